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

    def deal(self, count: int, most: int | None = None) -> list[tuple[Tensor, float]]:
        """Every W-th of `count` rows, int64, in passes of at most `most`, and 1.0, the factor of their weights.

        All processes have equally many passes, so that each has gradients to sum and, of a sharded model, parts to
        exchange: in the place of a pass that it has no rows for, a process computes row 0 with the factor 0.0.
        most: None: one pass.
        """
        most = most or count
        rows, passes = torch.arange(count)[self.rank :: self.size], -(-count // (self.size * most))
        dealt = [(part, 1.0) for part in rows.split(most) if len(part)]
        return dealt + [(torch.zeros(1, dtype=torch.int64), 0.0)] * (passes - len(dealt))
