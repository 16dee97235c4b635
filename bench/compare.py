"""Is one system better than another on the same sentences? A paired permutation test on strict F1.

If two systems are equally good, it does not matter whose answer to a sentence is whose. The test swaps the answers of
each sentence with probability 1/2, many times, and counts how often |F1 of A - F1 of B| is at least what was seen:

    p = (1 + that count) / (1 + permutations)

Where all swaps are few enough they are all tried, and p is exact. Several comparisons with one reference are corrected
after Holm. The interval of the difference resamples sentences, both systems' answers together.
Sources: Noreen 1989 (approximate randomisation); Yeh 2000 (for F1); Holm 1979; Phipson and Smyth 2010 (the 1 in p).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from el4ner.bench.resampling import Resampling
from el4ner.metrics import Pair

PERMUTATIONS = 10_000
_CELLS = 4_000_000  # swaps held at once: 16 MB
_ROUNDING = 1e-12

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two systems on the same sentences; difference and its interval are F1 of `a` minus F1 of `b`.

    differing: sentences that the two score differently. p_holm: p after Holm's correction, where there were several.
    """

    a: str
    b: str
    f1_a: float
    f1_b: float
    difference: float
    ci95: tuple[float, float]
    p: float
    is_exact: bool
    permutations: int
    sentences: int
    differing: int
    p_holm: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "ci95": list(self.ci95)}


def sentence_counts(pairs: Sequence[Pair]) -> Counts:
    """Correct, predicted and gold entities of each gold sentence, (N, 3).

    Predictions without gold record are added to the last sentence: errors of a system as a whole.
    """
    gold = [pair for pair in pairs if not pair.is_extra]
    counts = np.array([(len(p.found & set(p.gold)), len(p.claims), len(p.gold)) for p in gold], dtype=np.int64)
    counts[-1, 1] += sum(len(pair.claims) for pair in pairs if pair.is_extra)
    return counts


def compare(
    name_a: str, a: Counts, name_b: str, b: Counts, *, seed: int = 0, permutations: int = PERMUTATIONS,
    n_bootstrap: int = 1000,
) -> Comparison:  # fmt: skip
    """Test two systems. a, b: `sentence_counts` of the same sentences, (N, 3) each.

    Raises ValueError if they are not about the same gold entities.
    """
    if a.shape != b.shape or (a[:, 2] != b[:, 2]).any():
        raise ValueError(f"{name_a} and {name_b} were not scored against the same sentences")
    gold = int(a[:, 2].sum())
    total_a, total_b = a[:, :2].sum(axis=0), b[:, :2].sum(axis=0)
    moved = (b - a)[:, :2]
    moved = moved[moved.any(axis=1)]  # swapping equal counts changes nothing
    seen = abs(_f1(total_a, gold) - _f1(total_b, gold))
    is_exact = 2 ** min(len(moved), 60) <= permutations
    at_least = tried = 0
    for swaps in _swaps(len(moved), permutations, is_exact, seed):
        shift = swaps.astype(np.float32) @ moved.astype(np.float32)
        differences = np.abs(_f1(total_a + shift, gold) - _f1(total_b - shift, gold))
        at_least += int((differences >= seen - _ROUNDING).sum())
        tried += len(swaps)
    resampling = Resampling(len(a), n_bootstrap, seed)
    sums_a, sums_b = resampling.sums(a), resampling.sums(b)
    low, high = resampling.interval(_f1(sums_a[:, :2], sums_a[:, 2]) - _f1(sums_b[:, :2], sums_b[:, 2])) or (0.0, 0.0)
    return Comparison(
        name_a, name_b, float(_f1(total_a, gold)), float(_f1(total_b, gold)),
        float(_f1(total_a, gold) - _f1(total_b, gold)), (low, high),
        at_least / tried if is_exact else (1 + at_least) / (1 + tried), is_exact, tried, len(a), len(moved),
    )  # fmt: skip


def _f1(totals: NDArray[Any], gold: Any) -> NDArray[np.float64]:
    """F1 from correct and predicted (..., 2) and gold."""
    totals = np.asarray(totals, dtype=np.float64)
    f1: NDArray[np.float64] = 2 * totals[..., 0] / np.maximum(totals[..., 1] + gold, 1)
    return f1


def _swaps(n: int, permutations: int, is_exact: bool, seed: int) -> Iterator[NDArray[np.int8]]:
    """Which of n sentences are swapped, (part, n) of 0 and 1: every choice there is, or random ones in parts."""
    if is_exact:
        yield ((np.arange(2**n)[:, None] >> np.arange(n)) & 1).astype(np.int8)
        return
    rng = np.random.default_rng(seed)
    step = max(1, _CELLS // n)
    for done in range(0, permutations, step):
        yield rng.integers(0, 2, size=(min(step, permutations - done), n), dtype=np.int8)


def compare_all(
    counts: Mapping[str, Counts], against: str | None = None, *, seed: int = 0, permutations: int = PERMUTATIONS
) -> list[Comparison]:
    """Each system against one: the one named, else the best. Best first; p corrected after Holm."""
    f1 = {name: float(_f1(rows[:, :2].sum(axis=0), rows[:, 2].sum())) for name, rows in counts.items()}
    ranked = sorted(counts, key=lambda name: (-f1[name], name))
    reference = ranked[0] if against is None else against
    found = [
        compare(name, counts[name], reference, counts[reference], seed=seed, permutations=permutations)
        for name in ranked
        if name != reference
    ]
    corrected = holm([comparison.p for comparison in found])
    return [Comparison(**{**asdict(comparison), "p_holm": p}) for comparison, p in zip(found, corrected, strict=True)]


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for being several, after Holm: never below what they were, in the same order."""
    corrected = [0.0] * len(values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        highest = max(highest, min(1.0, values[index] * (len(values) - rank)))
        corrected[index] = highest
    return corrected


def show_p(p: float) -> str:
    """A p-value as it is printed: three decimals, or that it is below them."""
    return f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"


def comparison_lines(found: Sequence[Comparison]) -> list[str]:
    """Comparisons as lines of text, a system each."""
    width = max((len(comparison.a) for comparison in found), default=0)
    lines = []
    for c in found:
        several = "" if c.p_holm is None or len(found) < 2 else f", {show_p(c.p_holm)} after Holm"
        lines.append(
            f"{c.a:<{width}}  F1 {c.f1_a:.3f} against {c.f1_b:.3f} of {c.b}: {c.difference:+.3f} "
            f"[{c.ci95[0]:+.3f}, {c.ci95[1]:+.3f}], {show_p(c.p)}{several}"
        )
    return lines
