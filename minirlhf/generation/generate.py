"""Batched sampling from a GPT-2 with a key/value cache.

Left out: beam search and repetition penalties; PPO needs samples whose probabilities are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minirlhf.device.gpu import to_device
from minirlhf.device.precision import full_precision
from minirlhf.generation.sampling import SamplingConfig, pack_set, sample
from minirlhf.generation.static_decode import GraphedDecoder, decode
from minirlhf.models.gpt2 import GPT2, KVCache
from minirlhf.text.batching import Ids, left_pad


@dataclass(frozen=True)
class Generation:
    """A batch of continuations: prompts padded on the left to P tokens, then R response columns, T = P + R.

    tokens: (B, T) int64. mask: (B, T) int64, 1 at real tokens. response_mask: (B, R) bool, True up to and including
    an end-of-sequence token. logprobs: (B, R) fp32, nats, of each response token under the distribution it was drawn
    from; 0 at padding. sampling_sets: (B, R, ceil(V / 8)) uint8, the packed sampling set of each response token, or
    None if nothing was truncated or the sets were not asked for. states: (B, R, C), the model's hidden state before
    each response token, anything at padding; None if they were not asked for.
    """

    tokens: Tensor
    mask: Tensor
    response_mask: Tensor
    logprobs: Tensor
    sampling_sets: Tensor | None
    states: Tensor | None = None

    @property
    def responses(self) -> list[Tensor]:
        """The response tokens of every row, 1-D on the CPU, without padding."""
        columns = self.tokens[:, -self.response_mask.size(1) :].cpu()  # in one go
        return [row[kept] for row, kept in zip(columns, self.response_mask.cpu(), strict=True)]


@torch.no_grad()
def generate(
    model: GPT2,
    prompts: Sequence[Ids],
    max_new_tokens: int,
    sampling: SamplingConfig | None = None,
    *,
    eos_token_id: int | None = None,
    pad_token_id: int = 0,
    generator: torch.Generator | None = None,
    keep_sampling_sets: bool = False,
    keep_states: bool = False,
    decoder: GraphedDecoder | None = None,
) -> Generation:
    """Continue ragged prompts in one batch.

    model: a GPT2, in eval mode (dropout would sample from another policy than the one that is scored).
    prompts: token ids of each prompt, 1-D, of any lengths of at least 1.
    max_new_tokens: R; without `eos_token_id` every response has exactly this length, as in the original recipe.
    eos_token_id: a row stops after this token and costs nothing from then on.
    generator: on the model's device, the source of all randomness; None: PyTorch's global one.
    keep_sampling_sets, keep_states: whether the result has them.
    decoder: makes the tokens after the first at fixed shapes, on a GPU by a CUDA graph; rows that ended then go on
        unseen (see `graphed_decode`). None: without.
    Raises ValueError for no prompts, an empty one, one that leaves no room in the model's context, or a model in
    training mode; FloatingPointError if logits have a NaN, or no finite maximum.
    """
    sampling = sampling or SamplingConfig()
    if model.training:
        raise ValueError("the model is in training mode, so dropout would change what is sampled; call model.eval()")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    device = model.wte.weight.device
    ids, prompt_mask = left_pad(prompts, pad_token_id)
    padded = not bool(prompt_mask.all())
    ids, prompt_mask = to_device(ids, device), to_device(prompt_mask, device)
    B, P = ids.shape
    if P + max_new_tokens > model.config.n_positions:
        raise ValueError(
            f"a prompt of {P} tokens leaves no room for {max_new_tokens} new ones in the model's context of "
            f"{model.config.n_positions}; shorten the prompt to {model.config.n_positions - max_new_tokens}"
        )
    tokens = torch.cat([ids, ids.new_full((B, max_new_tokens), pad_token_id)], 1)
    mask = torch.cat([prompt_mask, prompt_mask.new_zeros(B, max_new_tokens)], 1)
    logprobs = torch.zeros(B, max_new_tokens, device=device, dtype=full_precision(model.wte.weight).dtype)
    packed_width = -(-model.vocab_size // 8)
    keep_sets = keep_sampling_sets and sampling.truncates
    sets = tokens.new_zeros((B, max_new_tokens, packed_width), dtype=torch.uint8) if keep_sets else None

    columns = P + max_new_tokens - 1  # the last token is never fed back
    step = None if decoder is None else decoder.step_for(model, B, columns)
    cache = model.new_cache(B, columns if step is None else P)
    state, logits = _prefill(model, ids, prompt_mask if padded else None, cache)
    states = state.new_zeros(B, max_new_tokens, state.size(-1)) if keep_states else None
    if step is not None:
        step.load(cache, prompt_mask)
        decode(step, state, logits, tokens, mask, logprobs, sets, states, sampling, eos_token_id, generator)
        return _checked(Generation(tokens, mask, mask[:, P:].bool(), logprobs, sets, states))
    rows = torch.arange(B, device=device)  # the rows that are still running
    for t in range(max_new_tokens):
        new, logp, keep = sample(logits, sampling, generator)
        tokens[rows, P + t], mask[rows, P + t], logprobs[rows, t] = new, torch.ones_like(new), logp
        if sets is not None and keep is not None:
            sets[rows, t] = pack_set(keep)
        if states is not None:
            states[rows, t] = state
        if t + 1 == max_new_tokens:
            break
        if eos_token_id is not None:
            running = (new != eos_token_id).nonzero().squeeze(-1)
            if len(running) == 0:
                break
            if len(running) < len(rows):
                rows, new = rows[running], new[running]
                cache.take_rows(running)
        state = _last_state(model, new.unsqueeze(-1), mask[rows, : P + t + 1] if padded else None, cache)
        logits = model.lm_logits(state)
    return _checked(Generation(tokens, mask, mask[:, P:].bool(), logprobs, sets, states))


def _checked(sampled: Generation) -> Generation:
    """Raises FloatingPointError if logits were not finite: on a GPU what was sampled is looked at once, at the end."""
    if not sampled.logprobs.isfinite().all():
        raise FloatingPointError("cannot sample: the logits of a row have a NaN, or no finite maximum")
    return sampled


def _prefill(model: GPT2, ids: Tensor, mask: Tensor | None, cache: KVCache) -> tuple[Tensor, Tensor]:
    """Fill the cache with the prompts (B, P); return the states (B, C) and the logits (B, V) after them.

    Equal prompts are read once.
    """
    distinct, row = torch.unique(ids if mask is None else torch.cat([ids, mask], 1), dim=0, return_inverse=True)
    cache.take_rows(slice(len(distinct)))
    state = _last_state(model, distinct[:, : ids.size(1)], None if mask is None else distinct[:, ids.size(1) :], cache)
    cache.take_rows(row)
    return state[row], model.lm_logits(state)[row]


def _last_state(model: GPT2, new: Tensor, mask: Tensor | None, cache: KVCache) -> Tensor:
    """Feed new tokens (B, T) and return the hidden state (B, C) after the last one."""
    return model.hidden_states(new, mask, cache)[:, -1]
