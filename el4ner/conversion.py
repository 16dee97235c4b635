"""A GGUF file converted once to what transformers loads fast, kept in the user's cache.

Dequantising a file and rebuilding its tokenizer takes about 11 s for SmolLM2-135M; loading the copy takes 2 s. A copy
belongs to the SHA-256 sum of its GGUF file and to the major version of transformers that made it. Its own checksums
lie beside it; a copy that does not match them is built again.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import io
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from el4ner.cache import cache_root
from el4ner.errors import EngineError

_MANIFEST = "el4ner-checksums.json"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex. A file of the same size and time of change is not read again."""
    state = path.stat()
    return _sha256_of(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _sha256_of(path: Path, _size: int, _changed: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no log lines below errors from transformers and the hub's client inside the block.

    As before after it. The client says of every request that it tries again; the error that follows says it once.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_level = hub_logging.get_verbosity()
    hub_bars_off = are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            logging.set_verbosity_error()
            hub_logging.set_verbosity_error()
            logging.disable_progress_bar()
            disable_progress_bars()
            yield
        finally:
            logging.set_verbosity(level)
            hub_logging.set_verbosity(hub_level)
            if bars:
                logging.enable_progress_bar()
            if not hub_bars_off:
                enable_progress_bars()
            else:
                disable_progress_bars()


def _major() -> str:
    # asked of the metadata, because importing transformers takes seconds
    return importlib.metadata.version("transformers").partition(".")[0]


def copy_folder(sha256: str) -> Path:
    """Where the converted copy of the GGUF file with that checksum lies, or would lie."""
    return cache_root() / "converted" / f"{sha256[:32]}-transformers{_major()}"


def is_intact(folder: Path) -> bool:
    """Whether every file of a converted copy is there with the size and SHA-256 sum it was written with."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        entries = [(folder / name, int(entry["size"]), str(entry["sha256"])) for name, entry in manifest.items()]
        return bool(entries) and all(
            # size first: it finds a cut file without reading it
            path.stat().st_size == size and sha256_of(path) == digest
            for path, size, digest in entries
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def converted_copy(gguf: Path, sha256: str) -> Path:
    """The folder with the converted copy of `gguf`, made now if it is missing or damaged.

    Several processes may do this at once: each writes its own folder and the first rename wins.
    Raises EngineError if transformers cannot read the file, or the cache cannot be written.
    """
    folder = copy_folder(sha256)
    if is_intact(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
        try:
            _convert(gguf, temporary)
            _write_manifest(temporary)
            _move_into_place(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise EngineError(
            f"{gguf.name} needs a converted copy in the cache, but {folder.parent} cannot be written "
            f"({error.strerror or error}); set EL4NER_CACHE to a writable folder"
        ) from error
    return folder


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        # the dequantiser's bar listens to no setting, so what it writes is caught
        with quiet_transformers(), redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
            model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    except Exception as error:  # transformers and gguf raise all kinds for a file they cannot read
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise EngineError(
            f"{gguf}: transformers cannot read this GGUF file ({reason}); use the original weights instead"
        ) from error
    # model.save_pretrained refuses a dequantised GGUF model (transformers 5.23), hence by hand
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    try:
        save_file(weights, str(target / "model.safetensors"), metadata={"format": "pt"})
    except SafetensorError as error:  # how it reports a full disk
        raise OSError(str(error)) from error
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config["architectures"] = [type(model).__name__]
    (target / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True), encoding="utf-8")
    tokenizer.save_pretrained(str(target))


def _write_manifest(folder: Path) -> None:
    manifest = {
        path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _move_into_place(temporary: Path, folder: Path) -> None:
    temporary.chmod(0o755)  # mkdtemp makes it private; a cache may be shared by a group
    for _ in range(3):
        try:
            temporary.rename(folder)
            return
        except OSError:
            if is_intact(folder):  # another process was faster
                return
            if folder.exists():  # what is there is damaged
                aside = Path(tempfile.mkdtemp(prefix=".damaged-", dir=folder.parent))
                folder.rename(aside / "copy")
                shutil.rmtree(aside, ignore_errors=True)
    raise EngineError(f"{folder}: cannot be written; remove it, or set EL4NER_CACHE to a writable folder")
