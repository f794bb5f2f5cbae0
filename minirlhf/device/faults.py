"""Errors that one process has and all raise, and what differs between processes, in words."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

SHOWN = 80  # characters of a value that differs


def of_all(error: Exception) -> Exception:
    """The error, marked as one that all processes raise."""
    error.of_all = True  # type: ignore[attr-defined]
    return error


def described(error: Exception) -> tuple[list[type], str, str]:
    """The types of an error that can be sent, the closest first, its own type's name, and what it says."""
    found = []
    for kind in type(error).__mro__:
        with contextlib.suppress(Exception):
            pickle.dumps(kind)  # not a class that a function made
            found += [kind] if issubclass(kind, Exception) else []
    return found, type(error).__name__, str(error)


def error_of(rank: int, kinds: Sequence[type], name: str, text: str) -> Exception:
    """An error of another process, of the first of these types that takes a text."""
    for kind in kinds:
        with contextlib.suppress(Exception):
            error: Exception = kind(f"rank {rank}: {text}" if kind.__name__ == name else f"rank {rank}: {name}: {text}")
            return error
    return RuntimeError(f"rank {rank}: {name}: {text}")


def plain(x: Any) -> Any:
    """x with lists in the place of its tensors, also of those in a list or tuple."""
    if isinstance(x, (list, tuple)):
        return [plain(item) for item in x]
    return x.tolist() if isinstance(x, Tensor) else x


def difference(values: Sequence[Any], rank: int) -> str:
    """In words where the value of a rank first differs from that of rank 0."""
    where, a, b = "", values[0], values[rank]
    if isinstance(a, dict) and isinstance(b, dict):
        name = next(name for name in {**a, **b} if repr(a.get(name)) != repr(b.get(name)))
        where, a, b = f"{name} is ", a.get(name), b.get(name)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        i = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if repr(x) != repr(y))
        where, a, b = f"{where}number {i} is ", a[i], b[i]
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        where, a, b = "their number is ", len(a), len(b)
    return f"{where}{a!r:.{SHOWN}} on rank 0 and {b!r:.{SHOWN}} on rank {rank}"


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Raise ConnectionError if an exchange of torch.distributed fails: another process ended."""
    try:
        yield
    except RuntimeError as error:
        raise of_all(ConnectionError("another process of this run ended, or cannot be reached")) from error
