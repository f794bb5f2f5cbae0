"""What a GPU needs: transfers that do not wait, products in TF32, and clocks that wait for its queue."""

from __future__ import annotations

import contextlib
import time

import torch
from torch import Tensor

from minirlhf.device.cpu import matmul_precision


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on a device; x itself if it is there already.

    A host tensor goes to a GPU through pinned memory, so the copy is queued like any other work. PyTorch does not give
    the pinned memory to another tensor before the copy is done.
    """
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def tf32_matmul() -> contextlib.AbstractContextManager[None]:
    """A context in which a GPU computes fp32 matrix products in TF32: fp32's range, 10 bits of mantissa, fp32 sums."""
    return matmul_precision("high")


class PhaseClock:
    """Seconds between stops; a GPU finishes its queued work at each stop, so each phase is charged with its own."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}  # type: tuple[torch.device, dict[str, float]]
        self._last = self._now()

    def stop(self, phase: str) -> None:
        """Charge the time since the last stop to a phase."""
        now = self._now()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
