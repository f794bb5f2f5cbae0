"""Key/value caches of a decoder: one that grows token by token, and one of fixed shape for replayed decoding.

Shapes: B rows, P prompt, T new tokens, S tokens in the cache with the new ones, nh key/value heads, hs head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of the tokens seen so far, allocated once for `max_length` tokens a row.

    layers: one tensor (2, B, nh, max_length, hs) a layer, keys and values, of the type and device of `like`.
    length: how many tokens are filled.
    """

    def __init__(self, n_layer: int, batch_size: int, heads: int, max_length: int, head_size: int, like: Tensor):
        self.layers = [like.new_empty(2, batch_size, heads, max_length, head_size) for _ in range(n_layer)]
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store this call's keys and values (B, nh, T, hs) of a layer; return all so far (B, nh, S, hs)."""
        end = self.length + k.size(2)
        store = self.layers[layer]
        store[0, :, :, self.length : end] = k
        store[1, :, :, self.length : end] = v
        return store[0, :, :, :end], store[1, :, :, :end]

    def advance(self, tokens: int) -> None:
        """Count the tokens that every layer has stored."""
        self.length += tokens

    def take_rows(self, rows: Tensor | slice) -> None:
        """Keep these rows only (int64 indices, or a slice), so that finished sequences cost nothing."""
        self.layers = [store[:, rows] for store in self.layers]


class StaticKVCache(KVCache):
    """A KVCache of fixed shapes, filled one token a row at a time, so that a CUDA graph can replay it.

    column: (1,) int64, where the next token goes. positions: (B, 1), the position of each row's next token.
    real: (B, max_length) bool, False at the padding of a prompt.
    """

    def __init__(self, cache: KVCache, batch_size: int, max_length: int):
        _, _, heads, _, head_size = cache.layers[0].shape
        super().__init__(len(cache.layers), batch_size, heads, max_length, head_size, cache.layers[0])
        device = self.layers[0].device
        self.column = torch.zeros(1, dtype=torch.int64, device=device)
        self.positions = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        self.real = torch.ones(batch_size, max_length, dtype=torch.bool, device=device)
        self._columns = torch.arange(max_length, device=device)

    @property
    def allowed(self) -> Tensor:
        """Bool (B, 1, 1, max_length), the columns that each row's next token may attend to, its own included."""
        return (self.real & (self._columns <= self.column))[:, None, None]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, nh, 1, hs) of a layer; return those of all columns (B, nh, max_length, hs)."""
        keys, values = self.layers[layer].unbind()
        keys.index_copy_(2, self.column, k)
        values.index_copy_(2, self.column, v)
        return keys, values

    def advance(self, tokens: int) -> None:
        """Move on by one token a row."""
        self.column += tokens
        self.positions += tokens

    def load(self, cache: KVCache, prompt_mask: Tensor) -> None:
        """Begin with the prompts of another cache of as many rows. prompt_mask: (B, P), 1 at real tokens."""
        for mine, theirs in zip(self.layers, cache.layers, strict=True):
            mine[:, :, :, : cache.length] = theirs[:, :, :, : cache.length]
            # Hidden columns have weight 0, but 0 times a NaN left there would be NaN.
            mine[:, :, :, cache.length :] = 0
        self.column.fill_(cache.length)
        self.real.fill_(True)
        self.real[:, : cache.length] = prompt_mask.bool()
        self.positions.copy_(prompt_mask.sum(-1, keepdim=True))
