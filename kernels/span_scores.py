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

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from el4ner.errors import ShapeError
from el4ner.kernels import _dispatch
from el4ner.kernels._dispatch import Array, njit, triton_jit
from el4ner.kernels._threads import thread_count

if TYPE_CHECKING:
    import triton.language as tl

_Floats = NDArray[np.float32]
FlatSpan = tuple[int, int, int]
"""start, end (exclusive), label; start and end count tokens."""
Taken = tuple[NDArray[np.int64], NDArray[np.int64]]
"""(T,) number of tokens of the span taken at i in the best set of the suffix i.., 0 for none; (T,) its label."""

# Starts a program handles; not tuned (no GPU was measured yet).
_BLOCK_TOKENS = 32


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


def span_scores_native(mean_part: _Floats, last_part: _Floats, max_length: int) -> _Floats:
    """The same sums in the same order, in C++ (csrc/span_scores.hpp)."""
    from el4ner import _native

    out = np.empty((mean_part.shape[0], max_length, mean_part.shape[1]), dtype=np.float32)
    _native.span_scores(mean_part, last_part, out, thread_count())
    return out


@triton_jit
def _span_scores_kernel(  # type: ignore[no-untyped-def]  # pointers and scalars, typed by triton
    mean_ptr,
    last_ptr,
    out_ptr,
    tokens,
    max_length,
    labels,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]  # (BLOCK_T, 1)
    column = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)[None, :]  # (1, BLOCK_L)
    total = tl.zeros((BLOCK_T, BLOCK_L), dtype=tl.float64)
    for n in range(max_length):
        inside = (i + n < tokens) & (column < labels)
        at = (i + n) * labels + column
        total += tl.load(mean_ptr + at, mask=inside, other=0.0).to(tl.float64)
        score = total / (n + 1) + tl.load(last_ptr + at, mask=inside, other=0.0).to(tl.float64)
        score = tl.where(inside, score.to(tl.float32), -float("inf"))
        tl.store(out_ptr + (i * max_length + n) * labels + column, score, mask=(i < tokens) & (column < labels))


def span_scores_triton(mean_part: _Floats, last_part: _Floats, max_length: int) -> _Floats:
    """Running float64 sums from each start on: spans are short, and a scan over the text would need a second pass."""
    import torch
    import triton

    tokens, labels = mean_part.shape
    device = "cpu" if _dispatch.interpreted() else "cuda"
    out = torch.empty((tokens, max_length, labels), device=device)
    if out.numel():
        mean, last = (torch.from_numpy(part).to(device) for part in (mean_part, last_part))
        block_labels = min(64, triton.next_power_of_2(labels))
        grid = (triton.cdiv(tokens, _BLOCK_TOKENS), triton.cdiv(labels, block_labels))
        kernel: Any = _span_scores_kernel
        kernel[grid](mean, last, out, tokens, max_length, labels, BLOCK_T=_BLOCK_TOKENS, BLOCK_L=block_labels)
    scores: _Floats = out.cpu().numpy()
    return scores


_dispatch.register(
    "span_scores",
    ref=span_scores_ref,
    numba=span_scores_numba,
    native=span_scores_native,
    triton=span_scores_triton,
)


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
    max_length = _dispatch.to_index("max_length", max_length)
    if max_length < 1:
        raise ShapeError(f"max_length={max_length}; it must be at least 1 token")
    _dispatch.check_finite("mean_part", mean)
    _dispatch.check_finite("last_part", last)
    out: _Floats = run(mean, last, max_length)
    return out


def _gains(scores: _Floats, none_label: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The best label's gain over none (T, N) f64, -inf past the end, and that label (T, N) i64."""
    tokens, max_length, _ = scores.shape
    inside = np.arange(tokens)[:, None] + np.arange(max_length)[None, :] < tokens  # (T, N)
    values = scores[inside].astype(np.float64)  # (n, L)
    none = values[:, none_label].copy()
    values[:, none_label] = -np.inf
    best = values.argmax(axis=1)
    gains, label = np.full((tokens, max_length), -np.inf), np.zeros((tokens, max_length), dtype=np.int64)
    gains[inside] = np.take_along_axis(values, best[:, None], axis=1)[:, 0] - none
    label[inside] = best
    return gains, label


def best_flat_ref(scores: _Floats, none_label: int) -> Taken:
    """From the right, one token at a time."""
    gains, label = _gains(scores, none_label)
    tokens, max_length = gains.shape
    best = [(0.0, 0)] * (tokens + 1)  # sum of gains, minus the number of spans: larger is better
    taken, labels = np.zeros(tokens, dtype=np.int64), np.zeros(tokens, dtype=np.int64)
    for i in range(tokens - 1, -1, -1):
        best[i] = best[i + 1]
        for n in range(min(max_length, tokens - i)):
            gain = float(gains[i, n])
            after = best[i + n + 1]
            option = (gain + after[0], after[1] - 1)
            # At equal value a span beats no span here (it starts earlier), and a shorter one a longer one.
            if gain > 0 and (option > best[i] or (option == best[i] and taken[i] == 0)):
                best[i], taken[i], labels[i] = option, n + 1, label[i, n]
    return taken, labels


@njit
def _best_flat_loop(
    gains: NDArray[np.float64], label: NDArray[np.int64], taken: NDArray[np.int64], labels: NDArray[np.int64]
) -> None:
    tokens, max_length = gains.shape
    total, count = np.zeros(tokens + 1), np.zeros(tokens + 1, dtype=np.int64)
    for i in range(tokens - 1, -1, -1):
        total[i], count[i], taken[i], labels[i] = total[i + 1], count[i + 1], 0, 0
        for n in range(min(max_length, tokens - i)):
            if gains[i, n] > 0:
                value, spans = gains[i, n] + total[i + n + 1], count[i + n + 1] + 1
                same = value == total[i] and spans == count[i] and taken[i] == 0
                if value > total[i] or (value == total[i] and spans < count[i]) or same:
                    total[i], count[i], taken[i], labels[i] = value, spans, n + 1, label[i, n]


def best_flat_numba(scores: _Floats, none_label: int) -> Taken:
    """The same recursion, compiled by numba."""
    gains, label = _gains(scores, none_label)
    taken, labels = np.empty(len(gains), dtype=np.int64), np.empty(len(gains), dtype=np.int64)
    _best_flat_loop(gains, label, taken, labels)
    return taken, labels


def best_flat_native(scores: _Floats, none_label: int) -> Taken:
    """Gains and recursion in one pass over the scores, in C++ (csrc/span_scores.hpp), which checks them on the way."""
    from el4ner import _native

    taken, labels = np.empty(len(scores), dtype=np.int64), np.empty(len(scores), dtype=np.int64)
    if not _native.best_flat(scores, none_label, taken, labels):
        _check_scores(scores, none_label)
    return taken, labels


_dispatch.register("best_flat", ref=best_flat_ref, numba=best_flat_numba, native=best_flat_native)


def _check_scores(scores: _Floats, none_label: int) -> None:
    """Raise ShapeError on NaN, +inf, or an infinite score of none_label, inside the text."""
    tokens, max_length, _ = scores.shape
    values = scores[np.arange(tokens)[:, None] + np.arange(max_length)[None, :] < tokens]
    if np.isnan(values).any() or (values == np.inf).any() or not np.isfinite(values[:, none_label]).all():
        raise ShapeError("scores holds NaN, +inf or an infinite score of none_label inside the text")


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
    tokens, _, labels = scores_.shape
    none_label = _dispatch.to_index("none_label", none_label)
    if not 0 <= none_label < labels:
        raise ShapeError(f"none_label={none_label} with {labels} labels; choose 0 to {labels - 1}")
    if run is not best_flat_native:
        _check_scores(scores_, none_label)
    taken, label = run(scores_, none_label)
    spans: list[FlatSpan] = []
    i = 0
    while i < tokens:
        length = int(taken[i])
        if length:
            spans.append((i, i + length, int(label[i])))
        i += max(length, 1)
    return spans
