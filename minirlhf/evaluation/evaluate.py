"""Policy against reference on fresh samples: what PPO gained, what it paid, and whether it hacked its reward.

`evaluate` has confidence intervals, a second scorer, held-out prompts, best-of-n of the reference at equal KL, and the
optimum. It samples with its own seed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minirlhf.common.validation import require, require_counts, require_non_negative, require_positive_ints
from minirlhf.device.precision import Precision
from minirlhf.evaluation.best_of import BestOfN, best_of_n, best_of_n_kl, encode_prompts, expected_best_of_n, n_of_kl
from minirlhf.evaluation.findings import BestOfNPoint, Comparison, Evaluation, Figures, Pair, symptoms
from minirlhf.evaluation.optimum import Optimum, OptimumPoint, Spending, described
from minirlhf.evaluation.statistics import Bootstrap
from minirlhf.generation.models import Models
from minirlhf.generation.sampling import SamplingConfig
from minirlhf.models.decoder import Decoder
from minirlhf.models.heads import ActorCritic, with_value_head
from minirlhf.rewards.base import RewardFunction, call_reward
from minirlhf.rl.config import PPOConfig
from minirlhf.rl.rollout import Rollout, collect_rollout, logprobs_in_batches
from minirlhf.text.statistics import distinct_n, repeated_share, self_bleu, unit_of, units
from minirlhf.text.tokenizer import Tokenizer

MAX_N = 64  # candidates a prompt at most
LARGEST_EXPONENT = 700.0  # a float holds its exponential


@dataclass(frozen=True)
class EvaluationConfig:
    """Settings of an evaluation. Raises ValueError for a bad one.

    Without truncation (`sampling` as it stands) there is one KL; with it there are two (see `Comparison.kl`).
    """

    samples: int = 512  # of each model on each list of prompts, the prompts in turn; at least 2
    gen_len: int = 16  # new tokens a prompt
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    eos_token_id: int | None = None  # None: every response has gen_len tokens
    best_of: tuple[int, ...] = (2, 4, 8, 16)  # each at most max_n
    max_n: int = MAX_N  # how far best-of-n is followed to the policy's KL; at most MAX_N
    best_of_prompts: int = 64  # for which candidates are drawn, the prompts in turn
    kl_coef: float | None = None  # of the training; adds reward - kl_coef KL of policy and optimum
    resamples: int = 2000  # of the bootstrap
    confidence: float = 0.95
    seed: int = 0
    batch_size: int = 128  # sequences a forward pass

    def __post_init__(self) -> None:
        require_positive_ints(self, "samples", "gen_len", "max_n", "best_of_prompts", "resamples", "batch_size")
        require(self, "max_n", self.max_n <= MAX_N, f"at most {MAX_N}")
        require(self, "samples", self.samples >= 2, "at least 2")
        require_counts(self, "seed")
        require(self, "seed", self.seed < 2**63, "below 2**63")
        if self.eos_token_id is not None:
            require_counts(self, "eos_token_id")
        if self.kl_coef is not None:
            require_non_negative(self, "kl_coef")
        fine = isinstance(self.best_of, (tuple, list)) and len(self.best_of) > 0
        fine = fine and all(type(n) is int and 1 <= n <= self.max_n for n in self.best_of)
        require(self, "best_of", fine, f"a tuple of integers from 1 to {self.max_n}")
        object.__setattr__(self, "best_of", tuple(sorted(set(self.best_of))))
        require(self, "sampling", isinstance(self.sampling, SamplingConfig), "a SamplingConfig")
        _ = self.bootstrap  # resamples and confidence are checked there

    @property
    def bootstrap(self) -> Bootstrap:
        """Makes the confidence intervals."""
        return Bootstrap(self.resamples, self.confidence, self.seed)


def evaluate(
    policy: ActorCritic | Decoder,
    reference: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    reward_fn: RewardFunction,
    held_out_prompts: Sequence[str] | None = None,
    second_scorer: RewardFunction | None = None,
    config: EvaluationConfig | None = None,
) -> Evaluation:
    """Measure policy and reference on the prompts that the policy was trained on, and on others.

    policy, reference: in eval mode, on one device, with the vocabulary of the tokenizer.
    held_out_prompts: prompts that the policy was not trained on; None: the policy is not measured on others.
    second_scorer: a reward that the policy was not trained on, of another kind, such as `NGramScorer`; None: no second
        figures.
    Raises ValueError for no prompts, an empty or too long one, one that is on both lists, models or tokenizer that do
    not fit each other, and scores that are not finite numbers; of prompts and models before anything is sampled.
    """
    config = config or EvaluationConfig()
    sampler = _Sampler(with_value_head(policy, None), reference, tokenizer, reward_fn, second_scorer, config)
    models = {"policy": sampler.policy.decoder, "reference": reference}
    for name, model in models.items():
        model.fit_vocabulary(len(tokenizer), name)
    devices = [model.device for model in models.values()]
    if devices[0] != devices[1]:
        raise ValueError(f"policy and reference must be on one device, they are on {devices[0]} and {devices[1]}")
    lists = [prompts] if held_out_prompts is None else [prompts, held_out_prompts]
    context = min(sampler.policy.decoder.n_positions, reference.n_positions)
    for texts in lists:
        encode_prompts(tokenizer, texts, context, config.gen_len)
    seen = set(prompts) & set(held_out_prompts or ())
    if seen:
        raise ValueError(f"held-out prompts must not be among the given ones, as is {min(seen)[:20]!r}")
    given, *others = (_comparison(sampler, list(texts)) for texts in lists)
    held_out = others[0] if others else None
    return Evaluation(dataclasses.asdict(config), given, held_out, symptoms(given, held_out))


# ---- samples --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sampler:
    """Draws and scores samples of two models."""

    policy: ActorCritic
    reference: Decoder
    tokenizer: Tokenizer
    reward_fn: RewardFunction
    second_scorer: RewardFunction | None
    config: EvaluationConfig

    def draw(self, model: ActorCritic, prompts: Sequence[str]) -> Rollout:
        """`samples` rows, the prompts in turn.

        The seed is the same for both models: pairs have prompt and random numbers in common, their differences less
        noise.
        """
        c, s = self.config, self.config.sampling
        settings = PPOConfig(gen_len=c.gen_len, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p,
                             eos_token_id=c.eos_token_id)  # fmt: skip
        drawn = _in_turn(prompts, c.samples)
        return collect_rollout(self._models(model), drawn, self.reward_fn, settings, self._generator(0))

    def full_softmax(self, model: ActorCritic, rollout: Rollout) -> dict[str, Tensor]:
        """What both models say of a rollout's tokens (N, R) in their full softmax (see `logprobs_in_batches`)."""
        return logprobs_in_batches(self._models(model), rollout.tokens, rollout.mask, self.config.gen_len, 1.0)

    def candidates(self, prompts: Sequence[str], n: int) -> BestOfN:
        """n responses of the reference to each prompt."""
        c = self.config
        return best_of_n(
            self.reference, prompts, self.reward_fn, n, tokenizer=self.tokenizer, gen_len=c.gen_len,
            sampling=c.sampling, eos_token_id=c.eos_token_id, generator=self._generator(1), batch_size=c.batch_size,
        )  # fmt: skip

    def second(self, prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64] | None:
        """The second scorer's scores; None without one."""
        if self.second_scorer is None:
            return None
        try:
            return call_reward(self.second_scorer, prompts, responses).numpy()
        except ValueError as error:
            raise ValueError(f"the second scorer: {error}") from error

    def _models(self, model: ActorCritic) -> Models:
        precision = Precision("fp32", self.reference.device)
        return Models(model, self.reference, self.tokenizer, precision, None, self.config.batch_size)

    def _generator(self, use: int) -> torch.Generator:
        return torch.Generator(self.reference.device).manual_seed((self.config.seed + use) % 2**63)


def _in_turn(prompts: Sequence[str], count: int) -> list[str]:
    return [prompts[i % len(prompts)] for i in range(count)]


def _per_sequence(x: Tensor) -> NDArray[np.float64]:
    """Sums over the tokens, (N, R) to (N,)."""
    return x.double().sum(-1).cpu().numpy()


def _scores(rollout: Rollout) -> NDArray[np.float64]:
    return rollout.scores.double().cpu().numpy()


def _pairs(before: Rollout, after: Rollout) -> list[Pair]:
    columns = before.prompts, before.responses, before.scores.tolist(), after.responses, after.scores.tolist()
    return [Pair(*fields) for fields in zip(*columns, strict=True)]


# ---- the comparison -------------------------------------------------------------------------------------------------


def _comparison(sampler: _Sampler, prompts: list[str]) -> Comparison:
    c, interval = sampler.config, sampler.config.bootstrap
    head = with_value_head(sampler.reference, None)
    after, before = sampler.draw(sampler.policy, prompts), sampler.draw(head, prompts)
    full = sampler.full_softmax(sampler.policy, after)
    seconds = [sampler.second(rollout.prompts, rollout.responses) for rollout in (after, before)]
    unit = unit_of(before.responses)
    kl_exact, kl_full_softmax = (interval.mean(_per_sequence(x)) for x in (after.exact_kl, full["exact_kl"]))
    kl = max(kl_exact.mean, kl_full_softmax.mean)
    equal = n_of_kl(kl) if kl < best_of_n_kl(c.max_n) else None
    drawn = sampler.candidates(_in_turn(prompts, c.best_of_prompts), max(*c.best_of, math.ceil(equal or 1)))
    scores = drawn.candidate_scores.numpy()
    repeated = [prompt for prompt in drawn.prompts for _ in range(scores.shape[1])]
    second = sampler.second(repeated, [text for row in drawn.candidates for text in row])

    def point(n: float) -> BestOfNPoint:
        values = None if second is None else expected_best_of_n(scores, n, second.reshape(scores.shape))
        reward = interval.mean(expected_best_of_n(scores, n))
        return BestOfNPoint(n, best_of_n_kl(n), reward, None if values is None else interval.mean(values))

    frontier, spending, why = _beside_optimum(after, before, drawn, c)
    return Comparison(
        prompts=tuple(prompts),
        policy=_figures(after, full["ref_logprobs"], seconds[0], unit, interval),
        reference=_figures(before, sampler.full_softmax(head, before)["ref_logprobs"], seconds[1], unit, interval),
        gain=interval.mean(_scores(after) - _scores(before)),
        second_gain=None if seconds[0] is None or seconds[1] is None else interval.mean(seconds[0] - seconds[1]),
        kl_exact=kl_exact,
        kl_sampled=interval.mean(_per_sequence(after.logprobs - after.ref_logprobs)),
        kl_full_softmax=kl_full_softmax,
        best_of_n=tuple(map(point, c.best_of)),
        equal_kl=None if equal is None else point(equal),
        ahead=None if equal is None else interval.difference(_scores(after), expected_best_of_n(scores, equal)),
        pairs=tuple(_pairs(before, after)),
        spending=spending,
        frontier=frontier,
        no_optimum=why,
    )


def _figures(
    rollout: Rollout,
    ref_logprobs: Tensor,
    second: NDArray[np.float64] | None,
    unit: str,
    interval: Bootstrap,
) -> Figures:
    """ref_logprobs: (N, R), of the reference's full softmax."""
    responses, tokens = rollout.responses, rollout.response_mask.sum(-1).double()
    nll = -ref_logprobs.double().sum().item() / tokens.sum().item()  # nats a token
    texts = [units(text, unit) for text in responses]
    return Figures(
        reward=interval.mean(_scores(rollout)),
        second=None if second is None else interval.mean(second),
        perplexity=math.exp(min(nll, LARGEST_EXPONENT)),
        distinct_1=distinct_n(texts, 1),
        distinct_2=distinct_n(texts, 2),
        distinct_3=distinct_n(texts, 3),
        self_bleu=self_bleu(texts),
        characters=fmean(map(len, responses)),
        tokens=tokens.mean().item(),
        repeated=fmean(map(repeated_share, texts)),
        unit=unit,
    )


def _beside_optimum(
    after: Rollout, before: Rollout, drawn: BestOfN, config: EvaluationConfig
) -> tuple[tuple[OptimumPoint, ...], Spending | None, str]:
    """The optimum from all samples of the reference, the policy's reward and exact KL beside it; else why not."""
    scores: dict[str, list[float]] = {}
    for prompt, score in zip(before.prompts, _scores(before), strict=True):
        scores.setdefault(prompt, []).append(score)
    for prompt, row in zip(drawn.prompts, drawn.candidate_scores.tolist(), strict=True):
        scores.setdefault(prompt, []).extend(row)
    try:
        frontier = Optimum(scores, described(config.sampling), config.bootstrap)
    except ValueError as error:
        return (), None, str(error)
    reward, kl = config.bootstrap.mean(_scores(after)), config.bootstrap.mean(_per_sequence(after.exact_kl))
    return tuple(frontier.curve()), frontier.spent(reward, kl, config.kl_coef), ""
