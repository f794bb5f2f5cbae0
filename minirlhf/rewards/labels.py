"""What each label of a sentiment classifier is worth, read from its name.

Labels that form an ordered scale (negative to positive, very negative to very positive, 非常负面 to 非常正面, 1 star to
5 stars) get numbers from 0, the worst, to 1, the best. Names that say no order, such as LABEL_0, get none.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

PositiveLabel: TypeAlias = "str | Sequence[str] | Mapping[str, float]"

_WORDS = {
    1: "positive pos good favorable favourable 正面 正向 积极 好评 满意 好 正",
    0: "neutral neu mixed 中性 中立 中评 一般 中",
    -1: "negative neg bad unfavorable unfavourable 负面 负向 消极 差评 不满意 差 坏 负",
}
_STRENGTHS = {
    2: "very strongly strong extremely highly 非常 很 极其 极 强烈 十分 特别",
    0.5: "slightly somewhat mildly weakly weak 略 稍 有点 轻微 比较 较 偏",
}
_DEGREES: dict[str, float] = {word: degree for degree, words in _WORDS.items() for word in words.split()} | {
    f"{strength}{' ' if strength.isascii() else ''}{word}": times * degree
    for times, strengths in _STRENGTHS.items()
    for strength in strengths.split()
    for degree in (1, -1)
    for word in _WORDS[degree].split()
    if strength.isascii() == word.isascii()
}
_NUMERALS = {x: i for row in ("zero one two three four five", "零 一 二 三 四 五") for i, x in enumerate(row.split())}
_STARS = re.compile(
    r"stars? (?P<after>\d+(?:\.\d+)?)|(?P<before>\d+(?:\.\d+)?|[a-z]+|[零一二三四五]) ?(?:stars?|颗?星级?)"
)
_SILENT = re.compile(
    r"\b(?:sentiments?|reviews?|ratings?|emotions?|feelings?|opinions?|comments?)\b|(?:情绪|情感|评价|评论|态度)?的?$"
)


def label_values(labels: Sequence[str], positive_label: PositiveLabel | None = None) -> list[float]:
    """The number of each label, by which its probability is weighted in the score of a text.

    positive_label: a label or several, which get 1 and all others 0; or numbers by label, 0 for labels that are not
        named. None: the names must form an ordered scale, which gives numbers from 0 to 1, words in equal steps and
        stars as they count.
    Raises ValueError with the labels, and with what to pass, if the order cannot be told, a label does not exist, or
    all labels would get the same number.
    """
    order = label_order(labels)
    if positive_label is not None:
        values = _chosen(labels, positive_label)
    elif order is None:
        each = ", ".join(f"{label!r}: ..." for label in labels)
        raise ValueError(
            f"cannot tell the positive label among {list(labels)}; pass positive_label= with the good one, a list of "
            f"the good ones, or a number for each, {{{each}}}"
        )
    else:
        values = [(x - min(order)) / (max(order) - min(order)) for x in order]
    if len(set(values)) < 2:
        raise ValueError(f"positive_label must tell labels apart, but gives each of {list(labels)} {values[0]:g}")
    return values


def label_order(labels: Sequence[str]) -> list[float] | None:
    """Numbers that rise from the worst label to the best; None if the names do not tell.

    Words get whole steps with neutral at 0 ("slightly" and "very" say an order and no distance); stars get their
    number.
    """
    names = [_plain(label) for label in labels]
    stars = _all_different([_stars(name) for name in names])
    degrees = _all_different([_DEGREES.get(name) for name in names])
    if stars or not degrees:
        return stars
    bad, good = sorted(x for x in degrees if x < 0), sorted(x for x in degrees if x > 0)
    steps = {x: i - len(bad) for i, x in enumerate(bad)} | {0: 0} | {x: i for i, x in enumerate(good, 1)}
    return [float(steps[x]) for x in degrees]


def described(labels: Sequence[str], values: Sequence[float], symbol: str = "P") -> str:
    """A weighted sum of probabilities as a formula, such as 0.5 P('neutral') + P('positive')."""
    parts = [f"{'' if x == 1 else f'{x:g} '}{symbol}({label!r})" for label, x in zip(labels, values, strict=True) if x]
    return " + ".join(parts)


def _all_different(numbers: Sequence[float | None]) -> list[float] | None:
    """The numbers if each of two or more labels has one of its own; otherwise None."""
    known = [x for x in numbers if x is not None]
    return known if len(set(known)) == len(numbers) >= 2 else None


def _chosen(labels: Sequence[str], positive_label: PositiveLabel) -> list[float]:
    """The numbers that the caller gave. Raises ValueError for a label that does not exist and for a bad number."""
    one = isinstance(positive_label, str) or not isinstance(positive_label, Iterable)
    chosen: Any = [positive_label] if one else positive_label
    numbers = dict.fromkeys(labels, 0.0)
    for label in chosen:
        if label not in labels:
            raise ValueError(f"positive_label must be one of {list(labels)}, got {label!r}")
        value = chosen[label] if isinstance(chosen, Mapping) else 1.0
        try:
            numbers[label] = float(value) if isinstance(value, Real) else math.nan
        except OverflowError:  # an integer that no float holds
            numbers[label] = math.inf
        if not math.isfinite(numbers[label]):
            raise ValueError(f"positive_label must give {label!r} a finite number, got {value!r}")
    return [numbers[label] for label in labels]


def _plain(label: str) -> str:
    """A label in lower case, its words apart, without brackets and without words that are no opinion."""
    text = re.sub(r"\([^()]*\)", "", unicodedata.normalize("NFKC", label))
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|[\s_\-]+", " ", text)
    return " ".join(_SILENT.sub("", words.strip().lower()).split())


def _stars(name: str) -> float | None:
    if re.fullmatch("★+☆*", name):
        return float(name.count("★"))
    found = _STARS.fullmatch(name)
    if not found:
        return None
    number = found["after"] or found["before"]
    return float(number) if number[0].isdecimal() else _NUMERALS.get(number)
