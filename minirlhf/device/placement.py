"""Which device, and batches that fit into its memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

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
