"""Classical baselines on the review data, to judge the starter models by.

    python weights/train/starter_baselines.py --data FOLDER [--json FILE]

Classifier: logistic regression on character 1-3-grams. Language model: interpolated modified Kneser-Ney character
5-grams (Chen & Goodman, 1999). Perplexities are comparable under this convention: lower-cased text; characters that
occur fewer than 3 times in the training texts become one <unk>; the end of a text counts as one prediction, its
start as none; nothing is truncated; perplexity = exp(total negative log-likelihood / (characters + 1 per text)).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from reviews_data import Review, load_reviews, opening, split_reviews

MIN_COUNT = 3
BOS, EOS, UNK = 0, 1, 2


def logistic_regression(train: Sequence[Review], held_out: Sequence[Review]) -> dict[str, float | int]:
    """Fit on whole training reviews and their openings; return held-out accuracies on both, and the counts."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError("the classifier baseline needs scikit-learn: pip install scikit-learn") from error
    texts, labels = [review.text for review in train], [review.label for review in train]
    truth = [review.label for review in held_out]
    # The settings have the best mean of both accuracies on a tenth of the training reviews, not on the held-out ones.
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), min_df=2, sublinear_tf=True, dtype=np.float32)
    features = vectorizer.fit_transform(texts + [opening(text) for text in texts])
    model = LogisticRegression(C=3.0, solver="liblinear", tol=1e-3).fit(features, labels * 2)

    return {
        "accuracy_whole": model.score(vectorizer.transform([r.text for r in held_out]), truth),
        "accuracy_openings": model.score(vectorizer.transform([opening(r.text) for r in held_out]), truth),
        "train_reviews": len(train),
        "held_out_reviews": len(held_out),
    }


def kneser_ney_perplexity(train_texts: Sequence[str], held_out_texts: Sequence[str], order: int = 5) -> float:
    """Return the held-out perplexity per character of an interpolated modified Kneser-Ney model of this order."""
    train, held_out = [t.lower() for t in train_texts], [t.lower() for t in held_out_texts]
    known = sorted(char for char, count in Counter("".join(train)).items() if count >= MIN_COUNT)
    ids = {char: index for index, char in enumerate(known, start=UNK + 1)}
    stream = np.array([i for t in train + held_out for i in (BOS, *(ids.get(char, UNK) for char in t), EOS)])
    starts = np.flatnonzero(stream == BOS)
    position = np.arange(len(stream)) - np.repeat(starts, np.diff(starts, append=len(stream)))
    in_train = np.arange(len(stream)) < sum(len(t) + 2 for t in train)
    # gram[n][i]: id of the n-gram that ends at i, shared by both sets; it has meaning where position >= n - 1.
    gram = [np.zeros_like(stream), stream]
    for n in range(2, order + 1):
        first = np.concatenate([np.zeros(n - 1, dtype=stream.dtype), stream[: 1 - n]])
        gram.append(np.unique(first * (gram[-1].max() + 1) + gram[-1], return_inverse=True)[1])
    prob = np.full(len(stream), 1.0 / (len(known) + 2))  # uniform over the characters, <unk> and the end of text
    for n in range(1, order + 1):
        valid = (position >= n - 1) & (position > 0)  # an n-gram stays within its text; BOS is never predicted
        trained = np.flatnonzero(valid & in_train)
        count = np.bincount(gram[n][trained], minlength=gram[n].max() + 1)
        where = trained[np.unique(gram[n][trained], return_index=True)[1]]  # one position of each distinct n-gram
        if n < order:
            # Lower orders count distinct left neighbours, but n-grams at a text's start have none: they keep counts.
            inside = trained[position[trained] >= n]
            extended = inside[np.unique(gram[n + 1][inside], return_index=True)[1]]
            neighbours = np.bincount(gram[n][extended], minlength=len(count))
            count = np.where(neighbours > 0, neighbours, count)
        seen = count[gram[n][where]]
        discounts = _discounts(seen)
        context = np.concatenate([[0], gram[n - 1][:-1]])
        # Per context: the sum of its counts, and the mass that discounting frees for the next lower order.
        total = np.bincount(context[where], weights=seen, minlength=context.max() + 1)
        freed = np.bincount(context[where], weights=_discount(seen, discounts), minlength=context.max() + 1)
        use = valid & (total[context] > 0)
        c, own = context[use], count[gram[n][use]]
        prob[use] = (own - _discount(own, discounts) + freed[c] * prob[use]) / total[c]
    return float(np.exp(-np.log(prob[~in_train & (position > 0)]).mean()))


def _discount(counts: np.ndarray, discounts: np.ndarray) -> np.ndarray:
    """Return what is taken off each count."""
    return discounts[np.minimum(counts, 3)]


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Discounts for counts 0, 1, 2 and 3+, from the counts of counts (fixed ones when the data are too small)."""
    n1, n2, n3, n4 = (float((counts == k).sum()) for k in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) > 0:
        y = n1 / (n1 + 2 * n2)
        found = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        if (found[1:] > 0).all():
            return found
    return np.array([0.0, 0.5, 1.0, 1.5])


def main() -> None:
    """Compute both baselines, print them and, if asked, write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the two CSV files")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    train, held_out = split_reviews(load_reviews(args.data))
    results = logistic_regression(train, held_out)
    # The language model reads no white space and at most 128 tokens of a review, so neither does this one.
    texts, openings = (["".join(review.text.split()) for review in reviews] for reviews in (train, held_out))
    results["kneser_ney_5_perplexity"] = kneser_ney_perplexity(texts, [text[:126] for text in openings])
    report = json.dumps(results, indent=2)
    print(report)
    if args.json:
        args.json.write_text(report + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
