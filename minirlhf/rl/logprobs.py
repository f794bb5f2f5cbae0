"""Where response tokens meet the states that predict them: log-probabilities, entropy and KL under what was sampled.

`response_states` is the one place of the shift by one (states kept from the decode are before their tokens already).
Nothing of shape (B, T, V) is made: the LM head runs over chunks of the real response positions, and the softmax of each
chunk is in `generation.token_statistics`, for the reference over the policy's sampling set as well.

Shapes: B batch, P prompt, R response, T = P + R, C width, V vocabulary, N real response tokens of the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minirlhf.generation.sampling import restrict, unpack_set
from minirlhf.generation.token_statistics import LogprobsAndEntropy, compare, entropy, exact_kl, gather_logprobs
from minirlhf.models.decoder import Decoder
from minirlhf.models.heads import ActorCritic

LOGITS_PER_CHUNK = 2**25  # fp32 logits alive at once in the LM head, 128 MiB
LOGITS_IN_CACHE = 2**22  # the same on a CPU without a backward pass, where chunks that fit its cache are faster


@dataclass(frozen=True)
class TokenLogprobs:
    """What a model says of response tokens, each (B, R), fp32 (fp64 for a model in fp64), 0 at padding.

    logprobs, entropy: nats, of the distribution that was sampled from.
    values: of the state before each token; None without a value head.
    ref_logprobs, exact_kl: nats, KL(policy || reference) over the whole sampling set; None without a reference.
    """

    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None = None
    ref_logprobs: Tensor | None = None
    exact_kl: Tensor | None = None


def response_logprobs(
    policy: ActorCritic,
    tokens: Tensor,
    mask: Tensor | None,
    response_length: int,
    temperature: float = 1.0,
    sampling_sets: Tensor | None = None,
    reference: Decoder | None = None,
    states: Tensor | None = None,
) -> TokenLogprobs:
    """Log-probabilities of the response tokens, the last R = `response_length` columns, and values of their states.

    tokens: (B, T) int64, T > R. mask: (B, T), 1 at real tokens, or None for no padding; no padding stands between
        real tokens.
    temperature (`config.logprobs_divisor`), sampling_sets (B, R, ceil(V / 8)): how tokens were sampled, see `sampling`.
    reference: a second decoder to compare with; it gets no gradient.
    states: (B, R, C), the policy's hidden states before the response tokens, if `generate` has kept them.
    Raises ValueError if R leaves no token before the response.
    """
    R = response_length
    if not 1 <= R < tokens.size(1):
        raise ValueError(f"response_length must be in 1 to {tokens.size(1) - 1} for rows of {tokens.size(1)}, got {R}")
    # The places of the N real response tokens among all B * R; a GPU synchronises to find them.
    real = None if mask is None else mask[:, -R:].flatten().nonzero().squeeze(-1)
    states = response_states(policy, tokens, mask, R) if states is None else states
    hidden, picked, sets = (_real(x, real) for x in (states, tokens[:, -R:], sampling_sets))  # (N, C), (N,), (N, V / 8)
    ref_hidden = None
    if reference is not None:
        with torch.no_grad():
            ref_hidden = _real(response_states(reference, tokens, mask, R), real)

    # The LM head runs over chunks, so that few logits are alive at once; a gradient recomputes each chunk's logits.
    recorded = torch.is_grad_enabled()
    size = LOGITS_PER_CHUNK if recorded or hidden.device.type != "cpu" else LOGITS_IN_CACHE
    rows = max(1, size // policy.decoder.vocab_size)
    parts = []
    for start in range(0, max(len(picked), 1), rows):
        cut: Any = (None if x is None else x[start : start + rows] for x in (hidden, ref_hidden, picked, sets))
        arguments: Any = (policy.decoder, reference, *cut, temperature)
        recomputed = recorded and len(picked) > rows
        parts.append(checkpoint(_of_chunk, *arguments, use_reentrant=False) if recomputed else _of_chunk(*arguments))
    names = ("logprobs", "entropy", "ref_logprobs", "exact_kl")
    found = {name: torch.cat(column) for name, column in zip(names, zip(*parts, strict=True), strict=False)}
    if policy.value_head is not None:
        found["values"] = policy.value_head(hidden)
    return TokenLogprobs(**{name: _padded(x, real, (len(tokens), R)) for name, x in found.items()})


def response_states(model: ActorCritic | Decoder, tokens: Tensor, mask: Tensor | None, response_length: int) -> Tensor:
    """Hidden states (B, R, C) before each of the last R tokens: the state that predicts token t is at position t - 1.

    These are positions P-1 .. T-2. The last token of a row predicts nothing: it is not fed, or masked as padding.
    """
    context_mask = None if mask is None else mask[:, :-1] * mask[:, 1:]
    return model.hidden_states(tokens[:, :-1], context_mask)[:, -response_length:]


def _of_chunk(
    model: Decoder,
    reference: Decoder | None,
    hidden: Tensor,
    ref_hidden: Tensor | None,
    picked: Tensor,
    sets: Tensor | None,
    temperature: float,
) -> tuple[Tensor, ...]:
    """Log-probabilities and entropy (n,) of n tokens, and with a reference its log-probabilities and the exact KL."""
    keep = None if sets is None else unpack_set(sets, model.vocab_size)
    logits = model.lm_logits(hidden)  # (n, V)
    if reference is None or ref_hidden is None:  # the update
        return LogprobsAndEntropy.apply(logits, picked, temperature, keep)
    with torch.no_grad():
        ref_logits = reference.lm_logits(ref_hidden)
    if not torch.is_grad_enabled():  # the rollout
        return compare(logits, ref_logits, picked, temperature, keep)
    logits, ref_logits = (restrict(z, temperature, keep) for z in (logits, ref_logits))  # the loss with the exact KL
    of_tokens, of_reference = gather_logprobs(logits, picked), gather_logprobs(ref_logits, picked)
    return of_tokens, entropy(logits), of_reference, exact_kl(logits, ref_logits)


def _real(x: Tensor | None, real: Tensor | None) -> Any:
    """(B, R, ...) to (N, ...), the entries at these places; None: all B * R."""
    if x is None:
        return None
    x = x.flatten(0, 1)
    return x if real is None else x.index_select(0, real)


def _padded(x: Tensor, real: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """(N,) back to (B, R), 0 at padding."""
    return x.view(shape) if real is None else x.new_zeros(math.prod(shape)).index_copy(0, real, x).view(shape)
