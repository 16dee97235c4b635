"""Compiled kernels of el4ner (csrc/module.cpp); call them through el4ner.kernels, which checks the arguments."""

from typing import final

import numpy as np
from numpy.typing import NDArray

interface: str
"""First 16 digits of the SHA-256 sum of this file when the module was built."""

def vote(
    logp: NDArray[np.float32],
    weights: NDArray[np.float64],
    hard: bool,
    winners: NDArray[np.int64],
    scores: NDArray[np.float32],
    margins: NDArray[np.float32],
    threads: int,
) -> bool:
    """logp (M, S, L), weights (M, L); writes winners, scores and margins (S,). False: a row must be refused."""

def span_scores(
    mean_part: NDArray[np.float32], last_part: NDArray[np.float32], out: NDArray[np.float32], threads: int
) -> None:
    """mean_part, last_part (T, L); writes out (T, N, L)."""

def best_flat(scores: NDArray[np.float32], none_label: int, taken: NDArray[np.int64], label: NDArray[np.int64]) -> bool:
    """scores (T, N, L); writes taken and label (T,). False: a score must be refused."""

def choice_log_totals_f32(
    hidden: NDArray[np.float32],
    head: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    scale: float,
    soft_cap: float,
    log_total: NDArray[np.float64],
    threads: int,
) -> None:
    """hidden (R, H), head (V, H), bias (V,); writes log_total (R,). soft_cap 0 means none."""

def choice_log_totals_bf16(
    hidden: NDArray[np.uint16],
    head: NDArray[np.uint16],
    bias: NDArray[np.float32] | None,
    scale: float,
    soft_cap: float,
    log_total: NDArray[np.float64],
    threads: int,
) -> None:
    """The same with the bits of bfloat16 numbers."""

def instruction_set() -> int:
    """0 portable, 1 AVX2, 2 AVX-512, 3 AVX-512 with BF16, 4 AMX: what the next call uses (EL4NER_ISA narrows it)."""

def peak_flops(bf16: bool, rounds: int) -> float:
    """FLOP/s of one core in registers, the best of some rounds; 0 without AVX-512 (BF16)."""

@final
class PackedPool:
    """A pool laid out for span_topk in one precision."""

    @property
    def nbytes(self) -> int:
        """Memory it holds."""

    @property
    def vectors(self) -> int:
        """Vectors that a query span is multiplied with: what sentences share counts once, filling too."""

    @property
    def shared(self) -> int:
        """Vectors that sentences share."""

def span_topk_largest_norm(vectors: NDArray[np.float32], threads: int) -> float:
    """vectors (S, D): the length of the longest; NaN if a number is not finite."""

def span_topk_pack(
    vectors: NDArray[np.float32],
    offsets: NDArray[np.int64],
    largest_norm: float,
    precision: str,
    isa: str,
    threads: int,
    share: bool = True,
) -> PackedPool:
    """vectors (S, D), offsets (N+1,); precision "fp32", "bf16" or "int8", laid out for an instruction set."""

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
    """Whether this CPU can screen in a precision with an instruction set ("amx", "avx512", "avx2", "portable")."""

def span_topk_peak(precision: str, isa: str) -> float:
    """10^9 multiply and add operations a second that one core can do at most; 0 where that is not known."""
