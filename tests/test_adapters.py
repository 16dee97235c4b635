"""Members of one model that differ by a PEFT adapter hold its weights once, and answer as merged models would."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft", reason="peft is not installed; pip install 'el4ner[adapters]'")

from el4ner.bench.random_models import shape_config  # noqa: E402
from el4ner.config import load_config, make_config  # noqa: E402
from el4ner.engines import Choose, Generate, SubstringList, load_engine  # noqa: E402
from el4ner.engines import adapters as adapters_module  # noqa: E402
from el4ner.engines.residency import Residency  # noqa: E402
from el4ner.errors import ConfigError, EngineError  # noqa: E402
from el4ner.models import local_folder, resolve  # noqa: E402
from el4ner.plan import make_plan, render_plan  # noqa: E402
from el4ner.preparation import Preparation  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("embedded"),  # its tokenizer is used
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft reads it
]

TEXT = "Ann met Bob in Bern.\n"
CHOICES = (" person", " place", " none of these")
QUESTIONS = [Choose(("Name.\n", TEXT, f"{who} is a"), CHOICES) for who in ("Ann", "Bob")]
LISTS = [Generate(("Name.\n", TEXT, "Names:"), SubstringList(TEXT.strip(), ";", "none", 4), 12)]


class Folders:
    """A random two-layer model, two random adapters over it, and each of them merged into a model of its own."""

    def __init__(self, folder: Path) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(local_folder(resolve("embedded:smollm2")))
        self.base = str(folder / "base")
        torch.manual_seed(1)
        transformers.AutoModelForCausalLM.from_config(shape_config("random:tiny")).save_pretrained(self.base)
        tokenizer.save_pretrained(self.base)
        self.adapters = [self.adapter(folder / f"adapter{seed}", seed) for seed in (1, 2)]
        self.merged = []
        for number, own in enumerate(self.adapters):
            model = transformers.AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
            merged = peft.PeftModel.from_pretrained(model, own).merge_and_unload()
            self.merged.append(str(folder / f"merged{number}"))
            merged.save_pretrained(self.merged[-1])
            tokenizer.save_pretrained(self.merged[-1])

    def adapter(self, folder: Path, seed: int, **settings: Any) -> str:
        """Saves an adapter whose layers change something: peft's own beginnings change nothing."""
        model = transformers.AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        options = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"} | settings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on merging and sizes of adapters for an output head
            adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, tensor in adapted.named_parameters():
                if "lora_" in name:
                    tensor.normal_(std=0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted.save_pretrained(folder)
        return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("adapters"))


def _engine(source: str, **options: Any) -> Any:
    return load_engine(source, device="cpu", dtype="float32", chat=False, **options)


def _close(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return all(np.abs(a - b).max() < 1e-4 for a, b in zip(found, expected, strict=True))


def test_answers_are_those_of_merged_models_over_one_set_of_weights(folders: Folders) -> None:
    base = _engine(folders.base)
    alone = base.choose(QUESTIONS)
    engines = [_engine(folders.base, adapter=own) for own in folders.adapters]
    answers = [engine.choose(QUESTIONS) for engine in engines]
    merged = [_engine(folder) for folder in folders.merged]
    for own, found, engine in zip(merged, answers, engines, strict=True):
        assert _close(found, own.choose(QUESTIONS))
        assert engine.generate(LISTS) == own.generate(LISTS)
        np.testing.assert_allclose(engine.read([TEXT], [1])[0].states[1], own.read([TEXT], [1])[0].states[1], atol=1e-4)
        assert engine.packing.exact
    assert not _close(answers[0], answers[1])
    assert not _close(answers[0], alone)
    assert _close(base.choose(QUESTIONS), alone)  # the base answers as if there were no adapters

    held = {id(tensor) for tensor in base.model.parameters()}
    for engine, own in zip(engines, folders.adapters, strict=True):
        added = [tensor for tensor in engine.model.parameters() if id(tensor) not in held]
        assert sum(tensor.numel() for tensor in added) == adapters_module.find_adapter(own).parameters > 0
        assert {id(tensor) for tensor in engine.model.parameters()} >= held
    assert len({engine.source for engine in (base, *engines)}) == 3  # what is cached is kept apart
    assert _engine(folders.base, adapter=folders.adapters[0]).model is engines[0].model


def test_weights_that_leave_take_their_adapters_with_them(folders: Folders) -> None:
    residency = Residency(limit_bytes=1)
    engine = _engine(folders.base, adapter=folders.adapters[0], residency=residency)
    expected = engine.choose(QUESTIONS)
    before = engine.model
    other = _engine(folders.merged[1], residency=residency)
    other.choose(QUESTIONS)
    assert residency.departures == 1
    assert engine.model is not before
    assert residency.departures == 2
    assert _close(engine.choose(QUESTIONS), expected)


def test_members_name_adapters_and_share_the_base(folders: Folders) -> None:
    named = [f"{name}={folders.base}+{own}" for name, own in zip("ab", folders.adapters, strict=True)]
    config = load_config(None, {"members": [*named, f"c={folders.base}"], "device": "cpu", "dtype": "float32"})
    assert [member.adapter for member in config.members] == [*folders.adapters, None]
    assert {member.source for member in config.members} == {folders.base}
    preparation = Preparation(config)
    engines: list[Any] = [preparation.engine(m.source, m.chat, adapter=m.adapter) for m in config.members]
    assert len({engine.source for engine in engines}) == 3
    shared = [engine.model.get_input_embeddings().weight for engine in engines]
    assert shared[0] is shared[1] is shared[2]

    plan = make_plan(config)
    (model,) = plan.models
    assert model.members == ("a", "b", "c")
    alone = make_plan(load_config(None, {"members": [named[0]], "device": "cpu", "dtype": "float32"})).models[0]
    adapter = adapters_module.find_adapter(folders.adapters[0]).parameters
    assert model.parameters == alone.parameters + adapter
    assert model.weights == alone.weights + 4 * adapter
    assert model.cache == 3 * alone.cache  # prefixes read by another model are others
    assert "a, b, c" in render_plan(plan)
    predicted = preparation.predicted()
    assert predicted is not None
    assert predicted.models[0].weights == model.weights


def test_a_plus_sign_of_a_path_or_server_names_no_adapter(tmp_path: Path) -> None:
    (tmp_path / "a+b").mkdir()
    for source in (str(tmp_path / "a+b"), "openai:gpt+turbo", "https://host.example/v1+2"):
        assert load_config(None, {"members": [f"m={source}"]}).members[0].source == source
    with pytest.raises(ConfigError, match="no adapter behind the plus sign"):
        load_config(None, {"members": ["m=embedded:smollm2+"]})


def test_what_cannot_be_loaded_says_why(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("~nobody-of-that-name/adapter", "x" * 300):
        with pytest.raises(EngineError, match=r"no adapter_config\.json there"):
            adapters_module.find_adapter(folder)
    with pytest.raises(EngineError, match=r"no adapter_config\.json there"):
        _engine(folders.base, adapter=str(tmp_path))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(EngineError, match=r"no adapter_model\.safetensors there"):
        _engine(folders.base, adapter=str(tmp_path))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(EngineError, match="cannot be read"):
        _engine(folders.base, adapter=str(tmp_path))
    with pytest.raises(EngineError, match="does not fit llama"):  # of a model with other widths
        _engine("embedded:smollm2", adapter=folders.adapters[0])
    settings = {"members": [{"name": "m", "source": "openai:gpt", "adapter": folders.adapters[0]}]}
    with pytest.raises(ConfigError, match="is a server"):
        Preparation(make_config(settings)).engine("openai:gpt", adapter=folders.adapters[0])
    monkeypatch.setattr(adapters_module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EngineError, match=r"pip install 'el4ner\[adapters\]'"):
        _engine(folders.base, adapter=folders.adapter(tmp_path / "new", 3))


def test_an_incomplete_adapter_or_one_beside_the_layers_is_refused(folders: Folders, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    cut = Path(folders.adapter(tmp_path / "cut", 4))
    tensors = load_file(cut / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, cut / "adapter_model.safetensors")
    with pytest.raises(EngineError, match="missing adapter keys"):
        _engine(folders.base, adapter=str(cut))
    model = transformers.AutoModelForCausalLM.from_pretrained(folders.base, dtype=torch.float32)
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "prompt")
    with pytest.raises(EngineError, match=r"prompt' does not fit llama"):
        _engine(folders.base, adapter=str(tmp_path / "prompt"))


def test_an_adapter_of_the_head_is_not_packed_and_right(folders: Folders, tmp_path: Path) -> None:
    folder = folders.adapter(tmp_path / "head", 5, target_modules=["q_proj", "lm_head"])
    engine = _engine(folders.base, adapter=folder)
    assert not engine.packing.exact
    assert "output head" in str(engine.packing)
    found = engine.choose(QUESTIONS)
    for request, own in zip(QUESTIONS, found, strict=True):
        ids = torch.tensor([engine.prompt_ids(request.prompt)])
        logp = engine.model(input_ids=ids).logits[0, -1].log_softmax(-1)
        expected = [float(logp[engine.choice_ids(choice)[0]]) for choice in request.choices[:2]]
        np.testing.assert_allclose(own[:2], expected, atol=1e-4)
    assert any("output head" in note for note in engine.notes)
