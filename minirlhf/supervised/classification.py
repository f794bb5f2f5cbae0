"""Training and measuring a BERT classifier: what makes a sentiment reward out of labelled texts.

Besides the labels, training can predict masked tokens of the same texts (the MLM objective of Devlin et al. 2018),
which teaches a small model from random weights the language before the labels alone could.

Left out: pairs of texts, class weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.common.validation import require, require_rates
from minirlhf.device.placement import resolve_device
from minirlhf.models.bert import BertClassifier
from minirlhf.supervised.loop import FitConfig, fit
from minirlhf.text.batching import bucketed_batches, right_pad
from minirlhf.text.tokenizer import Tokenizer

LabelledText = tuple[str, Sequence[float]]


@dataclass(frozen=True)
class ClassifierTrainingConfig(FitConfig):
    """Settings of classifier training. Raises ValueError for a bad one."""

    max_length: int = 128  # tokens a text, [CLS] and [SEP] included; longer texts are cut
    tokens_per_batch: int = 4096  # padding included
    mask_probability: float = 0.15  # share of tokens replaced by [MASK] in training
    mlm_weight: float = 0.0  # weight of the masked-token loss beside the label loss

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "max_length", type(self.max_length) is int and self.max_length >= 2, "an integer of at least 2")
        fits = type(self.tokens_per_batch) is int and self.tokens_per_batch >= self.max_length
        require(self, "tokens_per_batch", fits, f"an integer of at least max_length={self.max_length}")
        require_rates(self, "mask_probability")
        fine = self.mlm_weight == 0 or (0 < self.mlm_weight < float("inf") and self.mask_probability > 0)
        require(self, "mlm_weight", fine, "0, or positive together with mask_probability")


def train_classifier(
    model: BertClassifier,
    tokenizer: Tokenizer,
    examples: Sequence[LabelledText] | Callable[[int], Sequence[LabelledText]],
    config: ClassifierTrainingConfig | None = None,
    on_step: Callable[[float, float], None] | None = None,
) -> None:
    """Train a classifier in place; it is left in eval mode.

    examples: (text, target probabilities (L,)) pairs; a hard label is a one-hot target, a teacher's opinion a soft
        one (distillation, Hinton et al. 2015). Or a function from the epoch number to such pairs, for augmentation.
    on_step: called after every optimizer step with the progress in (0, 1] and the loss.
    The loss is cross_entropy(labels) + mlm_weight * cross_entropy(masked tokens), both means, in nats.
    Raises ValueError for no examples, targets of the wrong length, or a `max_length` beyond the model's positions.
    """
    config = config or ClassifierTrainingConfig()
    if config.max_length > model.config.max_position_embeddings:
        limit = model.config.max_position_embeddings
        raise ValueError(f"max_length={config.max_length} exceeds the model's {limit} positions")
    device = resolve_device(config.device)
    model.to(device)
    generator = torch.Generator().manual_seed(config.seed)
    Encoded = tuple[list[list[int]], Tensor]

    def epoch_batches(epoch: int) -> list[Encoded]:
        drawn = examples(epoch) if callable(examples) else examples
        if len(drawn) == 0:
            raise ValueError("examples is empty: there is nothing to train on")
        if any(len(target) != len(model.config.labels) for _, target in drawn):
            raise ValueError(f"every target must have {len(model.config.labels)} probabilities, one a label")
        sequences = tokenizer.encode_batch([text for text, _ in drawn], config.max_length)
        targets = torch.tensor([list(target) for _, target in drawn], dtype=torch.float32)  # (N, L)
        batches = bucketed_batches([len(s) for s in sequences], config.tokens_per_batch, generator)
        return [([sequences[i] for i in batch], targets[batch]) for batch in batches]

    def loss_of(batch: Encoded) -> Tensor:
        ids, mask = right_pad(batch[0], tokenizer.pad_id)
        masked = torch.rand(ids.shape, generator=generator) < config.mask_probability
        masked &= (mask == 1) & (ids != tokenizer.cls_id) & (ids != tokenizer.sep_id)
        hidden = model.hidden_states(ids.masked_fill(masked, tokenizer.mask_id).to(device), mask.to(device))
        loss = F.cross_entropy(model.classify(hidden).float(), batch[1].to(device))
        if config.mlm_weight and masked.any():
            logits = model.lm_logits(hidden[masked.to(device)]).float()  # (masked tokens, V)
            loss = loss + config.mlm_weight * F.cross_entropy(logits, ids[masked].to(device))
        return loss

    fit(model, epoch_batches, loss_of, config, on_step)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature that minimises the cross-entropy of softmax(logits / T) (Guo et al. 2017).

    logits: (N, L); labels: (N,) int64, from texts that were not trained on.
    """
    log_t = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / log_t.exp(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return log_t.exp().item()


def reliability_table(probabilities: Tensor, labels: Tensor, bins: int = 10) -> list[dict[str, float]]:
    """Calibration of a binary classifier: for each bin of P(positive) its count, mean prediction and positive share.

    probabilities: (N,) P(label 1); labels: (N,) 0 or 1. Empty bins are left out.
    """
    index = (probabilities * bins).long().clamp_max(bins - 1)
    rows = []
    for b in range(bins):
        inside = index == b
        if inside.any():
            rows.append(
                {
                    "from": b / bins,
                    "to": (b + 1) / bins,
                    "count": int(inside.sum()),
                    "predicted": probabilities[inside].mean().item(),
                    "positive": labels[inside].float().mean().item(),
                }
            )
    return rows
