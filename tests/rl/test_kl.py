"""KL estimators against the oracle and over a vocabulary, and the controllers of the coefficient."""

import itertools
import math

import numpy as np
import pytest
import torch
from ragged import NAN, batches, close, tensors
from small_trainer import batch, make_trainer

import oracle
from minirlhf import AdaptiveKL, FixedKL
from minirlhf.generation.token_statistics import exact_kl
from minirlhf.rl.kl import kl_estimate


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimators_equal_the_oracle(kind):
    for mask, logp, ref, _, _ in batches():
        expected = np.vectorize(getattr(oracle, kind))(logp, ref)
        actual = kl_estimate(*tensors(logp, ref), kind)
        assert actual.shape == mask.shape
        close(actual, expected)


def test_expected_estimators_over_a_vocabulary():
    """E_p[k1] = E_p[k3] = KL(p || q); E_p[k2] = E_p[(log p/q)^2] / 2, its own definition."""
    rng = np.random.default_rng(2)
    for size in (2, 5, 11):
        p, q = rng.dirichlet(np.ones(size)), rng.dirichlet(np.ones(size))
        kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        half_square = sum(a * math.log(a / b) ** 2 / 2 for a, b in zip(p, q, strict=True))
        for kind, expected in (("k1", kl), ("k2", half_square), ("k3", kl)):
            terms = kl_estimate(torch.tensor(np.log(p)), torch.tensor(np.log(q)), kind)
            close((torch.tensor(p) * terms).sum(), expected, rtol=1e-9, atol=1e-12)
        close(exact_kl(torch.tensor(np.log(p)), torch.tensor(np.log(q))), kl)


def test_k3_is_never_negative_and_exact_near_zero():
    ratios = torch.tensor([-20.0, -1.0, -1e-4, 0.0, 1e-4, 1.0, 20.0])
    k3 = kl_estimate(ratios, torch.zeros(7), "k3")
    assert (k3 >= 0).all()
    close(k3[2:5], torch.tensor([5e-9, 0.0, 5e-9]), rtol=0.05, atol=0)  # x^2/2 + O(x^3), fp32


def test_the_cases_of_rlhf_book():
    """Its tests of k1 and k3: about x^2 / 2 near 0 in fp32, e - 2 at a log-ratio of -1, log p - log q."""
    ratios, zero = torch.tensor([1e-4, 1e-6, -1.0]), torch.zeros(3)
    k3 = kl_estimate(ratios, zero, "k3")
    assert k3[0].item() == pytest.approx(5e-9, rel=0.05) and k3[1].item() == pytest.approx(5e-13, abs=1e-12)
    assert k3[2].item() == pytest.approx(math.e - 2)
    policy, reference = torch.tensor([-0.5, -1.5, -2.0]), torch.tensor([-1.0, -1.0, -3.0])
    assert kl_estimate(policy, reference, "k1").tolist() == [0.5, -0.5, 1.0]


def test_rlhf_books_older_k3_is_ours_with_the_arguments_swapped_and_estimates_no_kl():
    """exp(x) - 1 - x of x = log(p / q): over samples of p its mean is chi^2(p, q) - KL(p || q)."""
    rng = np.random.default_rng(4)
    p, q = rng.dirichlet(np.ones(7)), rng.dirichlet(np.ones(7))
    theirs = np.exp(np.log(p / q)) - 1 - np.log(p / q)
    close(kl_estimate(torch.tensor(np.log(q)), torch.tensor(np.log(p)), "k3"), theirs)
    kl, chi = sum(p * np.log(p / q)), sum((p - q) ** 2 / q)
    assert sum(p * theirs) == pytest.approx(chi - kl) and abs(chi - 2 * kl) > 0.1


@pytest.mark.parametrize(("kind", "theirs"), [
    # verl's "kl", "mse" and "low_var_kl", which it holds within 10; TRL's "kl" and "mse" of PPO
    ("k1", lambda x: x), ("k2", lambda x: x * x / 2), ("k3", lambda x: min(math.exp(-x) + x - 1, 10.0)),
])  # fmt: skip
def test_the_estimators_of_verl(kind, theirs):
    """Equal but for its limit of k3, which takes the gradient from tokens at a log-ratio below -2.6."""
    for x in (-2.3, -0.5, 0.0, 1.5, 9.0):
        assert kl_estimate(torch.tensor(x, dtype=torch.float64), torch.tensor(0.0), kind).item() == pytest.approx(
            theirs(x), rel=1e-12, abs=1e-15
        )
    assert (kind == "k3") == (kl_estimate(torch.tensor(-2.7), torch.tensor(0.0), kind).item() > 10)


def test_an_unknown_estimator_is_refused_by_name():
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), "k4")


# ---- controllers -----------------------------------------------------------------------------------------------------


def test_adaptive_kl_equals_the_oracle_over_a_run():
    rng = np.random.default_rng(3)
    controller, coef = AdaptiveKL(0.2, target=6.0, horizon=100.0), 0.2
    for kl, n in zip(rng.uniform(-3, 15, 50), itertools.cycle((1, 7, 16)), strict=False):
        controller.update(float(kl), n)
        coef = oracle.adaptive_kl(coef, kl, n, 6.0, 100.0)
        assert controller.coef == pytest.approx(coef, rel=1e-12)


def test_adaptive_kl_worked_by_hand():
    # KL 6.6 against 6: error .1; times 1 + .1 * 20 / 100 = 1.02
    controller = AdaptiveKL(1.0, 6.0, 100.0)
    controller.update(6.6, 20)
    assert controller.coef == pytest.approx(1.02)


@pytest.mark.parametrize(("kl", "factor"), [(1e9, 1.02), (-1e9, 0.98), (0.0, 0.98), (12.0, 1.02), (6.0, 1.0)])
def test_adaptive_kl_error_is_clipped(kl, factor):
    controller = AdaptiveKL(1.0, 6.0, 100.0)
    controller.update(kl, 10)
    assert controller.coef == pytest.approx(factor)


def test_adaptive_kl_survives_a_kl_that_is_not_finite():
    for kl in (NAN, math.inf, -math.inf):
        controller = AdaptiveKL(0.2, 6.0, 100.0)
        controller.update(kl, 10)
        assert math.isfinite(controller.coef)


def test_adaptive_kl_never_pays_for_kl():
    """A batch far larger than the horizon must not turn the penalty into a reward."""
    controller = AdaptiveKL(0.2, target=6.0, horizon=10.0)
    controller.update(0.0, 128)
    assert controller.coef >= 0


def test_fixed_kl_stays():
    controller = FixedKL(0.3)
    controller.update(1e6, 100)
    assert controller.coef == 0.3
    assert FixedKL(0).coef == 0.0


@pytest.mark.parametrize(("init", "target", "horizon"), [(-0.1, 6, 100), (NAN, 6, 100), (0.2, 0, 100), (0.2, 6, 0)])
def test_bad_controllers_are_refused(init, target, horizon):
    with pytest.raises(ValueError):
        AdaptiveKL(init, target, horizon)


@pytest.mark.parametrize("coef", [-1.0, NAN])
def test_a_bad_fixed_coefficient_is_refused(coef):
    with pytest.raises(ValueError, match="coef"):
        FixedKL(coef)


def test_the_adaptive_coefficient_follows_the_kl_and_the_fixed_one_stays():
    settings = dict(horizon=100.0, init_kl_coef=0.1)
    for target, factor in ((1e-6, 1.01), (1e6, 0.99)):  # 5 episodes: 1 +- 0.2 * 5 / 100
        trainer = make_trainer(target=target, **settings)
        coefs = [trainer.step(*batch())["objective/kl_coef"] for _ in range(3)]
        assert coefs == pytest.approx([0.1, 0.1 * factor, 0.1 * factor**2])
    trainer = make_trainer(target=1e-6, adaptive_kl=False, **settings)
    assert [trainer.step(*batch())["objective/kl_coef"] for _ in range(3)] == [0.1] * 3
