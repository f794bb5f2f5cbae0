"""How much better than expected each token was: one function an estimator, all of them listed in ADVANTAGES.

An estimator takes a rollout with token rewards and the config, and returns advantages and returns, (B, R), 0 at
padding. Returns are what the value head learns; None: the method uses no values. docs/algorithms.md compares them.

Shapes: B sequences, R response tokens; G responses of one prompt are a group, side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minirlhf.common.masked import masked_mean, whiten, whitening_scale
from minirlhf.rl.groups import flat_groups

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


def reinforce(batch: Rollout, config: PPOConfig) -> tuple[Tensor, None]:
    """The return to go less its mean over the batch (Williams 1992): sum_{k>=t} gamma^(k-t) r_k - mean.

    Good with one response a prompt, if prompts are alike. Whitened over the batch it is REINFORCE++ (Hu 2025, eq. 4).
    """
    to_go, mask = return_to_go(batch, config.gamma), batch.response_mask
    return torch.where(mask, to_go - masked_mean(to_go, mask), 0.0), None


def rloo(batch: Rollout, config: PPOConfig) -> tuple[Tensor, None]:
    """REINFORCE leave-one-out (Kool et al. 2019; Ahmadian et al. 2024, eq. 7): S_i - mean of the other G - 1 returns.

    The baseline does not depend on the response, so the gradient is unbiased: good for scores of whole texts.
    """
    returns = batch.token_rewards.sum(-1).view(-1, batch.group_size)  # (B / G, G)
    return at_tokens(less_the_others(returns), batch), None


def rloo_to_go(batch: Rollout, config: PPOConfig) -> tuple[Tensor, None]:
    """Leave-one-out on the return to go: R_i,t - mean of the other R_j,t, with R_i,t = sum_{k>=t} gamma^(k-t) r_i,k.

    Unbiased as `rloo`, with less variance: a token does not pay for the KL of earlier ones. A row that has ended keeps
    the return of its last token; 0 would give tokens that outlast the others the whole score, where `rloo` compares it.
    """
    to_go, mask = return_to_go(batch, config.gamma), batch.response_mask
    held = torch.where(mask, to_go, to_go.gather(1, mask.sum(1, keepdim=True) - 1))
    to_go = held.unflatten(0, (-1, batch.group_size))  # (B / G, G, R)
    flat = to_go.amin(1, keepdim=True) == to_go.amax(1, keepdim=True)
    advantages = less_the_others(to_go).masked_fill(flat, 0.0).flatten(0, 1)
    return torch.where(mask, advantages, 0.0), None


def grpo(batch: Rollout, config: PPOConfig) -> tuple[Tensor, None]:
    """Group-relative advantages (Shao et al. 2024, section 4.1.2): (S_i - mean_G) / (std_G + 1e-6).

    Good for prompts whose rewards have unlike scales; the nearly decided ones weigh more than the others.
    """
    returns = batch.token_rewards.sum(-1).view(-1, batch.group_size)  # (B / G, G)
    spread = returns.std(1, keepdim=True, correction=config.whiten_ddof) + 1e-6
    return at_tokens((returns - returns.mean(1, keepdim=True)) / spread, batch), None


def dr_grpo(batch: Rollout, config: PPOConfig) -> tuple[Tensor, None]:
    """GRPO done right (Liu et al. 2025, section 3.2): S_i - mean_G, without the bias of the standard deviation.

    It is RLOO times (G - 1) / G. With loss_averaging="gen_len" a token's weight is independent of the lengths.
    """
    returns = batch.token_rewards.sum(-1).view(-1, batch.group_size)  # (B / G, G)
    return at_tokens(returns - returns.mean(1, keepdim=True), batch), None


def return_to_go(batch: Rollout, gamma: float) -> Tensor:
    """sum_{k>=t} gamma^(k-t) r_k of each token, (B, R), 0 at padding: GAE with lambda 1 and no values."""
    rewards = batch.token_rewards
    return gae(rewards, torch.zeros_like(rewards), batch.response_mask, gamma, 1.0)[0]


def less_the_others(x: Tensor) -> Tensor:
    """x (B / G, G, ...) less the mean of the other G - 1 of its group."""
    return x - (x.sum(1, keepdim=True) - x) / (x.size(1) - 1)


def at_tokens(advantages: Tensor, batch: Rollout) -> Tensor:
    """Advantages (B / G, G) at all tokens of their responses, (B, R). Exactly 0 in groups whose returns are equal."""
    flat = flat_groups(batch.token_rewards.sum(-1), batch.group_size)
    return torch.where(batch.response_mask, advantages.masked_fill(flat[:, None], 0.0).view(-1, 1), 0.0)


ADVANTAGES: dict[str, Callable[[Rollout, PPOConfig], tuple[Tensor, Tensor | None]]] = {
    "gae": gae_advantages,
    "reinforce": reinforce,
    "reinforce++": reinforce,
    "rloo": rloo,
    "rloo_to_go": rloo_to_go,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
}
USES_VALUES = {"gae"}  # only for these a value head is made; the others return None for the returns
COMPARES_GROUPS = {"rloo", "rloo_to_go", "grpo", "dr_grpo"}  # these need at least two responses a prompt
COMPARES_WHOLE_RETURNS = {"rloo", "grpo", "dr_grpo"}  # these know no discount


def with_advantages(batch: Rollout, config: PPOConfig) -> Rollout:
    """The batch with its advantages and returns; advantages whitened in the config's scope, if at all."""
    c, mask, per_row = config, batch.response_mask, config.whiten_scope == "sequence"
    if batch.group_size != c.group_size:
        raise ValueError(f"the rollout has groups of {batch.group_size}, the config group_size={c.group_size}")
    advantages, returns = ADVANTAGES[c.advantages](batch, c)
    if (returns is not None) != (c.advantages in USES_VALUES):
        raise ValueError(f"{c.advantages!r} must be in USES_VALUES if it gives returns, and only then")
    if not c.whiten_advantages:
        return batch.replace(advantages=advantages, returns=returns)
    scale = whitening_scale(advantages, mask, c.whiten_ddof, per_row=per_row)
    advantages = whiten(advantages, mask, ddof=c.whiten_ddof, per_row=per_row)
    return batch.replace(advantages=advantages, returns=returns, advantage_scale=scale)
