"""How varied and how repetitive texts are: a policy that collapses or exploits its reward shows it here.

A text is a sequence of units: its characters (a `str` is one already), or its words (see `units`).
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from statistics import fmean

SMOOTHING = 0.1  # counted for an n-gram order without a match (Chen & Cherry 2014, method 1)
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")  # scripts without spaces between words
LONGEST_WORD = 15

Units = Sequence[Hashable]


def unit_of(texts: Iterable[str]) -> str:
    """The unit in which texts vary: "word" if most letters are of a script that spaces words, else "character".

    Pieces between spaces that are longer than LONGEST_WORD letters on average are not words.
    """
    pieces = [piece for text in texts for piece in text.split()]
    letters = [char for piece in pieces for char in piece if char.isalpha()]
    spaced = sum(not unicodedata.name(char, "CJK").startswith(UNSPACED) for char in letters)
    return "word" if 2 * spaced > len(letters) and len(letters) <= LONGEST_WORD * len(pieces) else "character"


def units(text: str, unit: str) -> Units:
    """The words of a text, cut at white space, or its characters."""
    return text.split() if unit == "word" else text


def distinct_n(texts: Iterable[Units], n: int) -> float:
    """Distinct n-grams over all n-grams of the texts together (Li et al. 2016); 0 if there are none."""
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repeated_share(text: Units) -> float:
    """The share of a text's units that occurred in it before: 1 - distinct / all; 0 for an empty text."""
    return 1 - len(set(text)) / len(text) if text else 0.0


def self_bleu(texts: Sequence[Units], order: int = 4) -> float:
    """Mean BLEU of each text against all the others as references (Zhu et al. 2018, section 3); 1: they are all alike.

    n-grams of 1 to `order` count equally, clipped; the brevity penalty takes the reference whose length is nearest
    (the shorter one of two); a longer n-gram without a match counts `SMOOTHING`, as in nltk's sentence_bleu with
    method1. The time grows with the total length of the texts only: the two largest counts of an n-gram in one text
    are all that the others are compared with.
    Raises ValueError for fewer than two texts, or an order below 1.
    """
    if isinstance(texts, str) or len(texts) < 2:
        raise ValueError(f"self-BLEU compares at least two texts, got {texts!r:.80}")
    if order < 1:
        raise ValueError(f"order must be at least 1, got {order}")
    lengths = Counter(map(len, texts))
    precisions = [_precisions(texts, n) for n in range(1, order + 1)]
    scores = []
    for text, matched in zip(texts, zip(*precisions, strict=True), strict=True):
        if matched[0] == 0:  # nothing in common with the others, or empty
            scores.append(0.0)
            continue
        others = [length for length, count in lengths.items() if length != len(text) or count > 1]
        nearest = min(others, key=lambda length: (abs(length - len(text)), length))
        brevity = min(1.0, math.exp(1 - nearest / len(text)))
        scores.append(brevity * math.exp(fmean(map(math.log, matched))))
    return fmean(scores)


def _ngrams(text: Units, n: int) -> Iterator[tuple[Hashable, ...]]:
    return zip(*(text[i:] for i in range(n)), strict=False)


def _precisions(texts: Sequence[Units], n: int) -> list[float]:
    """BLEU's modified n-gram precision (Papineni et al. 2002, section 2.1.1) of each text against all the others."""
    counts = [Counter(_ngrams(text, n)) for text in texts]
    largest: dict[Hashable, tuple[int, int]] = {}  # n-gram -> its two largest counts in one text
    for count in counts:
        for gram, c in count.items():
            first, second = largest.get(gram, (0, 0))
            largest[gram] = (c, first) if c > first else (first, max(second, c))
    precisions = []
    for count in counts:
        matches = 0
        for gram, c in count.items():
            first, second = largest[gram]
            matches += min(c, second if c == first else first)
        precisions.append((matches or (SMOOTHING if n > 1 else 0)) / max(1, count.total()))
    return precisions
