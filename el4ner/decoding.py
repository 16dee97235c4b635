"""From scored spans to the spans that are kept: the best flat set, or every span above the threshold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from el4ner.kernels import best_flat
from el4ner.records import Span

_EDGE = 1e-6
_LEAST = 1e-3
"""Of its score, what a span that is no better than the reference counts: less than any better span."""


def log_odds(p: NDArray[np.floating]) -> NDArray[np.float64]:
    """log(p / (1 - p)), with p kept away from 0 and 1."""
    clipped = np.clip(np.asarray(p, dtype=np.float64), _EDGE, 1 - _EDGE)
    return np.asarray(np.log(clipped) - np.log1p(-clipped))


def keep_flat(spans: Sequence[Span], scores: Sequence[float], threshold: float, reference: float) -> list[int]:
    """Indices of the non-overlapping spans, scored at least `threshold`, with the largest summed gains; exact.

    gain = log-odds of the score - log-odds of max(threshold, reference), and never less than a trifle. The reference is
    the score at which a span is as good as none. Without it the parts of a name would win over the name under a low
    threshold: any two scores are better than one. The borders of the spans themselves serve as units, so spans need
    not fall on words.
    """
    chosen = [i for i in range(len(spans)) if scores[i] >= threshold and scores[i] > 0]
    values = np.asarray(scores, dtype=np.float64)
    gains = np.maximum(log_odds(values) - log_odds(np.asarray(max(threshold, reference))), _LEAST * values)
    kept: list[int] = []
    for group in _overlapping(spans, chosen):
        kept += group if len(group) == 1 else _best(spans, gains, group)
    return sorted(kept)


def _overlapping(spans: Sequence[Span], chosen: Sequence[int]) -> list[list[int]]:
    """The chosen spans in groups, none of which overlaps another."""
    groups: list[list[int]] = []
    end = -1
    for i in sorted(chosen, key=lambda i: spans[i]):
        if spans[i].start >= end:
            groups.append([])
        groups[-1].append(i)
        end = max(end, spans[i].end)
    return groups


def _best(spans: Sequence[Span], gains: NDArray[np.float64], group: Sequence[int]) -> list[int]:
    """Of a group of spans those without overlaps that gain the most."""
    borders = sorted({border for i in group for border in spans[i]})
    place = {border: position for position, border in enumerate(borders)}
    longest = max(place[spans[i].end] - place[spans[i].start] for i in group)
    dense = np.full((len(borders) - 1, longest, 2), -np.inf, dtype=np.float32)
    dense[:, :, 1] = 0.0
    owner: dict[tuple[int, int], int] = {}
    for i in group:
        start, end = place[spans[i].start], place[spans[i].end]
        dense[start, end - start - 1, 0] = gains[i]
        owner[start, end] = i
    return [owner[start, end] for start, end, _ in best_flat(dense, none_label=1)]


def keep(spans: Sequence[Span], scores: Sequence[float], threshold: float, overlap: str, reference: float) -> list[int]:
    """Indices of the spans that are kept, ascending; `overlap` is "flat" (as `keep_flat` has it) or "nested"."""
    if overlap == "flat":
        return keep_flat(spans, scores, threshold, reference)
    return [i for i, score in enumerate(scores) if score >= threshold and score > 0]
