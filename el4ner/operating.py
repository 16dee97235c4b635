"""Where to cut: the least score that is kept, and what it means in precision and recall on the pool, out of fold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from el4ner.calibration import Calibration, fit_calibration
from el4ner.decoding import keep
from el4ner.engines.base import FloatArray
from el4ner.errors import ConfigError
from el4ner.records import Candidate

THRESHOLDS = (0.05, 0.08, 0.1, 0.12, 0.15, 0.18, 0.2, 0.22, 0.25, 0.28, 0.3, 0.33, 0.36, 0.4, 0.45, 0.5, 0.55, 0.6)
"""Among which the best is chosen."""
_STRICT = (0.65, 0.7, 0.74, 0.78, 0.81, 0.84, 0.86, 0.88, 0.9, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99)
_LEAST_ENTITIES = 20
"""Operating points on fewer entities say too little to promise anything by."""


@dataclass(frozen=True)
class Decided:
    """What the pool's sentences are said to hold by voters that did not see them.

    candidates; shares: per sentence (n, L + 1), "none" last; truth: per sentence (n,) i64, L for "none"; gold: entities
    per sentence, those that are no candidate included; overlap: "flat" or "nested". verified: per sentence (n,), the
    score of a candidate after the verifier, -inf where it was not asked; None where there is no verifier. calibration:
    of the scores.
    """

    candidates: Sequence[Sequence[Candidate]]
    shares: Sequence[FloatArray]
    truth: Sequence[NDArray[np.int64]]
    gold: Sequence[int]
    overlap: str
    verified: Sequence[NDArray[np.float64]] | None = None
    calibration: Calibration = field(default_factory=Calibration)

    def scores(self, index: int) -> NDArray[np.float64]:
        """The score (n,) of each candidate of a sentence before the verifier."""
        shares = self.shares[index]
        return self.calibration(shares[:, :-1].max(axis=1)) if len(shares) else np.zeros(0)

    def kept(self, threshold: float, reference: float = 0.0) -> list[list[int]]:
        """Per sentence the candidates that are kept at a threshold, as the stages decide it, ascending.

        reference: as in `keep_flat`.
        """
        found = []
        for i, candidates in enumerate(self.candidates):
            kept = keep([c.span for c in candidates], list(self.scores(i)), threshold, self.overlap, reference)
            if self.verified is not None:
                kept = [k for k in kept if self.verified[i][k] >= threshold]
            found.append(kept)
        return found

    def counts(self, threshold: float, reference: float = 0.0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Entities kept at a threshold and those of them that are right, per sentence."""
        guesses = np.zeros(len(self.gold), dtype=np.int64)
        hits = np.zeros(len(self.gold), dtype=np.int64)
        for i, kept in enumerate(self.kept(threshold, reference)):
            labels = self.shares[i][kept, :-1].argmax(axis=1) if kept else np.zeros(0, np.int64)
            guesses[i], hits[i] = len(kept), int((labels == self.truth[i][kept]).sum())
        return guesses, hits

    def calibrated(self) -> Decided:
        """The same with scores fitted to how often what is kept at the lowest threshold is right."""
        p, right = [np.zeros(0)], [np.zeros(0, dtype=np.bool_)]
        for i, kept in enumerate(self.kept(min(THRESHOLDS))):
            rows = self.shares[i][kept, :-1]
            p.append(rows.max(axis=1) if kept else np.zeros(0))
            right.append(rows.argmax(axis=1) == self.truth[i][kept] if kept else np.zeros(0, dtype=np.bool_))
        return replace(self, calibration=fit_calibration(np.concatenate(p), np.concatenate(right)))

    def f1(self, threshold: float) -> tuple[float, float]:
        """Strict F1 and its standard error, as of a ratio of sums over sentences."""
        f1, shares = self._shares(threshold)
        return f1, _spread(shares)

    def _shares(self, threshold: float) -> tuple[float, NDArray[np.float64]]:
        """Strict F1, and what each sentence adds to its error: (S,), by linearising the ratio."""
        guesses, hits = self.counts(threshold)
        whole = guesses + np.array(self.gold)
        total = max(float(whole.sum()), 1.0)
        f1 = 2 * float(hits.sum()) / total
        return f1, (2 * hits - f1 * whole) / total

    def lead(self, threshold: float, other: Decided, its_threshold: float) -> tuple[float, float]:
        """By how much strict F1 exceeds that of another's decisions on the same sentences, and the standard error."""
        f1, shares = self._shares(threshold)
        its_f1, its_shares = other._shares(its_threshold)
        return f1 - its_f1, _spread(shares - its_shares)

    def points(self, reference: float = 0.0) -> NDArray[np.float64]:
        """(n, 3): threshold, precision less its standard error, recall; ascending thresholds.

        reference: the threshold that was chosen.
        """
        rows = []
        for threshold in (*THRESHOLDS, *_STRICT):
            guesses, hits = (int(counts.sum()) for counts in self.counts(threshold, reference))
            rows.append(_point(threshold, guesses, hits, sum(self.gold)))
        return np.array([row for row in rows if row is not None], dtype=np.float64).reshape(-1, 3)


def _spread(shares: NDArray[np.float64]) -> float:
    return float(np.sqrt(len(shares)) * shares.std())


def _point(threshold: float, guesses: int, hits: int, gold: int) -> tuple[float, float, float] | None:
    if guesses < _LEAST_ENTITIES:
        return None
    precision = hits / guesses
    error = np.sqrt(max(precision * (1 - precision), 1 / guesses) / guesses)
    return threshold, precision - float(error), hits / max(gold, 1)


def best_threshold(decided: Decided) -> tuple[float, float]:
    """(F1, threshold): the lowest threshold whose strict F1 on the pool is as good as the best.

    As good: within one standard error (the rule of Breiman et al., 1984), and within one point, which binds in pools
    of few sentences. Out of fold and after decoding. The curve is flat near its top, and texts unlike the pool get
    lower scores: F1 at 0.15, 0.2, 0.3 and 0.4 was 0.657, 0.656, 0.646 and 0.631 on WNUT17 dev, whose texts are of
    another kind than its pool, and 0.630, 0.634, 0.634 and 0.638 on CrossNER AI dev, whose texts are like its pool.
    """
    results = [(*decided.f1(threshold), threshold) for threshold in THRESHOLDS]
    best, error, _ = max(results)
    f1, _, threshold = next(result for result in results if result[0] >= best - min(error, 0.01))
    return f1, threshold


def fewest(
    options: Mapping[tuple[str, ...], tuple[Decided, float]], reads: Mapping[str, str] | None = None
) -> tuple[tuple[str, ...], float, float]:
    """The smallest set of voters that is as good as the best, the best's lead in strict F1, and the lead's error.

    options: by voters, what they decide on the same sentences, and at which threshold. As good: the lead is no larger
    than its standard error (Breiman et al., 1984). Every voter costs time, and a small lead need not carry over to
    other texts: beside the reading voter, the retrieval voter led by 0.007 on the pool of WNUT17 and by -0.001 on its
    dev texts. reads: what a voter reads, for those that read the same as others; they cost nothing more and count as
    one. Of sets of one size the best is taken.
    """
    names = reads or {}
    best = max(options, key=lambda voters: options[voters][0].f1(options[voters][1])[0])
    decided, threshold = options[best]
    leads = {voters: decided.lead(threshold, *other) for voters, other in options.items()}
    chosen = min(
        (voters for voters, (lead, error) in leads.items() if lead <= error),
        key=lambda voters: (len({names.get(voter, voter) for voter in voters}), leads[voters][0], len(voters)),
    )
    return chosen, *leads[chosen]


def threshold_for(points: NDArray[np.float64] | None, precision: float) -> tuple[float, dict[str, Any]]:
    """The lowest threshold that reaches a precision on the pool, a standard error to spare; and what to expect of it.

    points: as `Decided.points` makes them, None where nothing was fitted. Raises ConfigError where the pool promises no
    such precision.
    """
    if points is None or not len(points):
        raise ConfigError(
            f"target_precision={precision}: the pool is too small, or nothing was fitted on it (the paper preset, "
            "classify.combine), so it does not say which score reaches it; give more examples, a stack, or --min-score"
        )
    reached = points[points[:, 1] >= precision]
    if not len(reached):
        best = points[points[:, 1].argmax()]
        raise ConfigError(
            f"target_precision={precision}: no score reaches it on the pool, a standard error to spare; the most is "
            f"{best[1]:.2f}, at a score of {best[0]:g} and a recall of {best[2]:.2f}; aim lower, or give more examples"
        )
    threshold, lower, recall = (float(value) for value in reached[0])
    expected = {"precision, a standard error below": round(lower, 4), "recall": round(recall, 4)}
    return threshold, {
        "target precision": precision,
        "threshold": threshold,
        "expected on texts like the pool": expected,
    }
