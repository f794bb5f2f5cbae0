"""Processes that train together, by torch.distributed; torchrun starts them. Alone nothing is started or exchanged.

    torchrun --nproc-per-node 8 examples/positive_reviews.py

Every process runs the same script on the same batches and computes its share of the rows. Experience is gathered, and
gradients are summed, so W processes compute what one computes, and whatever is random or decided is the same on all.

Before tensors are exchanged, `gather` exchanges an object from each process, or its error: an error of one becomes the
same error of all. Every process must therefore reach the same calls in the same order.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import datetime
import hashlib
import math
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
TIMEOUT = datetime.timedelta(days=7)  # of an exchange: a reward may be a person; torchrun notices a dead process
SHOWN = 80  # characters of a value that differs


def processes() -> Processes:
    """The processes that work together here, joined at the first call if torchrun (or the like) started several."""
    together = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if together and dist.is_available() and not dist.is_initialized():
        _join()
    return Processes()


class Processes:
    """The processes of a process group, as one of them sees them.

    rank: its number. size: how many there are, W. on: whether there is a process group; without, every method returns
    its argument as it is.
    """

    def __init__(self) -> None:
        self.on = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if self.on else (0, 1)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    def share(self, count: int, unit: int = 1) -> slice:
        """The rows of this process, of `count` in groups of `unit` that stay whole; all if a process would have none.

        Gather with the same count, and what every process has computed is taken from the first one.
        """
        groups = count // unit
        mine = self.part(groups) if groups >= self.size else slice(0, groups)
        return slice(mine.start * unit, mine.stop * unit)

    def part(self, count: int) -> slice:
        """The rows of this process, of `count`; perhaps none."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def deal(self, count: int) -> tuple[Tensor, float]:
        """Every W-th of `count` rows, int64, and 1.0, the factor of their weights; row 0 and 0.0 if there are too few.

        A process without a row computes one that does not count, so that all have the same gradients to sum.
        """
        rows = torch.arange(count)[self.rank :: self.size]
        return (rows, 1.0) if len(rows) else (torch.zeros(1, dtype=torch.int64), 0.0)

    def gather(self, what: str, x: T) -> list[T]:
        """The object of each process; `what` names it in errors. Raises the error of a process that failed instead."""
        return self._exchange(what, x) if self.on else [x]

    def broadcast(self, what: str, x: T) -> T:
        """The first process's object."""
        return self.gather(what, x if self.first else None)[0]  # type: ignore[return-value]

    def same(self, what: str, x: Any) -> None:
        """Raise ValueError, naming the first difference, unless all processes have an object that looks the same."""
        if not self.on:
            return
        x = _plain(x)
        digests = self.gather(what, hashlib.sha256(repr(x).encode("utf-8", "backslashreplace")).digest())
        rank = next((r for r, digest in enumerate(digests) if digest != digests[0]), 0)
        if rank:
            values = self.gather(what, x)
            raise _of_all(ValueError(f"{what} must be equal on all processes: {_difference(values, rank)}"))

    def gather_rows(self, count: int, *tensors: Tensor) -> list[Tensor]:
        """The rows of all processes, `count` in all, rank after rank, of each of these tensors, equally many."""
        if not self.on:
            return list(tensors)
        own = len(tensors[0])
        bytes_ = [x.contiguous().view(own, math.prod(x.shape[1:])).view(torch.uint8) for x in tensors]
        told = self.gather("rows", (own, [(str(x.dtype), tuple(x.shape[1:])) for x in tensors]))
        self._check_equal("shapes of rows", [kinds for _, kinds in told])
        counts, widths = [n for n, _ in told], [x.size(1) for x in bytes_]
        padded = torch.zeros(max(counts), sum(widths), dtype=torch.uint8, device=tensors[0].device)
        padded[:own] = torch.cat(bytes_, 1)
        parts = [torch.empty_like(padded) for _ in counts]
        with _connected():
            dist.all_gather(parts, padded)
        columns = torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])[:count].split(widths, 1)
        return [
            column.contiguous().view(x.dtype).view(count, *x.shape[1:])
            for column, x in zip(columns, tensors, strict=True)
        ]

    def gather_record(self, count: int, record: T) -> T:
        """A dataclass with `count` rows of all processes: its tensors (B, ...) and tuples joined, the rest as here."""
        if not self.on:
            return record
        fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}  # type: ignore[arg-type]
        tensors = {name: x for name, x in fields.items() if isinstance(x, Tensor)}
        tuples = self.gather("tuples", {name: x for name, x in fields.items() if isinstance(x, tuple)})
        joined: dict[str, Any] = dict(zip(tensors, self.gather_rows(count, *tensors.values()), strict=True))
        joined |= {name: tuple(item for part in tuples for item in part[name])[:count] for name in tuples[0]}
        return dataclasses.replace(record, **joined)  # type: ignore[type-var]

    def spread(self, what: str, function: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
        """`[function(item) for item in items]`, every item by one process."""
        with agreed(what):
            mine = [function(item) for item in items[self.rank :: self.size]]
        parts = self.gather(what, mine)
        return [parts[i % self.size][i // self.size] for i in range(len(items))]

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over all processes into each of these tensors, by one exchange."""
        if not self.on:
            return
        flat = torch.cat([x.flatten() for x in tensors])
        with _connected():
            dist.all_reduce(flat)
        for x, total in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
            x.copy_(total.view_as(x))

    def copy_(self, tensors: Sequence[Tensor]) -> None:
        """Put the first process's values into each of these tensors, of equal shapes on all.

        Raises ValueError for GPU tensors in a process group that the caller has made without NCCL.
        """
        if self.on and any(x.is_cuda for x in tensors):
            _require_nccl(dist.get_backend_config())
        for x in tensors if self.on else ():
            with _connected():
                dist.broadcast(x.detach(), 0)

    def _exchange(self, what: str, x: Any, error: tuple[list[type], str, str] | None = None) -> list[Any]:
        entries: list[Any] = [None] * self.size
        with _connected():
            dist.all_gather_object(entries, (what, x, error))
        for rank, (_, _, failed) in enumerate(entries):
            if failed is not None:
                raise _of_all(_error(rank, *failed))
        self._check_equal("what the processes do", [name for name, _, _ in entries])
        return [value for _, value, _ in entries]

    def _check_equal(self, what: str, values: Sequence[Any]) -> None:
        rank = next((r for r, value in enumerate(values) if value != values[0]), 0)
        if rank:
            raise _of_all(RuntimeError(f"{what} must be equal on all processes: {_difference(values, rank)}"))


@contextlib.contextmanager
def agreed(what: str) -> Iterator[None]:
    """An error that one process raises inside is raised by all at the end, "rank 1: ...", with its type if possible.

    Also a decorator. Only errors (Exception) are agreed on; a process that is interrupted ends, and the others notice.
    """
    group, error = processes(), None
    try:
        yield
    except Exception as own:
        if not group.on or getattr(own, "of_all", False):
            raise
        error = own
    if group.on:
        try:
            group._exchange(what, None, None if error is None else _described(error))
        except Exception as of_all:
            raise of_all from error


def restarted() -> bool:
    """Whether torchrun started these processes again after one of them died."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def tells(error: BaseException) -> bool:
    """Whether this process is the first to tell this error, so that one of W processes shows it."""
    if not _stores:
        return True
    words = str(error).encode("utf-8", "backslashreplace")
    try:
        return bool(_stores[0].add(f"told {hashlib.sha256(words).hexdigest()}", 1) == 1)
    except RuntimeError:  # the store ended with the process that held it
        return True


_stores: list[dist.Store] = []  # the one that the processes joined by


def _join() -> None:
    """Start the process group."""
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":  # torchrun keeps the store, and the addresses of dead processes
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    _stores[:] = [store]
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    sys.excepthook = _told_once


def _told_once(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    if tells(error):
        sys.__excepthook__(kind, error, where)


def _require_nccl(backends: str) -> None:
    """Raise ValueError unless GPU tensors are exchanged by NCCL. backends: as "cpu:gloo,cuda:nccl"."""
    if "cuda:nccl" not in backends.split(","):
        advice = "let minirlhf start the process group, or use init_process_group('cpu:gloo,cuda:nccl')"
        raise ValueError(f"the process group exchanges GPU tensors by {backends!r}, not by NCCL; {advice}")


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    """Raise ConnectionError if an exchange of torch.distributed fails: another process ended."""
    try:
        yield
    except RuntimeError as error:
        raise _of_all(ConnectionError("another process of this run ended, or cannot be reached")) from error


def _of_all(error: Exception) -> Exception:
    """The error, marked as one that all processes raise."""
    error.of_all = True  # type: ignore[attr-defined]
    return error


def _described(error: Exception) -> tuple[list[type], str, str]:
    """The types of an error that can be sent, the closest first, its own type's name, and what it says."""
    found = []
    for kind in type(error).__mro__:
        with contextlib.suppress(Exception):
            pickle.dumps(kind)  # not a class that a function made
            found += [kind] if issubclass(kind, Exception) else []
    return found, type(error).__name__, str(error)


def _error(rank: int, kinds: Sequence[type], name: str, text: str) -> Exception:
    """An error of another process, of the first of these types that takes a text."""
    for kind in kinds:
        with contextlib.suppress(Exception):
            error: Exception = kind(f"rank {rank}: {text}" if kind.__name__ == name else f"rank {rank}: {name}: {text}")
            return error
    return RuntimeError(f"rank {rank}: {name}: {text}")


def _plain(x: Any) -> Any:
    """x with lists in the place of its tensors, also of those in a list or tuple."""
    if isinstance(x, (list, tuple)):
        return [_plain(item) for item in x]
    return x.tolist() if isinstance(x, Tensor) else x


def _difference(values: Sequence[Any], rank: int) -> str:
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
