"""What `precision="auto"` stands for: bf16 where it is faster and changes next to nothing, fp32 everywhere else.

Three things must hold for bf16: the model is large (a small one gains nothing), the device has instructions for it (an
emulation is slower than fp32), and the ratios of the model's probabilities in bf16 to those in fp32 stay far within
PPO's clip range. Weights with outliers, whose activations need more than bf16's 8 binary digits, fail the last.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minirlhf.device.cpu import onednn_has_bf16
from minirlhf.device.precision import LARGE_MODEL, PRECISION_SETTINGS, Precision, is_large
from minirlhf.device.random import eval_mode

ROUNDING_SHARE = 0.25  # of the clip range, for rounding on the average token; no token may take all of it


@dataclass(frozen=True)
class Rounding:
    """|ratio - 1| of rounded to exact probabilities of the same tokens; NaN or infinite if a log-probability is."""

    mean: float
    worst: float

    @classmethod
    def between(cls, logprobs: Tensor, exact: Tensor) -> Rounding:
        """Of log-probabilities in nats, both of the same shape."""
        error = (logprobs - exact).expm1().abs()
        return cls(error.mean().item(), error.max().item())

    def mean_fits(self, cliprange: float) -> bool:
        return self.mean <= ROUNDING_SHARE * cliprange

    def worst_fits(self, cliprange: float) -> bool:
        return self.worst <= cliprange

    def __str__(self) -> str:
        return f"|ratio - 1| against fp32 is {self.mean:.2g} on average and {self.worst:.2g} at worst"


@dataclass(frozen=True)
class PrecisionChoice:
    """A precision, and the reason for it; "" if it was asked for by its name."""

    name: str
    reason: str = ""

    def __str__(self) -> str:
        return f"precision auto: {self.name} ({self.reason})" if self.reason else f"precision: {self.name}"


def choose_precision(
    asked: str, model: nn.Module, probe: Callable[[], Tensor], cliprange: float = 0.2
) -> PrecisionChoice:
    """The precision that was asked for; for "auto", bf16 or fp32.

    model: on its device. probe: gives the same log-probabilities of it each time; it is called in fp32, then in bf16,
    in eval mode, and not at all if the model or the device settle the choice.
    Raises ValueError for an unknown precision.
    """
    if asked not in PRECISION_SETTINGS:
        raise ValueError(f"precision must be one of {', '.join(PRECISION_SETTINGS)}, got {asked!r}")
    if asked != "auto":
        return PrecisionChoice(asked)
    if not is_large(model):
        return PrecisionChoice("fp32", f"the model has fewer than {LARGE_MODEL / 1e6:.1f} million parameters")
    device = next(model.parameters()).device
    if not has_native_bf16(device):
        return PrecisionChoice("fp32", f"this {'GPU' if device.type == 'cuda' else 'CPU'} has no instructions for bf16")
    found = []
    for name in ("fp32", "bf16"):
        with torch.no_grad(), eval_mode(model), Precision(name, device, model).autocast():
            found.append(probe())
    rounding = Rounding.between(found[1], found[0])
    if rounding.mean_fits(cliprange) and rounding.worst_fits(cliprange):
        return PrecisionChoice("bf16", str(rounding))
    allowed = f"{ROUNDING_SHARE * cliprange:.2g} and {cliprange:.2g} are allowed"
    return PrecisionChoice("fp32", f"bf16 rounds too much: {rounding}, where {allowed}")


def has_native_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for matrix products in bf16, and this PyTorch uses them.

    A GPU from compute capability 8.0 (Ampere); a CPU that is known to have AVX512_BF16, AMX, or ARM's BF16.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if not onednn_has_bf16():
        return False
    if platform.machine().lower() in ("aarch64", "arm64"):
        return True
    known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # since PyTorch 2.6
    return any(bool(getattr(torch.cpu, name, bool)()) for name in known)
