"""From scored spans to the spans that are kept: the best flat set, or every span above the threshold."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from el4ner.kernels import best_flat
from el4ner.records import Span

_EDGE = 1e-6


def log_odds(p: NDArray[np.floating]) -> NDArray[np.float64]:
    """log(p / (1 - p)), with p kept away from 0 and 1."""
    clipped = np.clip(np.asarray(p, dtype=np.float64), _EDGE, 1 - _EDGE)
    return np.asarray(np.log(clipped) - np.log1p(-clipped))


def keep_flat(spans: Sequence[Span], scores: Sequence[float], threshold: float) -> list[int]:
    """Indices of the non-overlapping spans with the largest summed log-odds over the threshold's; exact.

    The borders of the spans themselves serve as units, so spans need not fall on words.
    """
    gains = log_odds(np.asarray(scores)) - log_odds(np.asarray(threshold))
    chosen = [i for i in range(len(spans)) if scores[i] >= threshold and scores[i] > 0]
    if not chosen:
        return []
    by_start = sorted(chosen, key=lambda i: spans[i])
    if all(spans[a].end <= spans[b].start for a, b in pairwise(by_start)):
        return sorted(chosen)  # the common case needs no search
    borders = sorted({border for i in chosen for border in spans[i]})
    place = {border: position for position, border in enumerate(borders)}
    longest = max(place[spans[i].end] - place[spans[i].start] for i in chosen)
    dense = np.full((len(borders) - 1, longest, 2), -np.inf, dtype=np.float32)
    dense[:, :, 1] = 0.0
    owner: dict[tuple[int, int], int] = {}
    for i in chosen:
        start, end = place[spans[i].start], place[spans[i].end]
        # a span exactly at the threshold is kept: a gain of 0 would not be
        dense[start, end - start - 1, 0] = max(gains[i], _EDGE)
        owner[start, end] = i
    return sorted(owner[start, end] for start, end, _ in best_flat(dense, none_label=1))


def keep(spans: Sequence[Span], scores: Sequence[float], threshold: float, overlap: str) -> list[int]:
    """Indices of the spans that are kept, ascending; `overlap` is "flat" or "nested"."""
    if overlap == "flat":
        return keep_flat(spans, scores, threshold)
    return [i for i, score in enumerate(scores) if score >= threshold and score > 0]
