"""How much better than expected each token was: one function an estimator, all of them listed in ADVANTAGES.

An estimator takes a rollout with token rewards and the config, and returns advantages and returns, (B, R), 0 at
padding. Returns are what the value head learns; None: the method uses no values.

Shapes: B sequences, R response tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minirlhf.rl.masked import whiten, whitening_scale

if TYPE_CHECKING:
    from minirlhf.rl.config import PPOConfig
    from minirlhf.rl.rollout import Rollout


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 11 and 16) over response tokens.

        delta_t = r_t + gamma * V(s_{t+1}) - V(s_t),   V after the last token = 0
        A_t     = delta_t + gamma * lam * A_{t+1}
        return_t = A_t + V(s_t)

    rewards, values: (B, R); values[:, t] belongs to the state before response token t. Response tokens of a row are
    contiguous. Returns advantages and returns, (B, R), 0 at padding.
    """
    mask = mask.bool()
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = torch.where(mask[:, t], delta + gamma * lam * next_advantage, 0.0)
        next_value, next_advantage = values[:, t], advantages[:, t]
    return advantages, advantages + values


def gae_advantages(batch: Rollout, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """`gae` with the value head as the baseline: PPO's own estimator."""
    rewards = batch.token_rewards
    if config.whiten_rewards:
        per_row = config.whiten_scope == "sequence"
        rewards = whiten(rewards, batch.response_mask, False, config.whiten_ddof, per_row=per_row)
    return gae(rewards, batch.values, batch.response_mask, config.gamma, config.lam)


ADVANTAGES: dict[str, Callable[[Rollout, PPOConfig], tuple[Tensor, Tensor | None]]] = {"gae": gae_advantages}
USES_VALUES = {"gae"}  # only for these a value head is made; the others return None for the returns


def with_advantages(batch: Rollout, config: PPOConfig) -> Rollout:
    """The batch with its advantages, whitened over all its tokens if the config says so, and returns."""
    c, mask, per_row = config, batch.response_mask, config.whiten_scope == "sequence"
    advantages, returns = ADVANTAGES[c.advantages](batch, c)
    if (returns is not None) != (c.advantages in USES_VALUES):
        raise ValueError(f"{c.advantages!r} must be in USES_VALUES if it gives returns, and only then")
    if not c.whiten_advantages:
        return batch.replace(advantages=advantages, returns=returns)
    scale = whitening_scale(advantages, mask, c.whiten_ddof, per_row=per_row)
    advantages = whiten(advantages, mask, ddof=c.whiten_ddof, per_row=per_row)
    return batch.replace(advantages=advantages, returns=returns, advantage_scale=scale)
