"""The sentiment classifier of the starter weights: trained on labels and on an n-gram teacher.

40,000 reviews are too few for a transformer from random weights to come near character n-grams on its own. It gets
there with the word embeddings of the language model, and by distillation (Hinton et al. 2015): a naive-Bayes-weighted
logistic regression on character 1-4-grams (Wang & Manning 2012) gives its opinion on every excerpt, always from a
model that was fitted without that review, which tells apart the excerpts that carry the review's sentiment from those
that do not.
"""

import argparse
import json
import random
import time

import numpy as np
import torch

from minirlhf import GPT2, BertClassifier, BertConfig, Tokenizer
from minirlhf.classification import (
    ClassifierTrainingConfig,
    fit_temperature,
    predict,
    reliability_table,
    train_classifier,
)
from reviews_data import Review, opening

CONTEXT = 128
FOLDS = 5
LABEL_WEIGHT = 0.4  # of the review's label in the target; the rest is the teacher's opinion


def train_sentiment_classifier(
    args: argparse.Namespace, tokenizer: Tokenizer, train: list[Review], held_out: list[Review], on_step
) -> None:
    start = time.time()
    tuning, train = train[::20], [review for i, review in enumerate(train) if i % 20]  # 5% to fit the temperature on
    folds = [[review for i, review in enumerate(train) if i % FOLDS != fold] for fold in range(FOLDS)]
    teachers = [NGramTeacher(reviews) for reviews in folds]
    print(f"{FOLDS} n-gram teachers fitted, {time.time() - start:.0f} s", flush=True)

    def examples(epoch: int) -> list[tuple[str, list[float]]]:
        """One excerpt of every review, a new one each epoch, with its target."""
        rng = random.Random(f"{args.seed} {epoch}")
        drawn = []
        for fold, teacher in enumerate(teachers):
            reviews = train[fold::FOLDS]
            texts = [excerpt(review.text, rng) for review in reviews]
            for review, text, opinion in zip(reviews, texts, teacher(texts), strict=True):
                positive = LABEL_WEIGHT * review.label + (1 - LABEL_WEIGHT) * float(opinion)
                drawn.append((text, [1 - positive, positive]))
        return drawn

    model = BertClassifier(bert_config(len(tokenizer)), seed=args.seed)
    embeddings = model.bert.embeddings
    with torch.no_grad():  # what the language model knows of each token, and where it stands
        words = GPT2.from_pretrained(args.output / "gpt2-chinese-reviews-small").wte.weight
        embeddings.word_embeddings.weight.copy_(words)
        embeddings.position_embeddings.weight.copy_(sinusoids(CONTEXT, words.size(1)) * words.std())
    seen = 0
    for cycle, epochs in enumerate(args.bert_epochs):  # cosine cycles, a warm restart between them (SGDR, 2017)
        config = ClassifierTrainingConfig(
            epochs=epochs,
            lr=6e-4 if cycle == 0 else 5e-4,
            weight_decay=0.05,
            mask_probability=0.0,
            max_length=CONTEXT,
            tokens_per_batch=2048,
            precision=args.precision,
            device=args.device,
            seed=args.seed + cycle,
        )
        train_classifier(model, tokenizer, lambda epoch, first=seen: examples(first + epoch), config, on_step)
        seen += epochs

    labels = torch.tensor([review.label for review in tuning] * 2)
    texts = [review.text for review in tuning] + [opening(review.text) for review in tuning]
    temperature = fit_temperature(predict(model, tokenizer, texts, CONTEXT), labels)
    with torch.no_grad():  # softmax(logits / T), written into the last layer
        model.classifier.weight /= temperature
        model.classifier.bias /= temperature
    figures = {"minutes": (time.time() - start) / 60, "temperature": temperature}
    truth = torch.tensor([review.label for review in held_out])
    for name, cut in (("whole", lambda text: text), ("openings", opening)):
        positive = predict(model, tokenizer, [cut(r.text) for r in held_out], CONTEXT).softmax(-1)[:, 1]
        figures[f"{name}_accuracy"] = ((positive > 0.5) == truth).float().mean().item()
        figures[f"{name}_reliability"] = reliability_table(positive, truth)
    folder = args.output / "bert-chinese-reviews-sentiment-small"
    model.save_pretrained(folder, dtype=torch.float16)
    tokenizer.save_pretrained(folder)
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(folder, json.dumps(figures, indent=1), flush=True)


def bert_config(vocab_size: int) -> BertConfig:
    # No dropout: every epoch shows new excerpts, and the teacher's opinions do not overfit.
    return BertConfig(
        vocab_size=vocab_size, max_position_embeddings=CONTEXT, hidden_size=256, num_hidden_layers=3,
        num_attention_heads=4, intermediate_size=1024, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip


def excerpt(text: str, rng: random.Random) -> str:
    """The whole review, its opening, or a passage from anywhere in it."""
    kind = rng.random()
    if kind < 0.4:
        return text[:CONTEXT]
    if kind < 0.8:
        return text[: rng.randint(8, 24)]
    length = rng.randint(12, 48)
    first = rng.randint(0, max(0, len(text) - length))
    return text[first : first + length]


def sinusoids(positions: int, width: int) -> torch.Tensor:
    """Sinusoidal position embeddings (Vaswani et al. 2017, section 3.5), of standard deviation about 0.7.

    Only a starting point: neighbours are recognisable from the first step, which a small model learns slowly.
    """
    angle = torch.arange(positions)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class NGramTeacher:
    """P(positive) by logistic regression on tf-idf of character 1-4-grams times their naive-Bayes log-count ratio."""

    def __init__(self, reviews: list[Review]):
        try:
            from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
            from sklearn.linear_model import LogisticRegression
        except ImportError as error:
            raise ImportError("the teacher needs scikit-learn: pip install 'minirlhf[dev]'") from error
        rng = random.Random(0)
        cuts = [lambda text: text, opening, lambda text: excerpt(text, rng), lambda text: excerpt(text, rng)]
        texts = [cut(review.text) for cut in cuts for review in reviews]
        labels = np.array([review.label for review in reviews] * len(cuts))
        self.counts = CountVectorizer(analyzer="char", ngram_range=(1, 4), min_df=3, dtype=np.float32)
        counts = self.counts.fit_transform(texts)
        self.tfidf = TfidfTransformer(sublinear_tf=True).fit(counts)
        present = (counts > 0).astype(np.float32)
        in_positive, in_negative = (np.asarray(present[labels == y].sum(0)).ravel() + 1 for y in (1, 0))
        self.ratio = np.log(in_positive / in_positive.sum()) - np.log(in_negative / in_negative.sum())
        self.model = LogisticRegression(C=3.0, solver="liblinear", tol=1e-3).fit(self._features(counts), labels)

    def __call__(self, texts: list[str]) -> np.ndarray:
        return self.model.predict_proba(self._features(self.counts.transform(texts)))[:, 1]

    def _features(self, counts):
        return self.tfidf.transform(counts).multiply(self.ratio[None, :].astype(np.float32)).tocsr()
