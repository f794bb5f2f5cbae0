"""Which rows each process computes."""

import pytest

from minirlhf.device.shares import Shares


@pytest.mark.parametrize(("count", "unit", "shares"), [
    (8, 1, [(0, 2), (2, 5), (5, 8)]), (8, 2, [(0, 2), (2, 4), (4, 8)]), (3, 1, [(0, 1), (1, 2), (2, 3)]),
    (2, 1, [(0, 2)] * 3), (4, 2, [(0, 4)] * 3),
])  # fmt: skip
def test_groups_stay_whole_and_too_few_are_computed_by_all(count, unit, shares):
    for rank, (start, stop) in enumerate(shares):
        assert Shares(rank, 3).share(count, unit) == slice(start, stop)


@pytest.mark.parametrize("most", [None, 1, 2, 3, 20])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_row_is_dealt_once_in_equally_many_passes(size, most):
    """A process without rows for a pass has one of no weight."""
    for count in range(1, 14):
        counted, passes = [], set()
        for rank in range(size):
            dealt = Shares(rank, size).deal(count, most)
            passes.add(len(dealt))
            assert all(factor == 1.0 or (factor, rows.tolist()) == (0.0, [0]) for rows, factor in dealt)
            assert all(1 <= len(rows) <= (most or count) for rows, _ in dealt)
            counted.append([row for rows, factor in dealt if factor for row in rows.tolist()])
        each = -(-count // size)  # rows of the first process
        assert passes == {1 if most is None else -(-each // most)}
        assert [counted[i % size][i // size] for i in range(count)] == [*range(count)]
