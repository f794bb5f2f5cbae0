"""The score in the answer of a judge: "8", "Score: 8/10", "评分：8分", "**8**", {"score": 8}, "[[8]]", and with a
<think> block before it. An answer that can be read in two ways has no score.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

_NUMBER = r"(?P<number>[-+]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+))"
_SCORE = rf"{_NUMBER}(?:\s*(?:/|out of|of)\s*(?P<of>[0-9]+(?:\.[0-9]+)?))?\s*(?:points?|stars?|分|星)?"
_NAME = r"(?<![a-z])(?:score|rating|grade|answer)|评分|得分|打分|分数|总分"
_IN_BRACKETS = re.compile(rf"\[\[\s*{_SCORE}\s*\]\]")
_ALONE = re.compile(
    rf"(?:[a-z ]{{0,20}}(?:{_NAME})\s*(?:\([^()]*\))?\s*(?:is|为|是)?\s*[:=]?\s*)?{_SCORE}\s*[.。!]?", re.I
)
_NAMED = re.compile(
    rf"(?:(?:{_NAME})\s*(?:\([^()\n]*\))?\s*(?:is|[:=】\]]|为|是)|(?:打|给|评)(?:出|了)?(?=\s*[0-9.]+\s*分))\s*{_SCORE}"
    r"(?![0-9a-z_%/]|[.,][0-9]|\s*(?:-|–|~|to|or|至|到|或)\s*[0-9])", re.I)  # fmt: skip
_OBJECT = re.compile(r"\{[^{}]*\}")
_KEY = re.compile(r"score|rating|grade|分", re.I)
_THOUGHT = re.compile(r"[<\[](/?)(?:think|thinking|reasoning)[>\]]", re.I)
_HALF_WIDTH = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)}


def text_of(content: Any) -> str:
    """The text of a chat message's content: a text, None, or a list of parts. Raises ValueError for anything else."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        return "".join(part for part in parts if isinstance(part, str))
    raise ValueError(
        f"an answer must be a text, got {type(content).__name__}; of a chat completion it is choices[0].message.content"
    )


def parse_score(answer: str, low: float, high: float) -> float | None:
    """The score that an answer gives, None if it gives none, several, or one outside the range from low to high.

    "8/10" is a score if `high` is 10.
    """
    text = _without_thoughts(answer).translate(_HALF_WIDTH)
    bracketed = {_value(match, high) for match in _IN_BRACKETS.finditer(text)}
    for found in (bracketed, _in_objects(text, high), _in_words(text, high)):
        if found:
            score = found.pop() if len(found) == 1 else None
            return score if score is not None and low <= score <= high else None
    return None


def _without_thoughts(answer: str) -> str:
    """What follows the last thought; nothing of an answer that ends within one."""
    marks = list(_THOUGHT.finditer(answer))
    if not marks:
        return answer
    return answer[marks[-1].end() :] if marks[-1][1] else ""


def _value(match: re.Match[str], high: float) -> float | None:
    """The number of a match; None if it is of another scale ("4/5" where 10 is the best)."""
    return float(match["number"]) if match["of"] is None or float(match["of"]) == high else None


def _in_objects(text: str, high: float) -> set[float | None]:
    """The scores in JSON objects: of a key that names a score, or of the only key."""
    found: set[float | None] = set()
    for match in _OBJECT.finditer(text):
        try:
            content = json.loads(match[0])
        except ValueError:
            continue
        named = {key: x for key, x in content.items() if _KEY.search(key)} or content
        value = next(iter(named.values())) if len(named) == 1 else None
        if isinstance(value, str):
            read = _ALONE.fullmatch(value.strip())
            found.add(_value(read, high) if read else None)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.add(float(value) if abs(value) < 1e300 else math.inf)
        else:
            found.add(None)
    return found


def _in_words(text: str, high: float) -> set[float | None]:
    """The scores that stand on a line of their own, and those that are named as scores."""
    plain = re.sub(r'[*`“”]|"(?!\s*:)', " ", text)  # not the quotes of a JSON key: an object that was cut is no answer
    lines = [_ALONE.fullmatch(line.strip().lstrip("# ")) for line in plain.splitlines()]
    return {_value(match, high) for match in [*lines, *_NAMED.finditer(plain)] if match}
