"""Statistics over the real tokens of a batch.

Shapes: B sequences, R response tokens. A mask (B, R) is True (or 1) at response tokens and False at padding; values at
padding, NaN included, never reach a result. No function changes its arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor, per_row: bool = False) -> Tensor:
    """Sum over the unmasked entries of x (B, R), 0-d; or of each row, (B, 1)."""
    x = torch.where(mask.bool(), x, 0.0)
    return x.sum(-1, keepdim=True) if per_row else x.sum()


def masked_mean(x: Tensor, mask: Tensor, per_row: bool = False) -> Tensor:
    """Mean over the unmasked entries of x (B, R), 0-d; or of each row, (B, 1). 0 where there are none."""
    return masked_sum(x, mask, per_row) / masked_sum(mask, mask, per_row).clamp_min(1)


def masked_var(x: Tensor, mask: Tensor, ddof: int = 1, per_row: bool = False) -> Tensor:
    """Variance over the unmasked entries of x (B, R), 0-d; or of each row, (B, 1). Divides by their number - `ddof`."""
    x = torch.where(mask.bool(), x, 0.0)  # before any arithmetic: 0 times a NaN gradient is NaN
    squares = (x - masked_mean(x, mask, per_row)).square()
    return masked_sum(squares, mask, per_row) / (masked_sum(mask, mask, per_row) - ddof).clamp_min(1)


def whiten(
    x: Tensor, mask: Tensor, shift_mean: bool = True, ddof: int = 1, eps: float = 1e-8, per_row: bool = False
) -> Tensor:
    """(x - mean) / sqrt(var + eps) over all unmasked entries of x (B, R), or per row; 0 at padding.

    Without `shift_mean` the mean is added back afterwards. ddof: as in `masked_var`. Fewer than two unmasked entries
    have no variance and stay as they are.
    """
    x = torch.where(mask.bool(), x, 0.0)
    mean = masked_mean(x, mask, per_row)
    whitened = (x - mean) / (masked_var(x, mask, ddof, per_row) + eps).sqrt()
    whitened = whitened if shift_mean else whitened + mean
    return torch.where(mask.bool() & (masked_sum(mask, mask, per_row) >= 2), whitened, x)


def whitening_scale(x: Tensor, mask: Tensor, ddof: int = 1, eps: float = 1e-8, per_row: bool = False) -> Tensor:
    """The factor (B, R) by which `whiten` multiplies."""
    scale = (masked_var(x, mask, ddof, per_row) + eps).rsqrt()
    return torch.where(masked_sum(mask, mask, per_row) >= 2, scale, 1.0).expand_as(mask)


def last_token(mask: Tensor) -> Tensor:
    """Bool (B, R), True at the last unmasked position of every row that has one."""
    mask = mask.bool()
    after = mask.long().flip(-1).cumsum(-1).flip(-1)  # unmasked positions from here to the end
    return mask & (after == 1)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over unmasked tokens, 0-d; 0 where the returns do not vary."""
    variance = masked_var(returns, mask)
    rounding = (torch.finfo(returns.dtype).eps * 8 * torch.where(mask.bool(), returns, 0.0).abs().max()).square()
    return torch.where(variance > rounding, 1.0 - masked_var(returns - values, mask) / variance, 0.0)
