"""The frontier of the optimum: exact where everything can be enumerated, unbiased in simulations, and never silent."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from conftest import VOCAB, make_gpt2
from minirlhf import GPT2, ActorCritic, GPT2Config, Optimum, SamplingConfig, Tokenizer, optimum
from minirlhf.evaluation.optimum import TooFewSamples, _corrected, _pareto_k, described, price_of_kl
from minirlhf.evaluation.statistics import Bootstrap, Estimate


def by_definition(probabilities, rewards, beta):
    """Reward and KL of p*(y) ~ p(y) exp(S(y) / beta), all y enumerated."""
    tilted = probabilities * np.exp((rewards - rewards.max()) / beta)
    tilted /= tilted.sum()
    return (tilted * rewards).sum(), (tilted * np.log(tilted / probabilities)).sum()


# ---- a bandit that can be enumerated --------------------------------------------------------------------------------

SMALL_VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"好坏大小早晚"]
RESPONSES = torch.tensor(list(itertools.product(range(len(SMALL_VOCAB)), repeat=2)))  # (121, 2)
REWARDS = (
    (RESPONSES[:, 0] == 5) * 0.6 + (RESPONSES[:, 1] == RESPONSES[:, 0] + 1) * 0.8 - (RESPONSES[:, 1] == 0) * 0.5
).double().numpy()  # fmt: skip


@pytest.fixture(scope="module")
def bandit():
    """A small reference, its tokenizer, and p(y) of all 121 responses to each of two prompts."""
    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=32, n_layer=1, n_head=2, initializer_range=0.2)
    reference = GPT2(config, seed=0).eval()
    tokenizer = Tokenizer(SMALL_VOCAB)
    p = {}
    for prompt in "大小":
        ids = torch.tensor(tokenizer.encode_prompt(prompt))
        with torch.no_grad():
            logp = reference(torch.cat([ids.expand(121, -1), RESPONSES], 1))[:, len(ids) - 1 : -1].double()
        p[prompt] = logp.log_softmax(-1).gather(-1, RESPONSES[..., None]).sum((1, 2)).exp().numpy()
    return reference, tokenizer, p


@pytest.mark.parametrize("beta", [1.0, 0.3, 0.15])
def test_the_optimum_of_the_bandit_is_exact_for_each_prompt_and_for_all(bandit, beta):
    """Each response as often as it comes on average in 4 million draws, so that no luck of the draw is in it."""
    scores = {prompt: np.repeat(REWARDS, np.round(4e6 * p).astype(int)) for prompt, p in bandit[2].items()}
    found = Optimum(scores, bootstrap=Bootstrap(100))
    exact = {prompt: by_definition(p, REWARDS, beta) for prompt, p in bandit[2].items()}
    assert abs(exact["大"][0] - exact["小"][0]) > 0.003
    for prompt, one in found.by_prompt().items():
        point = one.at(beta)
        assert (point.reward.mean, point.kl.mean) == pytest.approx(exact[prompt], abs=1e-3)
    point, mean = found.at(beta), np.mean(list(exact.values()), 0)
    assert (point.reward.mean, point.kl.mean) == pytest.approx(tuple(mean), abs=1e-3)
    assert found.at_reward(mean[0]).kl.mean == pytest.approx(mean[1], abs=2e-3)
    assert found.at_kl(mean[1]).reward.mean == pytest.approx(mean[0], abs=1e-3)
    assert found.at_kl(mean[1]).beta == pytest.approx(beta, rel=0.01)


@pytest.mark.parametrize("sampling", [None, SamplingConfig(top_p=0.8)])
def test_sampled_from_the_model_it_is_that_of_the_sampled_distribution(bandit, sampling):
    """In the top-p distribution the limit is another one: the tail is cut and the rest renormalised."""
    reference, tokenizer, _ = bandit
    values = dict(zip("好坏大小早晚", (0.7, 0.1, 0.5, 0.3, 0.2, 0.6), strict=True))
    found = optimum(
        ActorCritic(reference).eval(), ["大"], lambda texts: [values.get(text[1:2], 0.0) for text in texts],
        tokenizer=tokenizer, gen_len=1, sampling=sampling, samples=5000, batch_size=5000,
    )  # fmt: skip
    with torch.no_grad():
        q = reference(torch.tensor([tokenizer.encode_prompt("大")]))[0, -1].double().softmax(-1).numpy()
    order = np.argsort(-q)
    kept = order[: 1 + np.searchsorted(q[order].cumsum(), 1.0 if sampling is None else sampling.top_p)]
    q, rewards = q[kept] / q[kept].sum(), np.array([values.get(token, 0.0) for token in SMALL_VOCAB])[kept]
    point, exact = found.at(0.3), by_definition(q, rewards, 0.3)
    assert (point.reward.mean, point.kl.mean) == pytest.approx(exact, abs=0.02)
    assert point.reward.low < exact[0] < point.reward.high and point.kl.low < exact[1] < point.kl.high
    assert found.distribution == described(sampling) and len(kept) == (11 if sampling is None else len(kept)) > 2


# ---- few samples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "tilt"), [(128, 5.0), (24, 3.0)])
def test_the_estimates_have_no_bias_that_a_simulation_could_find(count, tilt):
    """Uniform rewards, 4,000 draws: the plain estimates are off by 3 standard errors and more, these by none."""
    grid = (np.arange(100_000) + 0.5) / 100_000
    exact = np.array(by_definition(np.full(100_000, 1e-5), grid, 1 / tilt))
    generator = np.random.default_rng(0)
    draws = np.sort(generator.random((4000, count)))
    ours = np.array([_corrected(x, np.ones(count, dtype=int), tilt) for x in draws])
    w = np.exp(draws * tilt)
    w /= w.sum(1, keepdims=True)
    plain = np.stack([(w * draws).sum(1), (w * np.log(count * w)).sum(1)], 1)
    error = ours.std(0) / math.sqrt(4000)
    assert (np.abs(ours.mean(0) - exact) < 3 * error).all()
    assert (np.abs(plain.mean(0) - exact) > 3 * error).all()


def test_the_jackknife_leaves_one_sample_out_at_a_time():
    """By the definition, with ties: N f - (N - 1) mean of f without one sample."""
    x, tilt = np.array([0.1, 0.5, 0.5, 0.9, 0.2]), 2.0

    def plain(x):
        w = np.exp(x * tilt) / np.exp(x * tilt).sum()
        return np.array([w @ x, w @ np.log(len(x) * w)])

    expected = 5 * plain(x) - 4 * np.mean([plain(np.delete(x, i)) for i in range(5)], 0)
    assert _corrected(*np.unique(x, return_counts=True), tilt) == pytest.approx(expected)


def test_an_interval_holds_the_optimum_as_often_as_it_says():
    exact = by_definition(np.full(10_000, 1e-4), (np.arange(10_000) + 0.5) / 10_000, 0.3)
    hits = np.zeros(4)
    for seed in range(60):
        scores = np.random.default_rng(seed).random((2, 300))
        found = Optimum(dict(zip("ab", scores, strict=True)), bootstrap=Bootstrap(200, seed=seed))
        point = found.at(0.3)
        estimates = (point.reward, point.kl, found.at_reward(exact[0]).kl, found.at_kl(exact[1]).reward)
        hits += [x.low <= e <= x.high for x, e in zip(estimates, (*exact, exact[1], exact[0]), strict=True)]
    assert (hits >= 51).all()  # 0.95 of 60 less 3.5 standard errors


def test_the_effective_samples_are_those_of_the_weights():
    x, y = np.random.default_rng(0).random((2, 500))
    w, v = np.exp(x / 0.5), np.exp(y / 0.5)
    pooled = np.concatenate([w / w.sum(), v / v.sum()]) / 2
    assert Optimum({"x": x, "y": y}).at(0.5).effective_samples == pytest.approx(1 / (pooled**2).sum())
    assert Optimum({"x": x}).at(0.5).effective_samples == pytest.approx(w.sum() ** 2 / (w**2).sum())


# ---- the curve, and what a policy spent -----------------------------------------------------------------------------

UNIFORM = Optimum(dict(zip("ab", np.random.default_rng(1).random((2, 2000)), strict=True)), "in the full softmax")


def test_the_curve_rises_and_bends_and_best_of_n_lies_under_it():
    curve = UNIFORM.curve()
    kls, rewards = ([getattr(p, name).mean for p in curve] for name in ("kl", "reward"))
    assert kls[0] == 0 and rewards[0] == pytest.approx(0.5, abs=0.02) and curve[0].beta is None
    slopes = np.diff(rewards) / np.diff(kls)
    assert (slopes > 0).all() and (np.diff(slopes) < 0).all()
    assert curve[-1].effective_samples == pytest.approx(100, rel=0.01)
    for n in (2, 4, 8):  # uniform rewards: n / (n + 1) at log n - (n - 1) / n
        assert UNIFORM.at_kl(math.log(n) - (n - 1) / n).reward.mean > n / (n + 1) - 0.002


def test_what_a_policy_spent_stands_beside_what_is_needed():
    needed = UNIFORM.at_reward(0.8)
    told = UNIFORM.spent(Estimate(0.8, 0.78, 0.82), Estimate(1.2, 1.1, 1.3), beta=0.15)
    assert told.efficiency == pytest.approx(needed.kl.mean / 1.2) and not told.note
    assert told.needed.kl.low < needed.kl.low and told.needed.kl.high > needed.kl.high  # the reward is uncertain too
    assert told.best.reward.mean == pytest.approx(UNIFORM.at_kl(1.2).reward.mean) and told.best.reward.mean > 0.8
    assert told.objectives["objective/policy"] == pytest.approx(0.8 - 0.15 * 1.2)
    best = UNIFORM.at(0.15)
    assert told.objectives["objective/optimum"] == pytest.approx(best.reward.mean - 0.15 * best.kl.mean)
    assert str(told).startswith(f"reward 0.800 at 1.20 nats; the optimum would need {needed.kl.mean:.2f} (efficiency ")
    assert set(told.figures()) >= {"optimum/kl", "optimum/efficiency", "optimum/reward_at_kl", "objective/policy"}


def test_a_policy_that_gained_nothing_needs_nothing():
    told = UNIFORM.spent(Estimate(0.4, 0.39, 0.41), Estimate(0.5, 0.4, 0.6))
    assert told.needed.kl.mean == 0 and told.efficiency == 0 and told.needed.beta is None
    at_start = UNIFORM.spent(Estimate(0.4, 0.39, 0.41), Estimate(0.0, 0.0, 0.0))
    assert at_start.efficiency is None and at_start.best.reward.mean == pytest.approx(0.5, abs=0.02)


def test_less_kl_than_any_policy_can_have_is_said():
    told = UNIFORM.spent(Estimate(0.9, 0.89, 0.91), Estimate(0.1, 0.05, 0.15))
    assert "less KL than any policy can have" in str(told) and "another reference" in told.note


def test_beyond_the_samples_nothing_is_made_up():
    reach = r"4,000 samples of 2 prompts can tell: they reach to reward 0\.9\d+ at \d\.\d+ nats, beta 0\.\d+"
    for ask, value in (
        (UNIFORM.at, 0.001),
        (UNIFORM.at_reward, 0.9999),
        (UNIFORM.at_reward, 1.5),
        (UNIFORM.at_kl, 9.0),
    ):
        with pytest.raises(TooFewSamples, match=reach):
            ask(value)
    told = UNIFORM.spent(Estimate(0.9999, 0.99, 1.0), Estimate(9.0, 8.9, 9.1), beta=0.001)
    assert told.needed is told.best is told.efficiency is None and "objective/optimum" not in told.objectives
    for asked in ("a reward of 1.000", "a KL of 9.00 nats", "beta 0.001"):
        assert f"{asked} is beyond what 4,000 samples" in str(told)
    assert set(told.figures()) == {"objective/policy", "objective/reference"}


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_rewards_without_a_bound_run_out_of_samples_instead_of_converging():
    """Exponential rewards: below beta 1 the optimum is infinite, whatever 4,096 samples average to."""
    found = Optimum({"x": np.random.default_rng(0).exponential(1.0, 4096)})
    for beta in (0.5, 0.9):
        with pytest.raises(TooFewSamples):
            found.at(beta)
    assert found.at(4.0).reward.mean == pytest.approx(4 / 3, rel=0.05)  # a rate of 1 - 1/4


def test_the_pareto_k_is_the_shape_of_the_weights_tail():
    """exp(tilt S) of exponential rewards is Pareto distributed, of shape tilt; a bounded reward has no tail."""
    rewards = np.random.default_rng(1).exponential(1.0, (20, 4096))
    for tilt in (0.3, 0.8):
        shapes = [_pareto_k(*np.unique(x, return_counts=True), tilt) for x in rewards]
        assert np.mean(shapes) == pytest.approx(tilt, abs=0.06) and np.std(shapes) < 0.15
    assert UNIFORM.at(0.15).pareto_k < 0 and not UNIFORM.at(0.15).note
    ones = np.random.default_rng(0).random(4096) < 0.1
    assert Optimum({"x": ones}).at(0.1).pareto_k == 0  # equal weights


def test_where_the_largest_rewards_decide_it_is_said():
    found = Optimum({"x": np.random.default_rng(3).exponential(1.0, 4096)})
    point = found.at(1.25)  # the reward is 5 in truth, and no sample shows it
    assert point.pareto_k > 0.7 and "the largest rewards decide (Pareto k" in point.note
    told = found.spent(point.reward, point.kl, beta=1.25)
    assert told.note.count("for a reward without an upper bound the true limit is higher") == 1
    assert point.note in str(told)


def test_equal_rewards_are_equal_in_either_precision():
    """A rollout holds scores in fp32, best-of-n in fp64: 1/3 and 1/3 are 1e-8 apart."""
    both = [np.float32(1 / 3)] * 50 + [1 / 3] * 50
    with pytest.raises(ValueError, match=r"all 100 rewards are 0.333333: every policy is as good as the reference"):
        Optimum({"x": both})
    assert Optimum({"x": both, "y": [0.1, 0.5] * 100}).by_prompt()["x"] is None


def test_large_rewards_keep_their_digits():
    rewards = np.random.default_rng(0).uniform(size=2000)
    far, near = Optimum({"x": rewards + 2.0**14}), Optimum({"x": rewards})
    assert far.at(0.2).reward.mean - 2.0**14 == pytest.approx(near.at(0.2).reward.mean, abs=1e-9)


def test_an_efficiency_above_1_is_explained_where_sets_are_truncated():
    spent = Estimate(0.8, 0.75, 0.85), Estimate(UNIFORM.at_reward(0.8).kl.mean * 0.97, 0.1, 2.0)
    assert not UNIFORM.spent(*spent).note  # in the full softmax it is noise
    truncated = Optimum(UNIFORM.scores, described(SamplingConfig(top_p=0.9)))
    assert truncated.spent(*spent).note.startswith("beyond 1: what the policy's smaller sampling sets cut off costs")


@pytest.mark.parametrize(("settings", "price"), [
    ({}, 0.2), (dict(score_scale=0.1), 2.0), (dict(score_scale=0.0), None), (dict(score_scale=-1.0), None),
    (dict(score_scale="2"), None), (dict(score_clip=3.0), None), (dict(missing_eos="replace"), None),
])  # fmt: skip
def test_the_price_of_kl_is_in_units_of_the_reward_as_it_was_given(settings, price):
    assert price_of_kl(0.2, settings) == (None if price is None else pytest.approx(price))


def test_too_few_samples_in_all_or_of_one_prompt():
    few = Optimum({"x": np.random.default_rng(0).random(60)})
    with pytest.raises(TooFewSamples, match="60 samples of 1 prompt can tell: at least 100 in all, 10 of each prompt"):
        few.at(1.0)
    assert few.curve() == []
    with pytest.raises(TooFewSamples):
        few.at_reward(0.1)
    uneven = Optimum({"x": np.random.default_rng(0).random(5000), "y": np.random.default_rng(1).random(9)})
    with pytest.raises(TooFewSamples):
        uneven.at(100.0)


@pytest.mark.parametrize(("scores", "message"), [
    ({}, "at least one prompt"), ({"x": [1.0]}, "prompt 'x': at least 2 rewards"), ({"x": [[1.0, 2.0]]}, "shape"),
    ({"x": [1.0, math.nan]}, "must be finite, got nan"), ({"x": [1.0, math.inf]}, "must be finite, got inf"),
    ({"x": [0.5, 0.5], "y": [0.5] * 9}, "all 11 rewards are 0.5: every policy is as good as the reference"),
])  # fmt: skip
def test_rewards_that_say_nothing_are_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        Optimum(scores)


@pytest.mark.parametrize(("ask", "value", "message"), [
    ("at", 0.0, "beta must be a finite number above 0, got 0.0"), ("at", -1.0, "beta"), ("at", math.nan, "beta"),
    ("at", math.inf, "beta"), ("at", "1", "beta"), ("at_kl", -0.1, "at least 0"), ("at_kl", math.nan, "at least 0"),
    ("at_reward", math.nan, "finite number"), ("at_kl", math.inf, "finite number"),
])  # fmt: skip
def test_bad_questions_are_refused(ask, value, message):
    with pytest.raises(ValueError, match=message):
        getattr(UNIFORM, ask)(value)


@pytest.mark.parametrize(("options", "message"), [
    (dict(samples=0), "samples must be an integer of at least 1"), (dict(prompts=[]), "got no prompts"),
    (dict(prompts="酒店"), "prompts must be a collection of texts"), (dict(tokenizer=None), "needs tokenizer="),
    (dict(gen_len=0), "gen_len"), (dict(tokenizer=Tokenizer([*VOCAB, "新"])), "vocabulary"),
    (dict(reward=lambda texts: [math.nan] * len(texts)), "nan"),
])  # fmt: skip
def test_bad_arguments_are_refused_before_anything_is_sampled(tokenizer, options, message):
    given = dict(prompts=["酒店"], reward=lambda texts: [0.0] * len(texts), tokenizer=tokenizer, gen_len=2, samples=4)
    given |= options
    with pytest.raises(ValueError, match=message):
        optimum(make_gpt2(0), given.pop("prompts"), given.pop("reward"), **given)


def test_equal_prompts_are_one_and_the_seed_decides(tokenizer):
    def found(**options):
        options = dict(prompts=["酒店", "房间", "酒店"], samples=40, seed=0) | options
        reward = lambda texts: [len(set(t)) / 8 for t in texts]  # noqa: E731
        return optimum(make_gpt2(0), options.pop("prompts"), reward, tokenizer=tokenizer, gen_len=4, **options)

    one = found()
    assert list(one.scores) == ["酒店", "房间"] and one.samples == 40
    assert np.array_equal(one.scores["房间"], found().scores["房间"])
    assert not np.array_equal(one.scores["房间"], found(seed=1).scores["房间"])
    assert dataclasses.is_dataclass(UNIFORM.at(0.5))


@pytest.mark.parametrize(("sampling", "words"), [
    (None, "in the full softmax"), (SamplingConfig(top_p=0.95), "in the distribution sampled with top-p 0.95"),
    (SamplingConfig(0.7, 5), "in the distribution sampled with temperature 0.7, top-k 5"),
])  # fmt: skip
def test_the_distribution_is_said(sampling, words):
    assert described(sampling) == words
