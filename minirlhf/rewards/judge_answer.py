"""The score in the answer of a judge: "8", "Score: 8/10", "评分：8分", "**8**", {"score": 8}, "[[8]]",
<score>8</score>, \\boxed{8}, and with a <think> block before it. An answer that can be read in two ways has no score.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

_NUMBER = r"(?P<number>[-+]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+))"
_SCORE = rf"{_NUMBER}(?:\s*(?:/|out of|of)\s*(?P<of>[0-9]+(?:\.[0-9]+)?))?\s*(?:points?|stars?|分|星)?"
_NAME = r"(?<![a-z])(?:score|rating|grade|answer)|评分|得分|打分|分数|总分"
_SCALE = r"(?:\([^()\n]*\)|\[[^\[\]\n]*\]|(?:out of|from|/)\s*[0-9]+(?:\s*(?:to|-)\s*[0-9]+)?)?"  # "(0-10)"
_IS = r"(?:(?:is|为|是)\s*[:=]?|[:=】\]])"
_IN_BRACKETS = re.compile(rf"\[\[\s*{_SCORE}\s*\]\]")
_ALONE = re.compile(rf"(?:[a-z ]{{0,20}}(?:{_NAME})\s*{_SCALE}\s*(?:is|为|是)?\s*[:=]?\s*)?{_SCORE}\s*[.。!]?", re.I)
_NAMED = re.compile(
    rf"(?:(?:{_NAME})\s*{_SCALE}\s*{_IS}|(?:打|给|评|得)(?:出|了)?(?=\s*[0-9.]+\s*分))\s*{_SCORE}"
    r"(?![0-9a-z_%/]|[.,][0-9]|\s*(?:-|–|~|to|or|至|到|或)\s*[0-9]|\s*[¼½¾]|\s+and an? half)", re.I)  # fmt: skip
_OBJECT = re.compile(r'\{(?=\s*["}])')  # how it begins
_JSON = json.JSONDecoder()
_MARKUP = re.compile(r"</?(?:answer|final_answer|score|rating|output)>", re.I)
_BOXED = re.compile(r"\$?\\boxed\{([^{}]*)\}\$?")
_KEY = re.compile(r"score|rating|grade|分", re.I)
# <think>, [THINK], ◁think▷, <|START_THINKING|>, <seed:think>, and the channels of gpt-oss.
_THOUGHT = re.compile(
    r"[<\[◁]\|?(?P<end>/|end_)?(?:start_|seed:)?(?:think|thinking|thought|reasoning)\|?[>\]▷]"
    r"|<\|channel\|>(?:(?P<final>final)|analysis|commentary)(?:<\|message\|>)?", re.I)  # fmt: skip
_HALF_WIDTH: dict[int, int | None] = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)}
_HALF_WIDTH |= {0x2212: ord("-"), 0x200B: None, 0xFEFF: None}  # the minus sign; what has no width


def text_of(content: Any) -> str:
    """The text of a chat message's content: a text, None, or a list of parts, without those that hold thoughts.

    Raises ValueError for anything else.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list):
        spoken = [x for x in content if not isinstance(x, dict) or x.get("type", "text") in ("text", "output_text")]
        parts = [part.get("text") if isinstance(part, dict) else part for part in spoken]
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
    return answer[marks[-1].end() :] if marks[-1]["end"] or marks[-1]["final"] else ""


def _value(match: re.Match[str], high: float) -> float | None:
    """The number of a match; None if it is of another scale ("4/5" where 10 is the best)."""
    return float(match["number"]) if match["of"] is None or float(match["of"]) == high else None


def _in_objects(text: str, high: float) -> set[float | None]:
    """The scores in JSON objects; None for one that was cut off, as what it begins with is not what it would say."""
    found: set[float | None] = set()
    end = 0
    while begins := _OBJECT.search(text, end):
        try:
            content, end = _JSON.raw_decode(text, begins.start())
        except (ValueError, RecursionError):
            return {None}
        found.add(_in_object(content, high))
    return found


def _in_object(content: dict[str, Any], high: float) -> float | None:
    """The score of the key that names one, in whatever objects, or of the only key; None if there are several."""
    named = {key: x for key, x in content.items() if _KEY.search(key)}
    if not named and len(content) > 1:
        named = {key: x for key, x in content.items() if isinstance(x, dict)}
    value = next(iter((named or content).values())) if len(named or content) == 1 else None
    if isinstance(value, dict):
        return _in_object(value, high)
    if isinstance(value, str):
        read = _ALONE.fullmatch(value.strip())
        return _value(read, high) if read else None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value) if abs(value) < 1e300 else math.inf
    return None


def _in_words(text: str, high: float) -> set[float | None]:
    """The scores that stand on a line of their own, and those that are named as scores."""
    text = _BOXED.sub(r" \1 ", _MARKUP.sub("\n", text))
    plain = re.sub(r'[*`“”]|"(?!\s*:)', " ", text)  # not the quotes of a JSON key: an object that was cut is no answer
    lines = [_ALONE.fullmatch(line.strip().lstrip("# ")) for line in plain.splitlines()]
    return {_value(match, high) for match in [*lines, *_NAMED.finditer(plain)] if match}
