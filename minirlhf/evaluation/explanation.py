"""One sample of a PPO step, token by token: what the algorithm saw and what it did about it."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, fields

from minirlhf.common.text import printable


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
        widths = [max(_width(cell) for cell in column) for column in zip(names, *rows, strict=True)]
        lines = [_line(row, widths) for row in [names, *rows]]
        return "\n".join([f"prompt {printable(self.prompt)!r}, score {self.score:.4f}", *lines])


def _cell(value: str | float | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    return printable(value) if isinstance(value, str) else f"{value:.4f}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(" " * (width - _width(cell)) + cell for cell, width in zip(cells, widths, strict=True))


def _width(text: str) -> int:
    """Columns that a text takes in a terminal: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)
