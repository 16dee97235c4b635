"""span_scores: projected token states -> scores of all spans up to a length; best_flat: the best flat set of spans.

    span_scores:  out[i, n, l] = mean(mean_part[i : i + n + 1, l]) + last_part[i + n, l],   -inf where i + n >= T

A span is read as (mean of its tokens, its last token) and scored by a linear map; the map and the mean commute, so
tokens are projected once and the means follow from prefix sums (float64, rounded once at the end).

    best_flat:  argmax over sets of disjoint spans of  sum_(i,n) gain[i, n],
                gain[i, n] = max_(l != none) scores[i, n, l] - scores[i, n, none]

solved exactly from the right: best[i] = max(best[i + 1], max_n gain[i, n] + best[i + n + 1]). Only gains above 0 are
taken. Among equal sums (float64): fewer spans, then the earlier start, then the shorter span, then the lower label.
Source: weighted interval scheduling (Kleinberg and Tardos, Algorithm Design, 6.1).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from el4ner.errors import ShapeError
from el4ner.kernels import _dispatch
from el4ner.kernels._dispatch import Array, njit

_Floats = NDArray[np.float32]
FlatSpan = tuple[int, int, int]
"""start, end (exclusive), label; start and end count tokens."""


def span_scores_ref(mean_part: _Floats, last_part: _Floats, max_length: int) -> _Floats:
    """Prefix sums, one span length at a time."""
    tokens, labels = mean_part.shape
    out = np.full((tokens, max_length, labels), -np.inf, dtype=np.float32)
    prefix = np.concatenate([np.zeros((1, labels)), np.cumsum(mean_part, axis=0, dtype=np.float64)])  # (T + 1, L)
    for n in range(min(max_length, tokens)):
        mean = (prefix[n + 1 :] - prefix[: tokens - n]) / (n + 1)  # (T - n, L)
        out[: tokens - n, n] = mean + last_part[n:]
    return out


@njit
def _span_scores_loop(mean_part: _Floats, last_part: _Floats, out: _Floats) -> None:
    tokens, max_length, labels = out.shape
    prefix = np.zeros((tokens + 1, labels))
    for i in range(tokens):
        for j in range(labels):
            prefix[i + 1, j] = prefix[i, j] + mean_part[i, j]
    for i in range(tokens):
        for n in range(max_length):
            for j in range(labels):
                if i + n < tokens:
                    out[i, n, j] = (prefix[i + n + 1, j] - prefix[i, j]) / (n + 1) + last_part[i + n, j]
                else:
                    out[i, n, j] = -np.inf


def span_scores_numba(mean_part: _Floats, last_part: _Floats, max_length: int) -> _Floats:
    """The same sums in the same order, compiled by numba."""
    out = np.empty((mean_part.shape[0], max_length, mean_part.shape[1]), dtype=np.float32)
    _span_scores_loop(mean_part, last_part, out)
    return out


_dispatch.register("span_scores", ref=span_scores_ref, numba=span_scores_numba)


def span_scores(mean_part: Array, last_part: Array, max_length: int, *, backend: str = "auto") -> _Floats:
    """Scores of all spans of up to `max_length` tokens (the formula is at the top of this file).

    mean_part (T, L) f32: token states under the map of the mean; last_part (T, L) f32: under that of the last token,
    the intercept included. Returns (T, max_length, L) f32; [i, n] is the span of tokens i to i + n; -inf past the end.
    Raises ShapeError (a ValueError) on other shapes, NaN, infinity or max_length < 1.
    """
    run = _dispatch.choose("span_scores", backend, _dispatch.device_of(mean_part, last_part))
    mean = _dispatch.to_numpy("mean_part", mean_part, 2, np.float32)
    last = _dispatch.to_numpy("last_part", last_part, 2, np.float32)
    if mean.shape != last.shape:
        raise ShapeError(f"mean_part has shape {mean.shape}, last_part {last.shape}; they must be equal")
    if max_length < 1:
        raise ShapeError(f"max_length={max_length}; it must be at least 1 token")
    _dispatch.check_finite("mean_part", mean)
    _dispatch.check_finite("last_part", last)
    out: _Floats = run(mean, last, max_length)
    return out


def _gains(scores: _Floats, none_label: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The best label's gain over none (T, N) f64, and that label (T, N) i64."""
    others = scores.astype(np.float64)
    none = others[:, :, none_label].copy()
    others[:, :, none_label] = -np.inf
    label = others.argmax(axis=2)
    best = np.take_along_axis(others, label[:, :, None], axis=2)[:, :, 0]
    # Spans past the end are -inf everywhere: -inf - 0, not -inf - -inf, which would be NaN.
    return best - np.where(np.isfinite(none), none, 0.0), label


def best_flat_ref(gains: NDArray[np.float64]) -> NDArray[np.int64]:
    """gains (T, N) -> (T,) number of tokens of the span taken at i in the best set of the suffix i.., 0 for none."""
    tokens, max_length = gains.shape
    best = [(0.0, 0)] * (tokens + 1)  # sum of gains, minus the number of spans: larger is better
    taken = np.zeros(tokens, dtype=np.int64)
    for i in range(tokens - 1, -1, -1):
        best[i] = best[i + 1]
        for n in range(min(max_length, tokens - i)):
            gain = float(gains[i, n])
            after = best[i + n + 1]
            option = (gain + after[0], after[1] - 1)
            # At equal value a span beats no span here (it starts earlier), and a shorter one a longer one.
            if gain > 0 and (option > best[i] or (option == best[i] and taken[i] == 0)):
                best[i], taken[i] = option, n + 1
    return taken


@njit
def _best_flat_loop(gains: NDArray[np.float64], taken: NDArray[np.int64]) -> None:
    tokens, max_length = gains.shape
    total, count = np.zeros(tokens + 1), np.zeros(tokens + 1, dtype=np.int64)
    for i in range(tokens - 1, -1, -1):
        total[i], count[i], taken[i] = total[i + 1], count[i + 1], 0
        for n in range(min(max_length, tokens - i)):
            if gains[i, n] > 0:
                value, spans = gains[i, n] + total[i + n + 1], count[i + n + 1] + 1
                same = value == total[i] and spans == count[i] and taken[i] == 0
                if value > total[i] or (value == total[i] and spans < count[i]) or same:
                    total[i], count[i], taken[i] = value, spans, n + 1


def best_flat_numba(gains: NDArray[np.float64]) -> NDArray[np.int64]:
    """The same recursion, compiled by numba."""
    taken = np.empty(gains.shape[0], dtype=np.int64)
    _best_flat_loop(gains, taken)
    return taken


_dispatch.register("best_flat", ref=best_flat_ref, numba=best_flat_numba)


def best_flat(scores: Array, none_label: int, *, backend: str = "auto") -> list[FlatSpan]:
    """The non-overlapping labelled spans whose summed gain over `none_label` is largest, exactly.

    scores (T, N, L) f32 as from span_scores: [i, n] is the span of tokens i to i + n; what lies past the end is not
    read; -inf forbids a label. none_label: the column that means "no entity", finite for every span inside.
    Returns (start, end exclusive, label) in tokens, by start. Raises ShapeError (a ValueError) on NaN, +inf, or a
    none_label that is no column.

    >>> scores = np.array([[[2.0, 0.0], [3.5, 0.0]], [[2.0, 0.0], [-np.inf, -np.inf]]], dtype=np.float32)
    >>> best_flat(scores, none_label=1)
    [(0, 1, 0), (1, 2, 0)]
    """
    run = _dispatch.choose("best_flat", backend, _dispatch.device_of(scores))
    scores_ = _dispatch.to_numpy("scores", scores, 3, np.float32)
    tokens, max_length, labels = scores_.shape
    if not 0 <= none_label < labels:
        raise ShapeError(f"none_label={none_label} with {labels} labels; choose 0 to {labels - 1}")
    inside = np.arange(tokens)[:, None] + np.arange(max_length)[None, :] < tokens  # (T, N)
    values = scores_[inside]
    if np.isnan(values).any() or (values == np.inf).any() or not np.isfinite(values[:, none_label]).all():
        raise ShapeError("scores holds NaN, +inf or an infinite score of none_label inside the text")
    if not tokens or not max_length or labels == 1:
        return []
    gains, label = _gains(np.where(inside[:, :, None], scores_, np.float32(-np.inf)), none_label)
    taken: NDArray[np.int64] = run(gains)
    spans: list[FlatSpan] = []
    i = 0
    while i < tokens:
        length = int(taken[i])
        if length:
            spans.append((i, i + length, int(label[i, length - 1])))
        i += max(length, 1)
    return spans
