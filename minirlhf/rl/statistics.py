"""Statistics of a PPO step; docs/metrics.md has their glossary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minirlhf.rl import ppo

if TYPE_CHECKING:
    from minirlhf.rl.rollout import Rollout

Stats = dict[str, float]

TensorStats = dict[str, Tensor]


def rollout_statistics(rollout: Rollout, scores: Tensor, rewards: Tensor, returns: Tensor) -> Stats:
    """Statistics of one batch of experience, before its update; the README has their glossary.

    scores: (B,), as they became rewards. rewards, returns: (B, R), as the trainer computed them. "A sequence" means
    the sum over its response tokens, averaged over the batch; "a token" the mean over all response tokens.
    """
    mask = rollout.response_mask

    def per_sequence(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0.0).sum(-1).mean()

    return read_stats(
        [
            {
                "objective/kl": per_sequence(ppo.kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k1")),
                "objective/kl_k2": per_sequence(ppo.kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k2")),
                "objective/kl_k3": per_sequence(ppo.kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k3")),
                "objective/kl_exact": per_sequence(rollout.exact_kl),
                "objective/entropy": per_sequence(rollout.entropy),
                "objective/reward_with_kl": per_sequence(rewards),
                "reward/mean": rollout.scores.mean(),
                "reward/std": rollout.scores.std(correction=0),
                "reward/shaped": scores.mean(),
                "ppo/val/mean": ppo.masked_mean(rollout.values, mask),
                "ppo/val/var_explained": ppo.explained_variance(rollout.values, returns, mask),
                "ppo/returns/mean": ppo.masked_mean(returns, mask),
                "tokens/response": mask.sum(-1).double().mean(),
            }
        ]
    )[0]


def time_statistics(stats: Stats, seconds: Mapping[str, float], count: int) -> Stats:
    """Seconds of each phase of a step, and response tokens a second over all of them."""
    times = {f"time/{phase}": value for phase, value in seconds.items()}
    return times | {"time/tokens_per_second": stats["tokens/response"] * count / sum(seconds.values())}


def read_stats(stats: Sequence[TensorStats]) -> list[Stats]:
    """Statistics of several minibatches as numbers, read from the device in one transfer."""
    names = list(stats[0])
    rows = torch.stack([torch.stack([s[name].double() for name in names]) for s in stats]).tolist()
    return [dict(zip(names, row, strict=True)) for row in rows]


def mean_stats(stats: Sequence[Stats]) -> Stats:
    """The mean of each statistic over minibatches.

    A minibatch with a statistic that is not finite, whose optimizer step was skipped, is left out, unless all are so.
    """
    finite = [s for s in stats if all(map(math.isfinite, s.values()))] or stats
    return {name: sum(s[name] for s in finite) / len(finite) for name in finite[0]}
