"""How the native span_topk runs: instruction set and screening precision. What it computes is in span_topk.py.

`EL4NER_ISA` = "amx", "avx512", "avx2" or "portable" caps the instructions of all native kernels (for tests and
comparisons; by default the best that the CPU has). A name that nobody knows is an error of all of them, and here one
that this CPU lacks is too; csrc/instruction_set.hpp takes the widest set below it.
Threads: kernels/_threads.py.
"""

from __future__ import annotations

import os

from el4ner.errors import KernelError
from el4ner.kernels import _dispatch

ISAS = ("amx", "avx512", "avx2", "portable")
"""Best first. avx512 also stands for its BF16 and VNNI parts where bf16 or int8 screen; amx has no float32 products."""

PRECISIONS = ("fp32", "bf16", "int8")


def supported() -> list[tuple[str, str]]:
    """(precision, instruction set) pairs that this CPU can screen with, best first. Empty without el4ner._native."""
    if _dispatch._native_reason() is not None:
        return []
    from el4ner import _native

    return [(p, isa) for isa in ISAS for p in ("int8", "bf16", "fp32") if _native.span_topk_supports(p, isa)]


def choose_path(precision: str) -> tuple[str, str]:
    """The precision that screens and its instruction set. Raises KernelError if EL4NER_ISA asks for what is not there.

    "auto" is int8 where the CPU multiplies bytes faster than floats, else fp32. A precision asked for by name runs on
    any CPU, on the portable loops if need be.
    """
    asked = os.environ.get("EL4NER_ISA") or "auto"
    forced = "avx512" if asked == "avx512_bf16" else asked  # a name of choice_logprobs; here avx512 includes it
    pairs = supported()
    if forced != "auto":
        present = list(dict.fromkeys(isa for _, isa in pairs))
        if forced not in present:
            if ("bf16", "avx512") in pairs:
                present.insert(present.index("avx512"), "avx512_bf16")
            raise KernelError(f"EL4NER_ISA={asked}; this CPU allows: auto, {', '.join(present)}")
        pairs = [(p, isa) for p, isa in pairs if ISAS.index(isa) >= ISAS.index(forced)]
    if precision == "auto":
        precision = next((p for p, isa in pairs if p == "int8" and isa != "portable"), "fp32")
    isa = next(isa for p, isa in pairs if p == precision)
    return precision, isa
