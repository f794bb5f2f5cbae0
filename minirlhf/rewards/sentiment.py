"""The sentiment reward: how good a BERT classifier finds a text."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minirlhf.device.gpu import to_device
from minirlhf.device.placement import resolve_device
from minirlhf.device.precision import Precision
from minirlhf.device.precision_choice import choose_precision
from minirlhf.device.random import eval_mode
from minirlhf.io.files import StrPath, naming
from minirlhf.models.bert import BertClassifier
from minirlhf.models.probes import classifier_probe
from minirlhf.rewards.labels import PositiveLabel, described, label_order, label_values
from minirlhf.text.batching import length_sorted_batches, right_pad
from minirlhf.text.tokenizer import Tokenizer, require_tokenizer

# Good, fair and bad texts by which a reward in the wrong order is noticed.
CHINESE_CANARIES = ("房间干净，服务很好，非常满意，推荐", "房间一般，服务一般", "房间很脏，服务太差，非常失望，差评")
ENGLISH_CANARIES = (
    "the room was clean and the staff were very friendly, we loved it, highly recommended",
    "an average hotel, neither good nor bad",
    "the room was dirty and the staff were very rude, we hated it, a terrible hotel",
)
CANARIES = (CHINESE_CANARIES[0], CHINESE_CANARIES[2])


class SentimentReward:
    """How good a text is under a sentiment classifier: `reward(texts) -> (B,)`, fp32 on the CPU, higher is better.

    The score is the sum of the labels' probabilities, each weighted by the number of its label: P(positive) for two
    labels, an expected value in [0, 1] for an ordered scale. Texts longer than the classifier's positions are cut at
    the end.

    positive_label: a label or several whose probabilities are summed, or a number for each label; None: the names of
        the labels say their order (see `label_values`).
    batch_size: texts in one forward pass.
    precision: of the forward passes (see `device.precision`), or "auto"; in fp32 scores do not depend on the machine.

    A classifier that was trained for several labels a text gives each a probability of its own; one that was trained
    by regression gives numbers, which count as they are and need a `positive_label` with a number for each.

    values: (L,) fp64, the number of each label. positive: index of the best label. meaning: the score as a formula.
    canaries: texts whose scores must fall in this order. untested: why there are none, "" if another language says it.
    Raises ValueError if the classifier has one label, the order of the labels cannot be told, or the vocabulary does
    not fit the model.
    """

    def __init__(
        self,
        model: BertClassifier,
        tokenizer: Tokenizer,
        positive_label: PositiveLabel | None = None,
        batch_size: int = 64,
        device: str | torch.device = "auto",
        precision: str = "fp32",
    ):
        if not isinstance(model, BertClassifier):
            advice = "SentimentReward.from_pretrained(folder) loads what other libraries saved"
            raise ValueError(f"model must be a BertClassifier, got a {type(model).__name__}: {advice}")
        require_tokenizer(tokenizer)
        model.fit_vocabulary(len(tokenizer))
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        labels = model.config.labels
        trained_as = model.origin.config.get("problem_type") if model.origin else None
        if len(labels) < 2:
            raise ValueError(
                f"a classifier with the only label {labels[0]!r} gives it to every text; a reward model of one score "
                "loads with RewardModel.from_pretrained"
            )
        if trained_as == "regression" and not isinstance(positive_label, Mapping):
            raise ValueError(
                f"the model was trained by regression: its outputs for {labels} are no probabilities; pass "
                "positive_label= with a number for each, by which they are weighted"
            )
        self._trained_as = trained_as
        if trained_as == "multi_label_classification" and positive_label is None and len(labels) > 2:
            raise ValueError(f"the model gives a text several of {labels}, which is no scale; pass positive_label=")
        values = label_values(labels, positive_label)
        self.values = torch.tensor(values, dtype=torch.float64)
        self.positive = values.index(max(values))
        self.meaning = described(labels, values, "output" if trained_as == "regression" else "P")
        self.canaries, self.untested = _canaries(tokenizer, labels, values)
        self.model = model.eval().to(resolve_device(device))
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.precision_choice = choose_precision(precision, model, classifier_probe(model))
        self.precision = Precision(self.precision_choice.name, next(model.parameters()).device, model)

    @classmethod
    def from_pretrained(cls, folder: StrPath, **options: Any) -> SentimentReward:
        """Load a classifier folder. Warns if plain sentences in its language, good ones and bad ones, are out of order,
        or could not be tried.

        options: of the constructor. Raises as `BertClassifier.from_pretrained` and the constructor.
        """
        model, tokenizer = BertClassifier.from_pretrained(folder), Tokenizer.from_pretrained(folder)
        with naming(folder):
            reward = cls(model, tokenizer, **options)
            scores = reward(reward.canaries).tolist()
        for (better, x), (worse, y) in itertools.pairwise(zip(reward.canaries, scores, strict=True)):
            if not x > y:  # also for NaN
                told = f"{folder} scores {better!r}, {x:.2f}, no higher than {worse!r}, {y:.2f}, by {reward.meaning}"
                warnings.warn(f"{told}: are its labels in the right order?", stacklevel=2)
                break
        if reward.untested:
            warnings.warn(f"{folder}: the order of its labels was not tested: {reward.untested}", stacklevel=2)
        return reward

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Scores (B,) of the texts, in the order given. An empty text is scored as [CLS] [SEP]."""
        scores = (self.probabilities(texts).double() * self.values).sum(-1)
        if self._trained_as not in ("multi_label_classification", "regression"):
            # Rounding of the softmax must not lead out of the range.
            scores = scores.clamp(self.values.min().item(), self.values.max().item())
        return scores.float()

    def probabilities(self, texts: Sequence[str]) -> Tensor:
        """Probabilities (B, L) of all labels, fp32 on the CPU, computed in batches of similar length.

        They sum to 1, unless the model was trained for several labels a text ("multi_label_classification"). Of one
        that was trained by regression these are its outputs.
        """
        if isinstance(texts, str):
            raise ValueError("texts must be a list of texts, got a single one")
        limit = self.model.config.max_position_embeddings
        with self.precision.autocast():
            logits = predict(self.model, self.tokenizer, texts, limit, self.batch_size)
        if self._trained_as == "regression":
            return logits
        return logits.sigmoid() if self._trained_as == "multi_label_classification" else logits.softmax(-1)


@torch.no_grad()
def predict(
    model: BertClassifier, tokenizer: Tokenizer, texts: Sequence[str], max_length: int, batch_size: int = 64
) -> Tensor:
    """Class logits (N, L) in fp32 on the CPU, in the order of the texts, computed in batches of similar length."""
    sequences = tokenizer.encode_batch(texts, max_length)
    device = next(model.parameters()).device
    logits = torch.empty(len(texts), len(model.config.labels))
    with eval_mode(model):
        for batch in length_sorted_batches([len(s) for s in sequences], batch_size):
            ids, mask = right_pad([sequences[i] for i in batch], tokenizer.pad_id)
            padded = None if bool(mask.all()) else to_device(mask, device)
            logits[batch] = model(to_device(ids, device), padded).float().cpu()
    return logits


def _canaries(tokenizer: Tokenizer, labels: Sequence[str], values: Sequence[float]) -> tuple[tuple[str, ...], str]:
    """Texts whose scores must fall in this order, () if the vocabulary is of neither Chinese nor English; and why not,
    if it has the letters of one of them.

    Also () if `values` go against the order of the labels' names: then the caller wants another score.
    """
    order = label_order(labels)
    if order is not None:
        in_order = [x for _, x in sorted(zip(order, values, strict=True))]
        if in_order != sorted(in_order):
            return (), ""
    words = [token for i, token in enumerate(tokenizer.vocab) if i not in tokenizer.special_ids]
    letters = [token for token in words if any(map(str.isalpha, token)) and not token.startswith("[unused")]
    chinese = sum(any("\u4e00" <= char <= "\u9fff" for char in token) for token in letters)
    english = sum(token.isascii() for token in letters)
    # BERT's vocabularies: Chinese 0.7 ideographs, English 0.95 ASCII, multilingual 0.1 and 0.75.
    if not (chinese > 0.3 * len(letters) or english > 0.9 * len(letters)):
        return (), ""
    texts = CHINESE_CANARIES if chinese > 0.3 * len(letters) else ENGLISH_CANARIES
    tokens = [tokenizer.vocab[i] for text in texts for i in tokenizer.encode(text)]
    if "[UNK]" in tokens:
        return (), ""
    if any(token.startswith("##") for token in tokens):  # perhaps a language that only shares its letters
        return (), "its vocabulary cuts the words of the test sentences into pieces"
    return (texts if len(set(values)) > 2 else (texts[0], texts[-1])), ""
