"""The value head, and the actor-critic that PPO trains: a GPT-2 with a value head on its hidden states.

`score_tokens` is the one place where token t meets the state before it. Nothing of shape (B, T, V) is made: hidden
states are cut to the response positions, padding is dropped, and the LM head runs over chunks of them.

Shapes: B batch, P prompt, R response, T = P + R, C width, V vocabulary, N real response tokens.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minirlhf.device.precision import full_precision
from minirlhf.generation.sampling import restrict, unpack_set
from minirlhf.io.hub import locate
from minirlhf.io.model_card import ModelCard
from minirlhf.io.model_folder import cast, check_tensors, read_metadata, read_tensors, write_folder
from minirlhf.models.gpt2 import GPT2, read_published
from minirlhf.models.layers import global_rng_kept
from minirlhf.rl import ppo
from minirlhf.rl.token_statistics import compare, logprobs_and_entropy

VALUE_HEAD_FILE = "value_head.safetensors"
VALUE_HEAD_KINDS = ("linear", "tanh")
LOGITS_PER_CHUNK = 2**25  # fp32 logits alive at once in the LM head, 128 MiB
LOGITS_IN_CACHE = 2**22  # the same on a CPU without a backward pass: what stays in its cache is not waited for


class ValueHead(nn.Module):
    """Hidden states (..., C) to values (...).

    kind: "linear", unbounded; or "tanh", Linear -> Tanh -> Dropout as in the original recipe, bounded to (-1, 1).
    dropout: of the "tanh" head.
    init_range: weights start uniform in +-init_range. 0: the first values are 0 and the first advantages those of no
        baseline at all, as Ziegler et al. 2019 have it. seed: of the generator that draws them.
    Raises ValueError for an unknown kind.
    """

    def __init__(self, n_embd: int, kind: str = "linear", dropout: float = 0.1, init_range: float = 0.0, seed: int = 0):
        super().__init__()
        if kind not in VALUE_HEAD_KINDS:
            raise ValueError(f"the kind of a value head must be one of {', '.join(VALUE_HEAD_KINDS)}, got {kind!r}")
        self.kind = kind
        with global_rng_kept():
            self.summary = nn.Linear(n_embd, 1)
        self.dropout = nn.Dropout(dropout)
        generator = torch.Generator().manual_seed(seed)
        nn.init.uniform_(self.summary.weight, -init_range, init_range, generator=generator)
        nn.init.uniform_(self.summary.bias, -init_range, init_range, generator=generator)

    def forward(self, hidden: Tensor) -> Tensor:
        values = full_precision(self.summary(hidden).squeeze(-1))
        return self.dropout(torch.tanh(values)) if self.kind == "tanh" else values


@dataclass(frozen=True)
class TokenScores:
    """What a model says of response tokens, each (B, R), fp32, 0 at padding.

    logprobs, entropy: nats, of the distribution that was sampled from.
    values: of the state before each token; None without a value head.
    ref_logprobs, exact_kl: nats, the reference's log-probabilities and KL(policy || reference) over the whole
        sampling set; None without a reference.
    """

    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None = None
    ref_logprobs: Tensor | None = None
    exact_kl: Tensor | None = None


class ActorCritic(nn.Module):
    """A GPT-2 and a value head on its last hidden state.

    `(ids, attention_mask) -> (logits (B, T, V), values (B, T))`; for PPO itself use `score`.
    value_head: None: a new linear one.
    """

    def __init__(self, gpt2: GPT2, value_head: ValueHead | None = None):
        super().__init__()
        self.gpt2 = gpt2
        self.value_head = value_head or ValueHead(gpt2.config.n_embd)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) and values (B, T); ids (B, T) int64, attention_mask (B, T) with 1 at real tokens."""
        hidden = self.gpt2.hidden_states(ids, attention_mask)
        return self.gpt2.lm_logits(hidden), self.value_head(hidden)

    def score(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        response_length: int,
        temperature: float = 1.0,
        sampling_sets: Tensor | None = None,
        reference: GPT2 | None = None,
        states: Tensor | None = None,
    ) -> TokenScores:
        """Log-probabilities, values and entropy of the last `response_length` tokens of every row.

        Arguments, result and errors as in `score_tokens`; values are of the state before each token.
        """
        return score_tokens(
            self.gpt2, tokens, mask, response_length, temperature, sampling_sets, reference, self.value_head, states
        )

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], value_head: str | None = None) -> ActorCritic:
        """Load a GPT-2 folder with its value head, `value_head.safetensors` or TRL's `v_head.*`, in eval mode.

        value_head: the kind of head; None: the one in the folder, or a linear one.
        Raises as `GPT2.from_pretrained`, and ValueError for a head that does not fit.
        """
        content, named = read_published(folder)
        of_trl = {name.removeprefix("v_head."): named.pop(name) for name in list(named) if name.startswith("v_head.")}
        gpt2 = GPT2.from_tensors(folder, content, named)
        path = locate(folder) / VALUE_HEAD_FILE
        stored = read_metadata(path).get("kind", "linear") if path.is_file() else None
        if of_trl:
            if stored is not None:
                raise ValueError(f"{folder} holds two value heads, {VALUE_HEAD_FILE} and v_head.* among the weights")
            stored = "linear"  # as TRL's is
        if stored is not None and stored not in VALUE_HEAD_KINDS:
            raise ValueError(f"{path} holds a {stored!r} value head, known are {', '.join(VALUE_HEAD_KINDS)}")
        if stored is not None and value_head not in (None, stored):
            raise ValueError(f"{path} holds a {stored!r} value head, but a {value_head!r} one was asked for")
        head = ValueHead(gpt2.config.n_embd, value_head or stored or "linear")
        if stored is not None:
            tensors = of_trl or read_tensors(path)
            check_tensors(tensors, {name: p.shape for name, p in head.state_dict().items()}, path)
            head.load_state_dict(tensors)
        return cls(gpt2, head).eval()

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        dtype: torch.dtype = torch.float32,
        summary: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the GPT-2 in the published layout and the value head beside it, where other tools ignore it.

        dtype, summary and errors as of `GPT2.save_pretrained`; everything is written at one moment.
        """
        config, tensors = self.gpt2.published(dtype)
        head = cast(self.value_head.state_dict(), torch.float32), {"kind": self.value_head.kind}
        card = ModelCard("ActorCritic", self.gpt2.origin, summary)
        write_folder(folder, config, tensors, card, beside={VALUE_HEAD_FILE: head})


def language_model(model: GPT2 | ActorCritic) -> GPT2:
    """The GPT-2 of a model that may have a value head."""
    return model.gpt2 if isinstance(model, ActorCritic) else model


def score_tokens(
    model: GPT2,
    tokens: Tensor,
    mask: Tensor | None,
    response_length: int,
    temperature: float = 1.0,
    sampling_sets: Tensor | None = None,
    reference: GPT2 | None = None,
    value_head: Callable[[Tensor], Tensor] | None = None,
    states: Tensor | None = None,
) -> TokenScores:
    """Score the response tokens, the last R = `response_length` columns, each from the state before it.

    tokens: (B, T) int64, T > R. mask: (B, T), 1 at real tokens, or None for no padding; no padding stands between
        real tokens.
    temperature, sampling_sets (B, R, ceil(V / 8)): how the tokens were sampled (see `sampling`); they are scored
        under the same distribution.
    reference: a second GPT2 to compare with; it gets no gradient.
    states: (B, R, C), the model's hidden states before the response tokens where they are known already (see
        `generation.generate`); None: they are computed.
    Raises ValueError if R leaves no token before the response.
    """
    B, T = tokens.shape
    R = response_length
    if not 1 <= R < T:
        raise ValueError(f"response_length must be between 1 and {T - 1} for {T} tokens a row, got {R}")
    # The state before token t predicts it: positions P-1 .. T-2. The last token's own state predicts nothing.
    context, context_mask = tokens[:, :-1], None if mask is None else mask[:, :-1]
    real = None if mask is None else mask[:, -R:].flatten().nonzero().squeeze(-1)  # (N,); a GPU is waited for here

    def of_response(x: Tensor) -> Tensor:  # (B, R or more, ...) to (N, ...)
        x = x[:, -R:].flatten(0, 1)
        return x if real is None else x.index_select(0, real)

    compared = None
    if states is not None:
        hidden = of_response(states)
        if reference is not None:
            with torch.no_grad():
                compared = of_response(reference.hidden_states(context, context_mask))
    elif reference is None:
        hidden = of_response(model.hidden_states(context, context_mask))
    else:
        hidden, compared = map(of_response, model.hidden_states_of_both(reference, context, context_mask))
    picked = of_response(tokens)  # (N,)
    sets = None if sampling_sets is None else of_response(sampling_sets)  # (N, ceil(V / 8))

    columns = _in_chunks(model, reference, hidden, compared, picked, sets, temperature)
    if value_head is not None:
        columns["values"] = value_head(hidden)
    return TokenScores(**{name: _unflatten(x, real, (B, R)) for name, x in columns.items()})


def _in_chunks(
    model: GPT2,
    reference: GPT2 | None,
    hidden: Tensor,
    compared: Tensor | None,
    picked: Tensor,
    sets: Tensor | None,
    temperature: float,
) -> dict[str, Tensor]:
    """Per-token results (N,) of the LM head, computed over chunks so that few logits are alive at once."""
    names = ["logprobs", "entropy"] + (["ref_logprobs", "exact_kl"] if reference is not None else [])

    def head(hidden: Tensor, compared: Tensor | None, picked: Tensor, sets: Tensor | None) -> tuple[Tensor, ...]:
        keep = None if sets is None else unpack_set(sets, model.vocab_size)
        logits = model.lm_logits(hidden)  # (chunk, V)
        if reference is not None and compared is not None and not torch.is_grad_enabled():
            return compare(logits, reference.lm_logits(compared), picked, temperature, keep)
        result = logprobs_and_entropy(logits, picked, temperature, keep)
        if reference is None or compared is None:
            return result
        logits = restrict(logits, temperature, keep)
        with torch.no_grad():
            ref_logits = restrict(reference.lm_logits(compared), temperature, keep)
        return *result, ppo.gather_logprobs(ref_logits, picked), ppo.exact_kl(logits, ref_logits)

    per_chunk = LOGITS_PER_CHUNK if torch.is_grad_enabled() or hidden.device.type != "cpu" else LOGITS_IN_CACHE
    rows = max(1, per_chunk // model.vocab_size)
    parts = []
    for start in range(0, max(len(picked), 1), rows):
        cut = slice(start, start + rows)
        arguments = (
            hidden[cut],
            None if compared is None else compared[cut],
            picked[cut],
            None if sets is None else sets[cut],
        )
        # More than one chunk: recompute each one's logits in the backward pass instead of keeping them all.
        recompute = torch.is_grad_enabled() and len(picked) > rows
        parts.append(checkpoint(head, *arguments, use_reentrant=False) if recompute else head(*arguments))
    return {name: torch.cat(pieces) for name, pieces in zip(names, zip(*parts, strict=True), strict=True)}


def _unflatten(x: Tensor, real: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """(N,) back to (B, R), 0 at padding."""
    return x.view(shape) if real is None else x.new_zeros(math.prod(shape)).index_copy(0, real, x).view(shape)
