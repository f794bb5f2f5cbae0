"""Ragged float64 batches with masks, for functions of (B, R) tensors."""

import numpy as np
import torch

DOUBLE = torch.float64
EXACT = dict(rtol=1e-10, atol=1e-12)
NAN = float("nan")


def batches():
    """Ragged float64 batches: lengths 1 to 40, one row, equal rows, one token in all."""
    rng = np.random.default_rng(0)
    shapes = [(1, 1), (1, 40), (2, 1), (4, 2), (8, 17), (5, 40), (3, 3)]
    for rows, width in shapes:
        lengths = rng.integers(1, width + 1, rows)
        lengths[0] = width
        if rows > 2:
            lengths[1] = 1  # an end of text at the first position
        mask = np.arange(width)[None] < lengths[:, None]
        a, b, c = (rng.normal(size=(rows, width)) * 2 for _ in range(3))
        if rows == 3:  # all rows equal
            a, b, c, mask = (np.repeat(x[:1], rows, 0) for x in (a, b, c, mask))
        yield mask, a, b, c, rng.normal(size=rows)


def tensors(*arrays):
    return [torch.tensor(a) for a in arrays]


def spoil(x, mask):
    """NaN, and infinities, at the padding."""
    junk = torch.full_like(x, NAN)
    junk[..., ::2] = torch.inf
    return torch.where(mask.bool(), x, junk)


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, torch.as_tensor(np.asarray(expected)), **(tolerance or EXACT))
