"""What is cached under a model's name was computed by that model, on that kind of device, in that precision."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from el4ner.models import folder_digest, resolve


def _folder(path: Path, weights: bytes) -> Path:
    (path / "1_Pooling").mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "bert"}')
    (path / "1_Pooling" / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(weights)
    return path


@pytest.mark.parametrize("size", [100, 20 << 20])
def test_folders_are_told_apart_by_their_content(size: int, tmp_path: Path) -> None:
    weights = bytearray(size)
    one = _folder(tmp_path / "one", bytes(weights))
    copy = _folder(tmp_path / "elsewhere" / "copy", bytes(weights))
    assert folder_digest(one) == folder_digest(copy)
    weights[-1] = 1  # also at the very end of a large file
    assert folder_digest(_folder(tmp_path / "trained", bytes(weights))) != folder_digest(one)
    (copy / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert folder_digest(copy) != folder_digest(one)


def test_the_same_relative_name_is_another_model_in_another_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _folder(tmp_path / "a" / "enc", b"one")
    _folder(tmp_path / "b" / "enc", b"two")
    sources = []
    for name in ("a", "b"):
        monkeypatch.chdir(tmp_path / name)
        sources.append(resolve(f".{os.sep}enc").source)
    assert sources[0] != sources[1]


@pytest.mark.embedded
def test_precision_is_part_of_what_numbers_are_cached_under() -> None:
    from el4ner.engines import load_encoder, load_engine

    for load, name in ((load_encoder, "embedded:minilm"), (load_engine, "embedded:smollm2")):
        sources = {load(name, device="cpu", dtype=dtype).source for dtype in ("float32", "bfloat16")}
        assert len(sources) == 2
        assert all("cpu" in source for source in sources)


def test_the_embedded_model_is_asked_without_its_template_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from el4ner import preparation
    from el4ner.config import make_config

    asked: list[tuple[str, bool]] = []

    def load(source: str, *, chat: bool, **_: object) -> object:
        asked.append((source, chat))
        return object()

    monkeypatch.setattr(preparation, "load_engine", load)
    loader = preparation.Preparation(make_config({}))
    engines = [loader.engine("embedded:smollm2"), loader.engine("embedded:smollm2", True), loader.engine("owner/name")]
    assert loader.engine("embedded:smollm2", False) is engines[0]
    assert asked == [("embedded:smollm2", False), ("embedded:smollm2", True), ("owner/name", True)]
