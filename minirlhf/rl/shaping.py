"""From the score of a response to the rewards of its tokens (Ziegler et al. 2019, equation 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minirlhf.common.masked import last_token
from minirlhf.generation.sampling import is_end
from minirlhf.rl.kl import kl_estimate

if TYPE_CHECKING:
    from minirlhf.rl.config import PPOConfig
    from minirlhf.rl.rollout import Rollout


def shaped_scores(rollout: Rollout, config: PPOConfig) -> Tensor:
    """The scores (B,) that become rewards: penalised where the end of text is missing, scaled, clipped."""
    c, scores = config, rollout.scores
    if c.missing_eos != "keep":
        scores = penalise_missing_eos(rollout, c)
    scores = scores * c.score_scale
    return scores if c.score_clip is None else scores.clamp(-c.score_clip, c.score_clip)


def penalise_missing_eos(rollout: Rollout, config: PPOConfig) -> Tensor:
    """Scores (B,) in which responses that do not end in an `eos_token_id` get a fixed score, or lose that much."""
    c, mask = config, rollout.response_mask
    ended = (last_token(mask) & is_end(rollout.tokens[:, -mask.size(1) :], c.eos_token_id)).any(-1)
    lost = rollout.scores - c.missing_eos_score
    return torch.where(ended, rollout.scores, lost if c.missing_eos == "subtract" else c.missing_eos_score)


def token_kl(rollout: Rollout, config: PPOConfig) -> Tensor:
    """KL (B, R) of each token between the sampling policy and the reference, as the config estimates it, in nats."""
    if config.kl_estimator == "exact":
        return rollout.exact_kl
    return kl_estimate(rollout.logprobs, rollout.ref_logprobs, config.kl_estimator)


def token_rewards(
    scores: Tensor,
    kl: Tensor,
    kl_coef: float,
    mask: Tensor,
    score_position: str = "last_token",
    score_shares: Tensor | None = None,
) -> Tensor:
    """Rewards (B, R): -kl_coef * KL at every response token, plus the score at the last one.

    scores: (B,). kl: (B, R), nats a token.
    score_position: "last_token" of each row; or "last_column" of the batch: rows that end earlier lose their score.
    score_shares: (B, R), the shares of single tokens in the scores; the rest of a score goes to its position.
    """
    mask = mask.bool()
    shares = torch.where(mask, 0.0 if score_shares is None else score_shares, 0.0).to(kl)
    rest = scores - shares.sum(-1)
    scored = last_token(mask)
    if score_position == "last_column":
        scored = torch.zeros_like(mask)
        scored[:, -1] = mask[:, -1]
    return torch.where(mask, shares - kl_coef * kl, 0.0) + torch.where(scored, rest.unsqueeze(-1), 0.0)


def with_token_rewards(rollout: Rollout, kl_coef: float, config: PPOConfig) -> tuple[Rollout, Tensor]:
    """The rollout with its token rewards, score at the last token - kl_coef * KL_t; and the shaped scores (B,)."""
    scores = shaped_scores(rollout, config)
    shares = None if rollout.score_shares is None else rollout.score_shares * config.score_scale
    coef = kl_coef if config.kl_placement == "reward" else 0.0
    kl, mask = token_kl(rollout, config), rollout.response_mask
    rewards = token_rewards(scores, kl, coef, mask, config.score_position, shares)
    return rollout.replace(token_rewards=rewards), scores
