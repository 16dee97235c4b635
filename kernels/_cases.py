"""A random input for each operation and what counts as the same answer: shared by `el4ner doctor` and el4ner-bench."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from el4ner.errors import KernelError
from el4ner.kernels._span_pool import SpanPool
from el4ner.kernels.choice_logprobs import choice_logprobs
from el4ner.kernels.span_scores import best_flat, span_scores
from el4ner.kernels.span_topk import span_topk
from el4ner.kernels.vote import vote


@dataclass(frozen=True, slots=True)
class Case:
    """One call: `run(backend)` gives its arrays; `shape` says its size; `tolerance` is absolute, `why` its reason.

    inputs: what the call is made with, for implementations from elsewhere.
    """

    op: str
    shape: dict[str, int]
    run: Callable[[str], tuple[NDArray[Any], ...]]
    tolerance: float
    why: str
    inputs: dict[str, Any] = field(default_factory=dict)


def _unit(random: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    vectors = random.normal(size=shape)
    unit: NDArray[np.float32] = (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)
    return unit


def _offsets(random: np.random.Generator, sentences: int) -> NDArray[np.int64]:
    """Sentences of 1 to 9 spans."""
    return np.cumsum(np.concatenate([[0], random.integers(1, 10, sentences)])).astype(np.int64)


def vote_case(random: np.random.Generator, members: int = 3, spans: int = 7, labels: int = 5) -> Case:
    """Members that each give a random distribution; one of them abstains on every third span."""
    logp = np.log(random.dirichlet(np.ones(labels), (members, spans))).astype(np.float32)
    logp[0, ::3] = np.nan
    weights = random.random(members)
    shape = {"members": members, "spans": spans, "labels": labels}
    return Case(
        "vote",
        shape,
        lambda b: vote(logp, weights, backend=b),
        1.2e-7,
        "one rounding to float32",
        {"logp": logp, "weights": weights},
    )


def span_topk_case(
    random: np.random.Generator, queries: int = 3, sentences: int = 20, width: int = 8, k: int = 4
) -> Case:
    """Random unit vectors, 1 to 9 spans a sentence, weights 1, 2 and 4."""
    query_offsets, offsets = _offsets(random, queries), _offsets(random, sentences)
    pool = SpanPool.pack(_unit(random, int(offsets[-1]), width), offsets)
    vectors = _unit(random, int(query_offsets[-1]), width)
    weights = random.choice([1.0, 2.0, 4.0], len(vectors))
    shape = {"queries": queries, "sentences": sentences, "width": width, "k": k}
    shape |= {"query_spans": len(vectors), "pool_spans": len(pool.vectors)}
    return Case(
        "span_topk",
        shape,
        lambda b: span_topk(vectors, query_offsets, weights, pool, k, backend=b),
        1.2e-7,
        "float64 scores rounded to float32",
        {"queries": vectors, "query_offsets": query_offsets, "weights": weights, "pool": pool, "k": k},
    )


def span_scores_case(random: np.random.Generator, tokens: int = 9, max_length: int = 4, labels: int = 3) -> Case:
    """Random projected token states."""
    mean, last = random.normal(size=(2, tokens, labels)).astype(np.float32)
    shape = {"tokens": tokens, "max_length": max_length, "labels": labels}
    return Case(
        "span_scores",
        shape,
        lambda b: (span_scores(mean, last, max_length, backend=b),),
        1e-6,
        "float64 sums rounded to float32, at values up to about 8",
        {"mean_part": mean, "last_part": last, "max_length": max_length},
    )


def best_flat_case(random: np.random.Generator, tokens: int = 9, max_length: int = 4, labels: int = 3) -> Case:
    """Random scores; the last label is none."""
    scores = random.normal(size=(tokens, max_length, labels)).astype(np.float32)
    shape = {"tokens": tokens, "max_length": max_length, "labels": labels}
    return Case(
        "best_flat",
        shape,
        lambda b: (np.array(best_flat(scores, labels - 1, backend=b), dtype=np.int64).reshape(-1, 3),),
        0.0,
        "the spans are the same",
        {"scores": scores, "none_label": labels - 1},
    )


def choice_logprobs_case(
    random: np.random.Generator,
    rows: int = 4,
    width: int = 16,
    vocabulary: int = 50,
    choices: int = 3,
    bf16: int = 0,
    device: str = "cpu",
) -> Case:
    """Random hidden states and head, float32 or bfloat16, over the whole vocabulary."""
    import torch

    # The head's columns are scaled so that logits have the spread of a language model's, about 3.
    hidden = torch.from_numpy(random.normal(size=(rows, width)).astype(np.float32))
    head = torch.from_numpy((random.normal(size=(vocabulary, width)) * 3 / np.sqrt(width)).astype(np.float32))
    ids = torch.from_numpy(random.integers(0, vocabulary, (rows, choices)))
    dtype = torch.bfloat16 if bf16 else torch.float32
    hidden, head, ids = hidden.to(device, dtype), head.to(device, dtype), ids.to(device)
    shape = {"rows": rows, "width": width, "vocabulary": vocabulary, "choices": choices, "bf16": bf16}
    return Case(
        "choice_logprobs",
        shape,
        lambda b: (choice_logprobs(hidden, head, ids, backend=b),),
        0.05 if bf16 else 5e-5,
        "logits up to 16 in bfloat16 are off by up to 2^-5"
        if bf16
        else "float32 dots of up to a few thousand products",
        {"hidden": hidden, "head": head, "token_ids": ids},
    )


CASES: dict[str, Callable[..., Case]] = {
    "best_flat": best_flat_case,
    "choice_logprobs": choice_logprobs_case,
    "span_scores": span_scores_case,
    "span_topk": span_topk_case,
    "vote": vote_case,
}


def difference(result: Sequence[NDArray[Any]], expected: Sequence[NDArray[Any]]) -> float:
    """Largest absolute difference; infinite where shapes, whole numbers or infinities differ or NaN turns up."""
    worst = 0.0
    for got, want in zip(result, expected, strict=True):
        if got.shape != want.shape:
            return float("inf")
        if want.dtype.kind in "iu":
            if not np.array_equal(got, want):
                return float("inf")
            continue
        same = got == want  # equal infinities have no difference
        gap = np.abs(np.where(same, 0.0, got) - np.where(same, 0.0, want))
        if np.isnan(gap).any():
            return float("inf")
        worst = max(worst, float(gap.max(initial=0.0)))
    return worst


def check(case: Case, backend: str) -> str | None:
    """Why a backend's answer to a case is no good, None if it equals the reference's within the tolerance."""
    try:
        gap = difference(case.run(backend), case.run("ref"))
    except KernelError as error:
        return str(error)
    if gap <= case.tolerance:
        return None
    return f"differs from ref by {gap:.3g}; allowed: {case.tolerance:.3g} ({case.why})"
