"""The reward model of RLHF: a decoder or BERT trunk with a scalar head, which is itself a reward function.

The score is a linear function of one state: a decoder's at the last real token (Ouyang et al. 2022), or BERT's at
[CLS]. Folders are those of `GPT2ForSequenceClassification`, `LlamaForSequenceClassification` and their like with one
label; the normalisation is a key of `config.json` that other tools ignore. Shapes: B texts, T tokens, C width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minirlhf.common.validation import is_finite
from minirlhf.device.gpu import to_device
from minirlhf.device.placement import resolve_device
from minirlhf.device.precision import full_precision
from minirlhf.device.random import eval_mode
from minirlhf.io.files import StrPath, naming, read_json, replaced_folder
from minirlhf.io.hub import locate
from minirlhf.io.model_card import ModelCard, Origin
from minirlhf.io.model_folder import CONFIG_FILE, cast, write_folder
from minirlhf.models.bert import BertClassifier
from minirlhf.models.decoder import Decoder
from minirlhf.models.layers import check_vocabulary, fill, global_rng_kept, shapes_only
from minirlhf.models.loading import DECODERS, decoder_class
from minirlhf.models.sharded import gathered
from minirlhf.text.batching import length_sorted_batches, right_pad
from minirlhf.text.tokenizer import Tokenizer

LABEL = "reward"  # the name of the only label, for other tools
NORMALISATION = "reward_normalisation"  # key of config.json


class DecoderScorer(nn.Module):
    """A decoder with a linear head on the state of each row's last real token: `model(ids, mask) -> (B, 1)`.

    decoder: the trunk. seed: of the generator that draws the head from N(0, 1 / (C + 1)) (Stiennon et al. 2020).
    """

    def __init__(self, decoder: Decoder, seed: int = 0):
        super().__init__()
        self.config = decoder.config
        self.origin = decoder.origin
        self.decoder = decoder
        with global_rng_kept():
            self.score = nn.Linear(decoder.width, 1, bias=False)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.score.weight, 0.0, (decoder.width + 1) ** -0.5, generator=generator)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Scores (B, 1).

        ids: (B, T) int64, padded on the right; attention_mask: (B, T), 1 at real tokens, None: no padding.
        Raises ValueError for texts longer than `n_positions`.
        """
        hidden = self.decoder.hidden_states(ids)  # right padding: causal attention never reads it
        if attention_mask is None:
            return self.score(hidden[:, -1])
        last = attention_mask.sum(-1) - 1  # (B,)
        return self.score(hidden[torch.arange(len(ids), device=ids.device), last])

    @classmethod
    def from_pretrained(cls, folder: StrPath) -> DecoderScorer:
        """Load a folder in the published layout, in fp32 and eval mode. Raises as `load_decoder`."""
        kind = decoder_class(folder)
        content, tensors = kind.read_published(folder)
        content["tie_word_embeddings"] = True  # there is no LM head to be untied
        named = {name if name.startswith("score.") else f"decoder.{name}": x for name, x in tensors.items()}
        with naming(folder), shapes_only():
            model = cls(kind(kind.read_config(content, len(tensors))))
        fill(model, named, folder)
        model.origin = Origin.of(folder, content)
        return model.eval()

    def published(self, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """`config.json` and tensors in the published layout, as of `Decoder.published`."""
        content = {**self.decoder.described("score", dtype), "id2label": {0: LABEL}, "label2id": {LABEL: 0}}
        tensors = {name.replace("decoder.", self.decoder.prefix, 1): x for name, x in self.state_dict().items()}
        return content, cast(tensors, dtype)


class RewardModel(nn.Module):
    """Scores whole texts, prompt and response: `reward(texts) -> (B,)`, fp32 on the CPU, higher is better.

    The rewards are `(scores(texts) - mean) / std`; `normalise` sets mean and std, which are 0 and 1 at first. Texts
    longer than the network's positions are cut at the end.

    network: scores token ids, a DecoderScorer or a BertClassifier with one label. batch_size: texts in a forward pass.
    Raises ValueError for a classifier of several labels, a vocabulary that does not fit, or a bad batch size.
    """

    def __init__(
        self,
        network: DecoderScorer | BertClassifier,
        tokenizer: Tokenizer,
        batch_size: int = 64,
        device: str | torch.device = "auto",
    ):
        super().__init__()
        if isinstance(network, BertClassifier) and len(network.config.labels) != 1:
            raise ValueError(f"a reward model has one label, this classifier has {network.config.labels}")
        check_vocabulary(network.config.vocab_size, len(tokenizer))
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.network = network
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.mean, self.std = 0.0, 1.0
        self.eval().to(resolve_device(device))

    @classmethod
    def from_trunk(cls, folder: StrPath, seed: int = 0, **options: Any) -> RewardModel:
        """A new scalar head, drawn with `seed`, on the decoder or BERT of a folder, whose own heads are dropped if any.

        options: of the constructor. Raises as `Decoder.from_trunk` and `BertClassifier.from_trunk`.
        """
        network: DecoderScorer | BertClassifier
        if _model_type(folder) == "bert":
            network = BertClassifier.from_trunk(folder, {0: LABEL}, seed)
        else:
            network = DecoderScorer(decoder_class(folder).from_trunk(folder), seed)
        return cls(network, Tokenizer.from_pretrained(folder), **options)

    @classmethod
    def from_pretrained(cls, folder: StrPath, **options: Any) -> RewardModel:
        """Load a reward model, saved by `save_pretrained` or by transformers, with its normalisation if it has one.

        options: of the constructor.
        Raises FileNotFoundError for a missing folder or file, ValueError for a damaged one, naming file and tensor.
        """
        kind = BertClassifier if _model_type(folder) == "bert" else DecoderScorer
        model = cls(kind.from_pretrained(folder), Tokenizer.from_pretrained(folder), **options)
        model.mean, model.std = _normalisation(locate(folder) / CONFIG_FILE)
        return model

    def save_pretrained(
        self, folder: StrPath, dtype: torch.dtype = torch.float32, summary: Mapping[str, Any] | None = None
    ) -> None:
        """Write weights, config, normalisation and tokenizer into a folder, all at one moment.

        transformers loads it as `AutoModelForSequenceClassification`, whose logit is the score before normalisation.
        Arguments and errors: see `Decoder.save_pretrained`.
        """
        config, tensors = self.network.published(dtype)
        config["pad_token_id"] = self.tokenizer.pad_id  # by which transformers finds the last token of a row
        config[NORMALISATION] = {"mean": self.mean, "std": self.std}
        with replaced_folder(folder) as staged:
            write_folder(staged, config, tensors, ModelCard("RewardModel", self.network.origin, summary))
            self.tokenizer.save_pretrained(staged, self.max_length)

    @property
    def max_length(self) -> int:
        """Number of tokens of the longest text, [CLS] and [SEP] included."""
        network = self.network
        return (
            network.decoder.n_positions
            if isinstance(network, DecoderScorer)
            else network.config.max_position_embeddings
        )

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Rewards (B,) of texts, in the order given: normalised scores, without a gradient."""
        return ((self.scores(texts).double() - self.mean) / self.std).float()

    def score(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Scores (B,) of token ids [CLS] ... [SEP] of any lengths, fp32 on the model's device, with a gradient."""
        ids, mask = right_pad(sequences, self.tokenizer.pad_id)
        device = next(self.parameters()).device
        padded = None if bool(mask.all()) else to_device(mask, device)
        return full_precision(self.network(to_device(ids, device), padded).squeeze(-1))

    @torch.no_grad()
    def scores(self, texts: Sequence[str]) -> Tensor:
        """Scores (B,) before the normalisation, fp32 on the CPU, computed in batches of similar length.

        The sigmoid of a difference is the probability that one answer is preferred to the other. Of a sharded model
        all processes must call it.
        """
        if isinstance(texts, str):
            raise ValueError("texts must be a list of texts, got a single one")
        sequences = self.tokenizer.encode_batch(texts, self.max_length)
        scores, whole = torch.empty(len(texts)), gathered(self)
        with eval_mode(whole):
            for batch in length_sorted_batches([len(s) for s in sequences], self.batch_size):
                scores[batch] = whole.score([sequences[i] for i in batch]).float().cpu()
        return scores

    def normalise(self, texts: Sequence[str]) -> None:
        """Set mean and std so that the rewards of these texts have mean 0 and standard deviation 1.

        texts: usually samples of the reference policy, which gives all reward models one scale (Ziegler et al. 2019,
            section 2).
        Raises ValueError for fewer than two texts, or scores that are all equal.
        """
        scores = self.scores(texts).double()
        std = scores.std(correction=0).item() if len(scores) else 0.0
        rounding = 8 * torch.finfo(torch.float32).eps * float(scores.abs().max()) if len(scores) else 0.0
        if not rounding < std < math.inf:
            raise ValueError(f"the scores of {len(scores)} texts have no spread to normalise by; give different texts")
        self.mean, self.std = scores.mean().item(), std


def _model_type(folder: StrPath) -> str:
    kind = read_json(locate(folder) / CONFIG_FILE).get("model_type")
    kinds = ("bert", *DECODERS)
    if kind is None:
        raise ValueError(f"{folder}: {CONFIG_FILE} lacks model_type, which says what the trunk is: {', '.join(kinds)}")
    if kind not in kinds:
        raise ValueError(f"{folder} holds a {kind!r} model; the trunk of a reward model is one of {', '.join(kinds)}")
    return kind


def _normalisation(path: Path) -> tuple[float, float]:
    """Mean and std in `config.json`; 0 and 1 if it has none."""
    content = read_json(path).get(NORMALISATION, {"mean": 0.0, "std": 1.0})
    values: list[Any] = [content.get(name) if isinstance(content, Mapping) else None for name in ("mean", "std")]
    if not (all(map(is_finite, values)) and values[1] > 0):
        raise ValueError(f"{path}: {NORMALISATION} must have a finite mean and a std above 0, got {content!r:.80}")
    return float(values[0]), float(values[1])
