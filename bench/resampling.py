"""Bootstrap over sentences: one set of resampled sentences, from which every metric of a system gets its interval.

Sentences are the units, because entities of one sentence are not independent. Source: Efron, percentile interval.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL = (2.5, 97.5)


class Resampling:
    """How often each of n sentences is drawn in each of `samples` resamplings, (samples, n) f32.

    The draws are those of `el4ner.metrics.bootstrap` with the same seed. No samples: no intervals.
    """

    def __init__(self, n: int, samples: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.samples, self.seed = samples, seed
        self._weights = np.zeros((samples, n), dtype=np.float32)
        for row in self._weights:
            row += np.bincount(rng.integers(0, n, size=n), minlength=n)

    def sums(self, counts: NDArray[Any]) -> NDArray[np.float64]:
        """Sums over resampled sentences. counts (n, C) -> (samples, C); whole numbers below 2**24 stay exact."""
        return (self._weights @ counts.astype(np.float32)).astype(np.float64)

    def interval(self, values: NDArray[np.float64]) -> list[float] | None:
        """The 95% percentile interval of resampled values, (samples,); None without samples."""
        if not self.samples:
            return None
        return [float(value) for value in np.percentile(values, LEVEL)]

    def score(self, counts: NDArray[Any]) -> dict[str, Any]:
        """Precision, recall and F1 with intervals. counts (n, 3): correct, predicted and gold entities of a sentence.

        correct may hold halves (partial credit). A ratio without denominator is 0.
        """
        correct, predicted, support = (float(value) for value in counts.sum(axis=0))
        found, claimed, wanted = self.sums(counts).T
        return {
            "precision": correct / predicted if predicted else 0.0,
            "recall": correct / support if support else 0.0,
            "f1": 2 * correct / (predicted + support) if predicted + support else 0.0,
            "ci95": self.interval(2 * found / np.maximum(claimed + wanted, 1)),
            "precision_ci95": self.interval(found / np.maximum(claimed, 1)),
            "recall_ci95": self.interval(found / np.maximum(wanted, 1)),
            "correct": _whole(correct),
            "predicted": _whole(predicted),
            "support": _whole(support),
        }


def _whole(value: float) -> int | float:
    return int(value) if value.is_integer() else value
