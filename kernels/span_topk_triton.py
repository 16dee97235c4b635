"""span_topk on CUDA: bfloat16 screening on the tensor cores with a certified error, then exact rescoring.

Packing. Sentences are sorted by their number of spans and cut into tiles; a tile holds its spans by position,
[position][sentence], as many positions as its longest sentence has; shorter ones repeat their last span, which changes
no maximum. The maximum over a sentence's spans is then an element-wise running maximum over positions.

Screening. A program takes a block of query spans (whole queries) and a tile: for each position a product, a running
maximum, and at the end one small product with the weights, which gives [queries, sentences]. Scores that reach their
query's threshold are appended to its list. Three rounds over growing parts of the pool raise the thresholds.

Certificate. Screening is off by at most `error` (rounding to bfloat16, and sums). A threshold is the k-th best score so
far minus 2 errors, so no sentence of the true top k is dropped; whatever could be in it is scored again in float64.
Results are those of span_topk_ref. Nothing here was measured on a GPU yet; tests run it in triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from el4ner.kernels._dispatch import interpreted, triton_jit

if TYPE_CHECKING:
    import torch
    import triton.language as tl

_Ints = NDArray[np.int64]
_Floats = NDArray[np.float32]


class Tiling(NamedTuple):
    """Sizes of a block: query spans, sentences, dimensions, queries (a multiple of 16); how it is compiled."""

    m: int
    n: int
    k: int
    q: int
    warps: int
    stages: int


# The largest that compile without spilling registers (tests/test_triton_compile.py); not timed: no GPU was at hand.
# 9.0: 224 registers, 164 KB of shared memory, wgmma and TMA. 8.0: 244 registers, 98 KB, which smaller cards have too.
TILINGS = {9: Tiling(128, 128, 64, 32, 8, 4), 8: Tiling(128, 64, 64, 32, 8, 3)}
# Sentences after which thresholds are renewed, and entries of a query's list (doubled when it overflows).
ROUNDS = (2048, 32768)
CAPACITY = 4096


def tiling() -> Tiling:
    """The tiling for this machine's card; the interpreter takes the one for 8.0."""
    import torch

    large = not interpreted() and torch.cuda.get_device_capability()[0] in (9, 10)
    return TILINGS[9 if large else 8]


class Queries(Protocol):
    """What is read of the checked queries (kernels/span_topk.py): spans of positive weight, exclusions as CSR."""

    vectors: _Floats
    offsets: _Ints
    weights: NDArray[np.float64]
    excluded: _Ints
    excluded_offsets: _Ints


class Pool(Protocol):
    """What is read of a SpanPool: vectors (S, D) f32, offsets (N+1,) i64."""

    vectors: _Floats
    offsets: _Ints


@triton_jit
def _screen_kernel(  # type: ignore[no-untyped-def]  # descriptors, pointers and scalars, typed by triton
    query_descriptor,
    pool_descriptor,
    mix_descriptor,
    tile_row_ptr,
    tile_length_ptr,
    tile_order_ptr,
    slot_id_ptr,
    query_ptr,
    threshold_ptr,
    count_ptr,
    list_id_ptr,
    list_score_ptr,
    capacity,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    block = tl.program_id(0)
    tile = tl.load(tile_order_ptr + tl.program_id(1))
    row = tl.load(tile_row_ptr + tile)
    length = tl.load(tile_length_ptr + tile)
    best = tl.full((BLOCK_M, BLOCK_N), -float("inf"), dtype=tl.float32)
    for position in range(length):
        product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, width, BLOCK_K):
            q = query_descriptor.load([block * BLOCK_M, k])  # (BLOCK_M, BLOCK_K)
            v = pool_descriptor.load([row + position * BLOCK_N, k])  # (BLOCK_N, BLOCK_K)
            product = tl.dot(q, v.T, product)
        best = tl.maximum(best, product)
    ids = tl.load(slot_id_ptr + tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))  # -1 pads
    # mix holds w / sum w at [query, span]: rows of padding have weight 0 and a finite product (0). 16 queries at a
    # time: with 32 the registers of three-fold tf32 spilled (232 bytes at compute capability 9.0).
    for part in range(0, BLOCK_Q, 16):
        mix = mix_descriptor.load([block * BLOCK_Q + part, 0])  # (16, BLOCK_M)
        score = tl.dot(mix, best, input_precision="tf32x3")  # (16, BLOCK_N)
        query = tl.load(query_ptr + block * BLOCK_Q + part + tl.arange(0, 16))  # -1 pads
        threshold = tl.load(threshold_ptr + query, mask=query >= 0, other=float("inf"))
        hit = (score >= threshold[:, None]) & (query[:, None] >= 0) & (ids[None, :] >= 0)
        hits = tl.sum(hit.to(tl.int32), axis=1)
        base = tl.atomic_add(count_ptr + query, hits, mask=(query >= 0) & (hits > 0))
        place = base[:, None] + tl.cumsum(hit.to(tl.int32), axis=1) - 1
        kept = hit & (place < capacity)
        at = query[:, None].to(tl.int64) * capacity + place
        tl.store(list_id_ptr + at, tl.broadcast_to(ids[None, :], (16, BLOCK_N)), mask=kept)
        tl.store(list_score_ptr + at, score, mask=kept)


@triton_jit
def _rescore_kernel(  # type: ignore[no-untyped-def]  # pointers and scalars, typed by triton
    query_vectors_ptr,
    query_offsets_ptr,
    weights_ptr,
    pool_vectors_ptr,
    pool_offsets_ptr,
    pair_query_ptr,
    pair_id_ptr,
    out_ptr,
    width,
    BLOCK_D: tl.constexpr,
):
    # The exact score of one (query, sentence) pair: float64 sums in a fixed order, rounded once.
    pair = tl.program_id(0).to(tl.int64)
    query, sentence = tl.load(pair_query_ptr + pair), tl.load(pair_id_ptr + pair)
    begin, end = tl.load(pool_offsets_ptr + sentence), tl.load(pool_offsets_ptr + sentence + 1)
    total = tl.zeros((), dtype=tl.float64)
    weight = tl.zeros((), dtype=tl.float64)
    i = tl.load(query_offsets_ptr + query)
    last = tl.load(query_offsets_ptr + query + 1)
    while i < last:
        top = tl.full((), -float("inf"), dtype=tl.float64)
        j = begin
        while j < end:
            dot = tl.zeros((BLOCK_D,), dtype=tl.float64)
            for d in range(0, width, BLOCK_D):
                column = d + tl.arange(0, BLOCK_D)
                q = tl.load(query_vectors_ptr + i * width + column, mask=column < width, other=0.0)
                v = tl.load(pool_vectors_ptr + j * width + column, mask=column < width, other=0.0)
                dot += q.to(tl.float64) * v.to(tl.float64)
            top = tl.maximum(top, tl.sum(dot, axis=0))
            j += 1
        w = tl.load(weights_ptr + i)
        total += w * top
        weight += w
        i += 1
    tl.store(out_ptr + pair, (total / weight).to(tl.float32))


@dataclass(frozen=True, slots=True)
class PackedPool:
    """A pool on the device. tiles (rows, D') bf16, position-major by tile; the rest says where what lies."""

    vectors: torch.Tensor  # (S, D) f32, for rescoring
    offsets: torch.Tensor  # (N+1,) i64
    tiles: torch.Tensor  # (rows, D') bf16, D' = D rounded up to 8
    tile_row: torch.Tensor  # (tiles,) i32
    tile_length: torch.Tensor  # (tiles,) i32
    slot_id: torch.Tensor  # (tiles * tiling.n,) i64, -1 pads
    order: torch.Tensor  # (tiles,) i32: tiles of all lengths, mixed
    largest_norm: float
    largest_rounding: float  # max |v - bf16(v)|
    tiling: Tiling


def _mixed(tiles: int) -> NDArray[np.int32]:
    """0..tiles-1 in an order in which every beginning has tiles from all over (the golden ratio's multiples)."""
    key = np.arange(tiles) * 0.6180339887498949 % 1.0
    return np.argsort(key, kind="stable").astype(np.int32)


def _stored(rounded: torch.Tensor) -> torch.Tensor:
    """bfloat16, or the same numbers as float32 for the interpreter, whose products take bfloat16 for integers."""
    return rounded.float() if interpreted() else rounded


def pack(vectors: torch.Tensor, offsets: torch.Tensor, size: Tiling) -> PackedPool:
    """vectors (S, D) f32, offsets (N+1,) i64, on the device -> the same pool, tiled. Empty sentences get no slot."""
    import torch

    device, width = vectors.device, vectors.shape[1]
    counts = offsets.diff()
    order = torch.argsort(counts, descending=True, stable=True)
    order = order[: int((counts > 0).sum())]
    tiles = -(-len(order) // size.n)
    slot_id = torch.full((tiles * size.n,), -1, dtype=torch.int64, device=device)
    slot_id[: len(order)] = order
    length = counts[order[:: size.n]]  # the longest comes first
    tile_row = (length * size.n).cumsum(0) - length * size.n
    # For every row of every tile the span that lies there: position p of sentence c, its last span where it is shorter.
    tile_of_row = torch.repeat_interleave(torch.arange(tiles, device=device), length * size.n)
    inner = torch.arange(len(tile_of_row), device=device) - tile_row[tile_of_row]
    sentence = slot_id[tile_of_row * size.n + inner % size.n].clamp(min=0)
    span = offsets[sentence] + torch.minimum(inner // size.n, counts[sentence] - 1)
    rounded = torch.zeros((len(vectors), -(-width // 8) * 8), dtype=torch.bfloat16, device=device)
    rounded[:, :width] = vectors
    norm, off = vectors.double().norm(dim=1), (vectors.double() - rounded[:, :width].double()).norm(dim=1)
    largest = (float(norm.max()), float(off.max())) if len(vectors) else (0.0, 0.0)
    order_of_tiles = torch.from_numpy(_mixed(tiles)).to(device)
    return PackedPool(
        vectors, offsets, _stored(rounded)[span.clamp(min=0)], tile_row.int(), length.int(), slot_id, order_of_tiles,
        *largest, size,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Queries in blocks of at most `m` spans and `q` queries (see Tiling)."""

    vectors: torch.Tensor  # (blocks * m, D') bf16
    mix: torch.Tensor  # (blocks * q, m) f32: weights, divided by their sum
    query: torch.Tensor  # (blocks * q,) i64, -1 pads
    error: torch.Tensor  # (B,) f32, by how much a screening score may be off


def _block_queries(queries: Queries, chosen: list[int], pool: PackedPool) -> _Blocks:
    import torch

    size = pool.tiling
    width, padded = queries.vectors.shape[1], pool.tiles.shape[1]
    rows: list[tuple[int, int, int]] = []  # block, first row in it, place among its queries
    block, used, members = 0, 0, 0
    for b in chosen:
        spans = int(queries.offsets[b + 1] - queries.offsets[b])
        if used + spans > size.m or members == size.q:
            block, used, members = block + 1, 0, 0
        rows.append((block, used, members))
        used, members = used + spans, members + 1
    blocks = block + 1
    vectors = np.zeros((blocks * size.m, padded), dtype=np.float32)
    mix = np.zeros((blocks * size.q, size.m), dtype=np.float32)
    query = np.full(blocks * size.q, -1, dtype=np.int64)
    weight_of_row = np.zeros(blocks * size.m)
    owner = np.zeros(blocks * size.m, dtype=np.int64)
    for b, (block, row, place) in zip(chosen, rows, strict=True):
        first, last = int(queries.offsets[b]), int(queries.offsets[b + 1])
        share = queries.weights[first:last] / queries.weights[first:last].sum()
        at = slice(block * size.m + row, block * size.m + row + len(share))
        vectors[at, :width] = queries.vectors[first:last]
        mix[block * size.q + place, row : row + len(share)] = share
        query[block * size.q + place] = b
        weight_of_row[at], owner[at] = share, b
    rounded = torch.from_numpy(vectors).to(torch.bfloat16)
    q = np.linalg.norm(vectors.astype(np.float64), axis=1)
    q_rounding = np.linalg.norm(vectors.astype(np.float64) - rounded.double().numpy(), axis=1)
    # |q.v - q'.v'| <= |q - q'| |v| + |q'| |v - v'|, and |q'| <= |q| + |q - q'|. Sums of D products and the product
    # with the weights round too: (D + 256) 2^-23 of |q| |v| covers float32 sums in any order and tf32x3's three terms.
    scale = pool.largest_norm * (q + q_rounding)
    error = q_rounding * pool.largest_norm + (q + q_rounding) * pool.largest_rounding
    error += scale * (width + 256) * 2.0**-23
    total = np.zeros(len(queries.offsets) - 1)
    np.add.at(total, owner, weight_of_row * error)
    device = pool.tiles.device
    parts = (
        _stored(rounded),
        torch.from_numpy(mix),
        torch.from_numpy(query),
        torch.from_numpy(total.astype(np.float32) * 1.001),
    )
    return _Blocks(*(part.to(device) for part in parts))


@dataclass(slots=True)
class _Lists:
    """What has reached its query's threshold so far."""

    ids: torch.Tensor  # (B, capacity) i64, -1 where empty
    scores: torch.Tensor  # (B, capacity) f32, -inf where empty
    count: torch.Tensor  # (B,) i32
    threshold: torch.Tensor  # (B,) f32

    @classmethod
    def empty(cls, queries: int, capacity: int, device: torch.device) -> _Lists:
        import torch

        return cls(
            torch.full((queries, capacity), -1, dtype=torch.int64, device=device),
            torch.full((queries, capacity), -torch.inf, device=device),
            torch.zeros(queries, dtype=torch.int32, device=device),
            torch.full((queries,), -torch.inf, device=device),
        )

    def grown(self) -> _Lists:
        """The same entries with twice the room."""
        new = _Lists.empty(len(self.ids), 2 * self.ids.shape[1], self.ids.device)
        new.ids[:, : self.ids.shape[1]], new.scores[:, : self.ids.shape[1]] = self.ids, self.scores
        new.count, new.threshold = self.count.clone(), self.threshold
        return new

    def tighten(self, k: int, error: torch.Tensor, excluded: torch.Tensor, sentences: int) -> None:
        """Drop excluded ids and whatever cannot be in the top k any more; raise the thresholds."""
        import torch

        key = torch.arange(len(self.ids), device=self.ids.device)[:, None] * sentences + self.ids
        gone = (self.ids < 0) | torch.isin(key, excluded)
        self.scores.masked_fill_(gone, -torch.inf)
        self.scores, order = self.scores.sort(dim=1, descending=True, stable=True)
        self.ids = self.ids.gather(1, order)
        if k <= self.scores.shape[1]:
            self.threshold = torch.maximum(self.threshold, self.scores[:, k - 1] - 2 * error)
        kept = (self.scores >= self.threshold[:, None]) & (self.scores > -torch.inf)
        self.ids.masked_fill_(~kept, -1)
        self.scores.masked_fill_(~kept, -torch.inf)
        self.count = kept.sum(1, dtype=torch.int32)


def _launch(blocks: _Blocks, pool: PackedPool, part: torch.Tensor, lists: _Lists) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    size = pool.tiling
    descriptors = (
        TensorDescriptor.from_tensor(blocks.vectors, [size.m, size.k]),
        TensorDescriptor.from_tensor(pool.tiles, [size.n, size.k]),
        TensorDescriptor.from_tensor(blocks.mix, [16, size.m]),
    )
    kernel: Any = _screen_kernel
    # Query blocks vary fastest: programs that run together read the same tile of the pool.
    grid = (len(blocks.query) // size.q, len(part))
    kernel[grid](
        *descriptors, pool.tile_row, pool.tile_length, part, pool.slot_id, blocks.query, lists.threshold, lists.count,
        lists.ids, lists.scores, lists.ids.shape[1], pool.tiles.shape[1],
        BLOCK_M=size.m, BLOCK_N=size.n, BLOCK_K=size.k, BLOCK_Q=size.q, num_warps=size.warps, num_stages=size.stages,
    )  # fmt: skip


def _screen(blocks: _Blocks, pool: PackedPool, k: int, excluded: torch.Tensor) -> _Lists:
    """Every query's candidates: all sentences whose screening score is within 2 errors of the k-th best one."""
    queries, tiles = len(blocks.error), len(pool.order)
    sentences = len(pool.offsets) - 1
    lists = _Lists.empty(queries, max(CAPACITY, 2 * k), pool.tiles.device)
    done = 0
    for sentences_seen in (*ROUNDS, tiles * pool.tiling.n):
        end = min(tiles, max(done, sentences_seen // pool.tiling.n))
        if end == done:
            continue
        while True:
            before = lists.count.clone()
            _launch(blocks, pool, pool.order[done:end].contiguous(), lists)
            if int(lists.count.max()) <= lists.ids.shape[1]:
                break
            lists.count = before  # what did not fit is lost: the round starts again with more room
            lists = lists.grown()
        lists.tighten(k, blocks.error, excluded, sentences)
        done = end
    return lists


def _rescore(queries: Queries, lists: _Lists, pool: PackedPool) -> torch.Tensor:
    """(B, capacity) f32 exact scores of all candidates, -inf where there is none."""
    import torch

    device = pool.vectors.device
    pair_query, place = (lists.ids >= 0).nonzero(as_tuple=True)
    exact = torch.full_like(lists.scores, -torch.inf)
    if len(pair_query):
        out = torch.empty(len(pair_query), device=device)
        kernel: Any = _rescore_kernel
        kernel[(len(pair_query),)](
            torch.from_numpy(queries.vectors).to(device), torch.from_numpy(queries.offsets).to(device),
            torch.from_numpy(queries.weights).to(device), pool.vectors, pool.offsets, pair_query,
            lists.ids[pair_query, place], out, pool.vectors.shape[1], BLOCK_D=128, num_warps=4,
        )  # fmt: skip
        exact[pair_query, place] = out
    return exact


def _long_queries(queries: Queries, chosen: list[int], pool: PackedPool, lists: _Lists) -> _Lists:
    """Queries with more spans than a block holds: every sentence is a candidate, whatever its score."""
    import torch

    room = max(lists.ids.shape[1], len(pool.offsets) - 1)
    while lists.ids.shape[1] < room:
        lists = lists.grown()
    counts = pool.offsets.diff()
    full = counts.nonzero()[:, 0]
    for b in chosen:
        skipped = queries.excluded[int(queries.excluded_offsets[b]) : int(queries.excluded_offsets[b + 1])]
        kept = full[~torch.isin(full, torch.from_numpy(np.ascontiguousarray(skipped)).to(full.device))]
        lists.ids[b, : len(kept)] = kept
    return lists


_PACKED: list[tuple[_Floats, _Ints, PackedPool]] = []


def _packed(pool: Pool) -> PackedPool:
    """The pool on the device; the last one is kept, since calls with the same pool follow each other."""
    import torch

    if not _PACKED or _PACKED[0][0] is not pool.vectors or _PACKED[0][1] is not pool.offsets:
        device = "cpu" if interpreted() else "cuda"
        vectors, offsets = (
            torch.from_numpy(np.ascontiguousarray(part)).to(device) for part in (pool.vectors, pool.offsets)
        )
        _PACKED[:] = [(pool.vectors, pool.offsets, pack(vectors, offsets, tiling()))]
    return _PACKED[0][2]


def span_topk_triton(queries: Queries, pool: Pool, k: int) -> tuple[_Ints, _Floats]:
    """The k best sentences of every query; the arguments are checked already. ids (B, k) i64, scores (B, k) f32."""
    import torch

    total, sentences = len(queries.offsets) - 1, len(pool.offsets) - 1
    ids = np.full((total, k), -1, dtype=np.int64)
    scores = np.full((total, k), -np.inf, dtype=np.float32)
    if not k or not len(pool.vectors) or not len(queries.vectors):
        return ids, scores
    packed = _packed(pool)
    spans, size = np.diff(queries.offsets), packed.tiling
    usual, long = np.flatnonzero((spans > 0) & (spans <= size.m)), np.flatnonzero(spans > size.m)
    device = packed.tiles.device
    k_found = min(k, sentences)
    keys = np.repeat(np.arange(total), np.diff(queries.excluded_offsets)) * sentences + queries.excluded
    if len(usual):
        blocks = _block_queries(queries, usual.tolist(), packed)
        lists = _screen(blocks, packed, k_found, torch.from_numpy(keys).to(device))
    else:
        lists = _Lists.empty(total, max(CAPACITY, k_found), device)
    lists = _long_queries(queries, long.tolist(), packed, lists) if len(long) else lists
    exact = _rescore(queries, lists, packed)
    # Equal scores: the lower id first. So sort by id, then stably by score.
    by_id, order = torch.where(lists.ids < 0, torch.iinfo(torch.int64).max, lists.ids).sort(dim=1)
    best, place = exact.gather(1, order).sort(dim=1, descending=True, stable=True)
    found = by_id.gather(1, place)[:, :k_found]
    best = best[:, :k_found]
    found = torch.where(best > -torch.inf, found, -1)
    ids[:, :k_found], scores[:, :k_found] = found.cpu().numpy(), best.cpu().numpy()
    return ids, scores
