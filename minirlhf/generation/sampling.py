"""From logits to a sampled token: temperature, top-k and top-p as pure functions over a batch.

Shapes: B rows, V vocabulary. A sampling set is the bool (B, V) of the tokens that may be drawn. Packed into bits
(`pack_set`) it is kept for a whole rollout, so that scoring can use exactly the distribution that was sampled from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.common.validation import plain_numbers, require, require_above, require_counts
from minirlhf.device.precision import full_precision


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn. The defaults sample from the model's own distribution; top_k=1 is greedy decoding.

    Raises ValueError for a bad value.
    """

    temperature: float = 1.0  # > 0; logits are divided by it
    top_k: int = 0  # keep the k most probable tokens; 0: all
    top_p: float = 1.0  # in (0, 1]; keep the most probable tokens whose mass reaches p; 1: all

    def __post_init__(self) -> None:
        plain_numbers(self)
        require(self, "temperature", self.temperature != 0, "above 0 (top_k=1 is greedy decoding)")
        require_above(self, 0, "temperature")
        require_counts(self, "top_k")
        require_above(self, 0, "top_p")
        require(self, "top_p", self.top_p <= 1, "in (0, 1]")

    @property
    def truncates(self) -> bool:
        """Whether some tokens can never be drawn."""
        return self.top_k > 0 or self.top_p < 1


def is_end(tokens: Tensor, eos_token_id: int | Sequence[int] | None) -> Tensor:
    """Bool, of the shape of tokens: which are the end of a text, one id or any of several; None: none is."""
    ids = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or []
    ended = torch.zeros_like(tokens, dtype=torch.bool)
    for i in ids:  # compared with numbers: a tensor of them would have to be copied to a GPU
        ended = ended | (tokens == i)
    return ended


def top_k_set(logits: Tensor, k: int) -> Tensor:
    """Bool (B, V): the k tokens with the highest logits; of equal ones the lower ids."""
    order = logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order, True)


def top_p_set(probs: Tensor, p: float) -> Tensor:
    """Bool (B, V): the smallest set of most probable tokens whose mass reaches p (Holtzman et al. 2020, eq. 2).

    The most probable token is always kept; of equally probable tokens the lower ids come first.
    """
    if p >= 1:
        return probs > 0  # a rounded running sum would lose the tail
    # On a GPU a sort is quick, and the histogram would force a synchronisation.
    return _top_p_by_histogram(probs, p) if probs.device.type == "cpu" else _top_p_by_sort(probs, p)


def _top_p_by_sort(probs: Tensor, p: float) -> Tensor:
    values, order = probs.sort(dim=-1, descending=True, stable=True)
    before = values.cumsum(-1) - values  # mass of the tokens ahead of each one
    keep = before < p
    keep[..., 0] = True
    return torch.zeros_like(keep).scatter_(-1, order, keep)


def _top_p_by_histogram(probs: Tensor, p: float) -> Tensor:
    """The same without a sort of the vocabulary: only the tokens of one bin, where the mass reaches p, are ordered.

    A float's upper 16 bits, read as an integer, grow with it: they are the bins, less than 1% wide. Tokens below
    (1 - p) / V have less than 1 - p of mass together, so they share the lowest bin.
    """
    lowest, highest = (
        int(torch.tensor(x, dtype=torch.float32).view(torch.int32)) >> 16 for x in ((1 - p) / probs.size(-1), 1.0)
    )
    bins = (probs.float().view(torch.int32) >> 16).clamp_(lowest, highest).sub_(lowest)
    mass = probs.new_zeros(len(probs), highest - lowest + 1).scatter_add_(-1, bins.long(), probs)
    reached = mass.flip(-1).cumsum(-1).flip(-1)  # by each bin and the likelier ones
    cut = ((reached >= p) & (reached > 0)).sum(-1, keepdim=True).sub_(1).clamp_min_(0)  # the bin in which p is reached
    before = reached.gather(-1, cut) - mass.gather(-1, cut)
    cut = cut.int()

    keep = bins > cut
    row, token = (bins == cut).nonzero(as_tuple=True)
    counts = row.bincount(minlength=len(probs))
    place = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
    values = probs.new_zeros(len(probs), max(1, int(counts.max()))).index_put_((row, place), probs[row, token])
    values, order = values.sort(dim=-1, descending=True, stable=True)
    inside = before + values.cumsum(-1) - values < p
    inside[:, 0] |= before[:, 0] <= 0  # the most probable token
    keep[row, token] = torch.zeros_like(inside).scatter_(-1, order, inside)[row, place]
    return keep


def truncate(logits: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor | None]:
    """Probabilities (B, V), 0 outside the sampling set but not renormalised, and that set; None: every token.

    Temperature comes first, then top-k, then top-p over what top-k left, as in transformers.
    """
    logits, keep = restrict(logits, config.temperature), None
    if config.top_k > 0:
        keep = top_k_set(logits, config.top_k)
        logits = logits.masked_fill(~keep, -torch.inf)
    probs = logits.softmax(-1)
    if config.top_p < 1:
        nucleus = top_p_set(probs, config.top_p)
        keep = nucleus if keep is None else nucleus & keep
        probs = torch.where(keep, probs, 0.0)
    return probs, keep


def restrict(logits: Tensor, temperature: float = 1.0, keep: Tensor | None = None) -> Tensor:
    """Logits (..., V) of the distribution that is sampled from: divided by the temperature, -inf outside the set.

    In fp32 whatever the autocast type: log-probabilities in bf16 have three digits.
    """
    logits = full_precision(logits)
    logits = logits if temperature == 1.0 else logits / temperature
    return logits if keep is None else logits.masked_fill(~keep, -torch.inf)


def sample(logits: Tensor, config: SamplingConfig, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Draw one token a row.

    logits: (B, V). uniforms: (B,) fp64 in [0, 1), the randomness of each row's draw.
    Returns tokens (B,) int64, their log-probabilities (B,) in nats, fp32, under the distribution that was sampled
    from, and the sampling set, bool (B, V) or None. Raises as `draw`.
    """
    probs, keep = truncate(logits, config)
    tokens, total = draw(probs, uniforms)
    share = probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) / total  # fp64
    return tokens, share.log().to(probs.dtype), keep


def draw(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw an index a row with a probability in proportion to its weight, by the inverse distribution function.

    weights: (B, V), not negative; one of 0 is never drawn. uniforms: (B,) fp64 in [0, 1). The function is inverted in
    two levels, so that the running sums, in fp64, are short: a block of about sqrt(V) weights, then a weight in it.
    Returns the indices (B,) int64, and the sum of each row's weights (B,) fp64.
    Raises FloatingPointError on the CPU if the sum of a row is 0, infinite or NaN; a GPU would need a synchronisation.
    """
    width = math.isqrt(weights.size(-1))
    blocks = F.pad(weights, (0, -weights.size(-1) % width)).unflatten(-1, (-1, width))  # (B, blocks, width)
    upto = blocks.sum(-1).double().cumsum(-1)  # (B, blocks)
    total = upto[:, -1:]
    if total.device.type == "cpu" and not (total.isfinite() & (total > 0)).all():
        raise FloatingPointError("cannot sample: the logits of a row have a NaN, or no finite maximum")
    target = uniforms.unsqueeze(-1) * total
    block, rest = _invert(upto, target)
    within = blocks[torch.arange(len(blocks), device=block.device), block.squeeze(-1)].double().cumsum(-1)
    place, _ = _invert(within, rest)
    return (block * width + place).squeeze(-1), total.squeeze(-1)


def _invert(upto: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The first place (B, 1) at which the running sum `upto` (B, N) is above the target (B, 1), and what is left."""
    target = torch.minimum(target, torch.nextafter(upto[:, -1:], torch.zeros_like(target)))  # rounded up to the end
    place = torch.searchsorted(upto, target, right=True).clamp_max(upto.size(-1) - 1)  # sums that are NaN: beyond
    before = F.pad(upto, (1, 0)).gather(-1, place)
    return place, target - before


def draw_uniforms(tokens: int, rows: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """The randomness of a whole batch, (R, B) fp64 in [0, 1): token t of row b is drawn with entry [t, b].

    A sample then depends neither on which other rows have ended nor on how the batch is decoded.
    """
    return torch.rand(tokens, rows, generator=generator, dtype=torch.float64, device=device)


def sample_top_p(probs: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Draw a token from the nucleus, `top_p_set`, of each row: probabilities (B, V) to (B,) int64, or (V,) to 0-d.

    Raises ValueError for a p outside (0, 1].
    """
    if not 0 < p <= 1:
        raise ValueError(f"p must be in (0, 1], got {p}")
    if probs.ndim == 1:
        return sample_top_p(probs[None], p, generator)[0]
    uniforms = draw_uniforms(1, len(probs), probs.device, generator)[0]
    return draw(torch.where(top_p_set(probs, p), probs, 0.0), uniforms)[0]


def pack_set(keep: Tensor) -> Tensor:
    """Bool (..., V) to uint8 (..., ceil(V / 8)), lowest bit first."""
    whole = F.pad(keep, (0, -keep.size(-1) % 8)).clone(memory_format=torch.contiguous_format)
    eight = whole.view(torch.int64)  # eight bools, a byte each, in one number
    # This product adds up, in its highest byte, byte i of the number shifted to bit i.
    return ((eight * 0x0102040810204080) >> 56).to(torch.uint8)


def unpack_set(packed: Tensor, vocab_size: int) -> Tensor:
    """The inverse of `pack_set`: uint8 (..., ceil(V / 8)) to bool (..., V)."""
    bits = packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    return bits.bitwise_and_(1).bool().flatten(-2)[..., :vocab_size]
