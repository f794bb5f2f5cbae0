"""Ragged sequences to rectangular batches and back: padding, and batches of similar length."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Ids = Sequence[int] | Tensor


def left_pad(sequences: Sequence[Ids], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Pad to the longest sequence on the left, as decoders need it (the last token of every row is a real one).

    Returns ids (B, T) int64 and mask (B, T) int64 with 1 at real tokens, on the CPU.
    Raises ValueError for no sequences or an empty one.
    """
    return _pad(sequences, pad_id, left=True)


def right_pad(sequences: Sequence[Ids], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Pad to the longest sequence on the right, as encoders and language-model training need it; see `left_pad`."""
    return _pad(sequences, pad_id, left=False)


def _pad(sequences: Sequence[Ids], pad_id: int, left: bool) -> tuple[Tensor, Tensor]:
    if len(sequences) == 0:
        raise ValueError("got no sequences to pad")
    lengths = [len(sequence) for sequence in sequences]
    if min(lengths) == 0:
        raise ValueError(f"sequence {lengths.index(0)} is empty")
    width = max(lengths)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        where = slice(width - length, width) if left else slice(length)
        ids[row, where] = torch.as_tensor(sequence, dtype=torch.int64)
        mask[row, where] = 1
    return ids, mask


def cat_padded(parts: Sequence[Tensor], left: bool = False) -> Tensor:
    """Tensors (B_i, T_i, ...) one after the other, padded with 0 to the longest T on the right, or on the left."""
    width = max(x.size(1) for x in parts)
    missing = [(width - x.size(1)) for x in parts]
    sides = [(0, 0) * (x.ndim - 2) + ((n, 0) if left else (0, n)) for x, n in zip(parts, missing, strict=True)]
    return torch.cat([F.pad(x, side) for x, side in zip(parts, sides, strict=True)])


def length_sorted_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first (an out-of-memory error shows at once)."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def bucketed_batches(
    lengths: Sequence[int], max_tokens: int, generator: torch.Generator, counts: Sequence[int] | None = None
) -> list[list[int]]:
    """Random batches of sequences of similar length, each of at most `max_tokens` tokens with its padding.

    counts: number of sequences of that length that an index stands for, kept in one batch; None: one each.
    The indices are shuffled, sorted by length within pools of about 50 batches, cut into batches, and the batches
    shuffled. Every index occurs once. An index of more than `max_tokens` tokens makes a batch of its own.
    """
    counts = [1] * len(lengths) if counts is None else counts
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    mean = max(1.0, sum(n * count for n, count in zip(lengths, counts, strict=True)) / max(1, len(lengths)))
    pool = max(1, int(50 * max_tokens / mean))
    batches: list[list[int]] = []
    for start in range(0, len(shuffled), pool):
        batch: list[int] = []
        rows = 0
        for i in sorted(shuffled[start : start + pool], key=lambda i: lengths[i]):  # ascending: i is the longest so far
            if batch and lengths[i] * (rows + counts[i]) > max_tokens:
                batches.append(batch)
                batch, rows = [], 0
            batch.append(i)
            rows += counts[i]
        batches.append(batch)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def packed_rows(lengths: Sequence[int], width: int, generator: torch.Generator) -> list[list[int]]:
    """Random rows of sequences that stand one after the other in at most `width` tokens, with little room left.

    The indices are shuffled, and within pools of about 50 rows each goes, longest first, to the fullest row that has
    room for it (best-fit decreasing); the rows are shuffled. Every index occurs once.
    Raises ValueError for a sequence of more than `width` tokens.
    """
    if len(lengths) > 0 and max(lengths) > width:
        raise ValueError(f"a sequence of {max(lengths)} tokens does not fit into rows of {width}")
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    mean = max(1.0, sum(lengths) / max(1, len(lengths)))
    pool = max(1, int(50 * width / mean))
    rows: list[list[int]] = []
    for start in range(0, len(shuffled), pool):
        begun: list[list[int]] = []
        room: list[int] = []
        for i in sorted(shuffled[start : start + pool], key=lambda i: -lengths[i]):
            fitting = [n for n, free in enumerate(room) if free >= lengths[i]]
            if not fitting:
                begun.append([])
                room.append(width)
            n = min(fitting, key=room.__getitem__, default=len(room) - 1)
            begun[n].append(i)
            room[n] -= lengths[i]
        rows += begun
    return [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]


def check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless ids is a 1-D integer tensor of at least one id below `vocab_size`."""
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool or len(ids) == 0:
        raise ValueError(f"{name} must be 1-D with at least one token id, got {ids.dtype} of shape {tuple(ids.shape)}")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"{name} has token ids outside [0, {vocab_size}): {ids.min()} to {ids.max()}")


def checked_ids(name: str, ids: Ids, vocab_size: int) -> Ids:
    """What `check_ids` accepts as a tensor or becomes one. Raises as it does, and for anything that is no numbers."""
    try:
        check_ids(name, torch.as_tensor(ids), vocab_size)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{name} must be token ids, got {ids!r:.60} of type {type(ids).__name__}") from error
    return ids


def checked_pairs(
    queries: Sequence[Ids], responses: Sequence[Ids], vocab_size: int, n_positions: int, group_size: int = 1
) -> tuple[list[Ids], list[Ids]]:
    """Queries and responses, each 1-D, also where it is a batch of one, (1, T), as other tokenizers return it.

    group_size: rows side by side that share their query.
    Raises ValueError for more of one than of the other, bad ids, a pair without room in `n_positions`, or rows of a
    group that do not share their query; warns if each response begins with its query, as `generate` of transformers and
    TRL return it.
    """
    if len(queries) != len(responses):
        raise ValueError(f"got {len(queries)} queries but {len(responses)} responses")
    columns: list[list[Ids]] = []
    for name, sequences in (("query", queries), ("response", responses)):
        columns.append([x[0] if isinstance(x, Tensor) and x.ndim == 2 and len(x) == 1 else x for x in sequences])
        for i, ids in enumerate(columns[-1]):
            checked_ids(f"{name} {i}", ids, vocab_size)
    if len(queries) % group_size:
        raise ValueError(f"{len(queries)} responses cannot be cut into groups of group_size={group_size}")
    for i, query in enumerate(columns[0]):
        if not torch.equal(torch.as_tensor(query), torch.as_tensor(columns[0][i - i % group_size])):
            raise ValueError(f"query {i} is not that of its group: with group_size={group_size} rows share theirs")
    repeats = [torch.equal(torch.as_tensor(r)[: len(q)], torch.as_tensor(q)) for q, r in zip(*columns, strict=True)]
    if len(repeats) > 1 and all(repeats) and min(map(len, columns[0])) > 1:
        told = "each response begins with its query: responses are the new tokens alone, response[len(query):]"
        warnings.warn(told, stacklevel=5)
    longest = max((len(q) + len(r) for q, r in zip(*columns, strict=True)), default=0)
    if longest - 1 > n_positions:  # the last token is not fed
        more = f"{longest} tokens, more than the model's {n_positions} positions"
        raise ValueError(f"the longest query with its response has {more}")
    return columns[0], columns[1]
