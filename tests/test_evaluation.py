"""Policy against reference: identical models differ in nothing; the table survives its texts."""

import functools
import re

import pytest
import torch

from conftest import make_gpt2
from minirlhf import ActorCritic, SamplingConfig
from minirlhf.evaluation import Pair, before_after_table, compare

PROMPTS = ["酒店", "服务很好", "w"]


def reward(texts):
    return [len(set(text)) / 8 for text in texts]


@functools.cache
def models(policy_seed):
    return ActorCritic(make_gpt2(policy_seed, scale=4.0)).eval(), make_gpt2(0, scale=4.0)


def run(tokenizer, policy_seed=0, prompts=PROMPTS, samples=7, **settings):
    policy, reference = models(policy_seed)
    return compare(policy, reference, tokenizer, prompts, reward, 5, samples=samples, **settings)


@pytest.mark.parametrize("sampling", [None, SamplingConfig(0.8, 0, 0.9)])
def test_identical_models_have_equal_figures_and_no_kl(tokenizer, sampling):
    summary, pairs = run(tokenizer, sampling=sampling)
    assert abs(summary["kl"]) < 1e-5 and abs(summary["kl_full_softmax"]) < 1e-5
    for name in ("reward", "distinct_1", "distinct_2"):
        assert summary[f"policy/{name}"] == summary[f"reference/{name}"]
    assert all(pair.before == pair.after and pair.before_reward == pair.after_reward for pair in pairs)


def test_different_models_differ(tokenizer):
    summary, pairs = run(tokenizer, policy_seed=1)
    assert summary["kl"] > 0.1
    assert any(pair.before != pair.after for pair in pairs)


def test_without_truncation_the_two_kl_are_one(tokenizer):
    summary, _ = run(tokenizer, policy_seed=1)
    assert summary["kl"] == pytest.approx(summary["kl_full_softmax"], rel=1e-5)


def test_pairs_take_the_prompts_in_turn_with_their_rewards(tokenizer):
    summary, pairs = run(tokenizer, policy_seed=1)
    assert [pair.prompt for pair in pairs] == [PROMPTS[i % 3] for i in range(7)]
    for pair in pairs:
        assert pair.before_reward == reward([pair.prompt + pair.before])[0]
        assert pair.after_reward == reward([pair.prompt + pair.after])[0]
    assert summary["policy/reward"] == pytest.approx(sum(p.after_reward for p in pairs) / 7, rel=1e-6)
    assert summary["reference/reward"] == pytest.approx(sum(p.before_reward for p in pairs) / 7, rel=1e-6)


def test_the_same_seed_gives_the_same_figures(tokenizer):
    assert run(tokenizer, 1, seed=3) == run(tokenizer, 1, seed=3) != run(tokenizer, 1, seed=4)


def test_comparing_leaves_the_global_random_state_alone(tokenizer):
    models(1)
    state = torch.get_rng_state()
    run(tokenizer, 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_prompts_are_refused(tokenizer):
    with pytest.raises(ValueError, match="prompt"):
        run(tokenizer, prompts=[])


def cells(line):
    """The cells of a row of a GitHub table: cut at the pipes that have no backslash before them."""
    return re.split(r"(?<!\\)\|", line)[1:-1]


@pytest.mark.parametrize("text", ["a|b", "||", "line\nbreak", "\x1b[31m", "back\\"])
def test_a_table_keeps_its_columns_whatever_the_texts(text):
    table = before_after_table([Pair(text, "x" + text, 0.5, text, 0.754)])
    lines = table.splitlines()
    assert len(lines) == 3 and table.endswith("\n")
    assert all(len(cells(line)) == 5 for line in lines)
    assert cells(lines[2])[2].strip() == "0.50" and cells(lines[2])[4].strip() == "0.75"
    assert "\x1b" not in table


def test_a_table_shows_the_first_rows_only():
    pairs = [Pair("p", f"text {i}", 0.0, "c", 1.0) for i in range(5)]
    table = before_after_table(pairs, rows=2)
    assert "text 1" in table and "text 2" not in table
