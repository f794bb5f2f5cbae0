"""Batched sampling from a decoder with a key/value cache, and texts from it.

A decoder is known here by what `models.decoder` promises alone, and not by its class: `Decoder` and `ActorCritic` take
their methods `generate` and `stream` from `TextGenerator`, below.

Left out: beam search and repetition penalties, because PPO needs samples whose probabilities are known.

Shapes: B rows, P longest prompt, R new tokens, T = P + R, C width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from minirlhf.common.validation import require_config
from minirlhf.device.gpu import to_device
from minirlhf.device.parts import is_part
from minirlhf.device.precision import full_precision
from minirlhf.generation.sampling import SamplingConfig, draw_uniforms, is_end, pack_set, sample
from minirlhf.text.batching import Ids, checked_ids, left_pad
from minirlhf.text.text_files import listed
from minirlhf.text.tokenizer import Tokenizer, require_tokenizer

if TYPE_CHECKING:
    from minirlhf.models.cache import KVCache
    from minirlhf.models.decoder import Decoder
    from minirlhf.models.heads import ActorCritic
    from minirlhf.models.static_decode import GraphedDecoder

CHECK_EVERY = 16  # tokens between two looks at whether all rows have ended: each look lets a GPU's queue run dry
ROWS = 128  # continuations that `TextGenerator.generate` samples at once


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


def joined(parts: Sequence[Generation]) -> Generation:
    """The rows of several generations of one batch, of which each has a `share`."""
    if len(parts) == 1:
        return parts[0]
    columns = {f.name: [getattr(part, f.name) for part in parts] for f in dataclasses.fields(Generation)}
    whole: dict[str, Any] = {name: None if xs[0] is None else torch.cat(xs) for name, xs in columns.items()}
    return Generation(**whole)


def generate(
    model: Decoder | ActorCritic,
    prompts: Sequence[Ids],
    max_new_tokens: int,
    sampling: SamplingConfig | None = None,
    *,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
    generator: torch.Generator | None = None,
    uniforms: Tensor | None = None,
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
    uniforms: (R, B), numbers of `draw_uniforms` in the place of new ones.
    share: of the prompts, those that are continued here, while padding and random numbers are those of all; None: all.
    keep_sampling_sets, keep_states: whether the result has them.
    graphed: decodes every token after the first at fixed shapes, on a GPU by a CUDA graph. None: plain decoding, in
        which rows that have ended cost nothing. Both give the same samples.
    Raises ValueError for no prompts, an empty one, one that leaves no room in the model's context, arguments of another
    type, or a model in training mode; FloatingPointError if logits have a NaN, or no finite maximum.
    """
    sampling = require_config(sampling, SamplingConfig)
    *_, samples = _decode(
        language_model(model), prompts, max_new_tokens, sampling, eos_token_id, pad_token_id,
        generator, keep_sampling_sets, keep_states, graphed, uniforms, share,
    )  # fmt: skip
    return samples.finished()


def language_model(model: Decoder | ActorCritic) -> Decoder:
    """The decoder of a model, with or without a value head. Raises ValueError for a model of another library."""
    if not isinstance(model, TextGenerator):
        kind = f"{type(model).__module__.split('.')[0]} {type(model).__name__}"
        advice = "save it with model.save_pretrained(folder) and load it with minirlhf.load_decoder(folder)"
        raise ValueError(f"the model must be a Decoder or an ActorCritic, got a {kind}: {advice}")
    return model.language_model


@torch.no_grad()
def _decode(
    model: Decoder,
    prompts: Sequence[Ids],
    max_new_tokens: int,
    sampling: SamplingConfig,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int,
    generator: torch.Generator | None,
    keep_sampling_sets: bool = False,
    keep_states: bool = False,
    graphed: GraphedDecoder | None = None,
    uniforms: Tensor | None = None,
    share: slice | None = None,
) -> Iterator[_Samples]:
    """The samples of `generate` after each token: the same object, which grows."""
    prompts = _checked_prompts(prompts, model.vocab_size)
    eos_token_id = _checked_ends(eos_token_id)
    if model.training:
        raise ValueError("the model is in training mode, so dropout would change what is sampled; call model.eval()")
    if is_part(next(model.parameters())):
        copy = "trainer.models.whole().policy, or models.sharded.gathered(model)"
        raise ValueError(f"the model is sharded, and samples come from a whole copy: {copy}")
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be an integer of at least 1, got {max_new_tokens!r}")
    ids, prompt_mask = left_pad(prompts, pad_token_id)
    longest, padded = int(prompt_mask.sum(-1).max()), not bool(prompt_mask.all())
    if longest + max_new_tokens > model.n_positions:
        room = f"for {max_new_tokens} new ones in the model's context of {model.n_positions}"
        advice = f"shorten the prompt to {model.n_positions - max_new_tokens}"
        raise ValueError(f"a prompt of {longest} tokens leaves no room {room}; {advice}")
    ids, prompt_mask = (to_device(x[share or slice(None)], model.device) for x in (ids, prompt_mask))
    B, P = ids.shape
    if uniforms is None:
        uniforms = draw_uniforms(max_new_tokens, len(prompts), model.device, generator)
    uniforms = uniforms[:, share or slice(None)]
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
        yield sampled
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


def _checked_prompts(prompts: Sequence[Ids], vocab_size: int) -> list[Ids]:
    """Prompts as a list. Raises ValueError for texts, another type, and bad ids."""
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise ValueError(f"prompts must be token ids of several prompts, got a {type(prompts).__name__}")
    found = [prompts] if isinstance(prompts, str) else list(prompts)
    if any(isinstance(prompt, str) for prompt in found):
        raise ValueError("prompts must be token ids, got texts: give [tokenizer.encode_prompt(text) for text in texts]")
    return [checked_ids(f"prompt {i}", prompt, vocab_size) for i, prompt in enumerate(found)]


def _checked_ends(eos_token_id: int | Sequence[int] | None) -> list[int] | None:
    """Ids as a list. Raises ValueError for anything else."""
    several = isinstance(eos_token_id, (list, tuple))
    ids: Any = eos_token_id if several else [] if eos_token_id is None else [eos_token_id]
    if not all(isinstance(i, Integral) for i in ids):
        raise ValueError(f"eos_token_id must be an id, several of them, or None, got {eos_token_id!r:.60}")
    return None if eos_token_id is None else list(map(int, ids))


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


# ---- texts ----------------------------------------------------------------------------------------------------------


class TextGenerator:
    """What every decoder, with or without a value head, has for use: texts from texts.

    tokenizer: of the model; None: read from the folder that the model was loaded from, when it is first needed.
    """

    tokenizer: Tokenizer | None = None
    folder: str | os.PathLike[str] | None = None

    @property
    def language_model(self) -> Decoder:
        """The decoder itself."""
        raise NotImplementedError

    @overload
    def generate(self, text: str, n: int = ..., max_new_tokens: int = ..., *,
                 temperature: float = ..., top_k: int = ..., top_p: float = ..., stop: str | Sequence[str] = ...,
                 seed: int = ..., tokenizer: Tokenizer | None = ...) -> list[str]: ...  # fmt: skip

    @overload
    def generate(self, text: list[str] | tuple[str, ...], n: int = ..., max_new_tokens: int = ..., *,
                 temperature: float = ..., top_k: int = ..., top_p: float = ..., stop: str | Sequence[str] = ...,
                 seed: int = ..., tokenizer: Tokenizer | None = ...) -> list[list[str]]: ...  # fmt: skip

    def generate(
        self,
        text: str | list[str] | tuple[str, ...],
        n: int = 1,
        max_new_tokens: int = 32,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
    ) -> list[str] | list[list[str]]:
        """Sample n continuations of a text, without the text itself; of several texts, a list of n for each.

        A continuation ends with the token that ends a text, or before the first of the `stop` strings in it.
        temperature, top_k, top_p: as in SamplingConfig. seed: of a generator of its own, new in each call.
        tokenizer: None: the model's own.
        Raises ValueError for an empty text or one without room, a bad setting, or a model without tokenizer.
        """
        texts = [text] if isinstance(text, str) else listed(text, "texts", "give a text, or a list of texts", "prompt")
        if type(n) is not int or n < 1:
            raise ValueError(f"n must be an integer of at least 1, got {n!r}")
        request = _Request(self, max_new_tokens, SamplingConfig(temperature, top_k, top_p), stop, seed, tokenizer)
        rows = [request.tokenizer.encode_prompt(each) for each in texts for _ in range(n)]
        found: list[str] = []
        for start in range(0, len(rows), ROWS):
            *_, last = request.responses(rows[start : start + ROWS], watched=bool(request.stop))
            found += last
        return found if isinstance(text, str) else [found[i : i + n] for i in range(0, len(found), n)]

    def stream(
        self,
        text: str,
        max_new_tokens: int = 32,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
    ) -> Iterator[str]:
        """One continuation of a text in pieces, as they are sampled; joined, they are `generate(text, ...)[0]`.

        What may be the beginning of a stop string, or of a character, waits for the next token. Arguments and errors as
        of `generate`.
        """
        request = _Request(self, max_new_tokens, SamplingConfig(temperature, top_k, top_p), stop, seed, tokenizer)
        return request.pieces(request.tokenizer.encode_prompt(text))


class _Request:
    """What a call of `generate` or `stream` asks for."""

    def __init__(
        self,
        model: TextGenerator,
        max_new_tokens: int,
        sampling: SamplingConfig,
        stop: str | Sequence[str],
        seed: int,
        tokenizer: Tokenizer | None,
    ):
        self.stop = (stop,) if isinstance(stop, str) or not isinstance(stop, Iterable) else tuple(stop)
        if not all(isinstance(each, str) and each for each in self.stop):
            raise ValueError(f"stop must be texts with something in them, got {stop!r}")
        for name, value, least in (("max_new_tokens", max_new_tokens, 1), ("seed", seed, 0)):
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        self.model, self.max_new_tokens, self.sampling = model.language_model, max_new_tokens, sampling
        self.tokenizer = _own_tokenizer(self.model) if tokenizer is None else tokenizer
        require_tokenizer(self.tokenizer)
        self.model.fit_vocabulary(len(self.tokenizer))
        self.generator = torch.Generator(self.model.device).manual_seed(seed)

    def responses(self, prompts: list[list[int]], watched: bool) -> Iterator[list[str]]:
        """The responses to a batch of prompts. watched: after every token, cut at stop strings; else once, whole."""
        before = [len(self.tokenizer.decode(prompt)) for prompt in prompts]
        texts, stopped = [""] * len(prompts), [False] * len(prompts)

        def read(samples: _Samples) -> None:
            for i, ids in enumerate(samples.finished().responses):
                if not stopped[i]:
                    texts[i] = self.tokenizer.decode([*prompts[i], *ids.tolist()])[before[i] :]
                    ends = [place for each in self.stop if (place := texts[i].find(each)) >= 0]
                    texts[i], stopped[i] = texts[i][: min(ends, default=None)], bool(ends)

        ids = self.tokenizer.eos_token_id, self.tokenizer.pad_id
        for samples in _decode(self.model, prompts, self.max_new_tokens, self.sampling, *ids, self.generator):
            if watched:
                read(samples)
                yield texts
                if all(stopped):
                    return
        if not watched:
            read(samples)
            yield texts

    def pieces(self, prompt: list[int]) -> Iterator[str]:
        """See `TextGenerator.stream`."""
        said, text = 0, ""
        for (text,) in self.responses([prompt], watched=True):
            settled = len(text.rstrip("\ufffd"))  # which the bytes of an incomplete character become
            begun = (i for i in range(said, settled) if any(each.startswith(text[i:settled]) for each in self.stop))
            settled = next(begun, settled)
            if settled > said:
                yield text[said:settled]
                said = settled
        if text[said:]:
            yield text[said:]


def _own_tokenizer(model: Decoder) -> Tokenizer:
    """The tokenizer of a model, kept with it. Raises ValueError if there is none, or as `Tokenizer.from_pretrained`."""
    if model.tokenizer is None:
        if model.folder is None:
            raise ValueError("the model was not loaded from a folder with a tokenizer: give tokenizer=")
        model.tokenizer = Tokenizer.from_pretrained(model.folder)
    return model.tokenizer
