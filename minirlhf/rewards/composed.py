"""Rewards made of rewards: weighted sums, a penalty on repetition, and rewards of single tokens.

All take prompts and responses, and are built from rewards of any form. Those with a third parameter, `tokens`, return
one score per token if they get tokens (PPO passes them), and one per response if they do not.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minirlhf.common.validation import is_finite, require_bools, require_positive_ints
from minirlhf.rewards.base import RewardFunction, call_reward, checked_scores, mean_metrics, rewards_by_token, scope_of


class WeightedSum:
    """sum_k w_k S_k of named rewards: `reward(prompts, responses) -> (B,)`, fp64; (B, R) if a part scores tokens.

    In (B, R), a part that scores whole responses counts at the last token.

    parts: name -> (weight, reward). A weight may be negative.
    Raises ValueError for no parts, a blank name, a weight that is not finite, or a reward that cannot be called.
    """

    def __init__(self, parts: Mapping[str, tuple[float, RewardFunction]]):
        if not parts:
            raise ValueError("parts is empty: there is nothing to sum")
        for name, (weight, reward) in parts.items():
            if not isinstance(name, str) or not name.strip():
                raise ValueError(f"the names of parts must be texts that are not blank, got {name!r}")
            if not is_finite(weight):
                raise ValueError(f"the weight of part {name!r} must be a finite number, got {weight!r}")
            if not callable(reward):
                raise ValueError(f"part {name!r} must be a reward, got {reward!r} of type {type(reward).__name__}")
        self.parts = dict(parts)
        self.scope = scope_of(*(reward for _, reward in parts.values()))
        # Sum and number of each part's unweighted scores; lists, as several threads may score at once.
        self._totals: list[tuple[str, float, int]] = []
        self._reported: list[tuple[int, dict[str, float]]] = []  # rows, and what parts returned with their scores

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], tokens: Sequence[Sequence[str]] | None = None
    ) -> Tensor:
        """The weighted sum. Raises as `call_reward`, with the name of the part."""
        weighted = []
        parts = {name: reward for name, (_, reward) in self.parts.items()}
        for name, (scores, metrics) in rewards_by_token(parts, prompts, responses, tokens).items():
            weight = self.parts[name][0]
            if tokens is None and scores.ndim == 2:
                scores = checked_scores(scores.sum(-1), len(prompts))
            self._reported.append((len(scores), {f"{name}/{key}": value for key, value in metrics.items()}))
            self._totals.append((name, scores.sum().item(), len(scores)))
            weighted.append(weight * scores)
        if tokens is not None and any(scores.ndim == 2 for scores in weighted):
            weighted = [_at_last_token(x, list(map(len, tokens))) if x.ndim == 1 else x for x in weighted]
        return torch.stack(weighted).sum(0)

    def metrics(self) -> dict[str, float]:
        """reward/parts/NAME: the mean of each part's unweighted scores since the last call; and the parts' own metrics.

        Metrics that a part returned with its scores get the prefix NAME/. So do those of its method `metrics` whose
        name an earlier part has used.
        """
        (totals, self._totals), (reported, self._reported) = (self._totals, []), (self._reported, [])
        means = [(n, {f"reward/parts/{name}": total / n}) for name, total, n in totals if n]
        figures = mean_metrics(means) | mean_metrics([x for x in reported if x[0]])
        for name, (_, reward) in self.parts.items():
            if hasattr(reward, "metrics"):
                for key, value in reward.metrics().items():
                    figures[f"{name}/{key}" if key in figures else key] = value
        return figures


@dataclass(frozen=True)
class RepetitionPenalty:
    """-(1 - distinct / all) over the character n-grams of a response: from 0 if all differ towards -1 if all are equal.

    This is the share of n-grams that occurred before, 1 - distinct-n (Li et al. 2016); 0 for a response of fewer than
    n characters.

    per_token: charge each repeated n-gram to the token that completes it, instead of all to the last token.
    Raises ValueError for an n below 1.
    """

    n: int = 3
    per_token: bool = False

    def __post_init__(self) -> None:
        require_positive_ints(self, "n")
        require_bools(self, "per_token")

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], tokens: Sequence[Sequence[str]] | None = None
    ) -> list[float] | list[list[float]]:
        if self.per_token and tokens is not None:
            return [self._charges(row) for row in tokens]
        return [sum(self._charges([response])) for response in responses]

    def _charges(self, tokens: Sequence[str]) -> list[float]:
        """The penalty of each token."""
        text = "".join(tokens)
        of_character = [t for t, piece in enumerate(tokens) for _ in piece]  # which token each character is of
        repeats = [0] * len(tokens)
        seen = set()
        for end in range(self.n, len(text) + 1):
            gram = text[end - self.n : end]
            repeats[of_character[end - 1]] += gram in seen
            seen.add(gram)
        return [-count / max(1, len(text) - self.n + 1) for count in repeats]


class Increments:
    """The difference that each token makes to the score of the response so far, by a reward of whole texts.

    Token t gets S(y_1 .. y_t) - S(y_1 .. y_(t-1)), the first one S(y_1). The sum is the score of the response, so that
    the optimal policy stays the same for gamma = 1 (potential-based shaping, Ng et al. 1999). The other reward scores
    one text for each token that adds text.

    reward: of any form; it must give sensible scores to texts that are cut anywhere.
    """

    def __init__(self, reward: RewardFunction):
        if not callable(reward):
            raise ValueError(f"Increments must be of a reward, got {reward!r} of type {type(reward).__name__}")
        self.reward, self.scope = reward, scope_of(reward)

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], tokens: Sequence[Sequence[str]] | None = None
    ) -> Tensor:
        """Token scores (B, R), or without tokens the scores (B,), fp64. Raises as `call_reward`."""
        if tokens is None:
            return call_reward(self.reward, prompts, responses)
        texts = [list(itertools.accumulate(row)) for row in tokens]
        places = [(i, t) for i, row in enumerate(tokens) for t, piece in enumerate(row) if piece or t == 0]
        rows, columns = [i for i, _ in places], [t for _, t in places]
        scores = call_reward(self.reward, [prompts[i] for i in rows], [texts[i][t] for i, t in places])
        first = torch.tensor([t == 0 for t in columns], dtype=torch.bool)
        before = torch.where(first, 0.0, scores.roll(1))
        table = torch.zeros(len(tokens), max(map(len, tokens), default=0), dtype=torch.float64)
        table[rows, columns] = scores - before
        return table


def _at_last_token(scores: Tensor, lengths: Sequence[int]) -> Tensor:
    """Token scores (B, R) with each response's score (B,) at the last of its `lengths` tokens."""
    table = torch.zeros(len(lengths), max(lengths, default=0), dtype=scores.dtype)
    table[range(len(lengths)), [length - 1 for length in lengths]] = scores
    return table
