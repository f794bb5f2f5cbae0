"""Compare a policy with its reference on fresh samples: the reward gained, its KL, and signs of reward hacking."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor

from minirlhf.common.validation import (
    require,
    require_config,
    require_non_negative,
    require_positive_ints,
    require_token_ids,
)
from minirlhf.device.precision import Precision
from minirlhf.device.processes import processes
from minirlhf.evaluation.best_of import best_of_n, best_of_n_kl, expected_best_of_n, n_of_kl
from minirlhf.evaluation.findings import BestOfNPoint, Comparison, Evaluation, Figures, Pair, symptoms
from minirlhf.evaluation.optimum import Optimum, OptimumPoint, described
from minirlhf.evaluation.statistics import Array, Bootstrap
from minirlhf.generation.generate import language_model
from minirlhf.generation.sampling import SamplingConfig
from minirlhf.models.decoder import Decoder
from minirlhf.models.heads import ActorCritic, with_value_head
from minirlhf.models.prepared import Models
from minirlhf.rewards.base import RewardFunction, score_all
from minirlhf.rl.config import PPOConfig
from minirlhf.rl.rollout import Rollout, collect_rollout, logprobs_in_batches
from minirlhf.text.prompts import as_prompts, require_room
from minirlhf.text.statistics import distinct_n, repeated_share, self_bleu, unit_of, units
from minirlhf.text.tokenizer import Tokenizer, require_tokenizer

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
    eos_token_id: int | tuple[int, ...] | None = None  # one or several; None: every response has gen_len tokens
    best_of: tuple[int, ...] = (2, 4, 8, 16)  # each at most max_n
    max_n: int = MAX_N  # how far best-of-n is followed to the policy's KL; at most MAX_N
    best_of_prompts: int = 64  # for which candidates are drawn, the prompts in turn
    kl_coef: float | None = None  # of the training; adds reward - kl_coef KL of policy and optimum
    resamples: int = 2000  # of the bootstrap
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive_ints(self, "samples", "gen_len", "max_n", "best_of_prompts")
        require(self, "max_n", self.max_n <= MAX_N, f"at most {MAX_N}")
        require(self, "samples", self.samples >= 2, "at least 2")
        require_token_ids(self, "eos_token_id")
        if self.kl_coef is not None:
            require_non_negative(self, "kl_coef")
        fine = isinstance(self.best_of, (tuple, list)) and len(self.best_of) > 0
        fine = fine and all(type(n) is int and 1 <= n <= self.max_n for n in self.best_of)
        require(self, "best_of", fine, f"a tuple of integers from 1 to {self.max_n}")
        object.__setattr__(self, "best_of", tuple(sorted(set(self.best_of))))
        require(self, "sampling", isinstance(self.sampling, SamplingConfig), "a SamplingConfig")
        _ = self.bootstrap  # resamples and seed are checked there

    @property
    def bootstrap(self) -> Bootstrap:
        """Makes the confidence intervals."""
        return Bootstrap(self.resamples, seed=self.seed)


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

    policy, reference: in eval mode, on one device, with the vocabulary of the tokenizer. Of several processes each
        samples and scores some of the rows, and all get the result.
    held_out_prompts: prompts that the policy was not trained on. second_scorer: a reward that it was not trained on, of
        another kind, such as `NGramScorer`.
    Raises ValueError for no prompts, an empty or too long one, one that is on both lists, models or tokenizer that do
    not fit each other, and scores that are not finite numbers; of prompts and models before anything is sampled.
    """
    config = require_config(config, EvaluationConfig)
    require_tokenizer(tokenizer)
    reference = language_model(reference)
    sampler = _Sampler(with_value_head(policy, None), reference, tokenizer, reward_fn, second_scorer, config)
    decoder = sampler.policy.decoder
    decoder.fit_vocabulary(len(tokenizer), "policy")
    reference.fit_vocabulary(len(tokenizer), "reference")
    if decoder.device != reference.device:
        devices = f"{decoder.device} and {reference.device}"
        raise ValueError(f"policy and reference must be on one device, they are on {devices}")
    given_lists = [prompts] if held_out_prompts is None else [prompts, held_out_prompts]
    lists = [list(dict.fromkeys(as_prompts(texts, tokenizer))) for texts in given_lists]  # each counts once
    for texts in lists:
        require_room(texts, tokenizer, min(decoder.n_positions, reference.n_positions), config.gen_len)
    if seen := set(lists[0]) & {prompt for texts in lists[1:] for prompt in texts}:
        raise ValueError(f"held-out prompts must not be among the given ones, as is {min(seen)[:20]!r}")
    given, *others = (_comparison(sampler, texts) for texts in lists)
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

    def draw(self, model: ActorCritic, prompts: Sequence[str]) -> tuple[Rollout, dict[str, Tensor]]:
        """`samples` rows, the prompts in turn, and what both models say of them in their full softmax.

        The seed is the same for both models: pairs have prompt and random numbers in common, their differences less
        noise.
        """
        c, s = self.config, self.config.sampling
        settings = PPOConfig(gen_len=c.gen_len, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p,
                             eos_token_id=c.eos_token_id)  # fmt: skip
        models = Models(model, self.reference, self.tokenizer, Precision("fp32", self.reference.device))
        drawn = collect_rollout(models, _in_turn(prompts, c.samples), self.reward_fn, settings, self.generator(0))
        group = processes()
        mine = group.share(len(drawn))
        full = logprobs_in_batches(models, drawn.tokens[mine], drawn.mask[mine], c.gen_len, 1.0)
        return drawn, dict(zip(full, group.gather_rows(len(drawn), *full.values()), strict=True))

    def second(self, prompts: Sequence[str], responses: Sequence[str]) -> Array | None:
        """The second scorer's scores; None without one."""
        if self.second_scorer is None:
            return None
        try:
            return score_all(self.second_scorer, prompts, responses).numpy()
        except ValueError as error:
            raise ValueError(f"the second scorer: {error}") from error

    def generator(self, use: int) -> torch.Generator:
        return torch.Generator(self.reference.device).manual_seed((self.config.seed + use) % 2**63)


def _in_turn(prompts: Sequence[str], count: int) -> list[str]:
    return [prompts[i % len(prompts)] for i in range(count)]


def _array(x: Tensor) -> Array:
    return x.double().cpu().numpy()


# ---- the comparison -------------------------------------------------------------------------------------------------


def _comparison(sampler: _Sampler, prompts: list[str]) -> Comparison:
    c, interval = sampler.config, sampler.config.bootstrap
    after, full = sampler.draw(sampler.policy, prompts)
    before, full_before = sampler.draw(with_value_head(sampler.reference, None), prompts)
    new, old = _array(after.scores), _array(before.scores)
    new_second, old_second = (sampler.second(rollout.prompts, rollout.responses) for rollout in (after, before))
    unit = unit_of(before.responses)
    kl_exact, kl_full_softmax, kl_sampled = (
        interval.mean(_array(x.sum(-1, dtype=torch.float64)))
        for x in (after.exact_kl, full["exact_kl"], after.logprobs - after.ref_logprobs)
    )
    kl = max(kl_exact.mean, kl_full_softmax.mean)
    equal = n_of_kl(kl) if kl < best_of_n_kl(c.max_n) else None
    drawn = best_of_n(
        sampler.reference, _in_turn(prompts, c.best_of_prompts), sampler.reward_fn,
        max(*c.best_of, math.ceil(equal or 1)), tokenizer=sampler.tokenizer, gen_len=c.gen_len, sampling=c.sampling,
        eos_token_id=c.eos_token_id, generator=sampler.generator(1),
    )  # fmt: skip
    scores = drawn.candidate_scores.numpy()
    repeated = [prompt for prompt in drawn.prompts for _ in range(scores.shape[1])]
    second = sampler.second(repeated, [text for row in drawn.candidates for text in row])

    def point(n: float) -> BestOfNPoint:
        values = None if second is None else expected_best_of_n(scores, n, second.reshape(scores.shape))
        reward = interval.mean(expected_best_of_n(scores, n))
        return BestOfNPoint(n, best_of_n_kl(n), reward, None if values is None else interval.mean(values))

    of_reference: dict[str, list[float]] = {}
    for texts, given in ((before.prompts, old), (repeated, scores.ravel())):
        for prompt, score in zip(texts, given.tolist(), strict=True):
            of_reference.setdefault(prompt, []).append(score)
    frontier: tuple[OptimumPoint, ...] = ()
    spending, why = None, ""
    try:
        optimum = Optimum(of_reference, described(c.sampling), interval)
        frontier = tuple(optimum.curve())
        spending = optimum.spent(interval.mean(new), kl_exact, c.kl_coef)
    except ValueError as error:
        why = str(error)
    columns = after.prompts, before.responses, old.tolist(), after.responses, new.tolist()
    return Comparison(
        prompts=tuple(prompts),
        policy=_figures(after, full["ref_logprobs"], new_second, unit, interval),
        reference=_figures(before, full_before["ref_logprobs"], old_second, unit, interval),
        gain=interval.mean(new - old),
        second_gain=None if new_second is None or old_second is None else interval.mean(new_second - old_second),
        kl_exact=kl_exact,
        kl_sampled=kl_sampled,
        kl_full_softmax=kl_full_softmax,
        best_of_n=tuple(map(point, c.best_of)),
        equal_kl=None if equal is None else point(equal),
        ahead=None if equal is None else interval.difference(new, expected_best_of_n(scores, equal)),
        pairs=tuple(Pair(*fields) for fields in zip(*columns, strict=True)),
        spending=spending,
        frontier=frontier,
        no_optimum=why,
    )


def _figures(rollout: Rollout, ref_logprobs: Tensor, second: Array | None, unit: str, interval: Bootstrap) -> Figures:
    """ref_logprobs: (N, R), of the reference's full softmax."""
    responses, tokens = rollout.responses, rollout.response_mask.sum(-1).double()
    nll = -ref_logprobs.double().sum().item() / tokens.sum().item()  # nats a token
    texts = [units(text, unit) for text in responses]
    return Figures(
        reward=interval.mean(_array(rollout.scores)),
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
