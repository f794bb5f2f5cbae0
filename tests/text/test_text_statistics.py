"""Self-BLEU against examples worked by hand and a second implementation from the definition; repetition."""

import math
import random
from collections import Counter

import pytest

from minirlhf.text.statistics import distinct_n, repeated_share, self_bleu, unit_of, units


def bleu(text, references, order):
    """Papineni et al. 2002, with method 1 of Chen & Cherry 2014: every reference is counted anew for every text."""
    logs = []
    for n in range(1, order + 1):
        own = Counter(text[i : i + n] for i in range(len(text) - n + 1))
        clipped = sum(
            min(c, max(sum(r[i : i + n] == gram for i in range(len(r) - n + 1)) for r in references))
            for gram, c in own.items()
        )
        if clipped == 0 and n == 1:
            return 0.0
        logs.append(math.log((clipped or 0.1) / max(1, sum(own.values()))))
    nearest = min((abs(len(r) - len(text)), len(r)) for r in references)[1]
    brevity = 1.0 if len(text) > nearest else math.exp(1 - nearest / len(text))
    return brevity * math.exp(sum(logs) / order)


def by_definition(texts, order=4):
    return sum(bleu(t, texts[:i] + texts[i + 1 :], order) for i, t in enumerate(texts)) / len(texts)


def test_worked_by_hand():
    # "ab" twice: all matched, 1. "ac": one of two characters, and its bigram not: sqrt(1/2 * 0.1/1).
    assert self_bleu(["ab", "ab", "ac"], 2) == pytest.approx((1 + 1 + math.sqrt(0.05)) / 3)
    # "ab" against "abcd": precisions 1, brevity exp(1 - 4/2). The other way: 2/4 and 1/3, and no penalty.
    assert self_bleu(["ab", "abcd"], 2) == pytest.approx((math.exp(-1) + math.sqrt(1 / 6)) / 2)
    # Clipped: of "aaa" only two are in the other text; "aa" is matched in full, 1/1, with brevity exp(1 - 3/2).
    assert self_bleu(["aaa", "aa"], 1) == pytest.approx((2 / 3 + math.exp(-0.5)) / 2)


@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_definition_on_random_texts(seed):
    draw = random.Random(seed)
    letters = "ab" if seed % 2 else "abcdefgh房间"
    texts = ["".join(draw.choices(letters, k=draw.randint(0, 12))) for _ in range(draw.randint(2, 12))]
    for order in (1, 2, 4):
        assert self_bleu(texts, order) == pytest.approx(by_definition(texts, order), abs=1e-12)


def test_alike_is_1_and_nothing_in_common_is_0():
    assert self_bleu(["房间很干净"] * 3) == pytest.approx(1.0)
    assert self_bleu(["abcd", "efgh", "ijkl"]) == 0.0
    assert self_bleu(["", ""]) == 0.0 and self_bleu(["", "ab"]) == 0.0


def test_order_does_not_matter():
    texts = ["房间很好", "房间不好", "早餐很好吃", "房间很好"]
    assert self_bleu(texts) == pytest.approx(self_bleu(texts[::-1]))


def test_long_and_many_texts_take_time_by_their_length_only():
    """1,000 texts of 200 characters: compared two by two they would take minutes."""
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefghij", k=200)) for _ in range(1000)]
    assert 0.5 < self_bleu(texts) < 1


@pytest.mark.parametrize(("texts", "order", "message"), [
    ([], 4, "at least two texts"), (["a"], 4, "at least two texts"), ("ab", 4, "at least two texts"),
    (["a", "b"], 0, "order must be at least 1, got 0"),
])  # fmt: skip
def test_bad_input_is_refused(texts, order, message):
    with pytest.raises(ValueError, match=message):
        self_bleu(texts, order)


@pytest.mark.parametrize(("text", "share"), [("", 0), ("a", 0), ("好好好好", 3 / 4), ("abab", 1 / 2), ("abc", 0)])
def test_repeated_share(text, share):
    assert repeated_share(text) == pytest.approx(share)


@pytest.mark.parametrize(("texts", "unit"), [
    (["房间很干净，wifi 很好"], "character"), (["the room was clean", "très bien"], "word"), (["номер чистый"], "word"),
    (["ห้องสะอาด มาก"], "character"), (["部屋はきれい です"], "character"),
    (["방이 깨끗하고 좋아요"], "word"), ([], "character"), (["x" * 40], "character"), (["12 34"], "character"),
])  # fmt: skip
def test_languages_with_spaces_between_words_vary_in_words(texts, unit):
    assert unit_of(texts) == unit


def test_words_and_characters_by_hand():
    assert units("a bb  a", "word") == ["a", "bb", "a"] and units("a b", "character") == "a b"
    assert distinct_n([["a", "bb", "a"], ["a", "bb"]], 2) == pytest.approx(2 / 3)  # (a, bb), (bb, a), (a, bb)
    assert distinct_n(["aba", "ab"], 2) == pytest.approx(2 / 3) and distinct_n(["a"], 2) == 0.0
    assert repeated_share(["a", "bb", "a"]) == pytest.approx(1 / 3)
    assert self_bleu([["a", "b"], ["a", "c"]], 1) == pytest.approx(1 / 2)


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        (["aab"], 1, 2 / 3),
        (["aaaa"], 2, 1 / 3),
        (["abab", "ab"], 2, 2 / 4),  # ab ba ab, ab: never across two texts
        (["很好很好"], 1, 2 / 4),
        (["a", ""], 2, 0.0),
        ([], 1, 0.0),
    ],
)
def test_distinct_n_worked_by_hand(texts, n, expected):
    assert distinct_n(texts, n) == pytest.approx(expected)
