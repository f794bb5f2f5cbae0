"""The frozen record of one batch of experience, and how it is collected.

Shapes: B batch, P longest prompt, R longest response, T = P + R, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.common.printing import html_table
from minirlhf.device.gpu import PhaseClock, to_device
from minirlhf.device.placement import sizes_that_fit
from minirlhf.device.processes import agreed, processes
from minirlhf.generation.generate import Generation, generate
from minirlhf.generation.sampling import draw_uniforms
from minirlhf.rewards.base import RewardFunction, checked_scores, checked_token_scores
from minirlhf.rewards.overlap import Texts, sample_and_score
from minirlhf.rl.logprobs import TokenLogprobs, response_logprobs
from minirlhf.text.batching import Ids, checked_pairs, left_pad, length_sorted_batches, right_pad

if TYPE_CHECKING:
    from minirlhf.models.prepared import Models
    from minirlhf.rl.config import PPOConfig

NOT_YET: Any = None  # in the place of a tensor that a later phase of the step computes


@dataclass(frozen=True, repr=False)
class Rollout:
    """One batch of prompts, responses and what the models said of them. It is frozen.

    tokens: (B, T) int64, prompts padded on the left, responses on the right.
    mask: (B, T) int64, 1 at real tokens.
    response_mask: (B, R) bool, True at real response tokens; each row has at least one, and they are contiguous.
    logprobs, ref_logprobs: (B, R) fp32, nats, of the response tokens under policy and reference before the update,
        in the distribution that was sampled from; 0 at padding.
    entropy, exact_kl: (B, R) fp32, nats, of the policy, and KL(policy || reference) over the whole sampling set.
    scores: (B,) fp32, the reward of each sequence.
    values: (B, R) fp32, of the state before each response token; 0 at padding. None without a value head.
    score_shares: (B, R) fp32, the shares of single tokens in the scores. None: the last token has the whole score.
    sampling_sets: (B, R, ceil(V / 8)) uint8, packed (see `sampling.pack_set`); None: nothing was truncated.
    sampler_logprobs: (B, R) fp32, what the sampler itself computed; None if not sampled here.
    prompts, responses: the B texts; empty if the rollout was made from tokens alone.
    group_size: responses of each prompt, side by side.
    reward_metrics: what the reward reported of itself. seconds: the time of each phase of collecting.

    Set within a step, (B, R) fp32: token_rewards, advantages, returns (None: the method has none), advantage_scale,
    the factor of whitening (None without it), and weights, of the tokens in the mean over their minibatch.
    """

    tokens: Tensor
    mask: Tensor
    response_mask: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    exact_kl: Tensor
    scores: Tensor
    values: Tensor = NOT_YET
    score_shares: Tensor | None = None
    sampling_sets: Tensor | None = None
    sampler_logprobs: Tensor | None = None
    prompts: tuple[str, ...] = ()
    responses: tuple[str, ...] = ()
    group_size: int = 1
    reward_metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    token_rewards: Tensor = NOT_YET
    advantages: Tensor = NOT_YET
    returns: Tensor | None = None
    advantage_scale: Tensor | None = None
    weights: Tensor = NOT_YET

    def __len__(self) -> int:
        return self.tokens.size(0)

    def __repr__(self) -> str:
        tokens, score = self.response_mask.size(1), self.scores.mean().item()
        return f"Rollout({len(self)} responses of up to {tokens} tokens, mean score {score:.3f})"

    def _repr_html_(self) -> str:  # a notebook shows it
        scores = [f"{score:.3f}" for score in self.scores.tolist()]
        return html_table(
            ("prompt", "response", "score"), list(zip(self.prompts, self.responses, scores, strict=False))
        )

    @property
    def texts(self) -> list[str]:
        """Prompt + response of every row."""
        return [p + r for p, r in zip(self.prompts, self.responses, strict=True)]

    @functools.cached_property
    def lengths(self) -> Tensor:
        """(B, 2) int64 on the CPU, the real tokens of prompt and response; a GPU synchronises once a rollout."""
        R = self.response_mask.size(1)
        return torch.stack([self.mask[:, :-R].sum(-1), self.response_mask.sum(-1)], -1).cpu()

    @property
    def attention_mask(self) -> Tensor | None:
        """The mask (B, T), or None without padding, where attention takes its fastest kernel."""
        return None if int(self.lengths.sum()) == self.tokens.numel() else self.mask

    def replace(self, **fields: Any) -> Rollout:
        """The same rollout with other values of some fields."""
        other = dataclasses.replace(self, **fields)
        other.__dict__["lengths"] = self.lengths  # cached: they do not change
        return other

    def rows(self, index: Tensor) -> Rollout:
        """These rows (int64, on the CPU), without columns that are padding in all of them, texts and times."""
        R = self.response_mask.size(1)
        lengths = self.lengths[index]
        left, right = lengths.amax(0).tolist()
        columns = slice(self.mask.size(1) - R - left, self.mask.size(1) - R + right)
        index = to_device(index, self.tokens.device)
        cut: dict[str, Any] = {name: getattr(self, name)[index, columns] for name in ("tokens", "mask")}
        cut |= {"scores": self.scores[index], "group_size": self.group_size}
        for f in dataclasses.fields(self):
            x = getattr(self, f.name)
            if f.name not in cut and isinstance(x, Tensor):
                cut[f.name] = x[index, :right]
        part = Rollout(**cut)
        part.__dict__["lengths"] = lengths
        return part


def collect_rollout(
    models: Models,
    prompts: Sequence[str],
    reward_fn: RewardFunction,
    config: PPOConfig,
    generator: torch.Generator | None = None,
) -> Rollout:
    """Sample `config.group_size` responses to each prompt, and score them with reward function, policy and reference.

    models: in eval mode on one device. prompts: texts. reward_fn: of any form that `rewards.call_reward` takes.
    Of several processes all get all prompts and the whole rollout, and each samples and scores its share of the rows.
    generator: on the models' device, the source of all randomness; None: PyTorch's global one.
    Raises ValueError for no prompts, an empty or too long one, and scores that are not B finite numbers; TimeoutError
    if the reward function takes longer than `reward_timeout`.
    """
    c, tokenizer = config, models.tokenizer
    clock, group = PhaseClock(models.policy.decoder.device), processes()
    if len(prompts) == 0:
        raise ValueError("prompts is empty: there is nothing to continue")
    group.same("prompts", prompts)
    count = len(prompts) * c.group_size
    prompts = [prompt for prompt in prompts for _ in range(c.group_size)]
    prompt_ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    uniforms = draw_uniforms(c.gen_len, count, models.policy.decoder.device, generator)

    def sample(rows: slice) -> tuple[Generation, Texts]:
        with agreed("generation"), models.precision.autocast():
            part = generate(
                models.policy.decoder, prompt_ids, c.gen_len, c.sampling,
                eos_token_id=c.eos_token_id, pad_token_id=tokenizer.pad_id, uniforms=uniforms, share=rows,
                # In fp32 they give the same log-probabilities to 1e-5 nats. With LoRA the KL of step 0 is 0 to the bit.
                keep_states=models.precision.name == "fp32" and not c.adapters_off,
                keep_sampling_sets=not c.logprobs_full_softmax,
                graphed=models.graphed,
            )  # fmt: skip
        pieces = [tokenizer.decode_response(*ids) for ids in zip(prompt_ids[rows], part.responses, strict=True)]
        clock.stop("generation")
        return part, (prompts[rows], ["".join(row) for row in pieces], pieces)

    how = (c.group_size, c.reward_workers, c.reward_timeout)
    sampled, texts, scored = sample_and_score(sample, reward_fn, count, *how)
    clock.stop("reward")
    known = (sampled.tokens, sampled.mask, c.gen_len, c.logprobs_divisor, sampled.sampling_sets, sampled.states)
    found = logprobs_in_batches(models, *known)
    clock.stop("scoring")
    rollout = Rollout(
        sampled.tokens, sampled.mask, sampled.response_mask, sampling_sets=sampled.sampling_sets,
        sampler_logprobs=sampled.logprobs, prompts=tuple(texts[0]), responses=tuple(texts[1]),
        group_size=c.group_size, reward_metrics=scored.metrics, seconds=clock.seconds,
        **_score_fields(scored.scores, found["logprobs"]), **found,
    )  # fmt: skip
    return group.gather_record(count, rollout)


def evaluation(models: Models, pool: Sequence[str], reward_fn: RewardFunction, config: PPOConfig) -> dict[str, float]:
    """Reward and KL of a fresh batch, the prompts of the pool in turn, with the same random numbers at each call."""
    drawn = [pool[i % len(pool)] for i in range(config.batch_size // config.group_size)]
    generator = torch.Generator(models.policy.decoder.device).manual_seed(config.seed)
    found = collect_rollout(models, drawn, reward_fn, config, generator)
    return {"evaluation/reward": found.scores.mean().item(), "evaluation/kl": found.exact_kl.sum(-1).mean().item()}


def rollout_from_tokens(
    models: Models, queries: Sequence[Ids], responses: Sequence[Ids] | None, scores: Any, config: PPOConfig
) -> Rollout:
    """A Rollout of queries and responses that were sampled elsewhere, with log-probabilities of the full softmax.

    Arguments and errors as of `PPOTrainer.step`.
    """
    model, pad_id = models.policy.decoder, models.tokenizer.pad_id
    if queries is None or responses is None or scores is None:
        raise ValueError("step takes a Rollout, or queries, responses and scores")
    queries, responses = checked_pairs(queries, responses, model.vocab_size, model.n_positions, config.group_size)
    checked = checked_token_scores(scores, [len(ids) for ids in responses])
    query_ids, query_mask = left_pad(queries, pad_id)
    response_ids, response_mask = right_pad(responses, pad_id)
    tokens = to_device(torch.cat([query_ids, response_ids], 1), model.device)
    mask = to_device(torch.cat([query_mask, response_mask], 1), model.device)
    group = processes()
    group.same("queries, responses and scores", [*queries, *responses, checked])
    mine = group.share(len(tokens))
    found = logprobs_in_batches(models, tokens[mine], mask[mine], response_ids.size(1), config.logprobs_divisor)
    found = dict(zip(found, group.gather_rows(len(tokens), *found.values()), strict=True))
    found |= _score_fields(checked, found["logprobs"])
    real = to_device(response_mask.bool(), model.device)
    return Rollout(tokens, mask, real, group_size=config.group_size, **found)


@torch.no_grad()
@agreed("scoring")
def logprobs_in_batches(
    models: Models,
    tokens: Tensor,
    mask: Tensor,
    response_length: int,
    temperature: float,
    sampling_sets: Tensor | None = None,
    states: Tensor | None = None,
) -> dict[str, Any]:
    """The fields of a Rollout that `response_logprobs` computes, each (B, R), in batches of similar length."""
    lengths, device = mask.sum(-1).tolist(), tokens.device
    for attempt in sizes_that_fit(min(models.scoring_batch_size, len(tokens))):
        with attempt, models.precision.autocast():
            parts: list[TokenLogprobs] = []
            batches = list(length_sorted_batches(lengths, attempt.size))
            for batch in batches:
                index = to_device(torch.tensor(batch), device)
                sets, known = (None if x is None else x[index] for x in (sampling_sets, states))
                real = mask[index] if lengths[batch[-1]] < tokens.size(1) else None  # the last is the shortest
                inputs = (tokens[index], real, response_length, temperature, sets, models.reference, known)
                parts.append(response_logprobs(models.policy, *inputs))
    back = to_device(torch.tensor([i for batch in batches for i in batch]).argsort(), device)
    columns = {f.name: [getattr(part, f.name) for part in parts] for f in dataclasses.fields(TokenLogprobs)}
    return {name: torch.cat(column)[back] for name, column in columns.items() if column[0] is not None}


def _score_fields(scores: Tensor, like: Tensor) -> dict[str, Any]:
    """The fields `scores` and `score_shares` from scores, (B,) or (B, up to R). like: (B, R), for the type."""
    if scores.ndim == 1:
        return {"scores": to_device(scores.to(like.dtype), like.device)}
    totals = checked_scores(scores.sum(-1), len(scores))  # a sum of finite numbers may not be finite
    fields = {"scores": totals, "score_shares": F.pad(scores, (0, like.size(1) - scores.size(1)))}
    return {name: to_device(x.to(like.dtype), like.device) for name, x in fields.items()}
