"""The frozen record of one batch of experience, and how it is collected.

Shapes: B batch, P longest prompt, R longest response, T = P + R, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.device.gpu import to_device
from minirlhf.device.placement import in_batches_that_fit
from minirlhf.generation.generate import generate
from minirlhf.generation.sampling import SamplingConfig
from minirlhf.generation.static_decode import GraphedDecoder
from minirlhf.models.gpt2 import GPT2
from minirlhf.models.heads import ActorCritic, TokenScores, language_model
from minirlhf.rewards.base import RewardFunction, checked_scores, checked_token_scores, reward_by_token
from minirlhf.text.batching import Ids, left_pad, length_sorted_batches, right_pad
from minirlhf.text.tokenizer import Tokenizer

Autocast = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Rollout:
    """One batch of prompts, responses and what the models said of them; nothing in it changes after it is made.

    tokens: (B, T) int64, prompts padded on the left, responses on the right.
    mask: (B, T) int64, 1 at real tokens.
    response_mask: (B, R) bool, True at real response tokens; each row has at least one, and they are contiguous.
    logprobs, ref_logprobs: (B, R) fp32, nats, of the response tokens under policy and reference before the update,
        in the distribution that was sampled from; 0 at padding.
    values: (B, R) fp32, of the state before each response token; 0 at padding.
    entropy, exact_kl: (B, R) fp32, nats, of the policy, and KL(policy || reference) over the whole sampling set.
    scores: (B,) fp32, the reward of each sequence.
    token_scores: (B, R) fp32, the shares of single tokens in the scores; 0 at padding. None: the last token has it all.
    sampling_sets: (B, R, ceil(V / 8)) uint8, packed (see `sampling.pack_set`); None: nothing was truncated.
    sampler_logprobs: (B, R) fp32, what the sampler itself computed while generating; None if not sampled here.
    prompts, responses: the B texts; empty if the rollout was made from tokens alone.
    seconds: the time of each phase of collecting.
    """

    tokens: Tensor
    mask: Tensor
    response_mask: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    entropy: Tensor
    exact_kl: Tensor
    scores: Tensor
    token_scores: Tensor | None = None
    sampling_sets: Tensor | None = None
    sampler_logprobs: Tensor | None = None
    prompts: tuple[str, ...] = ()
    responses: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.tokens.size(0)

    @property
    def texts(self) -> list[str]:
        """Prompt + response of every row."""
        return [p + r for p, r in zip(self.prompts, self.responses, strict=True)]

    @functools.cached_property
    def lengths(self) -> Tensor:
        """(B, 2) int64, the real tokens of prompt and response, on the CPU: a GPU is waited for once a rollout."""
        R = self.response_mask.size(1)
        return torch.stack([self.mask[:, :-R].sum(-1), self.response_mask.sum(-1)], -1).cpu()

    @property
    def padded(self) -> bool:
        """Whether there is any padding; without, attention needs no mask, and a GPU can take its quick kernel."""
        return int(self.lengths.sum()) < self.tokens.numel()

    def rows(self, index: Tensor) -> Rollout:
        """These rows (int64), without columns that are padding in all of them. Texts and times are left out.

        With an index on the CPU a GPU is not waited for.
        """
        R, index = self.response_mask.size(1), index.cpu()
        lengths = self.lengths[index]
        left, right = lengths.amax(0).tolist()
        columns = slice(self.mask.size(1) - R - left, self.mask.size(1) - R + right)
        index = to_device(index, self.tokens.device)
        cut: dict[str, Any] = {name: getattr(self, name)[index, columns] for name in ("tokens", "mask")}
        cut["scores"] = self.scores[index]
        for f in dataclasses.fields(self):
            x = getattr(self, f.name)
            if f.name not in cut and isinstance(x, Tensor):
                cut[f.name] = x[index, :right]
        part = Rollout(**cut)
        part.__dict__["lengths"] = lengths  # known already
        return part


def collect_rollout(
    policy: ActorCritic,
    ref_policy: GPT2 | ActorCritic,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    reward_fn: RewardFunction,
    gen_len: int = 16,
    sampling: SamplingConfig | None = None,
    *,
    eos_token_id: int | None = None,
    generator: torch.Generator | None = None,
    forward_batch_size: int = 128,
    score_full_softmax: bool = False,
    score_temperature: float | None = None,
    score_from_decode: bool = False,
    autocast: Autocast = contextlib.nullcontext,
    decoder: GraphedDecoder | None = None,
) -> Rollout:
    """Sample a response to each prompt, and score it with policy, reference and reward function.

    policy, ref_policy: in eval mode, on one device, with the same vocabulary.
    prompts: B texts; each is tokenised without a final [SEP].
    reward_fn: a reward of any form that `rewards.call_reward` takes.
    gen_len: R, new tokens a prompt; fewer where `eos_token_id` is drawn.
    generator: on the models' device, the source of all randomness.
    forward_batch_size: sequences a scoring pass; it changes memory and speed only.
    score_full_softmax: score with the full softmax though the tokens come from a truncated one, as the original
        recipe does.
    score_temperature: what logits are divided by when scoring; None: the sampling temperature.
    score_from_decode: take the policy's hidden states from the decode instead of computing them once more for
        log-probabilities and values. In fp32 both agree to 1e-5 nats; in 16 bits they differ by some hundredths.
    autocast: makes the context for the forward passes (see `optimization.Precision.autocast`).
    decoder: as of `generation.generate`.
    Raises ValueError for no prompts, an empty or too long one, and scores that are not B finite numbers.
    """
    sampling = sampling or SamplingConfig()
    clock = _Clock(policy.gpt2.wte.weight.device)
    if len(prompts) == 0:
        raise ValueError("prompts is empty: there is nothing to continue")
    with autocast():
        sampled = generate(
            policy.gpt2,
            [tokenizer.encode_prompt(prompt) for prompt in prompts],
            gen_len,
            sampling,
            eos_token_id=eos_token_id,
            pad_token_id=tokenizer.pad_id,
            generator=generator,
            keep_sampling_sets=not score_full_softmax,
            keep_states=score_from_decode,
            decoder=decoder,
        )
    sampled_ids = sampled.responses
    responses = [tokenizer.decode(response) for response in sampled_ids]
    clock.stop("generation")
    tokens = [tokenizer.decode_pieces(response) for response in sampled_ids]
    scores = reward_by_token(reward_fn, prompts, responses, tokens)
    clock.stop("reward")
    temperature = sampling.temperature if score_temperature is None else score_temperature
    with autocast():
        scored = score_in_batches(
            policy, ref_policy, sampled.tokens, sampled.mask, gen_len, temperature, sampled.sampling_sets,
            forward_batch_size, sampled.states,
        )  # fmt: skip
    clock.stop("scoring")
    return Rollout(
        tokens=sampled.tokens,
        mask=sampled.mask,
        response_mask=sampled.response_mask,
        sampling_sets=sampled.sampling_sets,
        sampler_logprobs=sampled.logprobs,
        prompts=tuple(prompts),
        responses=tuple(responses),
        seconds=clock.seconds,
        **_score_fields(scores, scored["values"]),
        **scored,
    )


def rollout_from_tokens(
    policy: ActorCritic,
    ref_policy: GPT2 | ActorCritic,
    queries: Sequence[Ids],
    responses: Sequence[Ids],
    scores: Any,
    temperature: float = 1.0,
    *,
    pad_token_id: int = 0,
    forward_batch_size: int = 128,
    autocast: Autocast = contextlib.nullcontext,
) -> Rollout:
    """A Rollout of B queries and responses that were sampled elsewhere, scored here with the full softmax.

    queries, responses: token ids, 1-D, of any lengths of at least 1. scores: B finite numbers, or B lists of them with
        one a token.
    Raises ValueError for lists of unequal or no length, empty sequences, bad token ids, sequences longer than the
    model's context, or bad scores.
    """
    config = policy.gpt2.config
    if len(queries) != len(responses):
        raise ValueError(f"got {len(queries)} queries but {len(responses)} responses")
    for name, sequences in (("query", queries), ("response", responses)):
        for i, ids in enumerate(sequences):
            _check_ids(f"{name} {i}", torch.as_tensor(ids), config.vocab_size)
    checked = checked_token_scores(scores, [len(ids) for ids in responses])
    query_ids, query_mask = left_pad(queries, pad_token_id)
    response_ids, response_mask = right_pad(responses, pad_token_id)
    device = policy.gpt2.wte.weight.device
    tokens = to_device(torch.cat([query_ids, response_ids], 1), device)
    mask = to_device(torch.cat([query_mask, response_mask], 1), device)
    if tokens.size(1) - 1 > config.n_positions:
        raise ValueError(
            f"the longest query and the longest response have {query_ids.size(1)} + {response_ids.size(1)} tokens, "
            f"more than the model's {config.n_positions} positions"
        )
    with autocast():
        scored = score_in_batches(
            policy, ref_policy, tokens, mask, response_ids.size(1), temperature, None, forward_batch_size
        )
    return Rollout(
        tokens=tokens,
        mask=mask,
        response_mask=to_device(response_mask.bool(), device),
        **_score_fields(checked, scored["values"]),
        **scored,
    )


@torch.no_grad()
def score_in_batches(
    policy: ActorCritic,
    ref_policy: GPT2 | ActorCritic,
    tokens: Tensor,
    mask: Tensor,
    response_length: int,
    temperature: float,
    sampling_sets: Tensor | None,
    batch_size: int,
    states: Tensor | None = None,
) -> dict[str, Any]:
    """The fields of a Rollout that come from scoring, each (B, R); `score` in batches of similar length.

    On a GPU that runs out of memory in smaller ones.
    """
    reference, lengths = language_model(ref_policy), mask.sum(-1).tolist()

    def in_batches_of(size: int) -> dict[str, Any]:
        parts: list[TokenScores] = []
        batches = list(length_sorted_batches(lengths, size))
        for batch in batches:
            index = to_device(torch.tensor(batch), tokens.device)
            sets, known = (None if x is None else x[index] for x in (sampling_sets, states))
            real = mask[index] if lengths[batch[-1]] < tokens.size(1) else None  # the last is the shortest
            parts.append(policy.score(tokens[index], real, response_length, temperature, sets, reference, known))
        back = to_device(torch.tensor([i for batch in batches for i in batch]).argsort(), tokens.device)
        return {
            name: torch.cat([getattr(part, name) for part in parts])[back]
            for name in ("logprobs", "values", "entropy", "ref_logprobs", "exact_kl")
        }

    return in_batches_that_fit(in_batches_of, min(batch_size, len(tokens)))[0]


def _score_fields(scores: Tensor, like: Tensor) -> dict[str, Any]:
    """The fields `scores` and `token_scores` from scores, (B,) or (B, up to R). like: (B, R), for the type."""
    if scores.ndim == 1:
        return {"scores": to_device(scores.to(like.dtype), like.device)}
    totals = checked_scores(scores.sum(-1), len(scores))  # of finite numbers it may not be one
    fields = {"scores": totals, "token_scores": F.pad(scores, (0, like.size(1) - scores.size(1)))}
    return {name: to_device(x.to(like.dtype), like.device) for name, x in fields.items()}


def _check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool or len(ids) == 0:
        raise ValueError(f"{name} must be 1-D with at least one token id, got {ids.dtype} of shape {tuple(ids.shape)}")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"{name} has token ids outside [0, {vocab_size}): {ids.min()} to {ids.max()}")


class _Clock:
    """Seconds between stops; on a GPU the queued work is waited for, so that a phase is charged with its own."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}  # type: tuple[torch.device, dict[str, float]]
        self._last = self._now()

    def stop(self, phase: str) -> None:
        now = self._now()
        self.seconds[phase] = now - self._last
        self._last = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
