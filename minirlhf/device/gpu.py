"""What a GPU needs besides: host tensors that it fetches by itself, and products in TF32."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on a device; if it is there already, x itself.

    A host tensor goes to a GPU through pinned memory, so that nobody waits: the copy is queued like any other work. The
    pinned memory is PyTorch's, which does not give it to another tensor before the copy is done.
    """
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


@contextlib.contextmanager
def tf32_matmul() -> Iterator[None]:
    """Within it fp32 matrix products of a GPU are computed in TF32: fp32's range, 10 bits of mantissa, fp32 sums.

    The setting is PyTorch's global one, which the threads of a backward pass see as well; afterwards it is as before.
    """
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # somebody sets the newer `fp32_precision`, with which PyTorch does not mix the older one
        matmul = torch.backends.cuda.matmul
        newer = matmul.fp32_precision
        try:
            matmul.fp32_precision = "tf32"
            yield
        finally:
            matmul.fp32_precision = newer
        return
    try:
        torch.set_float32_matmul_precision("high")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class PhaseClock:
    """Seconds between stops; a GPU finishes its queued work at each stop, so that a phase is charged with its own."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}  # type: tuple[torch.device, dict[str, float]]
        self._last = self._now()

    def stop(self, phase: str) -> None:
        now = self._now()
        self.seconds[phase] = now - self._last
        self._last = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
