"""vote: members x spans x labels -> one label for each span.

Let p = exp(logp), and let member m be *heard* on span s unless its row is NaN (it abstains). With weights w:

    soft:  score[s, l] = sum_m w[m, l] p[m, s, l] / sum_m w[m, l]        over the members heard on s
    hard:  score[s, l] = sum_m w[m, l] [l = argmax_l' logp[m, s, l']] / sum_m w[m, l]

A label nobody heard has weight for scores 0. winner = argmax_l score; margin = winner's score - the best other score
(the score itself if there is one label). Equal scores: soft, the lower label; hard, the label whose earliest voter of
positive weight comes first, then the lower label. If nobody is heard, or only with weights that are all 0: winner -1,
score 0, margin 0. Sums are float64, over members in order, and scores are rounded to float32 before they are
compared, so that the last bit of a backend's exp decides no vote.
Source: EL4NER, weighted and majority voting over the members.
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

Votes = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]
_Logp = NDArray[np.float32]
_Weights = NDArray[np.float64]

ABOVE_ONE = 1e-3
"""By how much a soft score may pass 1: log-probabilities near 0 that were rounded to half precision."""

# Spans a program handles; not tuned (no GPU was measured yet).
_BLOCK_SPANS = 32


def vote_ref(logp: _Logp, weights: _Weights, hard: bool) -> Votes:
    """The plain loop that defines the result. logp (M, S, L), weights (M, L)."""
    members, spans, labels = logp.shape
    winners = np.full(spans, -1, dtype=np.int64)
    scores, margins = np.zeros(spans, dtype=np.float32), np.zeros(spans, dtype=np.float32)
    for s in range(spans):
        total, weight = np.zeros(labels), np.zeros(labels)
        first = np.full(labels, members)
        for m in range(members):
            row = logp[m, s].astype(np.float64)
            if np.isnan(row).any() or labels == 0:
                continue
            weight += weights[m]
            if hard:
                best = int(row.argmax())
                total[best] += weights[m, best]
                if weights[m, best] > 0:
                    first[best] = min(first[best], m)
            else:
                with np.errstate(over="ignore"):  # of numbers that are no log-probabilities: refused afterwards
                    total += weights[m] * np.exp(row)
        if not (weight > 0).any():
            continue
        score = np.divide(total, weight, out=np.zeros(labels), where=weight > 0).astype(np.float32)
        order = sorted(range(labels), key=lambda i: (-score[i], first[i] if hard else 0, i))
        winners[s], scores[s] = order[0], score[order[0]]
        margins[s] = score[order[0]] - (score[order[1]] if labels > 1 else np.float32(0))
    return winners, scores, margins


@njit
def _vote_loop(
    logp: _Logp,
    weights: _Weights,
    hard: bool,
    winners: NDArray[np.int64],
    scores: NDArray[np.float32],
    margins: NDArray[np.float32],
) -> None:
    members, spans, labels = logp.shape
    total, weight = np.zeros(labels), np.zeros(labels)
    first, score = np.full(labels, members), np.zeros(labels, dtype=np.float32)
    for s in range(spans):
        total[:], weight[:], first[:], score[:] = 0.0, 0.0, members, 0.0
        for m in range(members):
            if np.isnan(logp[m, s, 0]):
                continue
            best = 0
            for i in range(labels):
                if logp[m, s, i] > logp[m, s, best]:
                    best = i
                weight[i] += weights[m, i]
                if not hard:
                    total[i] += weights[m, i] * np.exp(np.float64(logp[m, s, i]))
            if hard:
                total[best] += weights[m, best]
                if weights[m, best] > 0 and first[best] == members:
                    first[best] = m
        winner = -1
        for i in range(labels):
            if weight[i] > 0:
                score[i] = total[i] / weight[i]
        if weight.max() > 0:
            winner = 0
            for i in range(1, labels):
                earlier = hard and score[i] == score[winner] and first[i] < first[winner]
                if score[i] > score[winner] or earlier:
                    winner = i
        second = np.float32(0)
        for i in range(labels):
            if i != winner and score[i] > second:
                second = score[i]
        winners[s] = winner
        scores[s] = score[winner] if winner >= 0 else np.float32(0)
        margins[s] = score[winner] - second if winner >= 0 else np.float32(0)


def _outputs(spans: int) -> Votes:
    """Three parts of one allocation: large enough, it gets huge pages, whose first writing costs less."""
    memory = np.empty(2 * spans, np.int64)
    halves = memory[spans:].view(np.float32)
    return memory[:spans], halves[:spans], halves[spans:]


def _nobody(spans: int) -> Votes:
    return np.full(spans, -1, np.int64), np.zeros(spans, np.float32), np.zeros(spans, np.float32)


def _check_rows(logp: _Logp) -> None:
    """Raise ShapeError if a row is partly NaN or holds +inf."""
    missing = np.isnan(logp)
    partly = missing.any(axis=2) & ~missing.all(axis=2)
    if partly.any():
        m, s = (int(i) for i in np.argwhere(partly)[0])
        raise ShapeError(f"logp[{m}, {s}] is partly NaN; a member abstains with a row of NaN or votes with numbers")
    if (logp == np.inf).any():
        raise ShapeError("logp holds +inf; log-probabilities are at most 0")


def vote_numba(logp: _Logp, weights: _Weights, hard: bool) -> Votes:
    """The same sums, compiled by numba."""
    if not logp.size:
        return _nobody(logp.shape[1])
    out = _outputs(logp.shape[1])
    _vote_loop(logp, weights, hard, *out)
    return out


def vote_native(logp: _Logp, weights: _Weights, hard: bool) -> Votes:
    """The same sums in C++ (csrc/vote.hpp)."""
    from el4ner import _native

    out = _outputs(logp.shape[1])
    # Rows are checked on the way: a pass over the log-probabilities of its own would double the memory traffic.
    if not _native.vote(logp, weights, hard, *out, thread_count()):
        _check_rows(logp)
    return out


@triton_jit
def _vote_kernel(  # type: ignore[no-untyped-def]  # pointers and scalars, typed by triton
    logp_ptr,
    weights_ptr,
    winners_ptr,
    scores_ptr,
    margins_ptr,
    members,
    spans,
    labels,
    HARD: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)  # (BLOCK_S,)
    column = tl.arange(0, BLOCK_L)  # (BLOCK_L,)
    inside = (s[:, None] < spans) & (column[None, :] < labels)
    total = tl.zeros((BLOCK_S, BLOCK_L), dtype=tl.float64)
    weight = tl.zeros((BLOCK_S, BLOCK_L), dtype=tl.float64)
    first = tl.zeros((BLOCK_S, BLOCK_L), dtype=tl.int64) + members
    m = tl.zeros((), dtype=tl.int64)
    while m < members:
        row = tl.load(logp_ptr + (m * spans + s[:, None]) * labels + column[None, :], mask=inside, other=-float("inf"))
        w = tl.load(weights_ptr + m * labels + column[None, :], mask=column[None, :] < labels, other=0.0)
        heard = inside & (row == row)
        row = tl.where(heard, row, -float("inf")).to(tl.float64)
        weight += tl.where(heard, w, 0.0)
        if HARD:
            top = tl.max(row, axis=1)
            best = tl.min(tl.where(heard & (row == top[:, None]), column[None, :], BLOCK_L), axis=1)
            chosen = heard & (column[None, :] == best[:, None])
            total += tl.where(chosen, w, 0.0)
            first = tl.where(chosen & (w > 0.0), tl.minimum(first, m), first)
        else:
            total += tl.where(heard, w * tl.exp(row), 0.0)
        m += 1
    score = tl.where(weight > 0.0, total / tl.where(weight > 0.0, weight, 1.0), 0.0)
    score = tl.where(inside, score, -1.0).to(tl.float32)
    top = tl.max(score, axis=1)
    rank = column[None, :].to(tl.int64) + (first * BLOCK_L if HARD else tl.zeros_like(first))
    winner = tl.min(tl.where(score == top[:, None], rank, (members + 1) * BLOCK_L), axis=1) % BLOCK_L
    second = tl.max(tl.where(column[None, :] == winner[:, None], -1.0, score), axis=1)
    anyone = tl.max(weight, axis=1) > 0.0
    tl.store(winners_ptr + s, tl.where(anyone, winner, -1), mask=s < spans)
    tl.store(scores_ptr + s, tl.where(anyone, top, 0.0), mask=s < spans)
    margin = top - tl.where(second < 0.0, 0.0, second)
    tl.store(margins_ptr + s, tl.where(anyone, margin, 0.0), mask=s < spans)


def vote_triton(logp: _Logp, weights: _Weights, hard: bool) -> Votes:
    """The same sums, one program per 32 spans; in triton's interpreter where TRITON_INTERPRET=1."""
    import torch
    import triton

    members, spans, labels = logp.shape
    if not logp.size:
        return _nobody(spans)
    device = "cpu" if _dispatch.interpreted() else "cuda"
    inputs = torch.from_numpy(logp).to(device), torch.from_numpy(weights).to(device)
    outputs = tuple(torch.empty(spans, dtype=t, device=device) for t in (torch.int64, torch.float32, torch.float32))
    kernel: Any = _vote_kernel
    grid = (triton.cdiv(spans, _BLOCK_SPANS),)
    block_labels = max(2, triton.next_power_of_2(labels))
    kernel[grid](*inputs, *outputs, members, spans, labels, HARD=hard, BLOCK_S=_BLOCK_SPANS, BLOCK_L=block_labels)
    winners, scores, margins = (output.cpu().numpy() for output in outputs)
    return winners, scores, margins


_dispatch.register("vote", ref=vote_ref, numba=vote_numba, native=vote_native, triton=vote_triton)


def vote(logp: Array, weights: Array, *, hard: bool = False, backend: str = "auto") -> Votes:
    """The label each span gets from the members' weighted votes (the formula is at the top of this file).

    logp (M, S, L) f32: log-probabilities; a row of NaN means that the member abstains on that span; -inf is p = 0.
    weights (M,) or (M, L), finite, >= 0.
    hard: each member votes for its best label only (equal labels: the lower), majority wins.
    Returns winners (S,) i64 (-1: nobody was heard), scores (S,) f32 in [0, 1], margins (S,) f32 >= 0.
    Raises ShapeError (a ValueError) on other shapes, negative weights (or positive ones beyond 1e-305 to 1e300), +inf,
    a row that is partly NaN, or a soft score above 1, which no log-probabilities give; KernelError if the backend asked
    for cannot run.

    >>> winners, scores, margins = vote(np.log([[[0.9, 0.1]], [[0.4, 0.6]]]), np.ones(2))
    >>> winners.tolist(), scores.round(2).tolist()
    ([0], [0.6499999761581421])
    """
    run = _dispatch.choose("vote", backend, _dispatch.device_of(logp))
    logp_ = _dispatch.to_numpy("logp", logp, 3, np.float32)
    members, _, labels = logp_.shape
    ndim = getattr(weights, "ndim", np.ndim(weights))
    weights_ = _dispatch.to_numpy("weights", weights, 2 if ndim == 2 else 1, np.float64)
    if weights_.shape not in ((members,), (members, labels)):
        raise ShapeError(f"weights has shape {weights_.shape}; ({members},) or ({members}, {labels}) is needed")
    _dispatch.check_weights("weights", weights_, 1e-305, 1e300)
    if weights_.ndim == 1:
        weights_ = np.repeat(weights_[:, None], labels, axis=1)
    if run is not vote_native:
        _check_rows(logp_)
    result: Votes = run(logp_, weights_, hard)
    # Numbers above 0 are no log-probabilities: scores tell at no cost, logp would have to be read once more.
    if not hard and result[1].size and not (highest := result[1].max()) <= 1 + ABOVE_ONE:
        raise ShapeError(f"a score of {highest}: logp holds numbers above 0; take log_softmax, or vote with hard=True")
    return result
