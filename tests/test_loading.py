"""Models whose files are not whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from el4ner.bench.random_models import shape_config  # noqa: E402
from el4ner.engines import load_encoder, load_engine  # noqa: E402
from el4ner.errors import EngineError  # noqa: E402
from el4ner.models import local_folder, resolve  # noqa: E402

pytestmark = pytest.mark.usefixtures("embedded")


def without(folder: Path, part: str) -> None:
    """Takes the weights with this in their names out of a folder's file."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    kept = {name: tensor for name, tensor in weights.items() if part not in name}
    assert len(kept) < len(weights)
    save_file(kept, path, {"format": "pt"})


def test_a_language_model_without_some_weights_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(1)
    transformers.AutoModelForCausalLM.from_config(shape_config("random:tiny")).save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(local_folder(resolve("embedded:smollm2")))
    tokenizer.save_pretrained(tmp_path)
    engine = load_engine(str(tmp_path), device="cpu", dtype="float32")
    assert engine.n_layers == 2
    del engine
    without(tmp_path, "layers.1.mlp")
    with pytest.raises(EngineError, match=r"files lack model\.layers\.1\.mlp\.\S+, \S+, \S+, which a causal language"):
        load_engine(str(tmp_path), device="cpu", dtype="float32")


def test_an_encoder_is_no_language_model() -> None:
    with pytest.raises(EngineError, match=r"'embedded:minilm': its files lack cls\..* and 3 more, which a causal"):
        load_engine("embedded:minilm", device="cpu", dtype="float32")


def test_an_encoder_without_some_weights_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    shutil.copytree(local_folder(resolve("embedded:minilm")), folder)
    without(folder, "pooler")  # never read
    assert load_encoder(str(folder), device="cpu", dtype="float32").encode(["Oslo"]).shape == (1, 384)
    without(folder, "encoder.layer.3.output")
    with pytest.raises(EngineError, match=r"files lack encoder\.layer\.3\.output\S+, .* which an encoder needs"):
        load_encoder(str(folder), device="cpu", dtype="float32")


@pytest.mark.parametrize(("given", "kept"), [({}, "64"), ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7"}, "7")])
def test_shapes_that_onednn_keeps_are_few_unless_somebody_says_otherwise(given: dict[str, str], kept: str) -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith("ONEDNN_")} | given
    code = "import os, el4ner.engines.loading; print(os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'])"
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == kept
