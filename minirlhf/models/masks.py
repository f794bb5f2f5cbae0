"""Positions of tokens, and which tokens each may attend to: after padding, after a cache, and in packed rows.

Shapes: B batch, T tokens of this call, S tokens in the cache and this call together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_positions(attention_mask: Tensor | None, past: int, total: int, device: torch.device) -> Tensor:
    """Positions (B, T) or (T,) of the new tokens: real tokens are numbered 0, 1, 2, ... in every row."""
    if attention_mask is None:
        return torch.arange(past, total, device=device)
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, past:]


def causal_mask(attention_mask: Tensor | None, past: int, new: int, device: torch.device) -> Tensor | None:
    """Bool (B or 1, 1, T, S), which keys each new token may attend to; None stands for all that are not after it."""
    if attention_mask is None and (past == 0 or new == 1):
        return None
    causal = torch.ones(new, past + new, dtype=torch.bool, device=device).tril(past)[None, None]  # (1, 1, T, S)
    if attention_mask is None:
        return causal
    # A padding token may attend to itself: a softmax over nothing would be NaN.
    itself = torch.ones_like(causal).triu(past)  # with `causal`: the diagonal
    return causal & (attention_mask.bool()[:, None, None, :] | itself)


def segment_positions(segments: Tensor) -> Tensor:
    """Positions (B, T) that begin at 0 in every segment of contiguous equal numbers in segments (B, T)."""
    places = torch.arange(segments.size(1), device=segments.device).expand_as(segments)
    begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    return places - torch.where(begins, places, 0).cummax(-1).values


def segment_mask(segments: Tensor) -> Tensor:
    """Bool (B, 1, T, T), causal and block-diagonal (Krell et al. 2021, "Efficient Sequence Packing")."""
    T = segments.size(1)
    causal = torch.ones(T, T, dtype=torch.bool, device=segments.device).tril()
    return (causal & (segments[:, :, None] == segments[:, None, :]))[:, None]
