"""The best that any policy can do: the frontier of reward against KL, from samples of the reference alone.

Of all policies p, J(p) = E[S] - beta KL(p || ref) is largest for p*(y) ~ ref(y) exp(S(y) / beta) (Ziegler et al. 2019,
section 2.2; Korbak et al. 2022). With N samples of the reference for a prompt and w = exp(S / beta), normalised to
sum 1, its reward is sum w S and its KL sum w log(N w); no policy has as much reward at less KL. Both estimates are
biased by O(1/N), which the jackknife (Quenouille 1956) removes to O(1/N^2).

Everything is in the distribution that the samples come from (docs/optimum.md says what truncation does to it). For a
reward without an upper bound no sample can exclude a rare response with a larger one. How heavy the tail of the weights
is, is said: above a Pareto k of .7 (Vehtari et al. 2024) the largest rewards decide.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from minirlhf.common.validation import is_finite
from minirlhf.evaluation.best_of import best_of_n, loaded
from minirlhf.evaluation.statistics import Array, Bootstrap, Estimate
from minirlhf.generation.sampling import SamplingConfig
from minirlhf.io.files import StrPath
from minirlhf.models.decoder import Decoder
from minirlhf.models.heads import ActorCritic
from minirlhf.rewards.base import RewardFunction
from minirlhf.text.prompts import as_prompts
from minirlhf.text.tokenizer import Tokenizer

Counts = NDArray[np.int64]
ENOUGH = 100  # effective samples in all, below which nothing is said
ENOUGH_OF_EACH = 10  # and of each prompt, below which its bias is no longer small
HEAVIEST = 0.7  # Pareto k of a prompt's weights, above which their means converge slowly
STEEPEST = 1e6  # largest 1 / beta looked at, in units of 1 / (largest reward - smallest)


class EqualRewards(ValueError):
    """All rewards are equal."""


class TooFewSamples(ValueError):
    """What was asked for is beyond what the samples can tell."""


@dataclass(frozen=True)
class OptimumPoint:
    """A point of the frontier.

    beta: the KL coefficient that leads there; None: infinite, the reference itself. reward, kl: a sequence, KL in nats.
    effective_samples: how many equally weighted samples would tell as much (Kish 1965). pareto_k: of the prompt whose
    weights have the heaviest tail.
    """

    beta: float | None
    reward: Estimate
    kl: Estimate
    effective_samples: float
    pareto_k: float

    @property
    def note(self) -> str:
        """A warning where the largest rewards decide; "" where not."""
        limit = "for a reward without an upper bound the true limit is higher"
        return f"the largest rewards decide (Pareto k {self.pareto_k:.2f}): {limit}" if self.pareto_k > HEAVIEST else ""


@dataclass(frozen=True)
class Spending:
    """A policy's reward and KL beside the optimum's.

    needed, best: the optimum with the policy's reward, and with its KL; None where the samples cannot tell.
    beta: of the objectives J, with the optimum's, the policy's and the reference's; None without a beta.
    note: what the samples cannot tell, or what cannot be right; "" if nothing.
    """

    reward: Estimate
    kl: Estimate
    needed: OptimumPoint | None
    best: OptimumPoint | None
    distribution: str
    beta: float | None
    objectives: Mapping[str, float]
    note: str

    @property
    def efficiency(self) -> float | None:
        """KL needed / KL spent; None if the samples cannot tell, or nothing was spent."""
        return self.needed.kl.mean / self.kl.mean if self.needed is not None and self.kl.mean > 0 else None

    def figures(self) -> dict[str, float]:
        """What is known, by name."""
        found = {"optimum/efficiency": self.efficiency}
        if self.needed is not None:
            found |= {"optimum/kl": self.needed.kl.mean, "optimum/effective_samples": self.needed.effective_samples}
        if self.best is not None:
            found["optimum/reward_at_kl"] = self.best.reward.mean
        return {name: x for name, x in found.items() if x is not None} | dict(self.objectives)

    def __str__(self) -> str:
        parts = [f"reward {self.reward.mean:.3f} at {self.kl.mean:.2f} nats"]
        if self.needed is not None:
            parts.append(f"the optimum would need {self.needed.kl.mean:.2f}")
            if self.efficiency is not None:
                samples = f"{self.needed.effective_samples:.0f} effective samples"
                parts[-1] += f" (efficiency {self.efficiency:.2f}, {samples})"
        if self.objectives:
            values = ", ".join(f"{name.partition('/')[2]} {value:.3f}" for name, value in self.objectives.items())
            parts.append(f"reward - {self.beta:.3g} KL: {values}")
        return "; ".join([*parts, self.distribution, *filter(None, [self.note])])


class Optimum:
    """The frontier for one reference, some prompts and one reward.

    scores: prompt -> the rewards (N,) of N independent samples of the reference; each prompt counts alike.
    distribution: what they were drawn from, in words. bootstrap: makes the intervals, given the prompts.
    start: the mean reward of the reference.
    Raises ValueError for no prompts, fewer than 2 samples of one, rewards that are not finite numbers, and rewards that
    are all equal.
    """

    def __init__(
        self, scores: Mapping[str, ArrayLike], distribution: str = "full softmax", bootstrap: Bootstrap | None = None
    ):
        self.scores = {prompt: np.asarray(x, dtype=np.float64) for prompt, x in scores.items()}
        self.distribution, self.bootstrap = distribution, bootstrap or Bootstrap(500)
        if not self.scores:
            raise ValueError("scores is empty: the optimum needs the rewards of at least one prompt's samples")
        for prompt, x in self.scores.items():
            if x.ndim != 1 or len(x) < 2:
                remedy = "draw more samples, or give fewer prompts"
                raise ValueError(f"prompt {prompt[:20]!r}: at least 2 rewards needed, got shape {x.shape}: {remedy}")
            if not np.isfinite(x).all():
                raise ValueError(f"prompt {prompt[:20]!r}: rewards must be finite, got {x[~np.isfinite(x)][0]}")
        every = np.concatenate(list(self.scores.values()))
        self.samples, self.spread = len(every), float(np.ptp(every))
        equal = np.ptp(every.astype(np.float32)) == 0  # a rollout rounds scores to fp32, best-of-n does not
        self.start = float(np.mean([x.mean() for x in self.scores.values()]))
        if equal:
            raise EqualRewards(f"all {self.samples} rewards are {every[0]:g}: every policy is as good as the reference")
        # Distinct rewards with their counts: all that is needed, and few where rewards are counts.
        self._tallies = [np.unique(x, return_counts=True) for x in self.scores.values()]

    # ---- what is asked ----------------------------------------------------------------------------------------------

    def at(self, beta: float) -> OptimumPoint:
        """The optimum for a KL coefficient. Raises ValueError for one that is not above 0, TooFewSamples."""
        if not (isinstance(beta, (int, float)) and 0 < beta < math.inf):
            raise ValueError(f"beta must be a finite number above 0, got {beta!r}")
        if 1 / beta > self._steepest:
            raise self._too_few(f"beta {beta:g}")
        return self._points([1 / beta])[0]

    def at_reward(self, reward: float) -> OptimumPoint:
        """The least KL for a mean reward; 0 for the reference's own or less. Raises TooFewSamples."""
        return self._points([self._solve(0, reward, f"a reward of {reward:.3f}")], reward=reward)[0]

    def at_kl(self, kl: float) -> OptimumPoint:
        """The largest mean reward at a KL in nats a sequence. Raises TooFewSamples."""
        if not kl >= 0:
            raise ValueError(f"a KL divergence is at least 0, got {kl!r}")
        return self._points([self._solve(1, kl, f"a KL of {kl:.2f} nats")], kl=kl)[0]

    def curve(self, count: int = 24) -> list[OptimumPoint]:
        """Points from the reference to the last that the samples can tell, evenly in sqrt(KL); none if there are none.

        Neighbours are then about as far apart in reward, which begins as sqrt(2 KL) times its standard deviation.
        """
        if self._steepest == 0:
            return []
        last = float(self._figures(self._steepest)[1])
        return self._points([self._solve(1, last * (i / count) ** 2, "") for i in range(count)] + [self._steepest])

    def by_prompt(self) -> dict[str, Optimum | None]:
        """The frontier of each prompt alone; None where all of its rewards are equal."""
        return {
            prompt: Optimum({prompt: x}, self.distribution, self.bootstrap) if np.ptp(np.float32(x)) > 0 else None
            for prompt, x in self.scores.items()
        }

    def spent(self, reward: Estimate, kl: Estimate, beta: float | None = None) -> Spending:
        """A policy's mean reward and KL, on the same prompts in the same distribution, beside the optimum's.

        beta: the coefficient that the policy was trained with, for the objective.
        """
        found: dict[str, OptimumPoint] = {}
        notes: list[str] = []
        asked = [("needed", self.at_reward, reward.mean), ("best", self.at_kl, max(0.0, kl.mean))]
        for name, ask, value in [*asked, *([("objective", self.at, beta)] if beta else [])]:
            try:
                found[name] = ask(value)
            except TooFewSamples as error:
                notes.append(str(error))
        notes += [point.note for point in found.values() if point.note][:1]
        needed = found.get("needed")
        if needed is not None:
            slope = 0.0 if needed.beta is None else 1 / needed.beta  # d KL / d reward along the frontier
            mean = needed.kl.mean
            low = mean - math.hypot(mean - needed.kl.low, slope * (reward.mean - reward.low))
            high = mean + math.hypot(needed.kl.high - mean, slope * (reward.high - reward.mean))
            needed = dataclasses.replace(needed, kl=Estimate(mean, max(0.0, low), high))
            if kl.high < needed.kl.low:
                notes.append(
                    "less KL than any policy can have for this reward: the samples are of another reference or other "
                    "prompts, or the policy's sampling sets are smaller than the reference's"
                )
            elif kl.mean < needed.kl.mean and self.distribution != described(None):
                notes.append("beyond 1: what the policy's smaller sampling sets cut off costs nothing")
        objectives: dict[str, float] = {}  # of J = reward - beta KL
        if beta is not None:
            objectives = {"objective/policy": reward.mean - beta * kl.mean, "objective/reference": self.start}
            if "objective" in found:
                best = found["objective"]
                objectives["objective/optimum"] = best.reward.mean - beta * best.kl.mean
        return Spending(reward, kl, needed, found.get("best"), self.distribution, beta, objectives, "; ".join(notes))

    # ---- how it is computed; tilt = 1 / beta ------------------------------------------------------------------------

    def _figures(self, tilt: float) -> Array:
        """Mean over the prompts of the optimum's reward and KL, without bias to the order 1/N: (2,)."""
        return np.mean([_corrected(*tally, tilt) for tally in self._tallies], 0)

    def _effective(self, tilt: float) -> tuple[float, float]:
        """Effective samples of the mean over the prompts, and of the prompt that has fewest."""
        each = []
        for values, counts in self._tallies:
            w = np.exp((values - values[-1]) * tilt)
            each.append((counts @ w) ** 2 / (counts @ w**2))
        return len(each) ** 2 / sum(1 / x for x in each), min(each)

    @cached_property
    def _steepest(self) -> float:
        """The largest tilt that the samples can tell of; 0: not even the mean of the reference."""

        def enough(tilt: float) -> bool:
            in_all, least = self._effective(tilt)
            return in_all >= ENOUGH and least >= ENOUGH_OF_EACH

        high = STEEPEST / self.spread
        return high if enough(high) else _bisect(lambda tilt: not enough(tilt), high) if enough(0.0) else 0.0

    def _too_few(self, asked: str) -> TooFewSamples:
        samples = f"{self.samples:,} samples of {len(self.scores)} prompt{'s' * (len(self.scores) > 1)}"
        reach = f"at least {ENOUGH} in all, {ENOUGH_OF_EACH} of each prompt, are needed"
        if self._steepest > 0:
            reward, kl = self._figures(self._steepest)
            reach = f"they reach to reward {reward:.3f} at {kl:.2f} nats, beta {1 / self._steepest:.2g}"
        return TooFewSamples(f"{asked} is beyond what {samples} can tell: {reach}")

    def _solve(self, index: int, target: float, asked: str) -> float:
        """The tilt at which the reward (index 0) or the KL (1) reaches a target; 0 if the reference has it."""
        if not math.isfinite(target):
            raise ValueError(f"expected a finite number, got {target!r}")
        if self._steepest == 0:
            raise self._too_few(asked)
        if self._figures(0.0)[index] >= target:
            return 0.0
        if self._figures(self._steepest)[index] < target:
            raise self._too_few(asked)
        return _bisect(lambda tilt: bool(self._figures(tilt)[index] >= target), self._steepest)

    def _points(
        self, tilts: Sequence[float], reward: float | None = None, kl: float | None = None
    ) -> list[OptimumPoint]:
        """The points at these tilts, with intervals: of the other figure where a reward or KL is given.

        Along the frontier d KL = tilt d reward, so a resampled frontier is followed to the given figure by its tangent.
        """
        figures = np.stack([self._figures(tilt) for tilt in tilts])  # (T, 2)
        generator = np.random.default_rng(self.bootstrap.seed)
        resamples = self.bootstrap.resamples
        drawn = [_resampled(*tally, np.array(tilts), resamples, generator) for tally in self._tallies]
        replicates = np.mean(drawn, 0)  # (resamples, T, 2)
        replicates = replicates - replicates.mean(0) + figures  # resampling doubles the bias
        points = []
        for i, tilt in enumerate(tilts):
            rewards, kls = replicates[:, i, 0], replicates[:, i, 1]
            if reward is not None and tilt > 0:
                rewards, kls, figures[i, 0] = np.full_like(rewards, reward), kls + tilt * (reward - rewards), reward
            if kl is not None and tilt > 0:
                rewards, kls, figures[i, 1] = rewards + (kl - kls) / tilt, np.full_like(kls, kl), kl
            of_reward, of_kl = map(self.bootstrap.interval, map(float, figures[i]), (rewards, kls))
            beta = 1 / tilt if tilt > 0 else None
            heaviest = max(_pareto_k(*tally, tilt) for tally in self._tallies)
            points.append(OptimumPoint(beta, of_reward, of_kl, float(self._effective(tilt)[0]), heaviest))
        return points


def optimum(
    reference: Decoder | ActorCritic | StrPath,
    prompts: Sequence[str],
    reward: RewardFunction,
    *,
    tokenizer: Tokenizer | None = None,
    gen_len: int = 16,
    sampling: SamplingConfig | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    samples: int = 4096,
    seed: int = 0,
    batch_size: int = 128,
) -> Optimum:
    """Sample the reference and compute the best rewards that any policy can have near it.

    samples: in all, shared evenly among the prompts; what they can tell ends where their weights concentrate on few.
    sampling: as the policy will be sampled; None: the full softmax. Other arguments and errors as of `best_of_n`.
    """
    if type(samples) is not int or samples < 1:
        raise ValueError(f"samples must be an integer of at least 1, got {samples!r}")
    model, tokenizer = loaded(reference, tokenizer)
    distinct = list(dict.fromkeys(as_prompts(prompts, tokenizer)))
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    drawn = best_of_n(
        model, distinct, reward, max(2, -(-samples // len(distinct))), tokenizer=tokenizer, gen_len=gen_len,
        sampling=sampling, eos_token_id=eos_token_id, generator=generator, batch_size=batch_size,
    )  # fmt: skip
    return Optimum(dict(zip(distinct, drawn.candidate_scores.numpy(), strict=True)), described(sampling))


def price_of_kl(coef: float, settings: Mapping[str, Any]) -> float | None:
    """A run's KL coefficient per unit of the reward as it was given, which the run scales.

    settings: fields of the run's PPOConfig. None where the run changes scores otherwise: it has another objective.
    """
    scale = settings.get("score_scale", 1.0)
    kept = settings.get("score_clip") is None and settings.get("missing_eos", "keep") == "keep"
    return coef / scale if kept and is_finite(scale) and scale > 0 else None


def described(sampling: SamplingConfig | None) -> str:
    """The distribution that a sampling config draws from, in words."""
    c = sampling or SamplingConfig()
    parts = [f"temperature {c.temperature:g}"] * (c.temperature != 1) + [f"top-k {c.top_k}"] * (c.top_k > 0)
    parts += [f"top-p {c.top_p:g}"] * (c.top_p < 1)
    return f"in the distribution sampled with {', '.join(parts)}" if parts else "in the full softmax"


def _corrected(values: Array, counts: Counts, tilt: float) -> Array:
    """Reward and KL of the optimum from one prompt's samples: (2,), by the jackknife over them."""
    N, d = int(counts.sum()), values - values[-1]
    e = np.exp(d * tilt)

    def figures(n: int, z: Array, a: Array) -> Array:
        reward = a / z
        return np.stack([reward, tilt * reward - np.log(z / n)])

    z, a = counts @ e, counts @ (d * e)
    without = figures(N - 1, np.maximum(z - e, np.finfo(float).tiny), a - d * e)  # (2, U): one sample less
    found: Array = N * figures(N, z, a) - (N - 1) * (without @ counts) / N
    return found + [values[-1], 0.0]  # added last: large rewards would cost digits


def _pareto_k(values: Array, counts: Counts, tilt: float) -> float:
    """The shape of a generalised Pareto distribution fitted to the largest weights of one prompt's samples.

    Means of the weights have a variance for k below 1/2. The largest 3 sqrt(N), at most a fifth, are fitted (Vehtari et
    al. 2024, section 3) by the estimator of Zhang & Stephens (2009), with its weak prior. 0 where they are equal.
    """
    N = int(counts.sum())
    size = min(N // 5, math.ceil(3 * math.sqrt(N)))
    last = values[np.searchsorted(counts.cumsum(), N - size - 1, side="right") :]  # distinct ones, threshold first
    repeats = counts[len(values) - len(last) :]
    x = np.repeat(np.exp((last - last[-1]) * tilt), repeats)[-size:] - math.exp((last[0] - last[-1]) * tilt)
    if size < 5 or x[(size + 2) // 4 - 1] <= 1e-9:  # no tail, or one of equal weights
        return 0.0
    points = 30 + int(math.sqrt(size))
    b = 1 / x[-1] + (1 - np.sqrt(points / (np.arange(points) + 0.5))) / (3 * x[(size + 2) // 4 - 1])
    k = np.log1p(-b[:, None] * x).mean(1)
    likelihood = size * (np.log(-b / k) - k - 1)
    b = b @ (1 / np.exp(np.clip(likelihood - likelihood[:, None], -700, 700)).sum(1))
    return float((size * np.log1p(-b * x).mean() + 5) / (size + 10))


def _resampled(values: Array, counts: Counts, tilts: Array, resamples: int, generator: np.random.Generator) -> Array:
    """Reward and KL of the optimum from resampled counts: (resamples, T, 2)."""
    N, d = int(counts.sum()), values - values[-1]
    e = np.exp(d[:, None] * tilts)  # (U, T)
    drawn = generator.multinomial(N, counts / N, size=resamples)  # (resamples, U)
    z = np.maximum(drawn @ e, np.finfo(float).tiny)
    reward = drawn @ (d[:, None] * e) / z
    return np.stack([reward + values[-1], tilts * reward - np.log(z / N)], -1)


def _bisect(reached: Callable[[float], bool], high: float) -> float:
    """The number in [0, high] from which on `reached` is true, from below."""
    low = 0.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return low
