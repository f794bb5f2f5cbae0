"""Which rows each process computes."""

import pytest
import torch

from minirlhf.device.shares import Shares


@pytest.mark.parametrize(("count", "unit", "shares"), [
    (8, 1, [(0, 2), (2, 5), (5, 8)]), (8, 2, [(0, 2), (2, 4), (4, 8)]), (3, 1, [(0, 1), (1, 2), (2, 3)]),
    (2, 1, [(0, 2)] * 3), (4, 2, [(0, 4)] * 3),
])  # fmt: skip
def test_groups_stay_whole_and_too_few_are_computed_by_all(count, unit, shares):
    for rank, (start, stop) in enumerate(shares):
        assert Shares(rank, 3).share(count, unit) == slice(start, stop)


def test_every_row_is_dealt_once_and_a_process_without_one_has_a_row_of_no_weight():
    for count in range(1, 10):
        counted = []
        for rank in range(4):
            rows, factor = Shares(rank, 4).deal(count)
            assert len(rows) and (factor == 1.0 or rows.tolist() == [0])
            counted += rows.tolist() if factor else []
        assert sorted(counted) == [*range(count)]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_rows_are_dealt_evenly_and_each_weighs_something_on_one_process_only(size):
    for count in range(1, 10):
        total, counts = torch.zeros(count), set()
        for rank in range(size):
            rows, factors = Shares(rank, size).deal_evenly(count)
            assert factors.shape == (count, 1)
            total[rows] += factors[rows, 0]
            counts.add(len(rows))
        assert counts == {-(-count // size)} and torch.equal(total, torch.ones(count))
