"""Advantages against the oracle and cases worked by hand, and estimators that need no values."""

import numpy as np
import pytest
import torch
from ragged import DOUBLE, NAN, batches, close, tensors
from small_trainer import PROMPTS, batch, from_tokens, make_trainer, reward, weights

import oracle
from minirlhf import PPOConfig, Rollout
from minirlhf.rl.advantages import ADVANTAGES, gae, with_advantages
from minirlhf.rl.shaping import with_token_rewards


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0), (0.0, 0.95)])
def test_gae_equals_the_oracle(gamma, lam):
    for mask, rewards, values, _, _ in batches():
        advantages, returns = gae(*tensors(rewards, values, mask), gamma, lam)
        expected = oracle.gae(rewards, values, mask, gamma, lam)
        close(advantages, expected[0])
        close(returns, expected[1])


def test_gae_worked_by_hand():
    # gamma 1, lambda 1/2; row 0: rewards 0 0 1, values 1 2 4; row 1: reward 3, value 1, then padding.
    # delta = 0+2-1=1, 0+4-2=2, 1+0-4=-3;  A_2=-3, A_1=2-1.5=.5, A_0=1+.25=1.25;  returns = A + V
    rewards = torch.tensor([[0.0, 0, 1], [3, NAN, NAN]])
    values = torch.tensor([[1.0, 2, 4], [1, NAN, NAN]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    advantages, returns = gae(rewards, values, mask, 1.0, 0.5)
    assert advantages.tolist() == [[1.25, 0.5, -3.0], [2.0, 0.0, 0.0]]
    assert returns.tolist() == [[2.25, 2.5, 1.0], [3.0, 0.0, 0.0]]


def test_gae_with_lambda_one_is_the_reward_to_go():
    for mask, rewards, values, _, _ in batches():
        _, returns = gae(*tensors(rewards, values, mask), 1.0, 1.0)
        to_go = np.where(mask, rewards, 0.0)[:, ::-1].cumsum(1)[:, ::-1]
        close(returns, np.where(mask, to_go, 0.0))


# ---- in a batch -----------------------------------------------------------------------------------------------------


def in_a_batch(**settings):
    """A ragged batch with its advantages, and gae's own for it."""
    trainer = make_trainer(dtype=DOUBLE, **settings)
    rollout, _ = with_token_rewards(from_tokens(trainer, *batch()), 0.2, trainer.config)
    return with_advantages(rollout, trainer.config), gae(rollout.token_rewards, rollout.values, rollout.response_mask)


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_advantages_are_whitened_in_their_scope_and_their_scale_is_kept(scope):
    found, (advantages, returns) = in_a_batch(whiten_scope=scope)
    mask = found.response_mask.numpy()
    groups = [slice(0, 5)] if scope == "batch" else [slice(b, b + 1) for b in range(5)]
    expected = np.concatenate([oracle.whiten(advantages[rows].numpy(), mask[rows]) for rows in groups])
    close(found.advantages, expected)
    assert torch.equal(found.returns, returns)
    for rows in groups:  # what the whitening did is a shift and this factor
        own, scale = advantages[rows][mask[rows]], found.advantage_scale[rows][mask[rows]]
        shifted = found.advantages[rows][mask[rows]] / scale - own
        assert scale.unique().numel() == 1 and shifted.max() - shifted.min() < 1e-12


def test_advantages_stay_as_they_are_without_whitening():
    found, (advantages, returns) = in_a_batch(whiten_advantages=False)
    assert torch.equal(found.advantages, advantages) and torch.equal(found.returns, returns)
    assert found.advantage_scale is None


@pytest.mark.parametrize("settings", [{}, dict(whiten_advantages=False), dict(whiten_scope="minibatch", group_size=2)])
def test_a_method_without_values_trains_without_a_value_head(monkeypatch, settings):
    """A mean over the responses of a prompt as the baseline: it returns None for the returns."""

    def of_groups(rollout, config):
        scores = rollout.scores.view(-1, rollout.group_size)
        above = (scores - scores.mean(1, keepdim=True)).view(-1, 1)
        return torch.where(rollout.response_mask, above, 0.0), None

    monkeypatch.setitem(ADVANTAGES, "of groups", of_groups)
    settings = {"group_size": 4, "minibatch_size": 4, **settings}
    trainer, with_values = (make_trainer(advantages=name, **settings) for name in ("of groups", "gae"))
    before = weights(trainer)
    assert trainer.policy.value_head is None and not any("value_head" in name for name in before)
    history, expected = (t.train(PROMPTS, reward) for t in (trainer, with_values))
    assert all(not torch.equal(before[name], p) for name, p in weights(trainer).items())
    gone = ["ppo/loss/value", "ppo/returns/mean", "ppo/val/clipfrac", "ppo/val/mean", "ppo/val/var_explained"]
    assert sorted(expected[0].keys() - history[0].keys()) == gone and history[0].keys() < expected[0].keys()
    assert all(np.isfinite(list(stats.values())).all() for stats in history)
    assert not any("value_head" in name for name in trainer.state_dict()["tensors"])


# ---- without values -------------------------------------------------------------------------------------------------


def rollout_of(rewards, mask, group_size, **settings):
    """A rollout with these token rewards, and its config."""
    c = PPOConfig(group_size=group_size, batch_size=group_size, minibatch_size=group_size, **settings)
    rewards, mask = torch.as_tensor(rewards, dtype=DOUBLE), torch.as_tensor(mask).bool()
    zeros = torch.zeros_like(rewards)
    tokens, lengths = torch.ones(len(mask), mask.size(1) + 1), torch.ones(len(mask), 2, dtype=torch.int64)
    batch = Rollout(tokens, tokens, mask, zeros, zeros, zeros, zeros, zeros[:, 0], group_size=group_size)
    batch.__dict__["lengths"] = lengths
    return batch.replace(token_rewards=torch.where(mask, rewards, 0.0)), c


@pytest.mark.parametrize("name", ["reinforce", "rloo", "rloo_to_go", "grpo", "dr_grpo"])
def test_advantages_without_values_equal_the_oracle(name):
    for mask, rewards, _, _, _ in batches():
        if len(mask) % 2 and name != "reinforce":
            mask, rewards = np.repeat(mask, 2, 0), np.concatenate([rewards, rewards[::-1]])
        G = 1 if name == "reinforce" else 2
        gamma = 0.9 if "reinforce" in name or "to_go" in name else 1.0
        batch, config = rollout_of(rewards, mask, G, advantages=name, gamma=gamma)
        found, returns = ADVANTAGES[name](batch, config)
        ragged = [[x for x, real in zip(*row, strict=True) if real] for row in zip(rewards, mask, strict=True)]
        expected = oracle.without_values(name, ragged, G, gamma, 1)
        assert returns is None and not found[~batch.response_mask].any()
        close(found[batch.response_mask], [x for row in expected for x in row])


def test_advantages_of_a_group_worked_by_hand():
    # Returns 1, 2, 6, two tokens each. The others' means are 4, 3.5, 1.5; the mean is 3, the deviations -2, -1, 3,
    # their squares sum to 14: standard deviation sqrt(7), or sqrt(14 / 3) with ddof 0. The second group is flat.
    rewards = [[0.5, 0.5], [0.0, 2.0], [1.0, 5.0], [0.25, 0.25], [0.5, 0.0], [0.0, 0.5]]
    mask = [[1, 1]] * 6
    for name, expected, settings in (
        ("rloo", [-3.0, -1.5, 4.5], {}),
        ("dr_grpo", [-2.0, -1.0, 3.0], {}),
        ("grpo", [x / (7**0.5 + 1e-6) for x in (-2, -1, 3)], {}),
        ("grpo", [x / ((14 / 3) ** 0.5 + 1e-6) for x in (-2, -1, 3)], dict(whiten_ddof=0)),
    ):
        batch, config = rollout_of(rewards, mask, 3, advantages=name, **settings)
        found, _ = ADVANTAGES[name](batch, config)
        close(found[:3], [[x, x] for x in expected])
        assert not found[3:].any()


def test_leave_one_out_to_go_worked_by_hand():
    # To go: 3 2 | 4 (then ended, 4) | 1 1. The others' means at the first token: 2.5, 2, 3.5; at the second: 2.5, -, 3.
    rewards, mask = [[1.0, 2.0], [4.0, NAN], [0.0, 1.0]], [[1, 1], [1, 0], [1, 1]]
    batch, config = rollout_of(rewards, mask, 3, advantages="rloo_to_go")
    assert ADVANTAGES["rloo_to_go"](batch, config)[0].tolist() == [[0.5, -0.5], [2.0, 0.0], [-2.5, -2.0]]


@pytest.mark.parametrize("name", ["rloo", "rloo_to_go", "grpo", "dr_grpo"])
@pytest.mark.parametrize("score", [0.1, 1 / 3, 1e-30, -7e8])
@pytest.mark.parametrize("lengths", [[3] * 14, [1, 3, 2, 1, 1, 3, 3] * 2], ids=["even", "ragged"])
def test_a_group_of_equal_scores_has_no_advantage_at_all(name, score, lengths):
    """In fp32 the mean of equal numbers need not be that number, and 0 / 0 is NaN."""
    rewards, mask = torch.zeros(14, 3), torch.arange(3) < torch.tensor(lengths)[:, None]
    rewards[torch.arange(14), torch.tensor(lengths) - 1] = score
    batch, config = rollout_of(rewards, mask, 7, advantages=name)
    batch = batch.replace(token_rewards=rewards)
    found, _ = ADVANTAGES[name](batch, config)
    assert found.dtype == torch.float32 and torch.equal(found, torch.zeros(14, 3))


def test_the_advantages_of_ppo_in_rlhf_book_are_ours_before_whitening():
    """The score at the last token, its values, no whitening; A + V are its returns, as ours."""
    for mask, _, values, _, scores in batches():
        rewards = np.zeros(mask.shape)
        rewards[np.arange(len(mask)), mask.sum(1) - 1] = scores
        advantages, returns = gae(*tensors(rewards, values, mask), 0.98, 0.9)
        for b, n in enumerate(mask.sum(1)):
            running, after = 0.0, 0.0
            for t in reversed(range(n)):
                running = (scores[b] if t == n - 1 else 0.98 * after) - values[b, t] + 0.98 * 0.9 * running
                after = values[b, t]
                close(advantages[b, t], running)
                close(returns[b, t], running + values[b, t])


def test_returns_to_go_worked_by_hand():
    # gamma 1/2: row 0, rewards 1 0 4: 1 + 0 + 1 = 2, 0 + 2 = 2, 4; row 1, reward 6: 6. Their mean is 3.5.
    batch, config = rollout_of([[1.0, 0, 4], [6.0, NAN, NAN]], [[1, 1, 1], [1, 0, 0]], 1, gamma=0.5)
    assert ADVANTAGES["reinforce"](batch, config)[0].tolist() == [[-1.5, -1.5, 0.5], [2.5, 0.0, 0.0]]


def test_reinforce_plus_plus_is_the_return_to_go_whitened_over_the_batch():
    for mask, rewards, _, _, _ in batches():
        batch, config = rollout_of(rewards, mask, 1, advantages="reinforce++")
        to_go = np.where(mask, rewards, 0.0)[:, ::-1].cumsum(1)[:, ::-1]
        if mask.sum() > 1:
            close(with_advantages(batch, config).advantages, oracle.whiten(to_go, mask))


@pytest.mark.parametrize(("name", "eps", "theirs"), [
    # verl's test of low variance: its GRPO has our epsilon and ddof, its RLOO multiplies by n / (n - 1).
    ("grpo", 1e-6, lambda r: (r - r.mean()) / (r.std(ddof=1) + 1e-6)),
    ("rloo", 0.0, lambda r: (r - r.mean()) * len(r) / (len(r) - 1)),
    # OpenRLHF: epsilon 1e-9 for GRPO ("group_norm"); the sum of the others for RLOO.
    ("grpo", 1e-9, lambda r: (r - r.mean()) / (r.std(ddof=1) + 1e-9)),
    ("rloo", 0.0, lambda r: r - (r.sum() - r) / (len(r) - 1)),
    # TRL: epsilon 1e-4; without scaling of rewards, Dr. GRPO.
    ("grpo", 1e-4, lambda r: (r - r.mean()) / (r.std(ddof=1) + 1e-4)),
    ("dr_grpo", 0.0, lambda r: r - r.mean()),
    # rlhf-book: epsilon 1e-8, also for GSPO and DAPO; RLOO as verl, Dr. GRPO as TRL.
    ("grpo", 1e-8, lambda r: (r - r.mean()) / (r.std(ddof=1) + 1e-8)),
])  # fmt: skip
def test_what_other_libraries_compute(name, eps, theirs):
    """Equal but for GRPO's epsilon, by which the advantages differ by the factor (std + 1e-6) / (std + epsilon)."""
    groups = np.array([[1.0, 1.00001], [2.0, 2.00001], [0.0, 1.0], [-3.0, 4.5]])
    batch, config = rollout_of(groups.reshape(-1, 1), np.ones((8, 1)), 2, advantages=name)
    found = ADVANTAGES[name](batch, config)[0].view(4, 2).numpy()
    for ours, scores in zip(found, groups, strict=True):
        std = scores.std(ddof=1)
        factor = (std + 1e-6) / (std + eps) if name == "grpo" else 1.0
        np.testing.assert_allclose(ours * factor, theirs(scores), rtol=1e-9)
        assert std < 1e-3 or abs(factor - 1) < 2e-4  # it matters only where the scores hardly differ
