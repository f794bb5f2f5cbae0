"""The teachers of the starter classifier: character n-grams, and a probe on the language model's features.

Each gives P(positive) of any excerpt of a training review, always from models that were fitted without that review.
Such opinions tell excerpts that carry the review's sentiment from those that do not, which the review's label cannot.
On unseen reviews the n-grams and the language model make different errors, so their mean is better than either.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minirlhf import GPT2, Tokenizer
from minirlhf.text.batching import length_sorted_batches, right_pad
from reviews_data import LONGEST, Review, excerpt, opening

FOLDS = 5
MAX_TOKENS = 128


class Teachers:
    """Opinions on one excerpt of every training review, in their order: `teachers(texts) -> (N,)` P(positive)."""

    def __init__(self, language_model: GPT2, tokenizer: Tokenizer, reviews: Sequence[Review], seed: int):
        self.features = TextFeatures(language_model, tokenizer)
        rng = random.Random(seed)
        cuts = (lambda text: text[:LONGEST], opening, lambda text: excerpt(text, rng))
        texts = [[cut(review.text) for cut in cuts] for review in reviews]  # (N, cuts)
        features = self.features([text for row in texts for text in row]).view(len(texts), len(cuts), -1)
        labels = torch.tensor([review.label for review in reviews])
        self.n_grams, self.probes = [], []
        for fold in range(FOLDS):
            others = [i for i in range(len(reviews)) if i % FOLDS != fold]
            known = labels[others].repeat_interleave(len(cuts))
            self.n_grams.append(NGramTeacher([text for i in others for text in texts[i]], known.numpy()))
            self.probes.append(fit_probe(features[others].flatten(0, 1), known.float(), seed))

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[float]:
        features = self.features(texts)
        odds = np.empty(len(texts))
        for fold in range(FOLDS):
            own = slice(fold, None, FOLDS)
            odds[own] = self.n_grams[fold](texts[own]) / 2 + self.probes[fold](features[own]).squeeze(-1).numpy() / 2
        return (1 / (1 + np.exp(-odds))).tolist()


class NGramTeacher:
    """Log-odds of positive by two logistic regressions on character 1-4-grams, their mean.

    One reads tf-idf, the other tf-idf times the naive-Bayes log-count ratio (Wang & Manning 2012).
    """

    def __init__(self, texts: Sequence[str], labels: np.ndarray):
        try:
            from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
            from sklearn.linear_model import LogisticRegression
        except ImportError as error:
            raise ImportError("the teacher needs scikit-learn: pip install -e '.[dev]'") from error
        self.counts = CountVectorizer(analyzer="char", ngram_range=(1, 4), min_df=3, dtype=np.float32)
        counts = self.counts.fit_transform(texts)
        self.tfidf = TfidfTransformer(sublinear_tf=True).fit(counts)
        present = (counts > 0).astype(np.float32)
        in_positive, in_negative = (np.asarray(present[labels == y].sum(0)).ravel() + 1 for y in (1, 0))
        self.ratio = np.log(in_positive / in_positive.sum()) - np.log(in_negative / in_negative.sum())
        self.models = [
            LogisticRegression(C=3.0, solver="liblinear", tol=1e-3).fit(features, labels)
            for features in self._features(counts)
        ]

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        features = self._features(self.counts.transform(texts))
        return np.mean([model.decision_function(x) for model, x in zip(self.models, features, strict=True)], axis=0)

    def _features(self, counts):
        tfidf = self.tfidf.transform(counts)
        return tfidf, tfidf.multiply(self.ratio[None, :].astype(np.float32)).tocsr()


class TextFeatures:
    """Features of texts from a language model, (N, 3 C): means of its last two layers, and the state of the last token.

    They are standardised over the first texts.
    """

    def __init__(self, model: GPT2, tokenizer: Tokenizer):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.scale: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        sequences = self.tokenizer.encode_batch(texts, MAX_TOKENS)
        features = torch.empty(len(texts), 3 * self.model.width)
        inner: list[Tensor] = []
        hook = self.model.blocks[-2].register_forward_hook(lambda module, args, output: inner.append(output))
        for batch in length_sorted_batches([len(s) for s in sequences], 64):
            ids, mask = right_pad([sequences[i] for i in batch], self.tokenizer.pad_id)
            hidden = self.model.hidden_states(ids)  # (B, T, C); right padding: causal attention never reads it
            real = mask.unsqueeze(-1).float()
            means = [(x * real).sum(1) / real.sum(1) for x in (hidden, inner.pop())]
            last = hidden[torch.arange(len(batch)), mask.sum(1) - 1]
            features[batch] = torch.cat([*means, last], 1)
        hook.remove()
        if self.scale is None:
            self.scale = features.mean(0), features.std(0)
        return (features - self.scale[0]) / self.scale[1]


def fit_probe(features: Tensor, labels: Tensor, seed: int, epochs: int = 10, batch_size: int = 512) -> nn.Module:
    """A small MLP from features (N, F) to the log-odds (N, 1) of positive; labels: (N,) 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator.get_state())  # initial weights and dropout know only the global generator
        probe = nn.Sequential(
            nn.Dropout(0.2), nn.Linear(features.size(1), 256), nn.GELU(), nn.Dropout(0.3), nn.Linear(256, 1)
        )
        optimizer = torch.optim.AdamW(probe.parameters(), lr=2e-3, weight_decay=0.05)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs * -(-len(features) // batch_size))
        for _ in range(epochs):
            for batch in torch.randperm(len(features), generator=generator).split(batch_size):
                optimizer.zero_grad()
                F.binary_cross_entropy_with_logits(probe(features[batch]).squeeze(-1), labels[batch]).backward()
                optimizer.step()
                decay.step()
    return probe.eval()
