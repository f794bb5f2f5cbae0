"""Groups of responses to one prompt: which have no spread, and sampling others in their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minirlhf.rewards.base import RewardFunction, mean_metrics
from minirlhf.rl.rollout import Rollout, collect_rollout
from minirlhf.rl.shaping import shaped_scores
from minirlhf.text.batching import cat_padded

if TYPE_CHECKING:
    from minirlhf.models.prepared import Models
    from minirlhf.rl.config import PPOConfig


def flat_groups(scores: Tensor, group_size: int) -> Tensor:
    """Bool (B / G,), True for groups without spread. scores: (B,)."""
    groups = scores.view(-1, group_size)
    return groups.amin(1) == groups.amax(1)


def collect_groups_with_spread(
    models: Models, prompts: Sequence[str], reward_fn: RewardFunction, config: PPOConfig, generator: torch.Generator
) -> Rollout:
    """`collect_rollout` with dynamic sampling (Yu et al. 2025, eq. 11): flat groups teach nothing and are replaced.

    In each of at most `drop_flat_groups` rounds, as many prompts as are missing are drawn from `prompts`, with
    replacement, and sampled. What is flat after the last round stays, with advantage 0, so B does not change.
    """
    parts: list[Rollout] = []
    rollout = collect_rollout(models, prompts, reward_fn, config, generator)
    reported = [(len(rollout), dict(rollout.reward_metrics))]  # of dropped responses too
    for _ in range(config.drop_flat_groups):
        flat = flat_groups(shaped_scores(rollout, config), config.group_size)
        if not flat.any():
            break
        if not flat.all():
            parts.append(_groups(rollout, (~flat).cpu()))
        drawn = torch.randint(len(prompts), (int(flat.sum()),), generator=generator, device=generator.device)
        rollout = collect_rollout(models, [prompts[i] for i in drawn.tolist()], reward_fn, config, generator)
        reported.append((len(rollout), dict(rollout.reward_metrics)))
    return (_joined([*parts, rollout]) if parts else rollout).replace(reward_metrics=mean_metrics(reported))


def _groups(rollout: Rollout, chosen: Tensor) -> Rollout:
    rows = chosen.repeat_interleave(rollout.group_size).nonzero().squeeze(1)
    texts = {name: tuple(getattr(rollout, name)[i] for i in rows) for name in ("prompts", "responses")}
    return rollout.rows(rows).replace(seconds=rollout.seconds, **texts)


def _joined(parts: list[Rollout]) -> Rollout:
    widths = [part.response_mask.size(1) for part in parts]
    fields: dict[str, Any] = {"group_size": parts[0].group_size}
    for name in (f.name for f in dataclasses.fields(Rollout)):
        xs = [getattr(part, name) for part in parts]
        if name in ("tokens", "mask"):
            before, after = zip(*((x[:, :-R], x[:, -R:]) for x, R in zip(xs, widths, strict=True)), strict=True)
            fields[name] = torch.cat([cat_padded(before, left=True), cat_padded(after)], 1)
        elif isinstance(xs[0], Tensor):
            fields[name] = torch.cat(xs) if xs[0].ndim == 1 else cat_padded(xs)
        elif isinstance(xs[0], tuple):
            fields[name] = sum(xs, ())
    fields["seconds"] = {phase: sum(part.seconds[phase] for part in parts) for phase in parts[0].seconds}
    return Rollout(**fields)
