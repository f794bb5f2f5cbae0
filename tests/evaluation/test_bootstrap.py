"""Confidence intervals against scipy's bootstrap, theory, and cases worked by hand."""

import numpy as np
import pytest

from minirlhf.evaluation.statistics import Bootstrap, Estimate

VALUES = np.random.default_rng(1).exponential(2.0, 60)


def test_an_interval_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    found = Bootstrap(20000, seed=1).mean(VALUES)
    expected = stats.bootstrap(
        (VALUES,), np.mean, n_resamples=20000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert found.mean == pytest.approx(VALUES.mean())
    error = 0.05 * (expected.high - expected.low)  # two draws of 20,000 differ by about a hundredth of the width
    assert found.low == pytest.approx(expected.low, abs=error)
    assert found.high == pytest.approx(expected.high, abs=error)


def test_the_difference_of_independent_samples_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    other = np.random.default_rng(5).normal(1.0, 3.0, 25)
    found = Bootstrap(20000, seed=1).difference(VALUES, other)
    expected = stats.bootstrap(
        (VALUES, other), lambda a, b, axis: a.mean(axis) - b.mean(axis), n_resamples=20000, method="percentile",
        rng=np.random.default_rng(2), vectorized=True,
    ).confidence_interval  # fmt: skip
    assert found.mean == pytest.approx(VALUES.mean() - other.mean())
    error = 0.05 * (expected.high - expected.low)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=error)


def test_two_values_have_three_means():
    """0 and 1 give the means 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4."""
    assert Bootstrap(4000).mean([0.0, 1.0]) == Estimate(0.5, 0.0, 1.0)


def test_equal_values_leave_no_doubt():
    assert Bootstrap(50).mean([2.5] * 7) == Estimate(2.5, 2.5, 2.5)
    assert Bootstrap(50).mean([2.5]) == Estimate(2.5, 2.5, 2.5)


def test_an_interval_holds_the_mean_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for i in range(300):
        estimate = Bootstrap(400, seed=i).mean(generator.normal(3.0, 2.0, 50))
        hits += estimate.low <= 3.0 <= estimate.high
    assert 0.9 <= hits / 300 <= 0.975  # a little under 0.95 at 50 values; the standard error is 0.013


def test_the_seed_decides_and_the_global_generators_are_left_alone():
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    one = Bootstrap(100, seed=3).mean(VALUES)
    assert one == Bootstrap(100, seed=3).mean(VALUES) != Bootstrap(100, seed=4).mean(VALUES)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


def test_cut_into_parts_the_draws_are_the_same_kind(monkeypatch):
    monkeypatch.setattr("minirlhf.evaluation.statistics.CHUNK", 200)  # 3 resamples at a time
    found = Bootstrap(4000, seed=1).mean(VALUES)
    monkeypatch.undo()
    expected = Bootstrap(4000, seed=1).mean(VALUES)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=0.05)


@pytest.mark.parametrize(("settings", "message"), [
    ({"resamples": 1}, "resamples .* at least 2, got 1"), ({"resamples": 10.0}, "resamples"),
    ({"seed": -1}, "seed .* at least 0, got -1"),
])  # fmt: skip
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        Bootstrap(**settings)


@pytest.mark.parametrize("values", [[], [[1.0]], 1.0])
def test_what_is_no_list_of_values_is_refused(values):
    with pytest.raises(ValueError, match="at least one value"):
        Bootstrap(10).mean(values)
