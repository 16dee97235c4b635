"""What tests/test_triton.py runs without the interpreter: compile every kernel ahead of time, no GPU needed.

Prints a JSON list: name, capability, registers, bytes of spills, shared memory, counts of instructions.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

# Triton 3.9 announces a new default for fused multiply-adds; either is within the kernels' tolerances.
warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")

TYPES = {"i32": "*i32", "i64": "*i64", "f32": "*fp32", "f64": "*fp64"}


def launches(capability: int) -> Iterator[tuple[str, Any, str, dict[str, Any], dict[str, int]]]:
    """name, kernel, types of its arguments in order, constants, options: as the public functions launch it."""
    vote, spans, logprobs, topk = (
        importlib.import_module(f"el4ner.kernels.{name}")
        for name in ("vote", "span_scores", "choice_logprobs", "span_topk_triton")
    )
    for hard in (False, True):
        constants = {"HARD": hard, "BLOCK_S": vote._BLOCK_SPANS, "BLOCK_L": 16}
        types = "*f32 *f64 *i64 *f32 *f32 i32 i32 i32"
        yield f"vote {'hard' if hard else 'soft'}", vote._vote_kernel, types, constants, {"num_warps": 4}
    constants = {"BLOCK_T": spans._BLOCK_TOKENS, "BLOCK_L": 16}
    yield "span_scores", spans._span_scores_kernel, "*f32 *f32 *f32 i32 i32 i32", constants, {"num_warps": 4}
    size = topk.TILINGS[capability // 10]
    tiles = [f"tensordesc<{kind}>" for kind in (f"bf16[{size.m},{size.k}]", f"bf16[{size.n},{size.k}]")]
    types = f"{tiles[0]} {tiles[1]} tensordesc<fp32[16,{size.m}]> *i32 *i32 *i32 *i64 *i64 *f32 *i32 *i64 *f32 i32 i32"
    constants = {"BLOCK_M": size.m, "BLOCK_N": size.n, "BLOCK_K": size.k, "BLOCK_Q": size.q}
    yield "screen", topk._screen_kernel, types, constants, {"num_warps": size.warps, "num_stages": size.stages}
    types = "*f32 *i64 *f64 *f32 *i64 *i64 *i64 *f32 i32"
    yield "rescore", topk._rescore_kernel, types, {"BLOCK_D": 128}, {"num_warps": 4}
    rows, columns, depth = logprobs._ROWS, logprobs._COLUMNS, logprobs._DEPTH
    for kind in ("bf16", "fp16"):
        for extra in (False, True):
            types = f"tensordesc<{kind}[{rows},{depth}]> tensordesc<{kind}[{columns},{depth}]>"
            types += " *f32 *f32 *f32 i32 i32 i32 i32 fp32 fp32"
            constants = {"HAS_BIAS": extra, "HAS_CAP": extra, "BLOCK_R": rows, "BLOCK_V": columns, "BLOCK_H": depth}
            name = f"log-sum-exp {kind}{' with bias and cap' if extra else ''}"
            options = {"num_warps": logprobs._WARPS, "num_stages": logprobs._STAGES}
            yield name, logprobs._partial_kernel, types, constants, options


def compile_for(capability: int) -> Iterator[dict[str, Any]]:
    """Rows of everything that is launched."""
    for name, later, types, constants, options in launches(capability):
        kernel = later.compiled
        arguments = [argument for argument in kernel.arg_names if argument not in constants]
        kinds = [TYPES.get(kind[1:], kind) if kind[0] == "*" else kind for kind in types.split()]
        signature = dict(zip(arguments, kinds, strict=True)) | dict.fromkeys(constants, "constexpr")
        places = {argument: place for place, argument in enumerate(kernel.arg_names)}
        # What torch allocates begins at multiples of 16 bytes; widths and capacities are multiples of 16 as a rule.
        divisible = {a for a, kind in signature.items() if kind[0] == "*" or a in ("width", "capacity")}
        source = ASTSource(
            kernel,
            {argument: signature[argument] for argument in kernel.arg_names},
            {(places[argument],): value for argument, value in constants.items()},
            {(places[argument],): [["tt.divisibility", 16]] for argument in divisible},
        )
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        ptx = built.asm["ptx"]
        yield (
            {"name": name, "capability": capability, "shared": built.metadata.shared}
            | usage(ptx, capability)
            | {
                "wgmma": ptx.count("wgmma.mma_async"),
                "tma": ptx.count("cp.async.bulk.tensor"),
                "mma": ptx.count("mma.sync"),
            }
        )


def usage(ptx: str, capability: int) -> dict[str, int]:
    """Registers and spilled bytes, from the assembler that triton brings."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target, "no target in the PTX"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={target[1]}", str(source), "-o", f"{folder}/kernel"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    assert registers, done.stderr
    assert spills, done.stderr
    return {"registers": int(registers[1]), "spills": sum(map(int, spills))}


if __name__ == "__main__":
    print(json.dumps([row for capability in (90, 80) for row in compile_for(capability)]))
    sys.exit(0)
