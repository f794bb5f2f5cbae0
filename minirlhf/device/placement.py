"""Which device, and batches that fit into its memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch


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


class Attempt:
    """One attempt with batches of `size` rows, used in a `with`: out of memory ends the attempt and not the program."""

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
