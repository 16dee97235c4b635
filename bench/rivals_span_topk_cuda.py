"""Libraries for MaxSim on CUDA beside span_topk: they score every sentence, torch selects. None is part of el4ner.

Neither knows weights. Scaled query spans say the same, as w max_j q.v_j = max_j (w q).v_j for w >= 0: each span is
scaled by its weight over the largest of its query, and the score by that largest over the sum. Both multiply in 16
bits, so that their scores are rounded; the best sentences may come in another order.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from el4ner.bench.rivals import Rival, to_host
from el4ner.bench.span_oracle import Answer
from el4ner.bench.span_pools import SpanInput
from el4ner.bench.span_sides import ROUNDED
from el4ner.errors import KernelError

# 10 bits of a half behind the point: two unit vectors' product is off by 2^-10 at most, in bfloat16's 7 by 2^-7.
_TOLERANCE = 1e-2
_SCORES = 1 << 28  # held at a time: queries x sentences (1 GB)

Scores = Callable[[int, int], Any]
"""(first query, behind the last) -> (queries, sentences with spans) f32, unweighted sums of maxima."""


class Prepared:
    """An input on the device as both libraries take it.

    queries (Q, D) f16, scaled; query_begins (B+1,) i32; vectors (S, D) f16; begins (N'+1,) i32 over the sentences that
    have spans, `named` (N',) their ids; factors (B, 1) f32, by which a score has to be multiplied; 0 for empty queries.
    """

    def __init__(self, data: SpanInput, device: str) -> None:
        import torch

        filled = np.flatnonzero(np.diff(data.pool.offsets))
        sizes = np.diff(data.offsets)
        owners = np.repeat(np.arange(len(sizes)), sizes)
        largest, total = np.zeros(len(sizes)), np.bincount(owners, weights=data.weights, minlength=len(sizes))
        np.maximum.at(largest, owners, data.weights)
        scaled = data.queries * (data.weights / largest[owners])[:, None].astype(np.float32)
        factors = np.divide(largest, total, out=np.zeros(len(sizes)), where=total > 0)
        begins = np.concatenate([[0], np.cumsum(np.diff(data.pool.offsets)[filled])])
        self.offsets = data.offsets
        self.queries = torch.from_numpy(scaled).to(device).half()
        self.vectors = torch.from_numpy(data.pool.vectors).to(device).half()
        self.query_begins, self.begins = (
            torch.from_numpy(array.astype(np.int32)).to(device) for array in (data.offsets, begins)
        )
        self.named = torch.from_numpy(filled).to(device)
        self.factors = torch.from_numpy(factors.astype(np.float32)).to(device)[:, None]
        self.longest, self.longest_query = (int(np.diff(x).max(initial=0)) for x in (data.pool.offsets, data.offsets))

    def best(self, scores: Scores, k: int) -> Answer:
        """The k best of each query, by blocks of queries whose scores fit in memory; on the host."""
        import torch

        ids, values = [], []
        count = max(1, _SCORES // max(1, len(self.named)))
        for first in range(0, len(self.factors), count):
            last = min(first + count, len(self.factors))
            top = (scores(first, last) * self.factors[first:last]).topk(min(k, len(self.named)), dim=1)
            ids.append(self.named[top.indices])
            values.append(top.values)
        return to_host(torch.cat(ids), torch.cat(values))  # type: ignore[return-value]


def late_interaction(module: Any, given: Prepared) -> Scores:
    """late-interaction-kernels: all pairs of queries and sentences in one launch, both packed."""

    def scores(first: int, last: int) -> Any:
        rows = slice(int(given.offsets[first]), int(given.offsets[last]))
        begins = given.query_begins[first : last + 1] - given.query_begins[first]
        return module.maxsim_varlen(
            given.queries[rows], given.vectors, begins, given.begins,
            max_seqlen_q=given.longest_query, max_seqlen_d=given.longest,
        )  # fmt: skip

    return scores


def flash_maxsim(module: Any, given: Prepared) -> Scores:
    """flash-maxsim: a query at a time against packed sentences.

    It pads widths to a power of two at every call; padded before, the call copies nothing.
    """
    import torch

    width = given.vectors.shape[1]
    padding = (0, (1 << max(4, (width - 1).bit_length())) - width)
    vectors, queries = (torch.nn.functional.pad(array, padding) for array in (given.vectors, given.queries))

    def scores(first: int, last: int) -> Any:
        out = torch.zeros((last - first, len(given.named)), dtype=torch.float32, device=vectors.device)
        for b in range(first, last):
            rows = queries[int(given.offsets[b]) : int(given.offsets[b + 1])]
            if len(rows):
                out[b - first] = module.flash_maxsim_packed(rows, vectors, given.begins, max_seqlen_d=given.longest)
        return out

    return scores


LIBRARIES = {
    "late-interaction-kernels maxsim_varlen + topk": ("late_interaction_kernels", late_interaction),
    "flash-maxsim packed + topk": ("flash_maxsim", flash_maxsim),
}
"""Name of the side -> the module, and how its scores are asked for."""


def rivals(data: SpanInput, k: int, device: str) -> Iterator[Rival]:
    """Both libraries where they are installed. What one raises, at its import too, is the reason it is skipped for."""
    prepared: Prepared | None = None
    for name, (module_name, scores_of) in LIBRARIES.items():
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # noqa: BLE001  a library may fail in any way; the row says how
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            reason = f"{module_name} cannot be imported ({reason}); el4ner[bench-cuda] installs it"
            yield Rival(name, _nothing, _TOLERANCE, ROUNDED, unavailable=reason)
            continue
        prepared = prepared or Prepared(data, device)
        yield Rival(name, _guarded(name, module, prepared, scores_of, k), _TOLERANCE, ROUNDED, mismatches=1.0)


def _nothing() -> Answer:
    raise KernelError("not installed")


def _guarded(
    name: str, module: Any, given: Prepared, scores_of: Callable[[Any, Prepared], Scores], k: int
) -> Callable[[], Answer]:
    """The call, whose failures of any kind are KernelErrors with the side's name."""
    scores: list[Scores] = []  # prepared at the first call, so that it is in no time

    def run() -> Answer:
        try:
            if not scores:
                scores.append(scores_of(module, given))
            return given.best(scores[0], k)
        except Exception as error:
            raise KernelError(f"{name}: {type(error).__name__}: {error}".partition("\n")[0]) from error

    return run
