"""Training of a BERT classifier on labelled texts, which makes a sentiment reward, and its calibration.

Besides the labels, training can predict masked tokens of the same texts (the MLM objective of Devlin et al. 2018),
which teaches a small model from random weights the language before the labels alone could.

Left out: pairs of texts, class weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.common.validation import require, require_rates
from minirlhf.device.placement import resolve_device
from minirlhf.models.bert import BertClassifier
from minirlhf.supervised.loop import FitConfig, SupervisedTrainer
from minirlhf.text.batching import bucketed_batches, right_pad
from minirlhf.text.tokenizer import Tokenizer

LabelledText = tuple[str, Sequence[float]]
Encoded = tuple[list[list[int]], Tensor]  # token ids of each text, targets (B, L)


@dataclass(frozen=True)
class ClassifierTrainingConfig(FitConfig):
    """Settings of classifier training. Raises ValueError with the field, the value and what is allowed."""

    mask_probability: float = 0.15  # share of tokens replaced by [MASK] in training
    mlm_weight: float = 0.0  # weight of the masked-token loss beside the label loss

    def __post_init__(self) -> None:
        super().__post_init__()
        require_rates(self, "mask_probability")
        fine = self.mlm_weight == 0 or (0 < self.mlm_weight < float("inf") and self.mask_probability > 0)
        require(self, "mlm_weight", fine, "0, or positive together with mask_probability")


def train_classifier(
    model: BertClassifier,
    tokenizer: Tokenizer,
    examples: Sequence[LabelledText] | Callable[[int], Sequence[LabelledText]],
    config: ClassifierTrainingConfig | None = None,
    on_step: Callable[[Any, dict[str, float]], object] | None = None,
) -> None:
    """Train a classifier in place; it is left in eval mode.

    examples: (text, target probabilities (L,)) pairs; a hard label is a one-hot target, a teacher's opinion a soft
        one (distillation, Hinton et al. 2015). Or a function from the epoch number to such pairs, for augmentation.
    on_step: as in `SupervisedTrainer.train`; the statistics are `classifier/progress` and `classifier/loss`.
    The loss is cross_entropy(labels) + mlm_weight * cross_entropy(masked tokens), both means, in nats.
    Raises ValueError for no examples, targets of the wrong length, or a `max_length` beyond the model's positions.
    """
    config = config or ClassifierTrainingConfig()
    if config.max_length > model.config.max_position_embeddings:
        limit = model.config.max_position_embeddings
        raise ValueError(f"max_length={config.max_length} exceeds the model's {limit} positions")
    model.to(resolve_device(config.device))
    # No bar: epochs are drawn when they begin, so the number of steps is not known.
    _ClassifierTrainer(model, tokenizer, examples, config).train(on_step, progress=False)


class _ClassifierTrainer(SupervisedTrainer[Encoded]):
    kind = "classifier"
    model: BertClassifier
    config: ClassifierTrainingConfig

    def __init__(self, model, tokenizer, examples, config):
        self.tokenizer, self.examples = tokenizer, examples
        self.generator = torch.Generator().manual_seed(config.seed)
        super().__init__(model, config, self._draw(config))

    def _draw(self, config: ClassifierTrainingConfig) -> Iterator[list[Encoded]]:
        """The batches of each epoch, drawn when it begins."""
        labels = len(self.model.config.labels)
        for epoch in range(config.epochs):
            drawn = self.examples(epoch) if callable(self.examples) else self.examples
            if len(drawn) == 0:
                raise ValueError("examples is empty: there is nothing to train on")
            if any(len(target) != labels for _, target in drawn):
                raise ValueError(f"every target must have {labels} probabilities, one a label")
            sequences = self.tokenizer.encode_batch([text for text, _ in drawn], config.max_length)
            targets = torch.tensor([list(target) for _, target in drawn], dtype=torch.float32)  # (N, L)
            batches = bucketed_batches([len(s) for s in sequences], config.tokens_per_batch, self.generator)
            yield [([sequences[i] for i in batch], targets[batch]) for batch in batches]

    def loss(self, batch: Encoded) -> Tensor:
        tokenizer, weight = self.tokenizer, self.config.mlm_weight
        ids, mask = right_pad(batch[0], tokenizer.pad_id)
        masked = torch.rand(ids.shape, generator=self.generator) < self.config.mask_probability
        masked &= (mask == 1) & (ids != tokenizer.cls_id) & (ids != tokenizer.sep_id)
        inputs = ids.masked_fill(masked, tokenizer.mask_id).to(self.device)
        hidden = self.model.hidden_states(inputs, mask.to(self.device))
        loss = F.cross_entropy(self.model.classify(hidden).float(), batch[1].to(self.device))
        if weight and masked.any():
            logits = self.model.lm_logits(hidden[masked.to(self.device)]).float()  # (masked tokens, V)
            loss = loss + weight * F.cross_entropy(logits, ids[masked].to(self.device))
        return loss


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
