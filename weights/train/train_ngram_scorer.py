"""Fit the second scorer in `weights/`, character n-grams, on reviews that the other weights have never seen.

    python weights/train/train_ngram_scorer.py --data FOLDER [--output runs/weights/ngrams-chinese-reviews-sentiment]

FOLDER holds ChnSentiCorp_htl_all.csv and online_shopping_10_cats.csv as ChineseNlpCorpus publishes them. The scorer
learns from the tenth of them that is held out from the language model and the classifier, so it shares none of their
texts. Its accuracy is measured twice: by cross-validation within the held-out part, and on the other part.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

try:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import normalize
except ImportError:
    sys.exit("fitting needs scikit-learn: pip install -e '.[dev]'")

from minirlhf.common.printing import error_line
from minirlhf.rewards.ngrams import NGramScorer
from reviews_data import Review, fold, load_reviews, opening, split_reviews

LONGEST, MIN_TEXTS, FOLDS = 3, 3, 5  # characters; an n-gram of fewer texts is dropped; parts of the cross-validation


def main() -> None:
    args = parse_arguments()
    others, own = split_reviews(load_reviews(args.data))
    parts = [fold(review.text, FOLDS) for review in own]
    figures: dict[str, float | list[float]] = {"reviews": len(own)}
    rates = []
    for part in range(FOLDS):
        known = [review for review, p in zip(own, parts, strict=True) if p != part]
        unseen = [review for review, p in zip(own, parts, strict=True) if p == part]
        rates.append(accuracies(fit(known), unseen))
    for i, name in enumerate(("whole", "openings")):
        figures[f"cross-validated, {name}"] = round(float(np.mean([rate[i] for rate in rates])), 4)
        figures[f"of each fold, {name}"] = [round(rate[i], 4) for rate in rates]

    scorer = fit(own)
    scorer.save_pretrained(args.output, torch.float16)
    scorer = NGramScorer.from_pretrained(args.output)  # as it is stored
    figures["n-grams"] = len(scorer.weights)
    figures["reviews of the other part"] = len(others)
    for name, rate in zip(("whole", "openings"), accuracies(scorer, others), strict=True):
        figures[f"on the other part, {name}"] = round(rate, 4)
    print(json.dumps(figures, indent=2))


def fit(reviews: Sequence[Review]) -> NGramScorer:
    """Logistic regression on the presence of n-grams, each times its naive-Bayes log-count ratio (Wang & Manning 2012).

    On whole reviews and their openings. A text's features have norm 1 before the ratios, which thus become a part of
    the weights: the scorer needs nothing but one number for each n-gram.
    """
    texts = ["".join(text.lower().split()) for r in reviews for text in (r.text, opening(r.text))]
    labels = np.array([r.label for r in reviews for _ in range(2)])
    counter = CountVectorizer(
        analyzer="char", ngram_range=(1, LONGEST), min_df=MIN_TEXTS, binary=True, dtype=np.float32, lowercase=False
    )
    present = counter.fit_transform(texts)
    in_positive, in_negative = (np.asarray(present[labels == y].sum(0)).ravel() + 1 for y in (1, 0))
    ratio = np.log(in_positive / in_positive.sum()) - np.log(in_negative / in_negative.sum())
    features = normalize(present).multiply(ratio[None, :].astype(np.float32)).tocsr()
    model = LogisticRegression(C=3.0, solver="liblinear", tol=1e-3).fit(features, labels)
    return NGramScorer(
        dict(zip(counter.get_feature_names_out().tolist(), (model.coef_[0] * ratio).tolist(), strict=True)),
        float(model.intercept_[0]),
    )


def accuracies(scorer: NGramScorer, reviews: Sequence[Review]) -> tuple[float, float]:
    """The share of reviews classified correctly, from whole texts and from openings of 10 to 20 characters."""
    labels = torch.tensor([review.label for review in reviews]).bool()
    texts = [review.text for review in reviews], [opening(review.text) for review in reviews]
    whole, openings = (((scorer(t) > 0.5) == labels).double().mean().item() for t in texts)
    return whole, openings


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the two published CSV files")
    parser.add_argument("--output", type=Path, default=Path("runs/weights/ngrams-chinese-reviews-sentiment"))
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # bad input: one line, no traceback
        sys.exit(error_line(error))
