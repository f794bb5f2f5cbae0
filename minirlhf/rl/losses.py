"""The losses of PPO, per token (B, R), and the weights by which they are averaged.

Sources: Schulman et al. 2017, "Proximal Policy Optimization Algorithms"; Yu et al. 2025 (DAPO); Zheng et al. 2025
(GSPO). `token_weights` refer to the whole minibatch, so cutting it into micro-batches changes nothing.

Shapes: B sequences, R response tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minirlhf.common.masked import masked_mean

if TYPE_CHECKING:
    from minirlhf.rl.config import PPOConfig

LOG_RATIO_LIMIT = 20.0  # exp(20) is about 5e8: large enough to clip on, small enough to stay finite in fp32


def log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, of: str = "token") -> Tensor:
    """log(pi / pi_old) (B, R), clamped so that its exp stays finite: of each token, or of its whole sequence.

    of="sequence": the mean over the sequence, at each token (Zheng et al. 2025, eq. 7): the clip drops whole responses,
    as they are scored, and one token's noise moves the ratio little. mask: (B, R).
    """
    log_rho = logprobs - old_logprobs
    if of == "sequence":
        log_rho = torch.where(mask, masked_mean(log_rho, mask, per_row=True), 0.0)
    return log_rho.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def clip_ratio(ratio: Tensor, low: float, high: float | None) -> Tensor:
    """The ratio within 1 - low and 1 + high; None: low. A higher one lets rare tokens grow (Yu et al. 2025, eq. 10)."""
    return ratio.clamp(1.0 - low, 1.0 + (low if high is None else high))


def policy_loss(
    log_rho: Tensor, advantages: Tensor, cliprange: float = 0.2, cliprange_high: float | None = None
) -> Tensor:
    """The clipped surrogate objective, negated (Schulman et al. 2017, eq. 7), per token (B, R).

    max(-A r, -A `clip_ratio`(r)) with r = exp(log_rho): no gain from moving further from the policy that sampled.
    """
    ratio = log_rho.exp()
    return torch.maximum(-advantages * ratio, -advantages * clip_ratio(ratio, cliprange, cliprange_high))


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float = 0.2) -> Tensor:
    """The clipped value loss of OpenAI's PPO2 and lm-human-preferences, per token (B, R).

    1/2 max((V - R)^2, (V_clip - R)^2) with V_clip = V_old + clip(V - V_old, -cliprange_value, cliprange_value).
    """
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def token_weights(mask: Tensor, config: PPOConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    """Per-token weights (B, R) that sum to 1 over the minibatch with this response mask, 0 at padding.

    `loss_averaging` says what has equal weights: all tokens, all rows, or all runs of `forward_batch_size` rows. With
    "gen_len" a token weighs 1 / (B gen_len), whatever the lengths (Liu et al. 2025); the sum is below 1 if rows end.
    """
    mask = mask.to(dtype)
    if config.loss_averaging == "gen_len":
        return mask / (len(mask) * config.gen_len)
    if config.loss_averaging == "tokens":
        return mask / mask.sum()
    if config.loss_averaging == "sequences":
        return mask / mask.sum(-1, keepdim=True) / len(mask)
    parts = mask.split(config.forward_batch_size)
    return torch.cat([part / part.sum() / len(parts) for part in parts])
