"""Statistics of a PPO step; docs/metrics.md has their glossary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minirlhf.common.masked import explained_variance, masked_mean
from minirlhf.rl.groups import flat_groups
from minirlhf.rl.kl import kl_estimate

if TYPE_CHECKING:
    from minirlhf.rl.rollout import Rollout

Stats = dict[str, float]
TensorStats = dict[str, Tensor]


def rollout_statistics(batch: Rollout, scores: Tensor) -> Stats:
    """Statistics of a batch with token rewards, advantages and returns, before its update; scores: (B,), shaped."""
    mask, rewards = batch.response_mask, batch.token_rewards

    def per_sequence(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0.0).sum(-1).mean()

    k1, k2, k3 = (per_sequence(kl_estimate(batch.logprobs, batch.ref_logprobs, kind)) for kind in ("k1", "k2", "k3"))
    stats = {
        "objective/kl": k1,
        "objective/kl_k2": k2,
        "objective/kl_k3": k3,
        "objective/kl_exact": per_sequence(batch.exact_kl),
        "objective/entropy": per_sequence(batch.entropy),
        "objective/reward_with_kl": per_sequence(rewards),
        "reward/mean": batch.scores.mean(),
        "reward/std": batch.scores.std(correction=0),
        "reward/shaped": scores.mean(),
    }
    if batch.returns is not None:
        stats |= {
            "ppo/val/mean": masked_mean(batch.values, mask),
            "ppo/val/var_explained": explained_variance(batch.values, batch.returns, mask),
            "ppo/returns/mean": masked_mean(batch.returns, mask),
        }
    if batch.group_size > 1:
        stats["reward/flat_groups"] = flat_groups(scores, batch.group_size).double().mean()
    stats["tokens/response"] = mask.sum(-1).double().mean()
    return read_stats([stats])[0]


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
    """The mean of each statistic over the minibatches whose statistics are all finite, or over all if none are."""
    finite = [s for s in stats if all(map(math.isfinite, s.values()))] or stats
    return {name: sum(s[name] for s in finite) / len(finite) for name in finite[0]}
