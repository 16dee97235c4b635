"""What tests/test_triton.py runs in a process of its own: triton kernels in the interpreter against the references."""

from __future__ import annotations

import sys

import numpy as np
import torch

from el4ner.kernels import (
    SpanPool,
    available_backends,
    choice_logprobs,
    operations,
    span_scores,
    span_topk,
    vote,
)
from el4ner.kernels._cases import CASES, check

SIZES = (0, 1, 31, 33)


def votes() -> None:
    random = np.random.default_rng(0)
    for spans in SIZES:
        for labels in (1, 3, 5):
            with np.errstate(divide="ignore"):
                logp = np.log(random.integers(0, 4, (3, spans, labels)) / 8).astype(np.float32)
            logp[random.random((3, spans)) < 0.3] = np.nan
            for weights in (np.ones(3), np.zeros(3), random.integers(0, 3, (3, labels)) / 2):
                for hard in (False, True):
                    expected = vote(logp, weights, hard=hard, backend="ref")
                    got = vote(logp, weights, hard=hard, backend="triton")
                    assert np.array_equal(got[0], expected[0]), (spans, labels, hard, got[0], expected[0])
                    # One rounding of float64 sums to float32, for margins two.
                    assert np.allclose(got[1], expected[1], atol=1.2e-7, rtol=0), (spans, labels, hard)
                    assert np.allclose(got[2], expected[2], atol=2.4e-7, rtol=0), (spans, labels, hard)


def scores_of_spans() -> None:
    for tokens in SIZES:
        for labels in (1, 3, 70):
            mean, last = np.random.default_rng(tokens).normal(size=(2, tokens, 2 * labels)).astype(np.float32)
            for max_length in (1, 5, 40):
                arguments = mean[:, ::2], last[:, 1::2], max_length
                got, expected = (span_scores(*arguments, backend=b) for b in ("triton", "ref"))
                # Sums from the start of a span instead of differences of prefix sums: float64, rounded once.
                assert np.allclose(got, expected, atol=1e-6, rtol=0), (tokens, labels, max_length)


def logprobs() -> None:
    module = sys.modules["el4ner.kernels.choice_logprobs"]
    for name, value in (("_ROWS", 16), ("_COLUMNS", 16), ("_DEPTH", 16), ("_SPLITS", 4)):
        setattr(module, name, value)
    for rows in SIZES:
        random = torch.Generator().manual_seed(rows)
        for width, vocabulary in ((5, 33), (24, 130)):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                hidden = torch.randn(rows, 2 * width, generator=random).to(dtype)[:, ::2]
                head = torch.randn(vocabulary, width, generator=random).to(dtype)
                bias = torch.randn(vocabulary, generator=random)
                bias[3] = -torch.inf
                ids = torch.randint(-1, vocabulary // 2, (rows, 3), generator=random)
                ids[:, 1] = 0
                for extra in ({}, {"bias": bias, "scale": 0.5}, {"soft_cap": 4.0, "n_vocab": vocabulary // 2}):
                    for normalise in ("vocab", "choices"):
                        arguments = hidden, head, ids, normalise
                        got = choice_logprobs(*arguments, backend="triton", **extra)  # type: ignore[arg-type]
                        expected = choice_logprobs(*arguments, backend="ref", **extra)  # type: ignore[arg-type]
                        # Products of halves are exact in float32; sums of up to 130 terms of size up to 20.
                        assert np.allclose(got, expected, atol=2e-5, rtol=0), (rows, width, dtype, extra, normalise)


def ragged(random: np.random.Generator, count: int, longest: int) -> np.ndarray:
    lengths = random.integers(0, longest + 1, count) * (random.random(count) < 0.8)
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def topk() -> None:
    module = sys.modules["el4ner.kernels.span_topk_triton"]
    small = module.Tiling(16, 16, 16, 16, 4, 2)
    module.TILINGS[8] = small
    # Rounds after 16 and 64 sentences, lists that overflow at once, queries longer than a block of 16 spans.
    module.ROUNDS, module.CAPACITY = (16, 64), 8
    for sentences, queries, width, longest, k in (
        (0, 3, 8, 3, 2),
        (1, 3, 8, 3, 2),
        (31, 4, 5, 9, 0),
        (31, 3, 5, 9, 40),
        (33, 5, 33, 4, 3),
        (70, 4, 16, 6, 3),
    ):
        random = np.random.default_rng(sentences + k)
        offsets, query_offsets = ragged(random, sentences, longest), ragged(random, queries, longest)
        vectors = random.normal(size=(offsets[-1], width)).astype(np.float32)
        rows = random.normal(size=(query_offsets[-1], width)).astype(np.float32)
        if sentences == 70:  # ties, and products that are all negative
            vectors = -np.abs(vectors).round(0)
            rows = np.abs(rows).round(0)
        weights = random.choice([0.0, 1.0, 2.0, 4.0], len(rows))
        exclude = [None if b % 2 or not sentences else [0, sentences - 1] for b in range(queries)]
        pool = SpanPool.pack(vectors, offsets)
        for skipped in (None, exclude):
            arguments = rows, query_offsets, weights, pool, k
            got = span_topk(*arguments, exclude=skipped, backend="triton")
            expected = span_topk(*arguments, exclude=skipped, backend="ref")
            assert np.array_equal(got[0], expected[0]), (sentences, got, expected)
            # Two float32 roundings of the same float64 score differ by one unit in the last place at most.
            assert np.allclose(got[1], expected[1], rtol=1.2e-7, atol=1e-12), (sentences, got[1], expected[1])
    # A query with more spans than a block holds is scored against every sentence.
    random = np.random.default_rng(1)
    pool = SpanPool.pack(random.normal(size=(20, 4)), np.arange(0, 21, 2))
    arguments = random.normal(size=(21, 4)).astype(np.float32), np.array([0, 18, 21]), np.ones(21), pool, 3
    assert np.array_equal(span_topk(*arguments, backend="triton")[0], span_topk(*arguments, backend="ref")[0])


def cases() -> None:
    """The cases that `el4ner doctor` and the benchmark run, at the sizes that are compiled for a GPU."""
    for op in operations():
        if available_backends(op)["triton"] is None:
            assert check(CASES[op](np.random.default_rng(3)), "triton") is None, op


if __name__ == "__main__":
    assert available_backends("vote")["triton"] is None
    {"vote": votes, "span_scores": scores_of_spans, "choice_logprobs": logprobs, "span_topk": topk, "cases": cases}[
        sys.argv[1]
    ]()
    print("agrees")
