"""Which rows of a batch each of several processes computes."""

from __future__ import annotations

import torch
from torch import Tensor


class Shares:
    """The rows of one of several processes. rank: its number. size: how many there are, W."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size

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

    def deal_evenly(self, count: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Every W-th of `count` rows, int64, equally many on all processes, and factors (count, 1) of their weights.

        A process that would have a row less computes row 0 as well, whose factor is 0 there. device: of the factors.
        """
        rows = torch.arange(self.rank, -(-count // self.size) * self.size, self.size)
        factors = torch.ones(count, 1, device=device)
        if rows[-1] >= count:
            rows[-1], factors[0] = 0, 0.0
        return rows, factors
