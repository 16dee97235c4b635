"""A causal language model and its tokenizer, loaded once for everyone who names the same source."""

from __future__ import annotations

import gc
import os
import platform
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from el4ner.conversion import quiet_transformers
from el4ner.engines.adapters import Adapter, adapt, find_adapter, first_line
from el4ner.engines.attention import install
from el4ner.engines.quantization import quantization_config
from el4ner.engines.residency import Residency
from el4ner.engines.sizes import size_of
from el4ner.errors import EngineError, ModelNotFoundError
from el4ner.hub import loading_options
from el4ner.models import ResolvedModel, local_folder, resolve

# oneDNN keeps code and memory for 1,024 shapes of products otherwise, and passes of all lengths meet as many: 60 texts
# of WNUT17, all voters, bfloat16 peaked at 2,011 MiB, with 64 at 1,823, as fast (EPYC Zen 4, torch 2.13, 2026-11).
# Read at the first product in bfloat16.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

T = TypeVar("T")
P = ParamSpec("P")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LoadedModel:
    """One set of weights. `shared` holds what its users share beside it, such as the prefix cache; `adapted` are the
    models that an adapter makes of it.

    model: the weights, loaded again where they had to leave memory. load: how to load them, None where they cannot
    leave. n_bytes: their size. residency: who takes turns with it.
    """

    def __init__(
        self, model: Any, tokenizer: Any, source: str, device: torch.device, dtype: torch.dtype, *,
        load: Callable[[], Any] | None = None, n_bytes: int = 0, residency: Residency | None = None,
    ) -> None:  # fmt: skip
        self.tokenizer = tokenizer
        self.source = source
        self.device = device
        self.dtype = dtype
        self.n_bytes = n_bytes
        self.shared: dict[str, Any] = {}
        self.adapted: weakref.WeakSet[AdaptedModel] = weakref.WeakSet()
        self._model = model
        self._load = load
        self._residency = residency

    @property
    def model(self) -> Any:
        """The transformers model. Raises EngineError if it had to leave and cannot be loaded again."""
        if self._model is None:
            assert self._load is not None  # only what can be loaded again leaves
            if self._residency is not None:
                self._residency.admit(self)
            self._model = self._load()
        elif self._residency is not None:
            self._residency.use(self)
        return self._model

    def release(self) -> None:
        """Leave memory, with everything that was computed by the weights; `model` brings them back."""
        if self._load is None:
            return
        for model in (self, *self.adapted):
            model.forget()
        gc.collect()  # modules refer to each other in circles
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def forget(self) -> None:
        """Let go of the model and of what it computed."""
        self._model = None
        self.shared.pop("repeated", None)
        if "prefixes" in self.shared:
            self.shared["prefixes"].clear()


class AdaptedModel(LoadedModel):
    """Another model's weights with an adapter. The weights are the other's: they leave and come back with it."""

    def __init__(self, base: LoadedModel, adapter: Adapter) -> None:
        super().__init__(None, base.tokenizer, f"{base.source}+{adapter.source}", base.device, base.dtype)
        self._base = base
        self._adapter = adapter
        base.adapted.add(self)

    @property
    def model(self) -> Any:
        """The transformers model with the adapter. Raises EngineError if either cannot be loaded."""
        weights = self._base.model  # back in memory if need be; that may have made this one forget
        if self._model is None:
            with quiet_transformers():
                self._model = adapt(weights, self._adapter)
        return self._model


_loaded: weakref.WeakValueDictionary[tuple[str, ...], LoadedModel] = weakref.WeakValueDictionary()
_lock = threading.RLock()


def one_at_a_time(method: Callable[P, T]) -> Callable[P, T]:
    """For what loads or runs models: threads wait for each other, in one process.

    Engines of one source share its weights, the hooks that catch its states and its cache of prefixes, and models
    that take turns send each other out of memory.
    """

    @wraps(method)
    def alone(*args: P.args, **kwargs: P.kwargs) -> T:
        with _lock:
            return method(*args, **kwargs)

    return alone


def choose_device(device: str) -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU. Raises EngineError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise EngineError(f"device={device!r} is unknown; choose auto, cpu, cuda, cuda:N or mps") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise EngineError(f"device={device!r}: {torch.cuda.device_count()} CUDA devices found; choose another, or cpu")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise EngineError("device='mps' is not available here; choose cpu")
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 where the hardware is faster in it (CUDA, AMX, AVX512-BF16 but for Intel's), else float32.

    Without AMX an Intel Xeon that has AVX512-BF16 multiplies bfloat16 no faster than float32, and torch's products run
    at 0.6 of the speed there: reading took 1.45 times as long, scoring choices 1.6 times (embedded model, one thread).
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" or _cpu_likes_bfloat16(device) else torch.float32
    if dtype not in _DTYPES:
        raise EngineError(f"dtype={dtype!r} is unknown; choose auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _cpu_likes_bfloat16(device: torch.device) -> bool:
    # private names, so absence means "no": float32 is always right, only slower
    def has(name: str) -> bool:
        check = getattr(torch.cpu, name, None)
        return check is not None and bool(check())

    if device.type != "cpu":
        return False
    return has("_is_amx_tile_supported") or (has("_is_avx512_bf16_supported") and not _is_intel())


def _is_intel() -> bool:
    """Whether the processor is Intel's, where the system tells (Linux, Windows)."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        told = platform.processor()
    return "GenuineIntel" in told


def numbers_of(source: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of what a model computes: numbers depend on the processor and the precision, and they are cached.

    `base.without_numbers` is the inverse.
    """
    return f"{source} ({device.type}, {str(dtype).rpartition('.')[2]})"


@one_at_a_time
def load_model(
    source: str, device: str = "auto", dtype: str = "auto", *, quantization: str = "none",
    residency: Residency | None = None, adapter: str | None = None,
) -> LoadedModel:  # fmt: skip
    """Load a causal LM, or hand out the one already in memory for this source, device, dtype and quantisation.

    residency: models that share memory with it; one already in memory keeps its own. adapter: the folder of a PEFT
    adapter; models that differ by it share their weights. Raises ModelNotFoundError if there is no such model,
    EngineError if model or adapter cannot be loaded.
    """
    resolved = resolve(source)
    if resolved.kind == "server":
        raise EngineError(f"model {source!r} is a server; its weights cannot be loaded here")
    torch_device = choose_device(device)
    torch_dtype = choose_dtype(dtype, torch_device)
    key = (resolved.location, resolved.identity or "", str(torch_device), str(torch_dtype), quantization)
    loaded = _loaded.get(key)
    if loaded is None:
        loaded = _load(resolved, torch_device, torch_dtype, quantization, residency)
        _loaded[key] = loaded
    if adapter is None:
        return loaded
    found = find_adapter(adapter)
    adapted = _loaded.get((*key, found.source))
    if adapted is None:
        adapted = AdaptedModel(loaded, found)
        _ = adapted.model  # an adapter that does not fit is an error now
        _loaded[(*key, found.source)] = adapted
    return adapted


def _load(
    resolved: ResolvedModel, device: torch.device, dtype: torch.dtype, quantization: str, residency: Residency | None
) -> LoadedModel:
    import transformers

    folder = local_folder(resolved)
    options = loading_options(resolved)
    quantized = quantization_config(quantization, dtype)
    with load_errors(resolved), quiet_transformers():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    if not getattr(tokenizer, "is_fast", False):
        raise EngineError(f"model {resolved.name!r} has no fast tokenizer; el4ner needs one for character offsets")

    def load() -> Any:
        with load_errors(resolved), quiet_transformers():
            return _weights(resolved.name, folder, device, dtype, quantized, options)

    n_bytes = 0
    if residency is not None and residency.limit_bytes is not None:
        n_bytes = size_of(resolved).weight_bytes(dtype, quantization)
    loaded = LoadedModel(None, tokenizer, "", device, dtype, load=load, n_bytes=n_bytes, residency=residency)
    revision = resolved.identity or getattr(loaded.model.config, "_commit_hash", None)
    loaded.source = f"{resolved.name}@{revision[:16]}" if revision else resolved.name
    if quantization != "none":
        loaded.source += f" in {quantization}"
    return loaded


def _weights(
    name: str, folder: str, device: torch.device, dtype: torch.dtype, quantized: Any, options: dict[str, Any]
) -> Any:
    import transformers

    if quantized is not None:  # such weights cannot be moved once they are there
        options = options | {"quantization_config": quantized, "device_map": {"": str(device)}}
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
    )
    model, told = loaded
    check_complete(name, "a causal language model", told)
    if quantized is None:
        model = model.to(device)
    model = model.eval()
    model.requires_grad_(False)
    if device.type == "cpu":
        install(model)
    return model


def check_complete(name: str, role: str, told: Mapping[str, Any], unused: str = "") -> None:
    """Raises EngineError where files lack weights, which transformers would make up at random.

    role: what the model is loaded as. told: transformers' loading information. unused: weights whose names begin with
    this are not needed.
    """
    missing = sorted(key for key in told["missing_keys"] if not unused or not key.startswith(unused))
    if missing:
        some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        needs = f"which {role} needs; name another, or get whole files"
        raise EngineError(f"model {name!r}: its files lack {some}, {needs}")


@contextmanager
def load_errors(resolved: ResolvedModel) -> Iterator[None]:
    """Turns what loading can raise into one-line EngineErrors that name the model."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        name, reason = resolved.name, first_line(error)
        if is_out_of_memory(error):
            raise EngineError(f"model {name!r}: out of memory while loading; use a smaller model or dtype") from error
        if resolved.kind == "hub" and isinstance(error, OSError):
            raise ModelNotFoundError(
                f"model {name!r}: not in the local cache and not fetched from the hub ({reason}); "
                "check the name, the network, HF_HUB_OFFLINE and HF_TOKEN"
            ) from error
        raise EngineError(f"model {name!r} cannot be loaded: {reason}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the GPU or on the host."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(error)


_LEAST_TOKENS = 32


def halving(attempt: Callable[[int], T], size: int, free: Callable[[], None]) -> tuple[T, int]:
    """attempt(size), with half the size as long as memory runs out; the result, and the size that was small enough.

    free: gives memory back before the next attempt. Raises what `attempt` raises last, below 32 tokens also for
    want of memory.
    """
    while True:
        try:
            return attempt(size), size
        except Exception as error:
            if not is_out_of_memory(error) or size // 2 < _LEAST_TOKENS:
                raise
        free()  # outside the handler, whose traceback holds the tensors of the failed attempt
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        size //= 2


@contextmanager
def run_errors(name: str) -> Iterator[None]:
    """Turns a lack of memory while a model runs into a one-line EngineError; everything else passes."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise EngineError(
                f"engine {name!r}: out of memory while running; lower --batch-size, or use a smaller model"
            ) from error
        raise
