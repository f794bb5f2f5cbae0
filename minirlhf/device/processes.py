"""Processes that train together, by torch.distributed; torchrun starts them. Alone nothing is started or exchanged.

    torchrun --nproc-per-node 8 examples/positive_reviews.py

Every process runs the same script on the same batches and computes its share of the rows. Experience is gathered, and
gradients are summed, so W processes compute what one computes, and whatever is random or decided is the same on all.

Before tensors are exchanged, `gather` exchanges an object from each process, or its error: an error of one becomes the
same error of all. Every process must therefore reach the same calls in the same order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from minirlhf.device.faults import connected, described, difference, error_of, of_all, plain
from minirlhf.device.launch import join, require_nccl, started_together
from minirlhf.device.parts import is_part
from minirlhf.device.shares import Shares

T = TypeVar("T")


def processes() -> Processes:
    """The processes that work together here, joined at the first call if torchrun (or the like) started several."""
    if started_together() and dist.is_available() and not dist.is_initialized():
        join()
    return Processes()


class Processes(Shares):
    """The processes of a process group, as one of them sees them.

    on: whether there is a process group; without, every method returns its argument as it is.
    """

    def __init__(self) -> None:
        self.on = dist.is_available() and dist.is_initialized()
        super().__init__(*((dist.get_rank(), dist.get_world_size()) if self.on else (0, 1)))

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

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
        x = plain(x)
        digests = self.gather(what, hashlib.sha256(repr(x).encode("utf-8", "backslashreplace")).digest())
        rank = next((r for r, digest in enumerate(digests) if digest != digests[0]), 0)
        if rank:
            values = self.gather(what, x)
            raise of_all(ValueError(f"{what} must be equal on all processes: {difference(values, rank)}"))

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
        with connected():
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
        """Put the sum over all processes into each of these tensors, by one exchange; parts are summed already."""
        tensors = [x for x in tensors if not is_part(x)]
        if not self.on:
            return
        flat = torch.cat([x.flatten() for x in tensors])
        with connected():
            dist.all_reduce(flat)
        for x, total in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
            x.copy_(total.view_as(x))

    def copy_(self, tensors: Sequence[Tensor]) -> None:
        """Put the first process's values into each of these tensors, of equal shapes on all.

        Raises ValueError for GPU tensors in a process group that the caller has made without NCCL.
        """
        if self.on and any(x.is_cuda for x in tensors):
            require_nccl(dist.get_backend_config())
        for x in tensors if self.on else ():
            with connected():
                dist.broadcast(x.detach(), 0)

    def _exchange(self, what: str, x: Any, error: tuple[list[type], str, str] | None = None) -> list[Any]:
        entries: list[Any] = [None] * self.size
        with connected():
            dist.all_gather_object(entries, (what, x, error))
        for rank, (_, _, failed) in enumerate(entries):
            if failed is not None:
                raise of_all(error_of(rank, *failed))
        self._check_equal("what the processes do", [name for name, _, _ in entries])
        return [value for _, value, _ in entries]

    def _check_equal(self, what: str, values: Sequence[Any]) -> None:
        rank = next((r for r, value in enumerate(values) if value != values[0]), 0)
        if rank:
            raise of_all(RuntimeError(f"{what} must be equal on all processes: {difference(values, rank)}"))


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
            group._exchange(what, None, None if error is None else described(error))
        except Exception as theirs:
            raise theirs from error
