"""Mixed precision: autocast over fp32 weights, loss scaling, and the optimizer step that skips what is not finite."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minirlhf.device.cpu import fastest_matmul, onednn_matmul
from minirlhf.device.gpu import tf32_matmul
from minirlhf.device.parts import full

LARGE_MODEL = 2**25  # parameters
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
PRECISION_SETTINGS = ("auto", *PRECISIONS)  # `precision_choice` makes a precision of it
SIXTEEN_BITS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Mixed precision over fp32 master weights (Micikevicius et al. 2018): autocast, and loss scaling for fp16.

    name: "fp32"; "tf32", products of a GPU rounded to 10 bits of mantissa; "bf16" or "fp16".
    model: on a CPU a large one gets the faster library for its largest matrices, whose name is `matmul`. (oneDNN keeps
        a kernel of about 0.1 MB for every shape that occurs: too much for a small model.)
    Raises ValueError for an unknown precision, or one that the device does not have.
    """

    def __init__(self, name: str, device: torch.device, model: nn.Module | None = None):
        if name not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {name!r}")
        if name == "tf32" and device.type != "cuda":
            raise ValueError(f"precision 'tf32' needs a GPU, but the device is {device}; use 'fp32' or 'bf16'")
        if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ValueError(f"precision is 'bf16', but {device} cannot compute in it; fp32 and fp16 it can")
        self.name, self.device_type = name, device.type
        self.matmul = "default"  # of `cpu.MATMULS`; a resumed run keeps the one it began with, for its rounding
        if device.type == "cpu" and model is not None and is_large(model):
            self.matmul = fastest_matmul(*_largest_matrix(model))
        # fp16 has 5 exponent bits: small gradients vanish unless the loss is scaled up. bf16 has fp32's range.
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=name == "fp16")

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which forward passes run."""
        dtype = SIXTEEN_BITS.get(self.name)
        return self._products() if dtype is None else torch.autocast(self.device_type, dtype)

    def _products(self) -> contextlib.AbstractContextManager[Any]:
        """The context of fp32 matrix products."""
        if self.name == "tf32":
            return tf32_matmul()
        return onednn_matmul() if self.matmul == "onednn" else contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Accumulate the (scaled) gradients of a loss; also inside `autocast`."""
        with self._products(), torch.autocast(self.device_type, enabled=False):
            self.scaler.scale(loss).backward()

    def step(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], max_grad_norm: float, loss: Tensor
    ) -> Tensor:
        """Unscale, clip the global gradient norm, step, and clear the gradients.

        optimizer: a fused one, which clips and skips by itself, so that no device is waited for.
        loss: 0-d, of which these are the gradients. If it or a gradient is not finite, weights and optimizer state
        stay as they are; with fp16 this also finds a loss scale that does not overflow.
        Returns the gradient norm before clipping, 0-d; NaN or infinite for a step that was skipped.
        """
        self.scaler.unscale_(optimizer)
        norm = full(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        norm = torch.where(torch.isfinite(loss.detach()), norm, torch.nan)
        # What fused optimizers get from a GradScaler: they divide by the one, and do nothing if the other is 1.
        told: Any = optimizer
        told.grad_scale = ((norm + 1e-6) / max_grad_norm).clamp_min(1.0).float()
        told.found_inf = (~torch.isfinite(norm)).float()
        optimizer.step()
        del told.grad_scale, told.found_inf
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm


def is_large(model: nn.Module) -> bool:
    """Whether a model has at least LARGE_MODEL parameters."""
    return sum(p.numel() for p in model.parameters()) >= LARGE_MODEL


def _largest_matrix(model: nn.Module) -> tuple[int, int]:
    """The shape of the matrices of a model that have most elements in all."""
    shapes: Counter[tuple[int, int]] = Counter()
    for p in model.parameters():
        if p.ndim == 2:
            shapes[p.size(0), p.size(1)] += p.numel()
    return shapes.most_common(1)[0][0]


def full_precision(x: Tensor) -> Tensor:
    """x in fp32; in fp64 if it already is."""
    return x if x.dtype == torch.float64 else x.float()
