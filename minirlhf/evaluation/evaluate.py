"""Policy against reference on fresh samples: what PPO gained, what it paid, and whether it hacked its reward.

`compare` gives a few figures at the end of a run; `evaluate` all of them, with confidence intervals, a second scorer,
held-out prompts, and best-of-n of the reference at equal KL. Both sample with their own seed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minirlhf.common.text import printable
from minirlhf.common.validation import require, require_counts, require_positive_ints
from minirlhf.evaluation.best_of import best_of_n, best_of_n_kl, encode_prompts, expected_best_of_n, n_of_kl
from minirlhf.evaluation.bootstrap import Bootstrap, Estimate
from minirlhf.evaluation.comparison import BestOfNPoint, Comparison, Evaluation, Figures
from minirlhf.evaluation.comparison import Pair as Pair
from minirlhf.evaluation.symptoms import symptoms
from minirlhf.evaluation.text_statistics import distinct_n, repeated_share, self_bleu
from minirlhf.generation.sampling import SamplingConfig
from minirlhf.models.gpt2 import GPT2
from minirlhf.models.heads import ActorCritic
from minirlhf.rewards.base import RewardFunction, call_reward
from minirlhf.rl.rollout import Rollout, collect_rollout, score_in_batches
from minirlhf.text.tokenizer import Tokenizer

MARKUP = r"[\\`*_~\[\]<&|$]"  # what Markdown, HTML in it, or a table would take for its own
MAX_N = 64  # candidates a prompt at most, when best-of-n is followed to the policy's KL
LARGEST_EXPONENT = 700.0  # of which a float holds the exponential


@dataclass(frozen=True)
class EvaluationConfig:
    """Settings of an evaluation. Raises ValueError for a bad one.

    Without truncation (`sampling` as it stands) there is one KL; with it there are two (see `Comparison.kl`).
    """

    samples: int = 512  # of each model on each list of prompts, the prompts in turn; at least 2
    gen_len: int = 16  # new tokens a prompt
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    eos_token_id: int | None = None  # None: every response has gen_len tokens
    best_of: tuple[int, ...] = (2, 4, 8, 16)  # each at most MAX_N
    best_of_prompts: int = 64  # that candidates are drawn for, the prompts in turn
    resamples: int = 2000  # of the bootstrap
    confidence: float = 0.95
    seed: int = 0
    batch_size: int = 128  # sequences a forward pass

    def __post_init__(self) -> None:
        require_positive_ints(self, "samples", "gen_len", "best_of_prompts", "resamples", "batch_size")
        require(self, "samples", self.samples >= 2, "at least 2")
        require_counts(self, "seed")
        require(self, "seed", self.seed < 2**63, "below 2**63")
        if self.eos_token_id is not None:
            require_counts(self, "eos_token_id")
        fine = isinstance(self.best_of, (tuple, list)) and len(self.best_of) > 0
        fine = fine and all(type(n) is int and 1 <= n <= MAX_N for n in self.best_of)
        require(self, "best_of", fine, f"a tuple of integers from 1 to {MAX_N}")
        object.__setattr__(self, "best_of", tuple(sorted(set(self.best_of))))
        require(self, "sampling", isinstance(self.sampling, SamplingConfig), "a SamplingConfig")
        _ = self.bootstrap  # resamples and confidence are checked there

    @property
    def bootstrap(self) -> Bootstrap:
        """What makes the confidence intervals."""
        return Bootstrap(self.resamples, self.confidence, self.seed)


# ---- all of it ------------------------------------------------------------------------------------------------------


def evaluate(
    policy: ActorCritic | GPT2,
    reference: GPT2,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    reward_fn: RewardFunction,
    held_out_prompts: Sequence[str] | None = None,
    second_scorer: RewardFunction | None = None,
    config: EvaluationConfig | None = None,
) -> Evaluation:
    """Measure policy and reference on the prompts that the policy was trained on, and on others.

    policy, reference: in eval mode, on one device, with the vocabulary of the tokenizer.
    held_out_prompts: prompts that the policy was not trained on; None: none are looked at.
    second_scorer: a reward that the policy was not trained on, of another kind, such as `NGramScorer`; None: none.
    Raises ValueError for no prompts, an empty or too long one, one that is on both lists, models or tokenizer that do
    not fit each other, and scores that are not finite numbers; of prompts and models before anything is sampled.
    """
    config = config or EvaluationConfig()
    actor = policy if isinstance(policy, ActorCritic) else _with_value_head(policy)
    _check_models(actor.gpt2, reference, tokenizer)
    lists = [prompts] if held_out_prompts is None else [prompts, held_out_prompts]
    context = min(actor.gpt2.config.n_positions, reference.config.n_positions)
    for texts in lists:
        encode_prompts(tokenizer, texts, context, config.gen_len)
    seen = set(prompts) & set(held_out_prompts or ())
    if seen:
        raise ValueError(f"held-out prompts must not be among the given ones, as is {min(seen)[:20]!r}")
    judge = _Judge(actor, reference, tokenizer, reward_fn, second_scorer, config)
    comparisons = [judge.compare(texts) for texts in lists]
    given, held_out = comparisons[0], comparisons[1] if len(comparisons) > 1 else None
    return Evaluation(dataclasses.asdict(config), given, held_out, symptoms(given, held_out))


@dataclass(frozen=True)
class _Samples:
    """What one model wrote. scores, second: (N,) fp64, by the reward and the second scorer (None without one).

    full: results (N, R) of scoring it with the models' own distributions (see `score_in_batches`).
    """

    rollout: Rollout
    scores: NDArray[np.float64]
    second: NDArray[np.float64] | None
    full: dict[str, Tensor]


@dataclass(frozen=True)
class _Judge:
    """The arguments of an evaluation, which each part of it needs."""

    policy: ActorCritic
    reference: GPT2
    tokenizer: Tokenizer
    reward_fn: RewardFunction
    second_scorer: RewardFunction | None
    config: EvaluationConfig

    def compare(self, prompts: Sequence[str]) -> Comparison:
        interval = self.config.bootstrap
        # The same seed: the pairs have prompt and random numbers in common, and their differences less noise.
        after, before = self._draw(self.policy, prompts), self._draw(_with_value_head(self.reference), prompts)
        kl_exact = interval.mean(_per_sequence(after.rollout.exact_kl))
        kl_full_softmax = interval.mean(_per_sequence(after.full["exact_kl"]))
        second_gain = None
        if after.second is not None and before.second is not None:
            second_gain = interval.mean(after.second - before.second)
        points, equal_kl, ahead = self._best_of_n(prompts, max(kl_exact.mean, kl_full_softmax.mean), after.scores)
        return Comparison(
            prompts=tuple(prompts),
            policy=self._figures(after),
            reference=self._figures(before),
            gain=interval.mean(after.scores - before.scores),
            second_gain=second_gain,
            kl_exact=kl_exact,
            kl_sampled=interval.mean(_per_sequence(after.rollout.logprobs - after.rollout.ref_logprobs)),
            kl_full_softmax=kl_full_softmax,
            best_of_n=points,
            equal_kl=equal_kl,
            ahead=ahead,
            pairs=_pairs(before.rollout, after.rollout),
        )

    def _draw(self, model: ActorCritic, prompts: Sequence[str]) -> _Samples:
        c = self.config
        rollout = collect_rollout(
            model, self.reference, self.tokenizer, _in_turn(prompts, c.samples), self.reward_fn, c.gen_len, c.sampling,
            eos_token_id=c.eos_token_id, generator=self._generator(0), forward_batch_size=c.batch_size,
        )  # fmt: skip
        full = score_in_batches(model, self.reference, rollout.tokens, rollout.mask, c.gen_len, 1.0, None, c.batch_size)
        second = self._second(rollout.prompts, rollout.responses)
        return _Samples(rollout, rollout.scores.double().cpu().numpy(), second, full)

    def _figures(self, x: _Samples) -> Figures:
        responses, interval = x.rollout.responses, self.config.bootstrap
        tokens = x.rollout.response_mask.sum(-1).double()
        nll = -x.full["ref_logprobs"].double().sum().item() / tokens.sum().item()  # nats a token
        return Figures(
            reward=interval.mean(x.scores),
            second=None if x.second is None else interval.mean(x.second),
            perplexity=math.exp(min(nll, LARGEST_EXPONENT)),
            distinct_1=distinct_n(responses, 1),
            distinct_2=distinct_n(responses, 2),
            distinct_3=distinct_n(responses, 3),
            self_bleu=self_bleu(responses),
            characters=fmean(map(len, responses)),
            tokens=tokens.mean().item(),
            repeated=fmean(map(repeated_share, responses)),
        )

    def _best_of_n(
        self, prompts: Sequence[str], kl: float, rewards: NDArray[np.float64]
    ) -> tuple[tuple[BestOfNPoint, ...], BestOfNPoint | None, Estimate | None]:
        """Best-of-n of the reference at every n, and at this KL; and rewards (N,) less those of the latter."""
        c = self.config
        equal = n_of_kl(kl) if kl < best_of_n_kl(MAX_N) else math.inf
        candidates = max(*c.best_of, math.ceil(equal) if equal <= MAX_N else 1)
        best = best_of_n(
            self.reference, _in_turn(prompts, c.best_of_prompts), self.reward_fn, candidates,
            tokenizer=self.tokenizer, gen_len=c.gen_len, sampling=c.sampling, eos_token_id=c.eos_token_id,
            generator=self._generator(1), batch_size=c.batch_size,
        )  # fmt: skip
        scores = best.candidate_scores.numpy()
        repeated = [prompt for prompt in best.prompts for _ in range(candidates)]
        second = self._second(repeated, [text for row in best.candidates for text in row])

        def point(n: float) -> BestOfNPoint:
            values = None if second is None else expected_best_of_n(scores, n, second.reshape(scores.shape))
            mean = c.bootstrap.mean
            reward = mean(expected_best_of_n(scores, n))
            return BestOfNPoint(n, best_of_n_kl(n), reward, None if values is None else mean(values))

        points = tuple(map(point, c.best_of))
        if equal > MAX_N:
            return points, None, None
        return points, point(equal), c.bootstrap.difference(rewards, expected_best_of_n(scores, equal))

    def _second(self, prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64] | None:
        if self.second_scorer is None:
            return None
        try:
            return call_reward(self.second_scorer, prompts, responses).numpy()
        except ValueError as error:
            raise ValueError(f"the second scorer: {error}") from error

    def _generator(self, use: int) -> torch.Generator:
        seed = (self.config.seed + use) % 2**63
        return torch.Generator(self.reference.wte.weight.device).manual_seed(seed)


def _check_models(policy: GPT2, reference: GPT2, tokenizer: Tokenizer) -> None:
    for name, model in (("policy", policy), ("reference", reference)):
        model.fit_vocabulary(len(tokenizer), name)
    devices = policy.wte.weight.device, reference.wte.weight.device
    if devices[0] != devices[1]:
        raise ValueError(f"policy and reference must be on one device, they are on {devices[0]} and {devices[1]}")


def _with_value_head(model: GPT2) -> ActorCritic:
    """The model as a policy, with a value head that nobody reads."""
    return ActorCritic(model).to(model.wte.weight.device).eval()


def _in_turn(prompts: Sequence[str], count: int) -> list[str]:
    return [prompts[i % len(prompts)] for i in range(count)]


def _per_sequence(x: Tensor) -> NDArray[np.float64]:
    """Sums over the tokens, (N, R) to (N,)."""
    return x.double().sum(-1).cpu().numpy()


def _pairs(before: Rollout, after: Rollout) -> tuple[Pair, ...]:
    columns = before.prompts, before.responses, before.scores.tolist(), after.responses, after.scores.tolist()
    return tuple(Pair(*fields) for fields in zip(*columns, strict=True))


# ---- a few figures at the end of a run ------------------------------------------------------------------------------


def compare(
    policy: ActorCritic,
    reference: GPT2,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    reward_fn: RewardFunction,
    gen_len: int = 16,
    sampling: SamplingConfig | None = None,
    samples: int = 512,
    seed: int = 0,
) -> tuple[dict[str, float], list[Pair]]:
    """Sample `samples` continuations from both models, the prompts in turn, and measure them.

    Returns the figures by name and the samples as pairs. For "policy" and "reference" each: mean reward, distinct-1
    and distinct-2 (over the characters of the responses). `kl`: KL(policy || reference) a sequence (sum over its
    tokens), nats, the exact KL at each token of the policy's samples, in the distribution that was sampled;
    `kl_full_softmax`: the same with the models' untruncated distributions at each token, still on samples of the
    truncated policy.
    Raises ValueError as `collect_rollout`.
    """
    if isinstance(prompts, str) or len(prompts) == 0:
        raise ValueError(f"prompts must be a list with at least one text, got {prompts!r}")
    chosen = _in_turn(prompts, samples)
    device = reference.wte.weight.device

    def draw(model: ActorCritic, full_softmax: bool = False) -> Rollout:
        generator = torch.Generator(device).manual_seed(seed)
        return collect_rollout(
            model, reference, tokenizer, chosen, reward_fn, gen_len, sampling,
            generator=generator, score_full_softmax=full_softmax,
        )  # fmt: skip

    after, before = draw(policy), draw(_with_value_head(reference))
    summary = {}
    for name, rollout in (("policy", after), ("reference", before)):
        summary[f"{name}/reward"] = rollout.scores.mean().item()
        for n in (1, 2):
            summary[f"{name}/distinct_{n}"] = distinct_n(rollout.responses, n)
    summary["kl"] = after.exact_kl.sum(-1).mean().item()
    summary["kl_full_softmax"] = draw(policy, full_softmax=True).exact_kl.sum(-1).mean().item()
    return summary, list(_pairs(before, after))


def before_after_table(pairs: Sequence[Pair], rows: int = 12) -> str:
    """The first rows as a Markdown table that shows the texts as they are: control characters visible, no markup."""
    lines = ["| prompt | before | reward | after | reward |", "|---|---|---|---|---|"]
    for pair in pairs[:rows]:
        texts = [re.sub(MARKUP, r"\\\g<0>", printable(text)) for text in (pair.prompt, pair.before, pair.after)]
        lines.append(f"| {texts[0]} | {texts[1]} | {pair.before_reward:.2f} | {texts[2]} | {pair.after_reward:.2f} |")
    return "\n".join(lines) + "\n"
