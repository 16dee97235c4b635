"""Do scores mean what they say? Calibration of entity scores: ECE, Brier score and skill, reliability curve.

With p the score of a predicted entity and y = 1 if it is right (strictly), over all N predicted entities with a score:

    ECE   = sum_b (n_b / N) |mean of y in bin b - mean of p in bin b|, bins of equal mass by p
    Brier = mean of (p - y)^2,   skill = 1 - Brier / (r (1 - r)) with r the mean of y

Skill is against saying r of every entity; it is undefined where all are right or all are wrong. Where scores are equal,
each counts with the mean of y over them, so that nothing depends on the order of ties. A small sample has an ECE above
0 even if its scores are perfect: `ece_if_calibrated` is what would be seen then, by drawing y from p.
Sources: Naeini et al. 2015 (ECE); Nixon et al. 2019 (bins of equal mass); Brier 1950.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from el4ner.metrics import Pair

BINS = 15
_SIMULATIONS = 200

Floats = NDArray[np.float64]


def scored_claims(pairs: Sequence[Pair]) -> tuple[Floats, Floats]:
    """Scores and rightness of all claims that have a score; duplicates and spans not in the text are wrong."""
    scores, right = [], []
    for pair in pairs:
        wanted = set(pair.gold)
        for claim in pair.claims:
            if claim.score is not None:
                scores.append(claim.score)
                right.append(float(claim.kind == "valid" and claim.triple in wanted))
    return np.array(scores, dtype=np.float64), np.array(right, dtype=np.float64)


def calibration(scores: Floats, right: Floats, seed: int = 0, bins: int = BINS) -> dict[str, Any] | None:
    """All calibration numbers of scores (N,) in [0, 1] and right (N,) of 0 and 1; None if there are no scores."""
    if not len(scores):
        return None
    rate = float(right.mean())
    brier = float(((scores - right) ** 2).mean())
    rng = np.random.default_rng(seed)
    drawn = [ece(scores, (rng.random(len(scores)) < scores).astype(np.float64), bins) for _ in range(_SIMULATIONS)]
    return {
        "entities": len(scores),
        "right": int(right.sum()),
        "bins": min(bins, len(scores)),
        "ece": ece(scores, right, bins),
        "ece_if_calibrated": {"mean": float(np.mean(drawn)), "p95": float(np.percentile(drawn, 95))},
        "brier": brier,
        "brier_skill": 1 - brier / (rate * (1 - rate)) if 0 < rate < 1 else None,
        "curve": curve(scores, right, bins),
    }


def ece(scores: Floats, right: Floats, bins: int = BINS) -> float:
    """Expected calibration error over bins of equal mass (fewer than `bins` where there are fewer scores)."""
    gaps = [abs(float(y.sum() - p.sum())) for p, y in _bins(scores, right, bins)]
    return math.fsum(gaps) / len(scores)


def curve(scores: Floats, right: Floats, bins: int = BINS) -> list[dict[str, Any]]:
    """The reliability curve: of each bin its size, mean score, share right, and the share's 95% Wilson interval."""
    rows = []
    for p, y in _bins(scores, right, bins):
        share = float(y.mean())
        rows.append({"n": len(p), "score": float(p.mean()), "right": share, "ci95": wilson(share, len(p))})
    return rows


def wilson(share: float, n: int) -> list[float]:
    """The 95% Wilson score interval of a share of n. Source: Wilson 1927."""
    z = 1.959964
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(max(share * (1 - share) / n + z * z / (4 * n * n), 0.0))
    return [max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))]


def _bins(scores: Floats, right: Floats, bins: int) -> list[tuple[Floats, Floats]]:
    """Scores in ascending order cut into parts whose sizes differ by at most one, with what was right of them."""
    values, index, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    shares = np.bincount(index, weights=right) / sizes
    parts = min(bins, len(scores))
    ordered, truth = np.repeat(values, sizes), np.repeat(shares, sizes)
    return list(zip(np.array_split(ordered, parts), np.array_split(truth, parts), strict=True))
