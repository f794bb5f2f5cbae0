"""What every training loop needs: reduced precision, schedules, batches that fit, and the supervised loop itself."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from minirlhf.cpu import fast_matmul
from minirlhf.fit_state import FitState
from minirlhf.gpu import tf32_matmul
from minirlhf.validation import (
    require,
    require_non_negative,
    require_one_of,
    require_positive,
    require_positive_ints,
    require_unit_interval,
)

LARGE_MODEL = 2**25  # parameters
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
PRECISION_SETTINGS = ("auto", *PRECISIONS)  # `precision_choice` makes a precision of it
SIXTEEN_BITS = {"bf16": torch.bfloat16, "fp16": torch.float16}
SCHEDULES = ("constant", "linear", "cosine")
Batch = TypeVar("Batch")
Result = TypeVar("Result")


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of a name; "auto" is a GPU where there is one and the CPU elsewhere.

    Raises ValueError for an unknown name or a GPU that is not there.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda[:index]', got {device!r}") from error
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda[:index]', got {device!r}")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but this PyTorch sees no GPU; use 'cpu' or 'auto'")
    return resolved


class Precision:
    """Mixed precision over fp32 master weights (Micikevicius et al. 2018): autocast, and loss scaling for fp16.

    name: "fp32", which on a GPU is all of fp32 unless the user's own `torch.set_float32_matmul_precision` allows less;
        "tf32", products of a GPU rounded to 10 bits of mantissa; "bf16" or "fp16". Raises ValueError for another, or
        for one that the device does not have.
    model: the one that is run. On a CPU a large one gets `cpu.fast_matmul`, which keeps a kernel, 0.1 MB or so, for
        every shape that occurs: among small models that would be much.
    """

    def __init__(self, name: str, device: torch.device, model: nn.Module | None = None):
        if name not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {name!r}")
        if name == "tf32" and device.type != "cuda":
            raise ValueError(f"precision 'tf32' needs a GPU, but the device is {device}; use 'fp32' or 'bf16'")
        self.name = name
        self.device_type = device.type
        if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ValueError(f"precision is 'bf16', but {device} cannot compute in it; fp32 and fp16 it can")
        self._matmul: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        if name == "tf32":
            self._matmul = tf32_matmul
        elif device.type == "cpu" and model is not None and is_large(model):
            self._matmul = fast_matmul
        # fp16 has 5 exponent bits: small gradients vanish unless the loss is scaled up. bf16 has fp32's range.
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=name == "fp16")

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which forward passes run."""
        dtype = SIXTEEN_BITS.get(self.name)
        return self._matmul() if dtype is None else torch.autocast(self.device_type, dtype)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the (scaled) gradients of a loss; also within `autocast`, which a backward pass is none of."""
        with self._matmul(), torch.autocast(self.device_type, enabled=False):
            self.scaler.scale(loss).backward()

    def step(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], max_grad_norm: float, loss: Tensor
    ) -> Tensor:
        """Unscale, clip the global gradient norm, step, and clear the gradients.

        optimizer: a fused one clips and skips by itself, so that no device is waited for; any other does as well.
        loss: 0-d, of which these are the gradients. If it or a gradient is not finite the step is skipped: weights and
        optimizer state stay as they are. With fp16 that is also how a loss scale is found that does not overflow.
        Returns the gradient norm before clipping, 0-d; NaN or infinite for a step that was skipped.
        """
        self.scaler.unscale_(optimizer)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        norm = torch.where(torch.isfinite(loss.detach()), norm, torch.nan)
        divisor = ((norm + 1e-6) / max_grad_norm).clamp_min(1.0)
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            # What fused optimizers get from a GradScaler: they divide by the one, and do nothing if the other is 1.
            told: Any = optimizer
            told.grad_scale, told.found_inf = divisor.float(), (~torch.isfinite(norm)).float()
            optimizer.step()
            del told.grad_scale, told.found_inf
        elif torch.isfinite(norm):
            for gradient in gradients:
                gradient.div_(divisor)
            optimizer.step()
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm


def is_large(model: nn.Module) -> bool:
    """Whether a model has at least LARGE_MODEL parameters."""
    return sum(p.numel() for p in model.parameters()) >= LARGE_MODEL


def in_batches_that_fit(compute: Callable[[int], Result], size: int) -> tuple[Result, int]:
    """`compute(size)`, with half the size, and a warning, for as long as the GPU runs out of memory.

    compute: batch size -> result, the same for every size, from the start each time it is called.
    Returns the result and the size that fitted. Raises torch.cuda.OutOfMemoryError if a size of 1 does not.
    """
    while True:
        try:
            return compute(size), size
        except torch.cuda.OutOfMemoryError:
            if size == 1:
                raise
        # Here, and not in the except clause: there the exception still holds on to what was computed.
        torch.cuda.empty_cache()
        warnings.warn(f"out of memory with {size} sequences a forward pass: now {size // 2}", stacklevel=2)
        size //= 2


def lr_factor(schedule: str, progress: float, warmup: float = 0.0, floor: float = 0.0) -> float:
    """Factor on the peak learning rate at a progress in [0, 1]: linear warm-up, then constant, linear or cosine decay.

    warmup: the share of the progress spent warming up. floor: the factor at the end of the decay.
    """
    if progress < warmup:
        return progress / warmup
    done = min((progress - warmup) / max(1.0 - warmup, 1e-12), 1.0)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return floor + (1.0 - floor) * (1.0 - done)
    if schedule == "cosine":
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
    raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")


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


@contextlib.contextmanager
def seeded_dropout(seed: int, device: torch.device) -> Iterator[None]:
    """Within it dropout, which knows no generator but the global one, draws from a stream of this seed.

    The global random state is the caller's again afterwards.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        if device.type == "cuda":
            torch.cuda.set_rng_state(torch.Generator(device).manual_seed(seed).get_state(), device)
        yield


@contextlib.contextmanager
def undone_on_error(generators: Iterable[torch.Generator]) -> Iterator[None]:
    """Within it generators may be drawn from; if an error leaves it, they are as they were before."""
    states = [(generator, generator.get_state()) for generator in generators]
    try:
        yield
    except BaseException:
        for generator, state in states:
            generator.set_state(state)
        raise


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within it a model is in eval mode; afterwards in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
