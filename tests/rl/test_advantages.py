"""Advantages against the oracle and cases worked by hand, and estimators that need no values."""

import numpy as np
import pytest
import torch
from ragged import NAN, batches, close, tensors

import oracle
from minirlhf.rl.advantages import gae


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
