"""Which device, and batches that fit into its memory."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator

import torch


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of a name; "auto" is a GPU where there is one and the CPU elsewhere.

    Of several processes that torchrun started on this machine each takes the GPU of its own number.
    Raises ValueError for an unknown name, a GPU that is not there, or fewer GPUs than processes.
    """
    name, there = str(device), torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if there else "cpu"
    if not re.fullmatch(r"(cpu|cuda)(:[0-9]{1,2})?", name):
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda[:index]', got {device!r}")
    if name.startswith("cuda") and not there:
        raise ValueError(f"device is {device!r}, but this PyTorch sees no GPU; use 'cpu' or 'auto'")
    return torch.device(name) if name == "cpu" else _own_gpu(name)


def _own_gpu(name: str) -> torch.device:
    """The GPU of a name; of several processes on this machine, that of this one, which becomes the current device."""
    count, own = (int(os.environ.get(variable, default)) for variable, default in (("LOCAL_WORLD_SIZE", "1"),
                                                                                    ("LOCAL_RANK", "0")))  # fmt: skip
    if count == 1:
        return torch.device(name)
    if name != "cuda":
        raise ValueError(
            f"device is {name!r}, but {count} processes run on this machine: with 'cuda' each takes its own"
        )
    if count > (there := torch.cuda.device_count()):
        raise ValueError(f"{count} processes on this machine have {there} GPUs: start {there}, or use device 'cpu'")
    torch.cuda.set_device(own)
    return torch.device(name, own)


class Attempt:
    """One attempt with batches of `size` rows: a `with` that out of memory ends, and not the program."""

    def __init__(self, size: int, last: bool = False):
        self.size, self.last, self.fitted = size, last or size == 1, False

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> bool:
        self.fitted = error is None
        return isinstance(error, torch.cuda.OutOfMemoryError) and not self.last


def sizes_that_fit(size: int, once: bool = False) -> Iterator[Attempt]:
    """Attempts with `size` rows, then half as many, with a warning, until one does not run out of GPU memory.

        for attempt in sizes_that_fit(16):
            with attempt:
                result = compute(attempt.size)  # from the start each time

    torch.cuda.OutOfMemoryError leaves the `with` if a size of 1 does not fit. once: if the first size does not.
    """
    while True:
        attempt = Attempt(size, once)
        yield attempt
        if attempt.fitted:
            return
        torch.cuda.empty_cache()  # outside of the `with`: its exception held on to what was computed
        warnings.warn(f"out of memory with {size} sequences a forward pass: now {size // 2}", stacklevel=3)
        size //= 2
