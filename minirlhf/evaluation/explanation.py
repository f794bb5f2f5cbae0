"""One sample of a PPO step, token by token: what the algorithm saw, and what it did with it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, TextIO

import torch

from minirlhf.common.printing import show, text_table
from minirlhf.common.text import printable
from minirlhf.rl import ppo

if TYPE_CHECKING:
    from minirlhf.rl.rollout import Rollout
    from minirlhf.rl.trainer import PPOTrainer


@dataclass(frozen=True)
class TokenExplanation:
    """One response token. Log-probabilities and KL in nats.

    logprob, old_logprob, ref_logprob: under the policy as it is now, as it was when it sampled, and the reference.
    kl: the KL estimate of the token before the update, as it was penalised. ratio: exp(logprob - old_logprob).
    clipped: whether clipping of the ratio keeps this token from moving the policy further.
    """

    token: str
    logprob: float
    old_logprob: float
    ref_logprob: float
    kl: float
    reward: float
    value: float
    returns: float
    advantage: float
    ratio: float
    clipped: bool


@dataclass(frozen=True)
class Explanation:
    """A prompt and its response, token by token; `str()` of it is a table."""

    prompt: str
    score: float
    tokens: tuple[TokenExplanation, ...]

    def __str__(self) -> str:
        names = [field.name for field in fields(TokenExplanation)]
        rows = [[_cell(getattr(token, name)) for name in names] for token in self.tokens]
        head = f"prompt {printable(self.prompt)!r}, score {self.score:.4f}"
        return "\n".join([head, *text_table([names, *rows], left=0)])


@torch.no_grad()
def explain(trainer: PPOTrainer, rollout: Rollout, i: int, file: TextIO | None = None) -> Explanation:
    """Print one row of a rollout token by token, as PPO sees it, and return it.

    rollout: before or after `trainer.step` was called on it; the ratio shows how far the policy has moved since it was
        sampled. The KL coefficient is the controller's present one.
    i: the row. file: where to print; None: standard output.
    Raises ValueError for a row that is not there.
    """
    if not 0 <= i < len(rollout):
        raise ValueError(f"the rollout has rows 0 to {len(rollout) - 1}, got {i}")
    c, mask = trainer.config, rollout.response_mask
    kl, rewards = trainer._token_kl(rollout), trainer._token_rewards(rollout, update=False)[0]
    advantages, returns = trainer.advantages(rewards, rollout.values, mask)
    row = rollout.rows(torch.tensor([i]))
    width = row.response_mask.size(1)
    with trainer.precision.autocast():
        scored = trainer.policy.score(row.tokens, row.mask, width, trainer.score_temperature, row.sampling_sets)
    advantage = advantages[i : i + 1, :width]
    ratio = ppo.log_ratio(scored.logprobs, row.logprobs, c.log_ratio_limit).exp()
    clipped = torch.where(advantage > 0, ratio > 1 + c.cliprange, ratio < 1 - c.cliprange)
    columns = {
        "logprob": scored.logprobs,
        "old_logprob": row.logprobs,
        "ref_logprob": row.ref_logprobs,
        "kl": kl[i : i + 1, :width],
        "reward": rewards[i : i + 1, :width],
        "value": row.values,
        "returns": returns[i : i + 1, :width],
        "advantage": advantage,
        "ratio": ratio,
    }
    numbers = torch.cat(list(columns.values())).T.tolist()  # one list a token
    texts = [trainer.tokenizer.vocab[token] for token in row.tokens[0, -width:].tolist()]
    explanation = Explanation(
        rollout.prompts[i] if rollout.prompts else trainer.tokenizer.decode(row.tokens[0, :-width]),
        rollout.scores[i].item(),
        tuple(
            TokenExplanation(text, clipped=bool(cut), **dict(zip(columns, values, strict=True)))
            for text, values, cut in zip(texts, numbers, clipped[0].tolist(), strict=True)
        ),
    )
    show(explanation, file)
    return explanation


def _cell(value: str | float | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    return value if isinstance(value, str) else f"{value:.4f}"
