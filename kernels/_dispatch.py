"""Which backend runs an operation, and why the others do not.

Backends: "ref" (plain, defines the result), "numba", "native" (C++, el4ner._native), "torch" (blocked matrix
products), "triton" (CUDA, or interpreted where TRITON_INTERPRET=1). On the CPU the order of preference is native,
torch, numba, ref; on CUDA triton, torch, ref. A backend that is asked for by name runs or raises; EL4NER_BACKEND=ref
makes "auto" mean the reference.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.resources
import importlib.util
import logging
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property, update_wrapper
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from el4ner.errors import KernelError, ShapeError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Array: TypeAlias = "NDArray[Any] | torch.Tensor"
"""What public calls take: numpy arrays or torch tensors on any device. What they return is always numpy."""

BACKENDS = ("native", "triton", "torch", "numba", "ref")
CPU_ORDER = ("native", "torch", "numba", "ref")
CUDA_ORDER = ("triton", "torch", "ref")
INSTRUCTION_SETS = ("amx", "avx512_bf16", "avx512", "avx2", "portable")
"""What EL4NER_ISA may say, best first; avx512_bf16 is for choice_logprobs."""

_OPERATIONS: dict[str, dict[str, Callable[..., Any]]] = {}
_F = TypeVar("_F", bound=Callable[..., Any])


class Later:
    """A function that is compiled when it is first used: importing numba or triton takes half a second and 60 MiB.

    compiled: what the compiler made of it.
    """

    def __init__(self, function: Callable[..., Any], compiler: Callable[[Callable[..., Any]], Any]) -> None:
        update_wrapper(self, function)
        self._function = function
        self._compiler = compiler

    @cached_property
    def compiled(self) -> Any:
        """Compiled now, or earlier."""
        return self._compiler(self._function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.compiled(*args, **kwargs)

    def __getitem__(self, grid: Any) -> Any:
        return self.compiled[grid]


def njit(function: _F) -> _F:
    """numba.njit with a cache on disk; the plain function where numba is missing (its backend is then refused)."""
    return cast(_F, Later(function, _by_numba))


def _by_numba(function: Callable[..., Any]) -> Any:
    try:
        import numba
    except ImportError:
        return function
    return numba.njit(cache=True, nogil=True)(function)


def triton_jit(function: _F) -> _F:
    """triton.jit of a kernel, which knows triton.language as `tl`. Compiles nothing before it is launched."""
    return cast(_F, Later(function, _by_triton))


def _by_triton(function: Callable[..., Any]) -> Any:
    import triton
    import triton.language

    function.__globals__["tl"] = triton.language
    return triton.jit(function)


def register(op: str, **implementations: Callable[..., Any]) -> None:
    """Declare the backends of an operation; all of them take the same arguments and return the same arrays."""
    unknown = sorted(set(implementations) - set(BACKENDS))
    if unknown or "ref" not in implementations:
        raise KernelError(f"{op}: backends {sorted(implementations)}; allowed: {', '.join(BACKENDS)}; ref is needed")
    _OPERATIONS[op] = dict(implementations)


def operations() -> tuple[str, ...]:
    """Names of all registered operations, sorted."""
    importlib.import_module("el4ner.kernels")
    return tuple(sorted(_OPERATIONS))


@cache
def _native_reason() -> str | None:
    try:
        module = importlib.import_module("el4ner._native")
    except ImportError as error:
        return f"el4ner._native is not built ({error}); install a C++ compiler and reinstall el4ner"
    # In a checkout the Python code moves on without it; a call that is gone or changed would fail much later.
    stub = importlib.resources.files("el4ner").joinpath("_native.pyi").read_bytes()
    if getattr(module, "interface", None) != hashlib.sha256(stub).hexdigest()[:16]:
        return "el4ner._native was built from other sources than these; reinstall el4ner (make setup)"
    return None


def interpreted() -> bool:
    """Whether triton kernels run in triton's interpreter (set before triton is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (it exists for Linux x86-64)"
    if interpreted():
        return None
    import torch

    return None if torch.cuda.is_available() else "no CUDA device (TRITON_INTERPRET=1 runs it slowly on the CPU)"


def _reason(op: str, backend: str, device: str) -> str | None:
    """Why a backend cannot run an operation on a device type ("cpu", "cuda"), None if it can."""
    if backend not in _OPERATIONS[op]:
        return f"{op} has no {backend} implementation"
    if backend == "native":
        return _native_reason() or ("data is on CUDA" if device == "cuda" else None)
    if backend == "triton":
        return _triton_reason()
    if backend in ("numba", "torch") and importlib.util.find_spec(backend) is None:
        return f"{backend} is not installed"
    return None


def available_backends(op: str) -> dict[str, str | None]:
    """backend -> None if it can run `op` on this machine, else the reason why not. Raises KernelError on unknown op."""
    if op not in operations():
        raise KernelError(f"operation {op!r}; allowed: {', '.join(operations())}")
    return {backend: _reason(op, backend, "cpu") for backend in BACKENDS}


@cache
def _log_choice(op: str, backend: str, device: str) -> None:
    logger.info("%s runs on backend %s (%s)", op, backend, device)


def choose(op: str, backend: str = "auto", device: str = "cpu") -> Callable[..., Any]:
    """The implementation of `op` to run. Raises KernelError if the backend asked for cannot run, with the reason."""
    implementations: Mapping[str, Callable[..., Any]] = _OPERATIONS[op]
    if backend == "auto":
        forced = os.environ.get("EL4NER_BACKEND", "auto") or "auto"
        if forced not in ("auto", "ref"):
            raise KernelError(f"EL4NER_BACKEND={forced}; allowed: auto, ref; or pass backend= to the call")
        order: Sequence[str] = ("ref",) if forced == "ref" else CUDA_ORDER if device == "cuda" else CPU_ORDER
        backend = next(name for name in order if _reason(op, name, device) is None)
    elif backend not in BACKENDS:
        raise KernelError(f"{op}: backend={backend!r}; allowed: auto, {', '.join(BACKENDS)}")
    elif (reason := _reason(op, backend, device)) is not None:
        raise KernelError(f"{op}: backend={backend!r} cannot run: {reason}; use backend='auto'")
    if backend == "native" and (asked := os.environ.get("EL4NER_ISA") or "auto") not in ("auto", *INSTRUCTION_SETS):
        raise KernelError(f"EL4NER_ISA={asked}; allowed: auto, {', '.join(INSTRUCTION_SETS)}")
    _log_choice(op, backend, device)
    return implementations[backend]


def check_environment() -> None:
    """Raises KernelError where EL4NER_BACKEND, EL4NER_ISA or EL4NER_THREADS hold what a kernel would refuse later."""
    choose("vote")
    importlib.import_module("el4ner.kernels._threads").thread_count()
    if _native_reason() is None:
        importlib.import_module("el4ner.kernels._span_native").choose_path("auto")


def device_of(*arrays: Any) -> str:
    """ "cuda" if any array is a tensor on a GPU, else "cpu"."""
    return "cuda" if any(getattr(array, "is_cuda", False) for array in arrays) else "cpu"


def to_numpy(name: str, array: Any, ndim: int, dtype: Any) -> NDArray[Any]:
    """A contiguous numpy array of `dtype`, copied only where needed; tensors come to the host.

    Raises ShapeError if the number of axes differs, or numbers would be lost (floats for an integer array).
    """
    if hasattr(array, "detach"):
        array = array.detach().cpu().resolve_conj().resolve_neg()
        array = (array.float() if array.is_floating_point() else array).numpy()
    array = np.asarray(array)
    if array.ndim != ndim:
        raise ShapeError(f"{name} has shape {array.shape}; {ndim} axes are needed")
    kind = np.dtype(dtype).kind
    if array.size and (array.dtype.kind not in "iufb" or (kind == "i" and array.dtype.kind not in "iu")):
        raise ShapeError(f"{name} has dtype {array.dtype}; {np.dtype(dtype)} is needed")
    if kind == "i" and array.dtype.kind == "u" and array.size and array.max() > np.iinfo(dtype).max:
        raise ShapeError(f"{name} holds {array.max()}; {np.dtype(dtype)} is needed")  # it would come out negative
    with np.errstate(over="ignore"):  # what no float32 can hold becomes infinite, and is then refused as such
        return np.ascontiguousarray(array, dtype=dtype)


def to_index(name: str, value: Any) -> int:
    """A whole number as Python's int: numpy's and torch's come too. Raises ShapeError on anything else."""
    try:
        return operator.index(value)
    except TypeError:
        raise ShapeError(f"{name}={value!r}; a whole number is needed") from None


def check_finite(name: str, array: NDArray[Any]) -> None:
    """Raise ShapeError (a ValueError) on NaN or infinity, saying where the first one is."""
    if not np.isfinite(array).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ShapeError(f"{name} holds {array[where]} at {where}; only finite numbers are allowed")


def check_offsets(name: str, offsets: NDArray[Any], total: int) -> None:
    """Raise ShapeError unless offsets are 0 = o[0] <= o[1] <= ... <= o[-1] = total."""
    falls = (offsets[1:] < offsets[:-1]).any()  # a difference could overflow
    if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != total or falls:
        ends = f"{offsets[0]}..{offsets[-1]}" if len(offsets) else "nothing"
        raise ShapeError(f"{name} is {ends} over {total} rows; it must start at 0, never fall and end at {total}")


def check_weights(name: str, weights: NDArray[Any], least: float, most: float) -> None:
    """Raise ShapeError unless all weights are 0 or from least to most, whose sums and products fit float64."""
    check_finite(name, weights)
    if (weights < 0).any():
        raise ShapeError(f"{name} holds {weights.min()}; weights must not be negative")
    wrong = weights[(weights > most) | ((weights > 0) & (weights < least))]
    if wrong.size:
        raise ShapeError(f"{name} holds {wrong[0]}; allowed: 0, and {least} to {most}")
