"""From logits to a sampled token: temperature, top-k and top-p as pure functions over a batch.

Shapes: B rows, V vocabulary. A sampling set is the bool (B, V) of the tokens that may be drawn; packed into bits
(`pack_set`) it is small enough to keep for a whole rollout, so that scoring can use exactly the distribution that was
sampled from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minirlhf.validation import require, require_above, require_counts


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn. The defaults sample from the model's own distribution; top_k=1 is greedy decoding.

    Raises ValueError for a bad value.
    """

    temperature: float = 1.0  # > 0; logits are divided by it
    top_k: int = 0  # keep the k most probable tokens; 0: all
    top_p: float = 1.0  # in (0, 1]; keep the most probable tokens whose mass reaches p; 1: all

    def __post_init__(self) -> None:
        require_above(self, 0, "temperature")  # for greedy decoding: top_k=1
        require_counts(self, "top_k")
        require_above(self, 0, "top_p")
        require(self, "top_p", self.top_p <= 1, "in (0, 1]")

    @property
    def truncates(self) -> bool:
        """Whether some tokens can never be drawn."""
        return self.top_k > 0 or self.top_p < 1


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
    values, order = probs.sort(dim=-1, descending=True, stable=True)
    before = values.cumsum(-1) - values  # mass of the tokens ahead of each one
    keep = before < p
    keep[..., 0] = True
    return torch.zeros_like(keep).scatter_(-1, order, keep)


def sampling_set(logits: Tensor, config: SamplingConfig) -> Tensor | None:
    """Bool (B, V): the tokens that `config` allows after each row's logits; None if it allows all.

    Temperature comes first, then top-k, then top-p over what top-k left, as in transformers.
    """
    if not config.truncates:
        return None
    logits = full_precision(logits) / config.temperature
    keep = torch.ones_like(logits, dtype=torch.bool)
    if config.top_k > 0:
        keep = top_k_set(logits, config.top_k)
    if config.top_p < 1:
        keep = top_p_set(logits.masked_fill(~keep, -torch.inf).softmax(-1), config.top_p) & keep
    return keep


def full_precision(x: Tensor) -> Tensor:
    """x in fp32; in fp64 if it already is."""
    return x if x.dtype == torch.float64 else x.float()


def restrict(logits: Tensor, temperature: float = 1.0, keep: Tensor | None = None) -> Tensor:
    """Logits (..., V) of the distribution that is sampled from: divided by the temperature, -inf outside the set.

    In fp32 whatever the autocast type: log-probabilities in bf16 have three digits.
    """
    logits = full_precision(logits)
    logits = logits if temperature == 1.0 else logits / temperature
    return logits if keep is None else logits.masked_fill(~keep, -torch.inf)


def sample(
    logits: Tensor, config: SamplingConfig, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Draw one token a row.

    logits: (B, V). generator: on the same device; None: PyTorch's global one.
    Returns tokens (B,) int64, their log-probabilities (B,) in nats, fp32, under the distribution that was sampled
    from, and the sampling set, bool (B, V) or None.
    """
    keep = sampling_set(logits, config)
    logp = restrict(logits, config.temperature, keep).log_softmax(-1)
    tokens = torch.multinomial(logp.exp(), 1, generator=generator)
    return tokens.squeeze(-1), logp.gather(-1, tokens).squeeze(-1), keep


def sample_top_p(probs: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token a row from the nucleus: the smallest set of most probable tokens whose mass reaches p.

    probs: (B, V), rows sum to 1. p: in (0, 1]. Returns tokens (B,) int64.
    Raises ValueError for a p out of range. Source: Holtzman et al. 2020, "The Curious Case of Neural Text
    Degeneration".
    """
    if not 0 < p <= 1:
        raise ValueError(f"p must be in (0, 1], got {p}")
    kept = torch.where(top_p_set(probs, p), probs, 0.0)
    return torch.multinomial(kept, 1, generator=generator).squeeze(-1)


_BIT_VALUES = (1, 2, 4, 8, 16, 32, 64, 128)


def pack_set(keep: Tensor) -> Tensor:
    """Bool (..., V) to uint8 (..., ceil(V / 8)), lowest bit first."""
    bits = torch.nn.functional.pad(keep, (0, -keep.size(-1) % 8)).unflatten(-1, (-1, 8))
    return (bits * torch.tensor(_BIT_VALUES, dtype=torch.uint8, device=keep.device)).sum(-1, dtype=torch.uint8)


def unpack_set(packed: Tensor, vocab_size: int) -> Tensor:
    """The inverse of `pack_set`: uint8 (..., ceil(V / 8)) to bool (..., V)."""
    bits = packed.unsqueeze(-1) & torch.tensor(_BIT_VALUES, dtype=torch.uint8, device=packed.device)
    return bits.ne(0).flatten(-2)[..., :vocab_size]
