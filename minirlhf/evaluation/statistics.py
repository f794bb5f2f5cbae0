"""How sure a mean is: percentile bootstrap confidence intervals (Efron 1979; Efron & Tibshirani 1993, chapter 13)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from minirlhf.common.validation import require, require_counts, require_positive_ints

CHUNK = 2**22  # indices drawn at a time
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over samples, and the ends of its confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Bootstrap:
    """Resamples with replacement, `resamples` times, and takes the middle 95% of the resampled figures.

    Every estimate starts from the same seed, so a figure does not depend on which others were asked for.
    Raises ValueError for a bad field.
    """

    resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive_ints(self, "resamples")
        require(self, "resamples", self.resamples >= 2, "at least 2")
        require_counts(self, "seed")

    def mean(self, values: ArrayLike) -> Estimate:
        """The mean of independent values (N,)."""
        x = _checked(values)
        return self.interval(float(x.mean()), self._means(x, np.random.default_rng(self.seed)))

    def difference(self, after: ArrayLike, before: ArrayLike) -> Estimate:
        """Mean of `after` (N,) less mean of `before` (M,), for samples drawn independently of each other."""
        x, y = _checked(after), _checked(before)
        generator = np.random.default_rng(self.seed)
        means = self._means(x, generator) - self._means(y, generator)
        return self.interval(float(x.mean() - y.mean()), means)

    def interval(self, figure: float, replicates: Array) -> Estimate:
        """A figure with the middle of its replicates (resamples,)."""
        low, high = np.quantile(replicates, [0.025, 0.975])
        return Estimate(figure, float(low), float(high))

    def _means(self, x: Array, generator: np.random.Generator) -> Array:
        rows = max(1, CHUNK // len(x))
        counts = [min(rows, self.resamples - done) for done in range(0, self.resamples, rows)]
        return np.concatenate([x[generator.integers(len(x), size=(n, len(x)))].mean(1) for n in counts])


def _checked(values: ArrayLike) -> Array:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) == 0:
        raise ValueError(f"expected a list of at least one value, got an array of shape {x.shape}")
    return x
