"""Batched sampling from a decoder with a key/value cache.

Left out: beam search and repetition penalties, because PPO needs samples whose probabilities are known.

Shapes: B rows, P longest prompt, R new tokens, T = P + R, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minirlhf.device.gpu import to_device
from minirlhf.device.precision import full_precision
from minirlhf.generation.sampling import SamplingConfig, draw_uniforms, is_end, pack_set, sample
from minirlhf.generation.static_decode import GraphedDecoder
from minirlhf.models.cache import KVCache
from minirlhf.models.decoder import Decoder
from minirlhf.models.heads import ActorCritic, language_model
from minirlhf.text.batching import Ids, left_pad

CHECK_EVERY = 16  # tokens between two looks at whether all rows have ended: each look lets a GPU's queue run dry


@dataclass(frozen=True)
class Generation:
    """A batch of continuations: prompts padded on the left to P tokens, then R response columns.

    tokens: (B, T) int64. mask: (B, T) int64, 1 at real tokens. response_mask: (B, R) bool, True up to and including
    an end-of-sequence token. logprobs: (B, R) fp32, nats, of each response token under the distribution it was drawn
    from; 0 at padding. If asked for: sampling_sets, (B, R, ceil(V / 8)) uint8, packed, None also if nothing was
    truncated; states, (B, R, C), the hidden state before each response token, undefined at padding.
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
        columns = self.tokens[:, -self.response_mask.size(1) :].cpu()  # one transfer
        return [row[kept] for row, kept in zip(columns, self.response_mask.cpu(), strict=True)]


@torch.no_grad()
def generate(
    model: Decoder | ActorCritic,
    prompts: Sequence[Ids],
    max_new_tokens: int,
    sampling: SamplingConfig | None = None,
    *,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
    generator: torch.Generator | None = None,
    share: slice | None = None,
    keep_sampling_sets: bool = False,
    keep_states: bool = False,
    graphed: GraphedDecoder | None = None,
) -> Generation:
    """Continue ragged prompts in one batch.

    model: a decoder or an actor-critic in eval mode: dropout would sample from another policy than the scored one.
    prompts: token ids of each prompt, 1-D, of any lengths of at least 1.
    max_new_tokens: R; without `eos_token_id`, one or several after any of which a row stops, every response has exactly
        this length.
    generator: on the model's device; R * B uniform numbers are drawn from it at once. None: PyTorch's global one.
    share: of the prompts, those that are continued here, while padding and random numbers are those of all; None: all.
    keep_sampling_sets, keep_states: whether the result has them.
    graphed: decodes every token after the first at fixed shapes, on a GPU by a CUDA graph. None: plain decoding, in
        which rows that have ended cost nothing. Both give the same samples.
    Raises ValueError for no prompts, an empty one, one that leaves no room in the model's context, or a model in
    training mode; FloatingPointError if logits have a NaN, or no finite maximum.
    """
    model, sampling = language_model(model), sampling or SamplingConfig()
    if isinstance(prompts, str) or any(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("prompts must be token ids, got texts: give [tokenizer.encode_prompt(text) for text in texts]")
    if model.training:
        raise ValueError("the model is in training mode, so dropout would change what is sampled; call model.eval()")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    ids, prompt_mask = left_pad(prompts, pad_token_id)
    longest, padded = int(prompt_mask.sum(-1).max()), not bool(prompt_mask.all())
    if longest + max_new_tokens > model.n_positions:
        room = f"for {max_new_tokens} new ones in the model's context of {model.n_positions}"
        advice = f"shorten the prompt to {model.n_positions - max_new_tokens}"
        raise ValueError(f"a prompt of {longest} tokens leaves no room {room}; {advice}")
    ids, prompt_mask = (to_device(x[share or slice(None)], model.device) for x in (ids, prompt_mask))
    B, P = ids.shape
    uniforms = draw_uniforms(max_new_tokens, len(prompts), model.device, generator)[:, share or slice(None)]
    columns = P + max_new_tokens - 1  # the last token is never fed back
    step = None if graphed is None else graphed.step_for(model, B, columns)
    cache = model.new_cache(B, columns if step is None else P)
    state, logits = _prefill(model, ids, prompt_mask if padded else None, cache)
    if step is not None:
        step.cache.load(cache, prompt_mask)
    sets = model.vocab_size if keep_sampling_sets and sampling.truncates else 0
    sampled = _Samples(ids, prompt_mask, max_new_tokens, pad_token_id, state, sets, keep_states)

    rows = torch.arange(B, device=model.device)  # the rows that are still decoded
    running = torch.ones_like(rows, dtype=torch.bool)  # of these, the ones that have not ended
    for t in range(max_new_tokens):
        drawn = sample(logits, sampling, uniforms[t, rows])
        sampled.append(t, rows, drawn, state, None if eos_token_id is None else running)
        new = drawn[0]
        if t + 1 == max_new_tokens:
            break
        if eos_token_id is not None:
            running = running & ~is_end(new, eos_token_id)
            if (step is None or (t + 1) % CHECK_EVERY == 0) and not running.any():
                break
            if step is None and not running.all():
                left = running.nonzero().squeeze(-1)
                rows, new, running = rows[left], new[left], running[left]
                cache.take_rows(left)
        if step is not None:
            state, logits = step(new)
        else:
            mask = sampled.mask[rows, : P + t + 1] if padded else None
            state = model.hidden_states(new.unsqueeze(-1), mask, cache)[:, -1]
            logits = model.lm_logits(state)
    return sampled.finished()


class _Samples:
    """The Generation of a batch while it is decoded. ids, mask: (B, P). V: 0 to keep no sampling sets."""

    def __init__(self, ids: Tensor, mask: Tensor, R: int, pad_id: int, state: Tensor, V: int, keep_states: bool):
        B, self.P = ids.shape
        self.tokens = torch.cat([ids, ids.new_full((B, R), pad_id)], 1)
        self.mask = torch.cat([mask, mask.new_zeros(B, R)], 1)
        self.logprobs = torch.zeros(B, R, device=ids.device, dtype=full_precision(state).dtype)
        self.sets = ids.new_zeros((B, R, -(-V // 8)), dtype=torch.uint8) if V else None
        self.states = state.new_zeros(B, R, state.size(-1)) if keep_states else None

    def append(
        self, t: int, rows: Tensor, drawn: tuple[Tensor, Tensor, Tensor | None], state: Tensor, running: Tensor | None
    ) -> None:
        """Write response token t of b rows: what `sample` gave for them, and the states (b, C) before it.

        running: bool (b,), False for rows that have ended, which stay as padding; None: all rows run.
        """
        column, (tokens, logprobs, keep) = self.P + t, drawn
        if running is not None:
            tokens = torch.where(running, tokens, self.tokens[rows, column])
            logprobs = torch.where(running, logprobs, 0.0)
            keep = None if keep is None else keep & running.unsqueeze(-1)
        self.tokens[rows, column], self.logprobs[rows, t] = tokens, logprobs
        self.mask[rows, column] = torch.ones_like(tokens) if running is None else running.long()
        if self.sets is not None and keep is not None:
            self.sets[rows, t] = pack_set(keep)
        if self.states is not None:
            self.states[rows, t] = state

    def finished(self) -> Generation:
        """Raises FloatingPointError if logits were not finite: on a GPU they are looked at once, here."""
        if not self.logprobs.isfinite().all():
            raise FloatingPointError("cannot sample: the logits of a row have a NaN, or no finite maximum")
        response_mask = self.mask[:, self.P :].bool()
        return Generation(self.tokens, self.mask, response_mask, self.logprobs, self.sets, self.states)


def _prefill(model: Decoder, ids: Tensor, mask: Tensor | None, cache: KVCache) -> tuple[Tensor, Tensor]:
    """Fill the cache with the prompts (B, P), equal ones once; return states (B, C) and logits (B, V) after them."""
    distinct, row = torch.unique(ids if mask is None else torch.cat([ids, mask], 1), dim=0, return_inverse=True)
    cache.take_rows(slice(len(distinct)))
    mask = None if mask is None else distinct[:, ids.size(1) :]
    state = model.hidden_states(distinct[:, : ids.size(1)], mask, cache)[:, -1]
    cache.take_rows(row)
    return state[row], model.lm_logits(state)[row]
