"""The losses of PPO, per token (B, R), and the weights by which they are averaged.

Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms". `token_weights` refer to the whole minibatch,
so cutting it into micro-batches changes nothing.

Shapes: B sequences, R response tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from minirlhf.rl.config import PPOConfig

LOG_RATIO_LIMIT = 20.0  # exp(20) is about 5e8: large enough to clip on, small enough to stay finite in fp32


def log_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """log(pi / pi_old) (B, R), clamped so that its exp stays finite."""
    return (logprobs - old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def policy_loss(log_rho: Tensor, advantages: Tensor, cliprange: float = 0.2) -> Tensor:
    """The clipped surrogate objective, negated (Schulman et al. 2017, eq. 7), per token (B, R).

    max(-A r, -A clip(r, 1 - cliprange, 1 + cliprange)) with r = exp(log_rho).
    """
    ratio = log_rho.exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1.0 - cliprange, 1.0 + cliprange))


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float = 0.2) -> Tensor:
    """The clipped value loss of OpenAI's PPO2 and lm-human-preferences, per token (B, R).

    1/2 max((V - R)^2, (V_clip - R)^2) with V_clip = V_old + clip(V - V_old, -cliprange_value, cliprange_value).
    """
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def token_weights(mask: Tensor, config: PPOConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    """Per-token weights (B, R) that sum to 1 over the minibatch with this response mask, 0 at padding.

    `loss_averaging` says what has equal weights: all tokens, all rows, or all runs of `forward_batch_size` rows.
    """
    mask = mask.to(dtype)
    if config.loss_averaging == "tokens":
        return mask / mask.sum()
    if config.loss_averaging == "sequences":
        return mask / mask.sum(-1, keepdim=True) / len(mask)
    parts = mask.split(config.forward_batch_size)
    return torch.cat([part / part.sum() / len(parts) for part in parts])
