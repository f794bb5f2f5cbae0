"""The score in the answer of a judge: "8", "Score: 8/10", "评分：8分", "**8**", {"score": 8}, "[[8]]",
<score>8</score>, \\boxed{8}, and with a <think> block before it. An answer that can be read in two ways has no score,
nor has one of another scale ("4 (out of 5)") or one that is still to be computed ("2+3+3 = 8").
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

_NUMBER = r"(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_UNIT = r"(?: *(?:points?|stars?|分(?!析)|星))?"
_MAXIMUM = rf"(?:{_NUMBER} *(?:to|-|–|~|至|到) *)?{_NUMBER}{_UNIT}"  # the best score: "10", "0-10", "10分"
_OF = r"(?:/|(?:out )?of|on a scale (?:of|from)|, *满分[为是:]?|\( *(?:/|(?:out )?of|from|满分[为是:]?)?)"
_SCORE = rf"(?P<score>[-+]?{_NUMBER}){_UNIT}(?: *(?P<of>{_OF} *{_MAXIMUM}制?) *\)?)?"
_NAME = r"(?<![a-z])(?:score|rating|grade|answer)|评分(?:结果)?|得分|打分|分数|总分"
_SUMMARY = r"(?<![a-z])overall|(?:综合|总体|整体)?评价|总评"  # a name only where nothing follows the number
_SCALE = rf"(?P<scale>\([^()\n]*\)|\[[^\[\]\n]*\]|(?:out of|from|/)\s*{_MAXIMUM})?"  # "(0-10)"
_IS = r"(?:(?:is|为|是)\s*[:=]?|[】\]]?\s*[:=]|[】\]])"
# A score is plain if the rest of its sentence has no number, and no word that changes the score or its scale.
_CHANGE = r"(?:and|half|less|minus|of|on|or|out|over|per|plus|point|times|to|x)\b|percent|[半点或到至]"
_OF_WORDS = "out of|scale|满分|分制|percent|%"
_REST = rf"(?: *[,:;()\]】|<'—]| +[-–]+ | +(?!{_CHANGE})[a-z一-鿿])(?:(?!{_OF_WORDS})[^\d\n.!。¼-¾])*"
_PLAIN = rf"(?:(?P<plain>)(?=(?:{_REST})? *(?:$|[\n。]|[.!](?![\d.])))|)"
_IN_BRACKETS = re.compile(rf"\[\[\s*{_SCORE}\s*\]\](?P<scale> *(?:/|out of) *{_MAXIMUM})?", re.I)
_LABEL = rf"[a-z ]{{0,20}}(?:{_NAME}|{_SUMMARY}) *{_SCALE} *(?:is|为|是)? *[:=]? *"
_ALONE = re.compile(rf"(?:{_LABEL})?{_SCORE} *[.。!]?", re.I)
_GIVEN = rf"[打给评得][出了分]?(?=\s*{_NUMBER}\s*分)"
_NAMED = re.compile(rf"(?:(?:{_NAME})\s*{_SCALE}\s*{_IS}|{_GIVEN})\s*{_SCORE}{_PLAIN}", re.I)
_DASHED = re.compile(rf"({_NAME}) +[-–—] +(?=[0-9][0-9./ ]*$)", re.I | re.M)  # "Score - 8"
_IN_PARENTHESES = re.compile(rf"\( *({_NUMBER}) *\)(?! *[:=])")  # "(8)", but not the scale of "Score (10): 8"
# The scale that is told anywhere: "满分5分", "on a scale of 1 to 5", "a 5-point scale", "5分制".
_SCALES = re.compile(
    rf"(?:满分[为是:* ]{{0,3}}|scale (?:of|from) *){_MAXIMUM}|(?<![0-9.]){_MAXIMUM}(?:(?:-point)? scale| *[分星]制)",
    re.I,
)
_OBJECT = re.compile(r"""\{(?=\s*(?:["}]|(?P<python>')))""")  # how it begins; Python has single quotes
_QUOTED = re.compile(r""""(?:[^"\\]|\\.)*"|'((?:[^'\\]|\\.)*)'""", re.S)
_MARKUP = re.compile(r"</?(?:answer|final_answer|score|rating|output|solution)>|<\|(?:begin|end)_of_solution\|>", re.I)
_BOXED = re.compile(r"\$?\\boxed\{([^{}]*)\}\$?")
_KEY = re.compile(
    r"(?:(?:^|[^A-Za-z])(?i:score|rating|grade)|[a-z](?:Score|Rating|Grade)|评分(?:结果)?|得分|打分|分数|总分|分值|^分)"
    r"(?:[\W\d_]|(?i:out|of|from|to)|满?分)*$")  # fmt: skip
_MAXIMUM_KEY = re.compile(r"^(?:max|out.?of|(?:scale|total)$|满分)", re.I)
_ASIDE = re.compile(r"<(analysis|rationale|reflection|scratchpad)>[^<]*(?:<(?!/?\1>)[^<]*)*</\1>", re.I)
# <think>, [THINK], ◁think▷, <|START_THINKING|>, <seed:think>, <|begin_of_thought|>, and the channels of gpt-oss.
_THOUGHT = re.compile(
    r"[<\[◁]\|?(?P<end>/|end_(?:of_)?)?(?:start_|begin_of_|seed:)?"
    r"(?:think|thinking|thought|reasoning|(?:analysis|rationale|reflection|scratchpad)(?=\|?>))\|?[>\]▷]"
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
    if not all(_fits(scale[0], high) for scale in _SCALES.finditer(text)):
        return None
    bracketed = {_value(match, high) for match in _IN_BRACKETS.finditer(text)}
    for found in (bracketed, _in_objects(text, high), _in_words(text, low, high)):
        if found:
            score = found.pop() if len(found) == 1 else None
            return score if score is not None and low <= score <= high else None
    return None


def _without_thoughts(answer: str) -> str:
    """What follows the last thought; nothing of an answer that ends within one."""
    answer = _ASIDE.sub("\n", answer)
    marks = list(_THOUGHT.finditer(answer))
    if not marks:
        return answer
    return answer[marks[-1].end() :] if marks[-1]["end"] or marks[-1]["final"] else ""


def _value(match: re.Match[str], high: float) -> float | None:
    """The score of a match; None if it is of another scale ("4/5" where 10 is the best), or not plain."""
    groups = match.groupdict()
    fits = all(_fits(scale, high) for scale in (groups.get("scale"), groups["of"]) if scale)
    return float(match["score"]) if fits and groups.get("plain", "") is not None else None


def _fits(scale: str, high: float) -> bool:
    """Whether the largest number of a scale is high. "out of five" is another scale, "(a whole number)" is none."""
    numbers = [float(number) for number in re.findall(_NUMBER, scale)]
    return max(numbers) == high if numbers else not re.search(_OF_WORDS, scale, re.I)


def _in_objects(text: str, high: float) -> set[float | None]:
    """The scores in JSON objects; None for one that was cut off, as what it begins with is not what it would say."""
    found: set[float | None] = set()
    while begins := _OBJECT.search(text):
        text = text[begins.start() :]
        if begins["python"]:
            text = _QUOTED.sub(lambda quoted: quoted[0] if quoted[1] is None else json.dumps(quoted[1]), text)
        try:
            content, end = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            return {None}
        found.add(_in_object(content, high))
        text = text[end:]
    return found


def _in_object(content: dict[str, Any], high: float) -> float | None:
    """The score of the key that names one, in whatever objects, or of the only key; None if there are several."""
    scales = {key: x for key, x in content.items() if _MAXIMUM_KEY.search(key)}
    named = {key: x for key, x in content.items() if _KEY.search(key) and key not in scales}
    if named and not all(_fits(scale, high) for scale in [*named, *(f"out of {x}" for x in scales.values())]):
        return None
    if not named and len(content) > 1:
        named = {key: x for key, x in content.items() if isinstance(x, dict)}
    value = next(iter((named or content).values())) if len(named or content) == 1 else None
    if isinstance(value, dict):
        return _in_object(value, high)
    if isinstance(value, str):
        read = _ALONE.fullmatch(" ".join(value.split()))
        return _value(read, high) if read else None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value) if abs(value) < 1e300 else math.inf
    return None


def _in_words(text: str, low: float, high: float) -> set[float | None]:
    """The scores that stand on a line of their own, and those that are named as scores."""
    text = _BOXED.sub(r" \1 ", _MARKUP.sub("\n", text))
    plain = re.sub(r'[*`“”]|"(?!\s*:)', " ", text)  # not the quotes of a JSON key: an object that was cut is no answer
    plain = _IN_PARENTHESES.sub(r" \1 ", re.sub(r"\s+", lambda gap: "\n" if "\n" in gap[0] else " ", plain))
    if low >= 0:  # a dash is no sign
        plain = _DASHED.sub(r"\1: ", plain)
    lines = [_ALONE.fullmatch(line.strip().lstrip("# ")) for line in plain.splitlines()]
    return {_value(match, high) for match in [*lines, *_NAMED.finditer(plain)] if match}
