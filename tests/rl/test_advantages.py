"""Advantages against the oracle and cases worked by hand, and estimators that need no values."""

import numpy as np
import pytest
import torch
from ragged import DOUBLE, NAN, batches, close, tensors
from small_trainer import PROMPTS, batch, from_tokens, make_trainer, reward, weights

import oracle
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
