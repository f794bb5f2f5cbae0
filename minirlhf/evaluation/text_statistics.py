"""How varied and how repetitive texts are, by their characters: what a collapsed or a hacking policy gives away."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean

SMOOTHING = 0.1  # matches that are counted where there is none (Chen & Cherry 2014, method 1)


def self_bleu(texts: Sequence[str], order: int = 4) -> float:
    """Mean BLEU of each text against all the others as references (Zhu et al. 2018, section 3); 1: they are all alike.

    Over characters, with n-grams of 1 to `order` in equal parts, clipped counts, the brevity penalty against the
    reference whose length is nearest (the shorter one of two), and `SMOOTHING` where a longer n-gram has no match, as
    nltk's sentence_bleu with method1. Time grows with the total length of the texts only: of all other texts' counts of
    an n-gram just the largest is needed, so the two largest of all texts are kept.
    Raises ValueError for fewer than two texts, or an order below 1.
    """
    if isinstance(texts, str) or len(texts) < 2:
        raise ValueError(f"self-BLEU compares at least two texts, got {texts!r:.80}")
    if order < 1:
        raise ValueError(f"order must be at least 1, got {order}")
    lengths = Counter(map(len, texts))
    precisions = [_others_precisions(texts, n) for n in range(1, order + 1)]
    scores = []
    for text, matched in zip(texts, zip(*precisions, strict=True), strict=True):
        if matched[0] == 0:  # no character in common, or no character
            scores.append(0.0)
            continue
        others = [length for length, count in lengths.items() if length != len(text) or count > 1]
        nearest = min(others, key=lambda length: (abs(length - len(text)), length))
        brevity = min(1.0, math.exp(1 - nearest / len(text)))
        scores.append(brevity * math.exp(fmean(map(math.log, matched))))
    return fmean(scores)


def repeated_share(text: str) -> float:
    """The share of a text's characters that occurred in it before: 1 - distinct / all; 0 for an empty text."""
    return 1 - len(set(text)) / len(text) if text else 0.0


def _others_precisions(texts: Sequence[str], n: int) -> list[float]:
    """BLEU's modified n-gram precision (Papineni et al. 2002, section 2.1.1) of each text against all the others."""
    counts = [Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in texts]
    largest: dict[str, tuple[int, int]] = {}  # n-gram -> its two largest counts in one text
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


def distinct_n(texts: Iterable[str], n: int) -> float:
    """Distinct character n-grams over all character n-grams of the texts (Li et al. 2016); 0 if there are none."""
    grams = [text[i : i + n] for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
