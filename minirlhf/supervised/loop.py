"""The loop of supervised fine-tuning and reward models: AdamW over epochs of batches, saved between two steps."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from minirlhf.common.progress import AfterSteps, OnStep
from minirlhf.common.validation import (
    is_finite,
    require,
    require_non_negative,
    require_one_of,
    require_positive,
    require_positive_ints,
    require_unit_interval,
)
from minirlhf.device.placement import resolve_device
from minirlhf.device.precision import PRECISIONS, Precision
from minirlhf.device.processes import agreed, processes
from minirlhf.device.random import DropoutStream
from minirlhf.device.schedules import SCHEDULES, lr_factor
from minirlhf.io.model_card import Origin
from minirlhf.io.training_state import State, frozen, load_moments, moments, require_fp32
from minirlhf.models.sharded import exported, is_to_be_sharded, require_shardable, shard
from minirlhf.version import __version__

Batch = TypeVar("Batch", bound=Sequence[Any])
Stats = dict[str, float]


@dataclass(frozen=True)
class FitConfig:
    """Settings of supervised training. Raises ValueError with the field, the value and what is allowed."""

    PRECISIONS: ClassVar[tuple[str, ...]] = PRECISIONS  # without "auto", which needs to know the model's outputs

    epochs: int = 3  # passes over the data
    max_length: int = 128  # tokens a text, special tokens included; longer texts are cut at the end
    tokens_per_batch: int = 4096  # of one forward pass, padding included
    lr: float = 5e-4  # peak learning rate
    schedule: str = "cosine"  # of the learning rate: constant, linear or cosine
    warmup: float = 0.05  # share of all steps
    lr_floor: float = 0.02  # factor on lr at the end
    weight_decay: float = 0.1  # on matrices only
    betas: tuple[float, float] = (0.9, 0.98)  # of AdamW
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    precision: str = "fp32"  # of the forward passes
    device: str = "auto"  # auto, cpu or cuda[:index]
    sharding: Literal["full"] | None = None  # full: each of several processes holds a part of the model
    seed: int = 0  # of shuffling, masking and dropout
    save_freq: int = 100  # optimizer steps between two checkpoints of a run

    def __post_init__(self) -> None:
        require_positive_ints(self, "epochs", "save_freq")
        require(self, "max_length", type(self.max_length) is int and self.max_length >= 2, "an integer of at least 2")
        fits = type(self.tokens_per_batch) is int and self.tokens_per_batch >= self.max_length
        require(self, "tokens_per_batch", fits, f"an integer of at least max_length={self.max_length}")
        require_positive(self, "lr", "max_grad_norm")
        require_unit_interval(self, "warmup", "lr_floor")
        require_non_negative(self, "weight_decay")
        fits = isinstance(self.betas, tuple) and len(self.betas) == 2
        fits = fits and all(is_finite(beta) and 0 <= beta < 1 for beta in self.betas)
        require(self, "betas", fits, "two numbers in [0, 1)")
        require(self, "seed", type(self.seed) is int, "an integer")
        require_one_of(self, "schedule", SCHEDULES)
        require_one_of(self, "precision", self.PRECISIONS)
        require_shardable(self)


class SupervisedTrainer(Generic[Batch]):
    """Minimises a loss over epochs of batches; a subclass has `kind`, `loss` and `parts`.

    model: trained in place; dropout is on in training, unless `with_dropout` is False, and off afterwards. With
        `sharding` a subclass puts it where `sharded.initial_device` says, and each process takes its part of it here.
    epochs: the batches of each epoch, shuffled. They must depend on data and config only, so that a resumed run
        gets the same ones.
    data: every text or ranking as a string, to recognise them. origin: where the model came from.
    interrupted: True inside a step, where the state is inconsistent and must not be saved.
    Of several processes all get the weights of the first one and the batches, and each computes a share of the rows.
    """

    kind: ClassVar[str]
    with_dropout: ClassVar[bool] = True
    entry: ClassVar[str] = "hidden_states"  # the model's method that `loss` calls, see `sharded.shard`
    tokenizer: Any = None  # saved beside the model, unless the model saves it

    @agreed("the training")
    def __init__(
        self,
        model: nn.Module,
        config: FitConfig,
        epochs: Iterable[Sequence[Batch]],
        data: Sequence[str] = (),
        origin: Origin | None = None,
    ):
        self.model, self.config, self.epochs, self.origin = model, config, epochs, origin
        self.data, sharded = data_record(data), is_to_be_sharded(config)
        self.device = resolve_device(config.device) if sharded else next(model.parameters()).device
        self.precision = Precision(config.precision, self.device)
        self.processes = processes()
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        versions = {"minirlhf": __version__, "torch": torch.__version__, "device": self.device.type}
        settings = {**versions, **dataclasses.asdict(config), **self.data, **shapes}
        self.processes.same("versions, settings, data and shapes", settings)
        self.processes.copy_(list(model.parameters()))
        if sharded:
            shard(model, self.device, config.precision, self.entry)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
                {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=config.lr,
            betas=config.betas,
            fused=True,
        )
        self.dropout = DropoutStream(config.seed, self.device)
        self.steps_done = 0  # optimizer steps
        self.interrupted = False

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch, 0-d; computed under autocast."""
        raise NotImplementedError

    def parts(self, batch: Batch) -> Sequence[tuple[Batch, float]]:
        """A batch in parts, each with its share in the loss of the whole: a step needs the memory of one part.

        Of several processes each has other rows, and one without a row has any, with the share 0. The batch must be a
        sequence of which `loss` is a mean, or a subclass has parts of its own.
        """
        [(rows, factor)] = self.processes.deal(len(batch))
        mine: Any = [batch[i] for i in rows]
        return [(mine, factor * len(rows) / len(batch))]

    @property
    def steps_total(self) -> int:
        """Optimizer steps of the whole run."""
        return sum(map(len, self.epochs))

    def train(
        self, on_step: Callable[[Batch, Stats], object] | Sequence[OnStep] | None = None, progress: bool = True
    ) -> None:
        """Train to the end of the last epoch; the model is left in eval mode.

        on_step: called after every optimizer step with its batch and statistics: `KIND/loss`, before the step, and
            `KIND/progress`, the share of the run that is done; `Run.record` is one. If it raises, `train` may be called
            again, here or from a checkpoint. on_step, progress: see `AfterSteps`.
        Raises FloatingPointError at a loss or gradient that is not finite, before it reaches the weights (with fp16 a
        gradient that overflows is skipped, and the loss scale lowered); RuntimeError after an error within a step.
        """
        self._require_consistent()
        try:
            with AfterSteps(self, on_step, progress) as ends:
                for epoch, i, count, batch in self._remaining():
                    # At the middle of the step, so that neither the first nor the last has a learning rate of 0.
                    share = (epoch + (i + 0.5) / count) / self.config.epochs
                    loss = self._step(batch, share, f"epoch {epoch}, batch {i}")
                    done = (epoch + (i + 1) / count) / self.config.epochs
                    if ends(batch, {f"{self.kind}/progress": done, f"{self.kind}/loss": loss}):
                        break
        finally:
            self.model.eval()

    def _remaining(self) -> Iterator[tuple[int, int, int, Batch]]:
        """Epoch, number in the epoch, batches of the epoch, and batch, of all steps that are not done yet."""
        number = 0
        for epoch, batches in enumerate(self.epochs):
            for i, batch in enumerate(batches):
                number += 1
                if number > self.steps_done:
                    yield epoch, i, len(batches), batch

    def _step(self, batch: Batch, progress: float, where: str) -> float:
        """One optimizer step. Returns the loss before it."""
        c, self.interrupted = self.config, True
        self.model.train(self.with_dropout)
        for group in self.optimizer.param_groups:
            group["lr"] = c.lr * lr_factor(c.schedule, progress, c.warmup, c.lr_floor)
        total = torch.zeros((), device=self.device)
        with self.dropout.use(self.processes.rank, self.processes.size):
            for part, share in self.parts(batch):
                with self.precision.autocast():
                    loss = self.loss(part) * share
                self.precision.backward(loss)
                total = total + loss.detach()
        self.processes.sum_([*(p.grad for p in self.parameters if p.grad is not None), total])
        if not torch.isfinite(total):
            raise FloatingPointError(f"the loss became {total.item()} in {where}; lower the learning rate")
        norm = self.precision.step(self.optimizer, self.parameters, c.max_grad_norm, total).item()
        if not math.isfinite(norm) and c.precision != "fp16":
            raise FloatingPointError(f"the gradient became {norm} in {where}; lower the learning rate")
        self.steps_done += 1
        self.interrupted = False
        return total.item()

    def _require_consistent(self) -> None:
        if self.interrupted:
            raise RuntimeError(f"training stopped within step {self.steps_done + 1}; go back to its last checkpoint")

    def save_pretrained(self, folder: str | os.PathLike[str], summary: Mapping[str, Any] | None = None) -> None:
        """Write the model, adapters merged, and its tokenizer as a model folder, once for all processes.

        summary: of the training, for the model card. All processes must call it.
        """
        model: Any = exported(self.model)
        if self.processes.first:
            model.save_pretrained(folder, summary=summary)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)

    def state_dict(self) -> State:
        """Everything besides the weights that the next step depends on; of the data, the hash.

        Raises RuntimeError for a trainer that an error stopped within a step, ValueError for weights that are not fp32.
        """
        self._require_consistent()
        require_fp32(self.model)
        streams = {f"generator.{name}": state for name, state in self.dropout.states.items()}
        counters = {
            "steps": self.steps_done,
            "scaler": self.precision.scaler.state_dict(),
            "data": self.data,
            "frozen": frozen(self.model),
            "origin": None if self.origin is None else dataclasses.asdict(self.origin),
            "config": dataclasses.asdict(self.config),
        }
        return {"tensors": streams | moments(self.optimizer, self.model.named_parameters()), "counters": counters}

    def load_state_dict(self, state: State) -> None:
        """Go on where `state_dict` was called; on the CPU bit for bit. The constructor's model must have the weights.

        Raises ValueError for other data, another kind of device, or a state that does not fit; the trainer must not be
        used then.
        """
        tensors, c = state["tensors"], state["counters"]
        require_same_data(c["data"], self.data)
        streams = {name: tensors.get(f"generator.{name}") for name in self.dropout.states}
        for name, stream in streams.items():
            if stream is None or (stream.dtype, stream.shape) != (torch.uint8, self.dropout.states[name].shape):
                raise ValueError(f"generator.{name} is missing, or was saved on another kind of device")
            self.dropout.states[name] = stream
        load_moments(self.optimizer, self.model.named_parameters(), tensors)
        if self.precision.scaler.is_enabled():
            self.precision.scaler.load_state_dict(c["scaler"])
        self.steps_done = c["steps"]


def data_record(data: Sequence[str]) -> dict[str, Any]:
    """Hash and number of these items, to recognise them."""
    return {"sha256": hashlib.sha256("".join(f"{item}\n" for item in data).encode()).hexdigest(), "count": len(data)}


def require_same_data(began: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise ValueError unless the data given are those that the run began with, as `data_record` knows them."""
    if began != given:
        raise ValueError(
            f"the run began with other data: with {began['count']} texts or rankings, {given['count']} are given, and "
            "they are not the same tokens in the same order"
        )


def check_positions(longest: int, positions: int, max_length: int) -> None:
    """Raise ValueError if the longest text, cut to `max_length`, has more tokens than the model has positions."""
    if longest > positions:
        raise ValueError(
            f"a text has {longest} tokens within max_length={max_length}, more than the model's {positions} positions; "
            f"set max_length to at most {positions}"
        )
