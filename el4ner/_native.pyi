"""Compiled kernels of el4ner (csrc/module.cpp); call them through el4ner.kernels, which checks the arguments."""

from typing import final

import numpy as np
from numpy.typing import NDArray

def vote(
    logp: NDArray[np.float32],
    weights: NDArray[np.float64],
    hard: bool,
    winners: NDArray[np.int64],
    scores: NDArray[np.float32],
    margins: NDArray[np.float32],
) -> None:
    """logp (M, S, L), weights (M, L); writes winners, scores and margins (S,). All contiguous."""

@final
class PackedPool:
    """A pool laid out for span_topk in one precision."""

    @property
    def nbytes(self) -> int:
        """Memory it holds."""

def span_topk_pack(
    vectors: NDArray[np.float32], offsets: NDArray[np.int64], largest_norm: float, precision: str, threads: int
) -> PackedPool:
    """vectors (S, D), offsets (N+1,); precision "fp32", "bf16" or "int8"."""

def span_topk_search(
    packed: PackedPool,
    vectors: NDArray[np.float32],
    offsets: NDArray[np.int64],
    largest_norm: float,
    queries: NDArray[np.float32],
    query_offsets: NDArray[np.int64],
    weights: NDArray[np.float64],
    excluded: NDArray[np.int64],
    excluded_offsets: NDArray[np.int64],
    isa: str,
    threads: int,
    ids: NDArray[np.int64],
    scores: NDArray[np.float32],
) -> dict[str, int]:
    """Writes ids and scores (B, k), which come padded. Returns counts of what was done."""

def span_topk_choose(
    vectors: NDArray[np.float32],
    offsets: NDArray[np.int64],
    largest_norm: float,
    queries: NDArray[np.float32],
    query_offsets: NDArray[np.int64],
    weights: NDArray[np.float64],
    excluded: NDArray[np.int64],
    excluded_offsets: NDArray[np.int64],
    proposed: NDArray[np.int64],
    proposed_offsets: NDArray[np.int64],
    isa: str,
    threads: int,
    ids: NDArray[np.int64],
    scores: NDArray[np.float32],
) -> dict[str, int]:
    """Like span_topk_search, among the proposed sentences of each query only."""

def span_topk_supports(precision: str, isa: str) -> bool:
    """Whether this CPU can screen in a precision with an instruction set ("avx512", "avx2", "portable")."""

def span_topk_peak(precision: str, isa: str) -> float:
    """10^9 multiply and add operations a second that one core can do at most; 0 where that is not known."""
