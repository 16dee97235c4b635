"""What this machine can do at most, measured in the same run: the rooflines that shares are taken of."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from el4ner.kernels import available_backends


@dataclass(frozen=True, slots=True)
class Ceilings:
    """copy_bytes_s: bytes read and written per second by a large copy. read_bytes_s: read by a large sum.

    flops_s: by kind of number ("f32", "bf16").
    """

    copy_bytes_s: float
    read_bytes_s: float
    flops_s: dict[str, float]
    how: str

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {
            "copy_gb_s": round(self.copy_bytes_s / 1e9, 1),
            "read_gb_s": round(self.read_bytes_s / 1e9, 1),
            "how": self.how,
        } | {f"{kind}_gflop_s": round(speed / 1e9, 1) for kind, speed in self.flops_s.items()}


def _fastest(run: Callable[[], object], repeats: int) -> float:
    run()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)


def measure_ceilings(device: str, megabytes: int = 256) -> Ceilings:
    """Copy and read bandwidth and multiplications per second; the fastest of a few tries, as ceilings are.

    CPU: torch's copy and sum with all threads; multiply-adds of one core in registers (AVX-512, AMX for
    bf16; 0 without) times threads.
    CUDA: a copy on the device; torch products of 8192 x 8192 matrices of random numbers, in bfloat16 and float32.
    """
    import torch

    def finish() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    source = torch.randn(megabytes << 18, device=device)
    target = torch.empty_like(source)
    bytes_moved = 2 * source.numel() * source.itemsize

    def copy() -> None:
        target.copy_(source)
        finish()

    def read() -> None:
        source.sum()
        finish()

    bandwidth = bytes_moved / _fastest(copy, 5)
    reading = bytes_moved / 2 / _fastest(read, 5)
    if device == "cuda":
        flops = {}
        for kind, dtype in (("bf16", torch.bfloat16), ("f32", torch.float32)):
            left, right = (torch.randn(8192, 8192, device=device).to(dtype) for _ in range(2))

            def multiply(left: torch.Tensor = left, right: torch.Tensor = right) -> None:
                torch.matmul(left, right)
                finish()

            flops[kind] = 2 * 8192.0**3 / _fastest(multiply, 20)
        return Ceilings(bandwidth, reading, flops, "torch copy; torch sum; torch matmul 8192^3")
    if available_backends("vote")["native"] is not None:
        return Ceilings(bandwidth, reading, {}, "torch copy; torch sum; no native module to measure multiply-adds with")
    from el4ner import _native

    threads = torch.get_num_threads()
    flops = {kind: threads * _native.peak_flops(kind == "bf16", 20) for kind in ("f32", "bf16")}
    how = f"torch copy; torch sum; multiply-adds of one core in registers x {threads} threads"
    return Ceilings(bandwidth, reading, flops, how)
