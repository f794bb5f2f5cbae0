"""The mathematics of PPO on token sequences, as pure functions.

Sources: Schulman et al. 2017, "Proximal Policy Optimization Algorithms" (PPO); Schulman et al. 2016,
"High-Dimensional Continuous Control Using Generalized Advantage Estimation" (GAE); Ziegler et al. 2019, "Fine-Tuning
Language Models from Human Preferences" (KL reward and controller); Schulman 2020, "Approximating KL Divergence"
(estimators).

Shapes: B sequences, R response tokens. A mask (B, R) is 1 (or True) at response tokens and 0 at padding; whatever
stands at a padding position, NaN included, never reaches a result. No function changes its arguments.

Left out: normalisation of returns, which OpenAI's Gym implementation had and its language-model work dropped.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

KL_ESTIMATORS = ("k1", "k2", "k3")
PENALTY_MODES = ("keep", "replace", "subtract")
LOG_RATIO_LIMIT = 20.0  # exp(20) is about 5e8: large enough to clip on, small enough to stay finite in fp32


# ---- masked statistics ----------------------------------------------------------------------------------------------


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum over the unmasked entries of x (B, R), 0-d."""
    return torch.where(mask.bool(), x, 0.0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the unmasked entries of x (B, R), 0-d; 0 if there are none."""
    return masked_sum(x, mask) / mask.sum().clamp_min(1)


def masked_var(x: Tensor, mask: Tensor, ddof: int = 1) -> Tensor:
    """Variance over the unmasked entries of x (B, R), 0-d; divides by their number minus `ddof`."""
    x = torch.where(mask.bool(), x, 0.0)  # before any arithmetic: 0 times a NaN gradient is NaN
    return masked_sum((x - masked_mean(x, mask)).square(), mask) / (mask.sum() - ddof).clamp_min(1)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, ddof: int = 1, eps: float = 1e-8) -> Tensor:
    """Scale x (B, R) to variance 1 over all unmasked entries, and to mean 0 unless `shift_mean` is False.

    (x - mean) / sqrt(var + eps), with the variance over their number less `ddof`; without the shift the mean is added
    back afterwards. Fewer than two unmasked entries have no variance and are left as they are. Padding is 0 in the
    result.
    """
    x = torch.where(mask.bool(), x, 0.0)
    mean = masked_mean(x, mask)
    whitened = (x - mean) / (masked_var(x, mask, ddof) + eps).sqrt()
    whitened = whitened if shift_mean else whitened + mean
    return torch.where(mask.bool() & (mask.sum() >= 2), whitened, x)


# ---- from logits to log-probabilities -------------------------------------------------------------------------------


def gather_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability (...) of each token (...) under logits (..., V), in nats."""
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy (...) in nats of the distributions softmax(logits (..., V)); logits of -inf have probability 0."""
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)  # 0 * -inf would be NaN


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(p || q) (...) in nats over the vocabulary, with p = softmax(logits (..., V)) and q of `ref_logits`.

    Where p is 0 (a logit of -inf) the term is 0.
    """
    logp, logq = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (logp.exp() * torch.where(logits == -torch.inf, 0.0, logp - logq)).sum(-1)


# ---- KL: estimators, rewards, controllers ---------------------------------------------------------------------------


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k1") -> Tensor:
    """A per-token estimate (B, R) of KL(policy || reference) in nats, for tokens sampled from the policy.

    With log r = logp - ref_logp (Schulman 2020 writes r for its inverse):
        k1 = log r                  unbiased, can be negative
        k2 = (log r)^2 / 2          biased, low variance
        k3 = exp(-log r) - 1 + log r    unbiased and never negative
    Raises ValueError for another kind.
    """
    log_ratio = logprobs - ref_logprobs
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    if kind == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"the KL estimator must be k1, k2 or k3, got {kind!r}")


def token_rewards(
    scores: Tensor,
    kl: Tensor,
    kl_coef: float,
    mask: Tensor,
    score_position: str = "last_token",
    token_scores: Tensor | None = None,
) -> Tensor:
    """Rewards (B, R): -kl_coef * KL at every response token, plus the score at the last one (Ziegler et al., eq. 2).

    scores: (B,), one a sequence. kl: (B, R), nats a token. A sequence without response tokens gets no reward.
    score_position: "last_token", of each row; or "last_column", of the batch, as implementations for responses of
        fixed length have it: rows that end earlier lose their score.
    token_scores: (B, R), the shares of single tokens in the scores; what is left of a score goes to its position.
    """
    mask = mask.bool()
    shares = torch.where(mask, 0.0 if token_scores is None else token_scores, 0.0).to(kl)
    rest = scores - shares.sum(-1)
    scored = last_token(mask)
    if score_position == "last_column":
        scored = torch.zeros_like(mask)
        scored[:, -1] = mask[:, -1]
    return torch.where(mask, shares - kl_coef * kl, 0.0) + torch.where(scored, rest.unsqueeze(-1), 0.0)


def penalise(scores: Tensor, where: Tensor, mode: str, value: float) -> Tensor:
    """Scores (B,) in which the rows of `where`, bool (B,), are changed.

    mode: "keep" leaves them, "replace" sets them to `value`, "subtract" takes `value` off.
    Raises ValueError for another mode.
    """
    if mode == "keep":
        return scores
    if mode == "replace":
        return torch.where(where, torch.full_like(scores, value), scores)
    if mode == "subtract":
        return torch.where(where, scores - value, scores)
    raise ValueError(f"mode must be one of {', '.join(PENALTY_MODES)}, got {mode!r}")


class RunningMoments:
    """Mean and standard deviation of all scores seen so far (Chan et al. 1979, parallel variance)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0  # squares: sum of squared deviations from the mean

    def update(self, scores: Tensor) -> None:
        """Take a batch of scores (B,) in."""
        n, mean = len(scores), scores.double().mean().item()
        squares = (scores.double() - mean).square().sum().item()
        delta, total = mean - self.mean, self.count + n
        self.squares += squares + delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.count = total

    @property
    def scale(self) -> float:
        """The standard deviation so far; 1 for fewer than two scores, or equal ones."""
        std = math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0
        return std if std > 0 else 1.0

    def whiten(self, scores: Tensor) -> Tensor:
        """(scores - mean) / scale with the moments so far."""
        return (scores - self.mean) / self.scale


def last_token(mask: Tensor) -> Tensor:
    """Bool (B, R), True at the last unmasked position of every row that has one."""
    mask = mask.bool()
    after = mask.long().flip(-1).cumsum(-1).flip(-1)  # unmasked positions from here to the end
    return mask & (after == 1)


class FixedKL:
    """A constant KL coefficient."""

    def __init__(self, coef: float):
        if not coef >= 0:
            raise ValueError(f"the KL coefficient must not be negative, got {coef}")
        self.coef = float(coef)

    def update(self, kl: float, n: int) -> None:
        """Does nothing: the coefficient is fixed."""


class AdaptiveKL:
    """The log-space proportional controller of Ziegler et al. 2019, section 2.2.

        e = clip(KL / target - 1, -0.2, 0.2)
        coef *= 1 + e * n / horizon

    init_coef: the first coefficient. target: KL per sequence (sum over its tokens) to aim at, in nats.
    horizon: episodes over which a full error multiplies the coefficient by about e^0.2.
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

        It never becomes negative, as a batch of more than 5 horizons could make it. A KL that is not finite is
        ignored.
        """
        if not math.isfinite(kl):
            return
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coef *= max(1.0 + error * n / self.horizon, 0.0)


# ---- advantages -----------------------------------------------------------------------------------------------------


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
        # delta_t = r_t + gamma * V(s_{t+1}) - V(s_t)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # A_t = delta_t + gamma * lam * A_{t+1}
        advantages[:, t] = torch.where(mask[:, t], delta + gamma * lam * next_advantage, 0.0)
        next_value, next_advantage = values[:, t], advantages[:, t]
    return advantages, advantages + values


# ---- losses ---------------------------------------------------------------------------------------------------------
# Each returns per-token terms (B, R); the trainer sums them over the mask and divides by the token count of the whole
# minibatch, so that cutting a minibatch into micro-batches changes nothing.


def log_ratio(logprobs: Tensor, old_logprobs: Tensor, limit: float = LOG_RATIO_LIMIT) -> Tensor:
    """log(pi / pi_old) (B, R), clamped to +-limit so that its exp stays finite."""
    return (logprobs - old_logprobs).clamp(-limit, limit)


def policy_loss(
    log_ratio: Tensor, advantages: Tensor, cliprange: float = 0.2, dual_clip: float | None = None
) -> Tensor:
    """The clipped surrogate objective, negated (Schulman et al. 2017, eq. 7), per token (B, R).

    max(-A r, -A clip(r, 1 - cliprange, 1 + cliprange)) with r = exp(log_ratio).
    dual_clip: c > 1 bounds the loss by -A c where A < 0 (Ye et al. 2020, "Mastering Complex Control in MOBA Games",
        eq. 5), so that a token that became much likelier in spite of a bad outcome cannot dominate.
    """
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1.0 - cliprange, 1.0 + cliprange))
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float = 0.2) -> Tensor:
    """The clipped value loss of OpenAI's PPO2 and lm-human-preferences, per token (B, R).

    1/2 max((V - R)^2, (V_clip - R)^2) with V_clip = V_old + clip(V - V_old, -cliprange_value, cliprange_value).
    """
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over unmasked tokens, 0-d; 0 where the returns do not vary."""
    variance = masked_var(returns, mask)
    rounding = (torch.finfo(returns.dtype).eps * 8 * torch.where(mask.bool(), returns, 0.0).abs().max()).square()
    return torch.where(variance > rounding, 1.0 - masked_var(returns - values, mask) / variance, 0.0)
