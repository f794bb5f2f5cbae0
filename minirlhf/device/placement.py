"""Which device, and batches that fit into its memory."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator

import torch


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of a name; "auto" is a GPU where there is one and the CPU elsewhere.

    Raises ValueError for an unknown name or a GPU that is not there.
    """
    name, there = str(device), torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if there else "cpu")
    if not re.fullmatch(r"(cpu|cuda)(:[0-9]{1,2})?", name):
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda[:index]', got {device!r}")
    if name.startswith("cuda") and not there:
        raise ValueError(f"device is {device!r}, but this PyTorch sees no GPU; use 'cpu' or 'auto'")
    return torch.device(name)


class Attempt:
    """One attempt with batches of `size` rows: a `with` that out of memory ends, and not the program."""

    def __init__(self, size: int):
        self.size, self.fitted = size, False

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> bool:
        self.fitted = error is None
        return isinstance(error, torch.cuda.OutOfMemoryError) and self.size > 1


def sizes_that_fit(size: int) -> Iterator[Attempt]:
    """Attempts with `size` rows, then half as many, with a warning, until one does not run out of GPU memory.

        for attempt in sizes_that_fit(16):
            with attempt:
                result = compute(attempt.size)  # from the start each time

    torch.cuda.OutOfMemoryError leaves the `with` if a size of 1 does not fit.
    """
    while True:
        attempt = Attempt(size)
        yield attempt
        if attempt.fitted:
            return
        torch.cuda.empty_cache()  # outside of the `with`: its exception held on to what was computed
        warnings.warn(f"out of memory with {size} sequences a forward pass: now {size // 2}", stacklevel=3)
        size //= 2
