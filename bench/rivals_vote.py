"""vote as it is written by hand: a weighted mean over the members, argmax, the two best."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from el4ner.bench.rivals import Rival, to_host
from el4ner.kernels._cases import Case


def rivals(case: Case, device: str) -> Iterator[Rival]:
    """numpy and torch, in float32; who abstains counts with weight 0."""
    import torch

    logp, weights = case.inputs["logp"], case.inputs["weights"].astype(np.float32)

    def with_numpy() -> tuple[np.ndarray, ...]:
        heard = ~np.isnan(logp[:, :, 0])
        w = np.where(heard, weights[:, None], np.float32(0))  # (M, S)
        score = np.einsum("ms,msl->sl", w, np.nan_to_num(np.exp(logp))) / w.sum(axis=0)[:, None]
        best = np.partition(score, -2, axis=1)[:, -2:]
        return score.argmax(axis=1), best[:, 1], best[:, 1] - best[:, 0]

    on_device, w_device = torch.from_numpy(logp).to(device), torch.from_numpy(weights).to(device)

    def with_torch() -> tuple[np.ndarray, ...]:
        heard = ~on_device[:, :, 0].isnan()
        w = torch.where(heard, w_device[:, None], 0.0)
        score = torch.einsum("ms,msl->sl", w, on_device.exp().nan_to_num()) / w.sum(0)[:, None]
        top = score.topk(2, dim=1).values
        return to_host(score.argmax(1), top[:, 0], top[:, 0] - top[:, 1])

    # Float32 sums of up to 8 terms; spans whose two best scores are that close may get the other winner.
    why = "float32 sums; winners may differ where scores are as close"
    yield Rival("numpy exp + einsum + argmax", with_numpy, 1e-6, why)
    yield Rival("torch exp + einsum + topk", with_torch, 1e-6, why)
