"""Learning-rate schedules."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "linear", "cosine")


def lr_factor(schedule: str, progress: float, warmup: float = 0.0, floor: float = 0.0) -> float:
    """Factor on the peak learning rate at a progress in [0, 1]: linear warm-up, then constant, linear or cosine decay.

    warmup: the share of the progress spent warming up. floor: the factor at the end of the decay.
    """
    if progress < warmup:
        return progress / warmup
    done = min((progress - warmup) / max(1.0 - warmup, 1e-12), 1.0)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return floor + (1.0 - floor) * (1.0 - done)
    if schedule == "cosine":
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
    raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
