"""Labelled Chinese reviews: loading, a fixed balanced split, short openings, and files for the examples.

    python weights/train/reviews_data.py --data FOLDER [--output runs/reviews --seed 0]

FOLDER holds the two CSV files that ChineseNlpCorpus publishes on GitHub. The split and every draw depend on the texts
alone (through SHA-256), never on a random seed; of several copies of a review the first one is kept. As a script it
writes positive hotel reviews (demonstrations.txt, for examples/sft_reviews.py) and pairs of openings (rankings.jsonl,
for examples/reward_model.py), each with a file of held-out ones, which the starter weights have not seen either.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from minirlhf.common.printing import error_line, show

HOTEL_FILE = "ChnSentiCorp_htl_all.csv"
SHOPPING_FILE = "online_shopping_10_cats.csv"
LONGEST = 126  # characters: what a model of 128 positions reads
HELD_OUT_SHARE = 0.1
_SOURCE = "the file is published by ChineseNlpCorpus on GitHub"


@dataclass(frozen=True)
class Review:
    """One review: its text, its label (1 positive, 0 negative) and its product category."""

    text: str
    label: int
    category: str


def load_reviews(folder: str | Path) -> list[Review]:
    """Read both CSV files in `folder`; empty and duplicate texts, and texts with both labels, are dropped.

    Texts that differ in case, punctuation or white space only are duplicates: the files share hotel reviews.
    """
    rows = [*_read(Path(folder) / HOTEL_FILE, category="酒店"), *_read(Path(folder) / SHOPPING_FILE)]
    labels: dict[str, set[int]] = {}
    for review in rows:
        labels.setdefault(_letters(review.text), set()).add(review.label)
    unique = {_letters(review.text): review for review in reversed(rows)}  # the first occurrence is kept
    return [unique[letters] for letters, seen in labels.items() if letters and len(seen) == 1]


def split_reviews(reviews: Iterable[Review]) -> tuple[list[Review], list[Review]]:
    """Return (train, held_out): 10% of the texts held out, each side with as many positives as negatives.

    Texts that begin with the same 20 letters (extended or cut copies of each other) fall on the same side.
    """
    train: list[Review] = []
    held_out: list[Review] = []
    for review in reviews:
        (held_out if _fraction(_letters(review.text)[:20]) < HELD_OUT_SHARE else train).append(review)
    return _balance(train), _balance(held_out)


def fold(text: str, folds: int) -> int:
    """Return a number in [0, folds), fixed by the text's hash; texts that begin with the same 20 letters share it."""
    return int(_fraction(_letters(text)[:20], "fold") * folds)


def opening(text: str, low: int = 10, high: int = 20) -> str:
    """Return the first n characters of `text`, n in [low, high] fixed by the text's hash."""
    return text[: low + int(_fraction(text, "opening") * (high - low + 1))]


def excerpt(text: str, rng: random.Random) -> str:
    """Return the whole review (as far as a model reads), its opening, or a passage from anywhere in it."""
    kind = rng.random()
    if kind < 0.35:
        return text[:LONGEST]
    if kind < 0.8:
        return text[: rng.randint(8, 24)]
    length = rng.randint(12, 48)
    first = rng.randint(0, max(0, len(text) - length))
    return text[first : first + length]


def _read(path: Path, category: str | None = None) -> Iterator[Review]:
    """Yield the rows of one file; without `category` it is read from the column `cat`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {_SOURCE}")
    # utf-8-sig: the byte-order mark would otherwise become part of the first column's name.
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            reader = csv.DictReader(file)
            for column in ("label", "review") if category else ("cat", "label", "review"):
                if column not in (reader.fieldnames or ()):
                    raise ValueError(f"{path} has no column '{column}'; {_SOURCE}")
            for row in reader:
                if row["label"] not in ("0", "1") or row["review"] is None:
                    column = "label" if row["label"] not in ("0", "1") else "review"
                    raise ValueError(f"{path}, line {reader.line_num}: bad column '{column}'; {_SOURCE}")
                # Some reviews carry byte-order marks of their own.
                text = " ".join(row["review"].replace("\ufeff", " ").split())
                yield Review(text, int(row["label"]), category or row["cat"])
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} is damaged ({error}); {_SOURCE}") from error


def _balance(reviews: list[Review]) -> list[Review]:
    """Drop the surplus of the majority label, chosen by hash; the order of the rest is kept."""
    groups = [sorted((r for r in reviews if r.label == y), key=lambda r: _fraction(r.text, "balance")) for y in (0, 1)]
    kept = {review.text for group in groups for review in group[: min(map(len, groups))]}
    return [review for review in reviews if review.text in kept]


def _letters(text: str) -> str:
    """The letters and digits of a text, in lower case."""
    return re.sub(r"[\W_]+", "", text.lower())


def _fraction(text: str, purpose: str = "") -> float:
    """Map a text to [0, 1) by SHA-256; `purpose` makes draws for different uses independent."""
    return int.from_bytes(hashlib.sha256((purpose + text).encode()).digest()[:6], "big") / 2**48


# ---- files for the examples -----------------------------------------------------------------------------------------


def positive_hotel_reviews(reviews: Iterable[Review]) -> list[str]:
    """The texts of the positive reviews of hotels."""
    return [review.text for review in reviews if review.label == 1 and review.category == "酒店"]


def make_pairs(reviews: Iterable[Review], seed: int) -> list[tuple[str, str]]:
    """Pairs (better, worse): the openings of a positive and of a negative review about the same kind of goods."""
    openings: dict[str, tuple[list[str], list[str]]] = {}
    for review in reviews:
        openings.setdefault(review.category, ([], []))[review.label].append(opening(review.text).strip())
    rng, found = random.Random(seed), []
    for negative, positive in openings.values():
        rng.shuffle(positive)
        found += [pair for pair in zip(positive, negative, strict=False) if pair[0] != pair[1]]
    return rng.sample(found, len(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with the two CSV files")
    parser.add_argument("--output", type=Path, default=Path("runs/reviews"), help="folder of the files (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the pairs (%(default)s)")
    args = parser.parse_args()
    sides = split_reviews(load_reviews(args.data))
    args.output.mkdir(parents=True, exist_ok=True)
    for side, suffix in zip(sides, ("", "_held_out"), strict=True):
        pairs = [{"prompt": "", "chosen": a, "rejected": b} for a, b in make_pairs(side, args.seed)]
        lines = {"demonstrations{}.txt": positive_hotel_reviews(side),
                 "rankings{}.jsonl": [json.dumps(pair, ensure_ascii=False) for pair in pairs]}  # fmt: skip
        for name, content in lines.items():
            path = args.output / name.format(suffix)
            path.write_text("".join(f"{line}\n" for line in content), encoding="utf-8")
            show(f"{path}: {len(content)}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(error_line(error))
