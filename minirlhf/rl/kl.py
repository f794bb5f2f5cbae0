"""The leash: estimates of the KL divergence to the reference, and the controllers of its coefficient.

Sources: Schulman 2020, "Approximating KL Divergence"; Ziegler et al. 2019, "Fine-Tuning Language Models from Human
Preferences", section 2.2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

KL_ESTIMATORS = ("k1", "k2", "k3", "exact")


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k1") -> Tensor:
    """A per-token estimate (B, R) of KL(policy || reference) in nats, for tokens sampled from the policy.

    With log r = logp - ref_logp (Schulman 2020 writes r for its inverse):
        k1 = log r                  unbiased, can be negative
        k2 = (log r)^2 / 2          biased, low variance
        k3 = exp(-log r) - 1 + log r    unbiased and never negative
    Raises ValueError for another kind.
    """
    log_r = logprobs - ref_logprobs
    if kind == "k1":
        return log_r
    if kind == "k2":
        return 0.5 * log_r.square()
    if kind == "k3":
        return torch.expm1(-log_r) + log_r
    raise ValueError(f"the KL estimator must be k1, k2 or k3, got {kind!r}")


class FixedKL:
    """A constant KL coefficient."""

    def __init__(self, coef: float):
        if not coef >= 0:
            raise ValueError(f"coef must be at least 0, got {coef}")
        self.coef = float(coef)

    def update(self, kl: float, n: int) -> None:
        """Does nothing: the coefficient is fixed."""


class AdaptiveKL:
    """The log-space proportional controller of Ziegler et al. 2019, section 2.2.

        e = clip(KL / target - 1, -0.2, 0.2)
        coef *= 1 + e * n / horizon

    target: KL per sequence (sum over its tokens) to aim at, in nats. horizon: in episodes.
    Raises ValueError for a negative coefficient, or a target or horizon that is not positive.
    """

    def __init__(self, init_coef: float, target: float, horizon: float):
        if not init_coef >= 0:
            raise ValueError(f"init_coef must be at least 0, got {init_coef}")
        if not target > 0 or not horizon > 0:
            raise ValueError(f"target and horizon must be positive, got {target} and {horizon}")
        self.coef, self.target, self.horizon = float(init_coef), float(target), float(horizon)

    def update(self, kl: float, n: int) -> None:
        """Move the coefficient after a batch of n episodes with this mean KL per sequence, in nats.

        It never becomes negative, not even after a batch of more than 5 horizons. Ignores a KL that is not finite.
        """
        if not math.isfinite(kl):
            return
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coef *= max(1.0 + error * n / self.horizon, 0.0)
