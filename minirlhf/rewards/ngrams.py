"""A sentiment scorer without a transformer: log-odds that are linear in the character n-grams of a text.

A second scorer, fitted on other texts and with other features, makes other mistakes than the reward: if the reward
rises and this score does not, the reward was hacked. `weights/train/train_ngram_scorer.py` fits it by logistic
regression on n-grams weighted by naive Bayes (Wang & Manning 2012).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from minirlhf.io.files import StrPath, atomic_write, naming, replaced_folder
from minirlhf.io.hub import locate
from minirlhf.io.model_folder import check_published, check_tensors, read_folder, write_folder

MODEL_TYPE = "minirlhf-ngrams"
NGRAMS_FILE = "ngrams.txt"  # one a line; the i-th has the i-th weight


class NGramScorer:
    """A reward, P(positive) from the known character n-grams G of a text (each counts once).

    log-odds = bias + sum_{g in G} w_g / sqrt(|G|), for the text in lower case without white space.

    weights: n-gram -> w_g. bias: the log-odds of a text with no known n-gram.
    Raises ValueError for no n-grams, an n-gram that is empty or holds white space or capitals (no text could have it),
    or a number that is not finite.
    """

    def __init__(self, weights: Mapping[str, float], bias: float):
        if not weights:
            raise ValueError("weights is empty: there are no n-grams to score by")
        for ngram, weight in weights.items():
            if not isinstance(ngram, str) or not ngram or _normalised(ngram) != ngram:
                raise ValueError(f"an n-gram must be a text in lower case without white space, got {ngram!r:.80}")
            if not math.isfinite(weight):
                raise ValueError(f"the weight of n-gram {ngram!r} must be a finite number, got {weight!r}")
        if not math.isfinite(bias):
            raise ValueError(f"bias must be a finite number, got {bias!r}")
        self.weights, self.bias = dict(weights), float(bias)
        self._orders = sorted({len(ngram) for ngram in self.weights})

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """P(positive) (B,) of each text, fp64. Raises ValueError for a single text."""
        if isinstance(texts, str):
            raise ValueError("texts must be a list of texts, got a single one")
        return torch.tensor([self.log_odds(text) for text in texts], dtype=torch.float64).sigmoid()

    def log_odds(self, text: str) -> float:
        """The log-odds of positive, in nats."""
        text = _normalised(text)
        known = {text[i : i + n] for n in self._orders for i in range(len(text) - n + 1)} & self.weights.keys()
        # Sorted, because the order of a set of texts differs between processes, and with it the last bits of the sum.
        return self.bias + sum(self.weights[ngram] for ngram in sorted(known)) / math.sqrt(max(1, len(known)))

    @classmethod
    def from_pretrained(cls, folder: StrPath) -> NGramScorer:
        """Load a folder that `save_pretrained` wrote.

        Raises FileNotFoundError for a missing folder or file, ValueError for a damaged one; both name it.
        """
        config, tensors = read_folder(folder)
        check_published({"model_type": "", **config}, folder, MODEL_TYPE, {"format": (1,)})
        path = locate(folder) / NGRAMS_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        with naming(path):
            ngrams = path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
            if len(set(ngrams)) < len(ngrams):
                raise ValueError("an n-gram occurs twice")
        check_tensors(tensors, {"weight": (len(ngrams),), "bias": (1,)}, folder)
        with naming(folder):
            return cls(dict(zip(ngrams, tensors["weight"].tolist(), strict=True)), tensors["bias"].item())

    def save_pretrained(self, folder: StrPath, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json, model.safetensors and ngrams.txt, all at one moment.

        dtype: of the stored weights. Raises OSError if writing fails, ValueError for a weight that `dtype` cannot hold.
        """
        tensors = {
            "weight": torch.tensor(list(self.weights.values()), dtype=torch.float64).to(dtype),
            "bias": torch.tensor([self.bias], dtype=torch.float64).to(dtype),
        }
        check_tensors(tensors, {"weight": (len(self.weights),), "bias": (1,)}, folder)
        with replaced_folder(folder) as staged:
            write_folder(staged, {"model_type": MODEL_TYPE, "format": 1}, tensors)
            atomic_write(staged / NGRAMS_FILE, "".join(f"{ngram}\n" for ngram in self.weights).encode("utf-8"))


def _normalised(text: str) -> str:
    return "".join(text.lower().split())
