"""Padding, and batches of similar length."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf.text.batching import bucketed_batches, left_pad, length_sorted_batches, packed_rows, right_pad

fixed = settings(max_examples=150, deadline=None, derandomize=True, database=None)
lengths_of = st.lists(st.integers(1, 40), max_size=60)


def test_padding_by_hand():
    ids, mask = left_pad([[1, 2, 3], [4]], pad_id=9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    ids, mask = right_pad([[1, 2, 3], [4]], pad_id=9)
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert ids.dtype == mask.dtype == torch.int64
    assert left_pad([[5], [6, 7]])[0].tolist() == [[0, 5], [6, 7]]


@pytest.mark.parametrize("pad", [left_pad, right_pad])
def test_padding_accepts_tensors_and_leaves_them_alone(pad):
    row = torch.tensor([3, 4], dtype=torch.int32)
    ids, _ = pad([row, torch.tensor([5, 6])], pad_id=1)
    ids += 100
    assert row.tolist() == [3, 4]


@fixed
@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=8), min_size=1, max_size=6))
def test_masked_rows_are_the_sequences(sequences):
    for pad, side in ((left_pad, -1), (right_pad, 0)):
        ids, mask = pad(sequences, pad_id=7)
        assert ids.shape == mask.shape == (len(sequences), max(map(len, sequences)))
        assert [row[kept].tolist() for row, kept in zip(ids, mask.bool(), strict=True)] == sequences
        assert (ids[mask == 0] == 7).all()
        assert (mask[:, side] == 1).all()


@pytest.mark.parametrize("pad", [left_pad, right_pad])
def test_nothing_to_pad_is_refused(pad):
    with pytest.raises(ValueError, match="no sequences"):
        pad([])
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        pad([[1], [], [2]])


@fixed
@given(lengths_of, st.integers(1, 9))
def test_length_sorted_batches_hold_each_index_once_longest_first(lengths, batch_size):
    batches = list(length_sorted_batches(lengths, batch_size))
    flat = [i for batch in batches for i in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[i] for i in flat] == sorted(lengths, reverse=True)
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert all(1 <= len(batch) <= batch_size for batch in batches)


@fixed
@given(lengths_of, st.integers(1, 100), st.integers(0, 3))
def test_bucketed_batches_hold_each_index_once_within_the_budget(lengths, max_tokens, seed):
    batches = bucketed_batches(lengths, max_tokens, torch.Generator().manual_seed(seed))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert batch
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= max_tokens


@fixed
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), max_size=40), st.integers(1, 200), st.integers(0, 3))
def test_bucketed_batches_of_groups_hold_each_group_once_within_the_budget(groups, max_tokens, seed):
    lengths, counts = [n for n, _ in groups], [count for _, count in groups]
    batches = bucketed_batches(lengths, max_tokens, torch.Generator().manual_seed(seed), counts)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * sum(counts[i] for i in batch) <= max_tokens
    ones = [1] * len(groups)
    drawn = [bucketed_batches(lengths, max_tokens, torch.Generator().manual_seed(seed), c) for c in (ones, None)]
    assert drawn[0] == drawn[1]


def test_bucketed_batches_waste_little_and_are_in_random_order():
    lengths = torch.randint(1, 100, (500,), generator=torch.Generator().manual_seed(0)).tolist()

    def draw(seed: int) -> list[list[int]]:
        return bucketed_batches(lengths, 1000, torch.Generator().manual_seed(seed))

    batches = draw(0)
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    assert padded < 1.15 * sum(lengths)  # batches in the given order would take about twice the sum
    assert len(batches) < 1.25 * sum(lengths) / 1000 + 1  # the budget is used
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)
    assert draw(0) == batches and draw(1) != batches
    assert {frozenset(batch) for batch in draw(1)} != {frozenset(batch) for batch in batches}  # not the same company


@fixed
@given(lengths_of, st.integers(40, 130), st.integers(0, 9))
def test_packed_rows_hold_each_index_once_within_their_width(lengths, width, seed):
    def packed(seed: int):
        return packed_rows(lengths, width, torch.Generator().manual_seed(seed))

    rows = packed(seed)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in row) for row in rows]
    assert all(row for row in rows) and all(n <= width for n in used)
    assert all(a + b > width for n, a in enumerate(used) for b in used[:n])  # or two rows would have been one
    assert packed(seed) == rows


def test_a_sequence_that_fits_no_row_is_refused():
    with pytest.raises(ValueError, match="21 tokens does not fit into rows of 20"):
        packed_rows([3, 21], 20, torch.Generator())
