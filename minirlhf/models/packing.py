"""The tokens of a batch that have to be computed: no padding, and no token twice.

Rows of a causal model that begin alike, say with the same prompt, share the states of their beginning. Layers that
work on single tokens get only the distinct tokens, side by side, and attention gets the batch back.

Shapes: B batch, T tokens, N distinct real tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WORTH = 0.9  # of a batch without padding: with more tokens than that left, to gather them costs more than it saves


class Packing:
    """The distinct real tokens of a batch side by side.

    kept: (N,) int64, their places among all B * T. source: (B * T,) int64, which of them stands at each place, N at
    padding. shape: (B, T). padded: whether there is padding.
    """

    def __init__(self, kept: Tensor, source: Tensor, shape: tuple[int, int], padded: bool):
        self.kept, self.source, self.shape, self.padded = kept, source, shape, padded

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, C) to the distinct tokens, (N, C)."""
        return x.flatten(0, 1).index_select(0, self.kept)

    def unpack(self, x: Tensor) -> Tensor:
        """(N, C) back to (B, T, C), 0 at padding: attention multiplies padding by 0, and a NaN would stay NaN."""
        x = F.pad(x, (0, 0, 0, 1)) if self.padded else x
        return x.index_select(0, self.source).unflatten(0, self.shape)

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor | None, share: bool = True) -> Packing | None:
        """The packing of a batch, or None if it has no padding and little to share.

        ids: (B, T) int64. mask: (B, T), 1 at real tokens; None: all are. share: whether rows that begin alike compute
            their beginning once; not if a cache or dropout makes them differ.
        Also None on a GPU (it would force a synchronisation).
        """
        alone = not share or len(ids) == 1
        if ids.device.type != "cpu" or ids.numel() == 0 or (mask is None and alone):
            return None
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        own = torch.arange(ids.numel()).view(ids.shape)
        first = own if alone else first_alike(ids, real)
        computed = real & (first == own)
        N, padded = int(computed.sum()), not bool(real.all())
        if N == 0 or (WORTH * ids.numel() < N and not padded):
            return None
        order = computed.flatten().cumsum(0) - 1  # of the computed ones
        source = torch.where(real, order[first], N)
        return cls(computed.flatten().nonzero().squeeze(-1), source.flatten(), (ids.size(0), ids.size(1)), padded)


def first_alike(ids: Tensor, real: Tensor) -> Tensor:
    """The place row * T + column, (B, T) int64, of the first token with the same value and past as each token.

    ids: (B, T) int64; real: bool (B, T), False at padding, which is the same whatever stands there.
    """
    B, T = ids.shape
    first = torch.arange(B * T).view(B, T)
    rows, group = torch.arange(B), torch.zeros(B, dtype=torch.int64)  # equal numbers: equal pasts so far
    tokens = torch.where(real, ids + 1, 0)
    for t in range(T):
        past_and_token = group * (tokens[:, t].max() + 1) + tokens[:, t]
        group = past_and_token.unique(return_inverse=True)[1]
        count = int(group.max()) + 1
        if count == B:  # from here on all differ
            break
        leader = rows.new_full((count,), B).scatter_reduce(0, group, rows, "amin")
        first[:, t] = leader[group] * T + t
    return first
