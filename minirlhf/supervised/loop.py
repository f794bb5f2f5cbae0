"""The loop that supervised fine-tuning and reward models share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from minirlhf.common.validation import (
    require,
    require_non_negative,
    require_one_of,
    require_positive,
    require_positive_ints,
    require_unit_interval,
)
from minirlhf.device.precision import PRECISIONS, Precision
from minirlhf.device.random import seeded_dropout
from minirlhf.device.schedules import SCHEDULES, lr_factor
from minirlhf.supervised.fit_state import FitState

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class FitConfig:
    """Settings of the supervised loop. Raises ValueError for a bad one."""

    PRECISIONS: ClassVar[tuple[str, ...]] = PRECISIONS  # no "auto": a loss alone does not say what bf16 does to it

    epochs: int = 3
    lr: float = 5e-4  # peak learning rate
    schedule: str = "cosine"
    warmup: float = 0.05  # share of all steps
    lr_floor: float = 0.02  # factor on lr at the end
    weight_decay: float = 0.1  # on matrices only
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = 1.0
    precision: str = "fp32"
    device: str = "auto"
    seed: int = 0  # of shuffling, masking and dropout

    def __post_init__(self) -> None:
        require_positive_ints(self, "epochs")
        require_positive(self, "lr", "max_grad_norm")
        require_unit_interval(self, "warmup", "lr_floor")
        require_non_negative(self, "weight_decay")
        require(self, "betas", all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)")
        require(self, "seed", type(self.seed) is int, "an integer")
        require_one_of(self, "schedule", SCHEDULES)
        require_one_of(self, "precision", self.PRECISIONS)


def fit(
    model: nn.Module,
    epoch_batches: Callable[[int], Sequence[Batch]],
    loss_of: Callable[[Batch], Tensor],
    config: FitConfig,
    on_step: Callable[[float, float], None] | None = None,
    parts_of: Callable[[Batch], Sequence[tuple[Batch, float]]] = lambda batch: [(batch, 1.0)],
    state: FitState | None = None,
) -> None:
    """Minimise a loss over epochs of batches with AdamW, in training mode; the model is left in eval mode.

    epoch_batches: epoch number (0, 1, ...) -> its batches, shuffled by the caller.
    loss_of: batch -> loss, 0-d, run under autocast.
    on_step: called after every optimizer step with the progress in (0, 1] and the loss.
    parts_of: batch -> its parts with the share that the loss of each has in the loss of the whole. Their gradients are
        added up before the optimizer's step, so a batch needs the memory of one part.
    state: where to begin; kept up to date, so that `on_step` may save it.
    Raises FloatingPointError at a loss or gradient that is not finite, before it reaches the weights. (With fp16 a
    gradient that overflows is skipped, and the loss scale lowered.)
    """
    device = next(model.parameters()).device
    precision = Precision(config.precision, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=config.betas,
        fused=True,
    )
    model.train()
    try:
        with seeded_dropout(config.seed, device):
            state = FitState() if state is None else state
            state.begin(optimizer, precision.scaler, device)
            for epoch in range(state.epoch, config.epochs):
                batches = epoch_batches(epoch)
                for i in range(state.batch, len(batches)):
                    # The middle of the step: neither the first nor the last one has a learning rate of 0.
                    progress = (epoch + (i + 0.5) / len(batches)) / config.epochs
                    for group in optimizer.param_groups:
                        group["lr"] = config.lr * lr_factor(config.schedule, progress, config.warmup, config.lr_floor)
                    total = torch.zeros((), device=device)
                    for part, share in parts_of(batches[i]):
                        with precision.autocast():
                            loss = loss_of(part) * share
                        precision.backward(loss)
                        total = total + loss.detach()
                    if not torch.isfinite(total):
                        raise FloatingPointError(
                            f"the loss became {total.item()} in epoch {epoch}, batch {i}; lower the learning rate"
                        )
                    norm = precision.step(optimizer, parameters, config.max_grad_norm, total).item()
                    if not math.isfinite(norm) and config.precision != "fp16":
                        raise FloatingPointError(
                            f"the gradient became {norm} in epoch {epoch}, batch {i}; lower the learning rate"
                        )
                    state.advance(i + 1)
                    if on_step is not None:
                        on_step((epoch + (i + 1) / len(batches)) / config.epochs, total.item())
                state.epoch, state.batch = epoch + 1, 0
    finally:
        model.eval()
