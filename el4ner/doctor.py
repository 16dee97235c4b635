"""What is installed, which devices and kernel backends work, and why the others do not.

Nothing here is guessed: a backend "works" if it ran a small input just now and its answer equals the reference's.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from el4ner.kernels._cases import Case

PACKAGES = (
    "el4ner",
    "torch",
    "transformers",
    "triton",
    "numba",
    "numpy",
    "faiss-cpu",
    "faiss-gpu-cu12",
    "llguidance",
    "sentence-transformers",
    "gguf",
    "textblob",
    "datasets",
    "seqeval",
)

# The instruction sets that kernels and torch choose their code by.
_FLAGS = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx_vnni"),
    *("amx_bf16", "amx_int8", "asimd", "asimddp", "i8mm", "bf16", "sve"),
)


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """A CUDA device as torch sees it."""

    name: str
    memory_bytes: int
    capability: str


@dataclass(frozen=True, slots=True)
class BackendState:
    """Whether a backend of an operation works here; `reason` says why not, and is None if it does."""

    op: str
    backend: str
    works: bool
    reason: str | None


@dataclass(frozen=True, slots=True)
class ModelState:
    """An embedded model: where it is and in what state; the models module words the status."""

    name: str
    path: str | None
    status: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything `el4ner doctor` reports. A version of None means: not installed."""

    python: str
    system: str
    versions: dict[str, str | None]
    cpu: str
    cores: int
    instruction_sets: tuple[str, ...]
    cuda: tuple[CudaDevice, ...]
    cuda_reason: str | None
    backends: tuple[BackendState, ...]
    models: tuple[ModelState, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> tuple[str, tuple[str, ...]]:
    """The CPU's name and the instruction sets of _FLAGS it has, where the system tells (Linux)."""
    name, flags = platform.processor() or platform.machine(), set()
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            name = found[1].strip()
        if found := re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE):
            flags = set(found[1].split())
    return name, tuple(flag for flag in _FLAGS if flag in flags)


def usable_cores() -> int:
    """CPU cores this process may use; fewer than the machine has inside a container or under taskset."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cuda() -> tuple[tuple[CudaDevice, ...], str | None]:
    """CUDA devices, or the reason why there are none."""
    try:
        import torch
    except ImportError as error:
        return (), f"torch cannot be imported: {error}"
    if torch.version.cuda is None and torch.version.hip is None:
        return (), f"torch {torch.__version__} is a build without CUDA"
    if not torch.cuda.is_available():
        return (), "torch sees no CUDA device (driver missing, or hidden by CUDA_VISIBLE_DEVICES)"
    devices = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        devices.append(CudaDevice(facts.name, int(facts.total_memory), f"{facts.major}.{facts.minor}"))
    return tuple(devices), None


def _trial(case: Case, backend: str) -> str | None:
    """Why a backend does not work; a broken installation can fail in any way, and every way is a finding."""
    from el4ner.kernels._cases import check

    try:
        return check(case, backend)
    except Exception as error:  # noqa: BLE001  the reason is what the reader came for; nothing is hidden
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _backends() -> tuple[BackendState, ...]:
    """Each backend of each operation, run on a small input and compared with the reference."""
    from el4ner.kernels import _cases, available_backends, operations

    states = []
    for op in operations():
        case = _cases.CASES[op](np.random.default_rng(0))
        for backend, reason in available_backends(op).items():
            if reason is not None and reason.startswith(f"{op} has no "):
                continue  # never written, so nothing is missing on this machine
            why = reason or _trial(case, backend)
            states.append(BackendState(op, backend, why is None, why))
    return tuple(states)


def _models() -> tuple[ModelState, ...]:
    """The embedded models."""
    from el4ner.models import installed

    return tuple(
        ModelState(model.name, None if model.path is None else str(model.path), model.status) for model in installed()
    )


def diagnose_hardware() -> dict[str, Any]:
    """CPU, cores, instruction sets and CUDA devices as plain types, for the rows of a measurement."""
    cpu, instruction_sets = _cpu()
    cuda = [asdict(device) for device in _cuda()[0]]
    # the kernel's release may name the host or its operator, and these facts are published
    system = " ".join((platform.system(), platform.machine(), *platform.libc_ver())).strip()
    return {"cpu": cpu, "cores": usable_cores(), "instruction_sets": instruction_sets, "cuda": cuda, "system": system}


def diagnose() -> Diagnosis:
    """Look at this machine. Takes seconds: kernels are run, and model files are read to check their sums."""
    cpu, instruction_sets = _cpu()
    cuda, cuda_reason = _cuda()
    models = _models()
    return Diagnosis(
        python=sys.version.split()[0],
        system=platform.platform(),
        versions={package: _version(package) for package in PACKAGES},
        cpu=cpu,
        cores=usable_cores(),
        instruction_sets=instruction_sets,
        cuda=cuda,
        cuda_reason=cuda_reason,
        backends=_backends(),
        models=models,
    )


def render(diagnosis: Diagnosis) -> str:
    """A diagnosis for reading: four sections, one fact a line, reasons after what does not work."""
    lines = ["versions", f"  {'python':<24}{diagnosis.python} on {diagnosis.system}"]
    lines += [f"  {package:<24}{version or 'not installed'}" for package, version in diagnosis.versions.items()]
    lines += ["", "devices", f"  {'cpu':<24}{diagnosis.cpu}, {diagnosis.cores} usable cores"]
    lines.append(f"  {'instruction sets':<24}{' '.join(diagnosis.instruction_sets) or 'unknown'}")
    if diagnosis.cuda_reason:
        lines.append(f"  {'cuda':<24}none: {diagnosis.cuda_reason}")
    for device in diagnosis.cuda:
        size = f"{device.memory_bytes / 2**30:.1f} GiB, compute capability {device.capability}"
        lines.append(f"  {'cuda':<24}{device.name}, {size}")
    lines += ["", "kernels"]
    for state in diagnosis.backends:
        lines.append(f"  {state.op:<24}{state.backend:<8}{'works' if state.works else f'no: {state.reason}'}")
    lines += ["", "models"]
    for model in diagnosis.models:
        lines.append(f"  {model.name:<24}{model.status}{f' ({model.path})' if model.path else ''}")
    if any(model.status in ("missing", "damaged") for model in diagnosis.models):
        lines.append("  `el4ner download embedded` installs what is missing or damaged")
    return "\n".join(lines)
