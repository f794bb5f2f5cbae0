"""What an evaluation found: the records of policy against reference, as tables and as JSON.

They are made by `evaluation.evaluate`, judged by `symptoms`, and shown by `html_report`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from minirlhf.evaluation.statistics import Estimate


@dataclass(frozen=True)
class Pair:
    """Two continuations of one prompt, with their rewards: by the reference, and by the policy."""

    prompt: str
    before: str
    before_reward: float
    after: str
    after_reward: float


@dataclass(frozen=True)
class Figures:
    """One model's samples.

    reward: mean. second: mean of the second scorer, None without one.
    perplexity: of the response tokens under the reference, its own full distribution: exp of the mean negative
        log-likelihood of a token.
    distinct_1, 2, 3: distinct character n-grams over all, of all responses together; they fall as samples are added.
    self_bleu: see `text_statistics`. characters, tokens: mean length of a response.
    repeated: mean share of a response's characters that occurred in it before.
    """

    reward: Estimate
    second: Estimate | None
    perplexity: float
    distinct_1: float
    distinct_2: float
    distinct_3: float
    self_bleu: float
    characters: float
    tokens: float
    repeated: float


@dataclass(frozen=True)
class BestOfNPoint:
    """Best-of-n of the reference. n: between integers at equal KL. kl: its bound, nats a sequence."""

    n: float
    kl: float
    reward: Estimate
    second: Estimate | None


@dataclass(frozen=True)
class Comparison:
    """Policy against reference on one list of prompts.

    gain, second_gain: mean of the policy less mean of the reference.
    kl_exact: KL(policy || reference) a sequence, nats: at each token of the policy's samples, over its whole sampling
        set, in the distribution that was sampled. kl_sampled: log-ratio of the sampled tokens, the same in expectation.
    kl_full_softmax: as kl_exact, with the models' own distributions (temperature 1, nothing truncated).
    best_of_n: of the reference, on the same prompts. equal_kl: at the KL of the policy; None: more than `evaluation.
        MAX_N` candidates would be needed. ahead: reward of the policy less that of best-of-n at equal KL.
    pairs: all samples, before and after.
    """

    prompts: tuple[str, ...]
    policy: Figures
    reference: Figures
    gain: Estimate
    second_gain: Estimate | None
    kl_exact: Estimate
    kl_sampled: Estimate
    kl_full_softmax: Estimate
    best_of_n: tuple[BestOfNPoint, ...]
    equal_kl: BestOfNPoint | None
    ahead: Estimate | None
    pairs: tuple[Pair, ...]

    @property
    def kl(self) -> float:
        """What the policy is charged with: the larger of kl_exact and kl_full_softmax.

        They are one without truncation. With it neither is the KL to the reference as it is sampled, which is
        infinite where the policy's sampling set is not within the reference's.
        """
        return max(self.kl_exact.mean, self.kl_full_softmax.mean)

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Name of a figure, of the reference, of the policy."""
        before, after = self.reference, self.policy
        yield "reward", str(before.reward), str(after.reward)
        if before.second is not None:
            yield "second scorer", str(before.second), str(after.second)
        yield "reward gained", "", str(self.gain)
        if self.second_gain is not None:
            yield "second scorer gained", "", str(self.second_gain)
        yield "KL exact, nats a sequence", "", str(self.kl_exact)
        yield "KL sampled", "", str(self.kl_sampled)
        yield "KL full softmax", "", str(self.kl_full_softmax)
        yield "perplexity under the reference", f"{before.perplexity:.2f}", f"{after.perplexity:.2f}"
        names = ("distinct_1", "distinct_2", "distinct_3", "self_bleu", "characters", "tokens", "repeated")
        titles = ("distinct-1", "distinct-2", "distinct-3", "self-BLEU", "characters a response", "tokens a response",
                  "share of repeated characters")  # fmt: skip
        for name, title in zip(names, titles, strict=True):
            yield title, f"{getattr(before, name):.3f}", f"{getattr(after, name):.3f}"

    def best_of_n_rows(self) -> Iterator[tuple[str, str, str, str]]:
        """Name, KL, reward and second score of best-of-n at each n and at equal KL, by n, then of the policy."""
        points = [(f"best of {point.n:g}", point) for point in self.best_of_n]
        if self.equal_kl is not None:
            points.append((f"best of {self.equal_kl.n:.2f}, at the policy's KL", self.equal_kl))
        for name, point in sorted(points, key=lambda named: named[1].n):
            yield name, f"{point.kl:.3f}", str(point.reward), _or_nothing(point.second)
        yield "policy", f"{self.kl:.3f}", str(self.policy.reward), _or_nothing(self.policy.second)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluation.evaluate` returns.

    settings: the fields of the EvaluationConfig. given, held_out: on the prompts that the policy was trained on, and
    on others. symptoms: what looks like reward hacking, a sentence each.
    """

    settings: dict[str, Any]
    given: Comparison
    held_out: Comparison | None
    symptoms: tuple[str, ...]

    @property
    def comparisons(self) -> dict[str, Comparison]:
        """Title -> comparison, of those that there are."""
        named = {"given prompts": self.given, "held-out prompts": self.held_out}
        return {title: comparison for title, comparison in named.items() if comparison is not None}

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return dataclasses.asdict(self)

    def lines(self) -> Iterator[str]:
        """Tables for a terminal, without the samples."""
        for title, comparison in self.comparisons.items():
            yield title
            yield from _table([("", "reference", "policy"), *comparison.rows()])
            yield ""
            yield from _table([("", "KL", "reward", "second scorer"), *comparison.best_of_n_rows()])
            yield _ahead(comparison)
            yield ""
        yield from [f"! {symptom}" for symptom in self.symptoms] or ["no symptom of reward hacking"]


def _ahead(comparison: Comparison) -> str:
    if comparison.ahead is None:
        return f"  the policy's KL of {comparison.kl:.2f} is beyond what best-of-n was drawn for"
    return f"  policy less best-of-n at equal KL: {comparison.ahead}"


def _or_nothing(estimate: Estimate | None) -> str:
    return "" if estimate is None else str(estimate)


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(f"{cell:{'>' if i else '<'}{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
