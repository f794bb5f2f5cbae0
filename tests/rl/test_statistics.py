"""Statistics of a step by hand, and their means over minibatches."""

import math

import pytest
import torch
from small_trainer import NAN, batch, make_trainer

from minirlhf.rl.statistics import mean_stats, read_stats


def test_the_figures_of_a_step_by_hand():
    queries, responses, _ = batch()
    scores = [1.0, 2.0, 3.0, 4.0, 5.0]
    trainer = make_trainer(ppo_epochs=3, init_kl_coef=0.25, horizon=100.0)
    stats = trainer.step(queries, responses, scores)
    assert stats["reward/mean"] == pytest.approx(3.0)
    assert stats["reward/shaped"] == pytest.approx(3.0)
    assert stats["reward/std"] == pytest.approx(math.sqrt(2.0))
    assert stats["tokens/response"] == pytest.approx((4 + 1 + 2 + 7 + 5) / 5)
    assert stats["ppo/updates"] == 3 * 3  # 5 rows in minibatches of 2: the last has one
    assert stats["ppo/lr"] == 1e-3
    assert stats["objective/kl_coef"] == 0.25  # the one of this step, not of the next
    expected = 3.0 - 0.25 * stats["objective/kl"]
    assert stats["objective/reward_with_kl"] == pytest.approx(expected, rel=1e-5)
    assert all(math.isfinite(value) for value in stats.values())


def test_mean_stats_is_the_mean_of_each_name():
    stats = [{"a": torch.tensor(1.0), "b": torch.tensor(0.5)}, {"a": torch.tensor(3.0), "b": torch.tensor(0.0)}]
    assert mean_stats(read_stats(stats)) == {"a": 2.0, "b": 0.25}


def test_mean_stats_leaves_out_what_was_skipped_unless_all_was():
    stats = [{"a": torch.tensor(x), "b": torch.tensor(y)} for x, y in ((1.0, NAN), (3.0, 2.0), (math.inf, 4.0))]
    assert mean_stats(read_stats(stats)) == {"a": 3.0, "b": 2.0}
    means = mean_stats(read_stats([stats[0], stats[0]]))
    assert means["a"] == 1.0 and math.isnan(means["b"])
