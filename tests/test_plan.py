"""The memory plan is what loading takes, members share weights, and models that do not fit together take turns."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from el4ner.bench.random_models import shape_config  # noqa: E402
from el4ner.cli import main  # noqa: E402
from el4ner.config import Config, make_config  # noqa: E402
from el4ner.engines import Choose, Generate, load_engine  # noqa: E402
from el4ner.engines.budgets import decode_replies  # noqa: E402
from el4ner.engines.loading import load_model  # noqa: E402
from el4ner.engines.residency import Residency  # noqa: E402
from el4ner.engines.sizes import size_of  # noqa: E402
from el4ner.errors import ConfigError, EngineError, ModelNotFoundError  # noqa: E402
from el4ner.models import embedded_file, local_folder, resolve  # noqa: E402
from el4ner.plan import LEAST_TOKENS, MIB, _group_bytes, check_fits, make_plan, peak_mib, render_plan  # noqa: E402
from el4ner.preparation import Preparation  # noqa: E402

pytestmark = pytest.mark.usefixtures("embedded")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two random models with the embedded model's tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(local_folder(resolve("embedded:smollm2")))
    made = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp(f"tiny{seed}")
        torch.manual_seed(seed)
        transformers.AutoModelForCausalLM.from_config(shape_config("random:tiny")).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made.append(str(folder))
    return made


def _config(folders: list[str], **settings: Any) -> Config:
    members = [{"name": f"m{i}", "source": folder} for i, folder in enumerate(folders)]
    return make_config({"members": members, "device": "cpu", "dtype": "float32", **settings})


def test_predicted_weights_are_what_is_loaded(folders: list[str]) -> None:
    for source in (folders[0], "embedded:smollm2"):
        size = size_of(resolve(source))
        model = load_model(source, "cpu", "float32").model
        assert size.weight_bytes(torch.float32) == sum(p.nbytes for p in model.parameters())
        engine: Any = load_engine(source, device="cpu", dtype="float32")
        engine.choose([Choose(("abc", "def", "ghi"), (" a",))])
        chunks = list(engine._cache._chunks.values())
        assert chunks
        for chunk in chunks:  # what it holds is of its own tokens, or of all before them too
            per_token = size.kv_bytes_per_token(torch.float32)
            assert sum(part.nbytes for pair in chunk.layers for part in pair) == len(chunk.tokens) * per_token
            assert chunk.n_bytes in (len(chunk.tokens) * per_token, chunk.length * per_token)


def test_gguf_metadata_give_the_same_size_as_the_converted_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    from el4ner.engines import sizes
    from el4ner.models import EMBEDDED

    if embedded_file(EMBEDDED[0]) is None:
        pytest.skip("the embedded model is not installed as a GGUF file")
    resolved = resolve("embedded:smollm2")
    if resolved.kind != "gguf":
        pytest.skip("the originals were chosen")
    converted = size_of(resolved)
    monkeypatch.setattr(sizes, "is_intact", lambda _: False)
    assert size_of(resolved) == converted


def test_members_of_one_source_share_weights(folders: list[str]) -> None:
    plan = make_plan(_config([folders[0], folders[0], folders[1]]))
    assert [model.members for model in plan.models] == [("m0", "m1"), ("m2",)]
    assert plan.mode == "resident"
    one, two = make_plan(_config(folders[:1])), plan
    assert two.resident - two.process > one.resident - one.process
    assert "m0, m1" in render_plan(plan)


def test_fewer_bits_take_less() -> None:
    member = {"name": "m", "source": "embedded:smollm2"}
    sizes = [
        make_plan(make_config({"members": [member | {"quantization": bits}], "device": "cpu", "dtype": "float32"}))
        .models[0]
        .weights
        for bits in ("none", "8bit", "4bit")
    ]
    assert sizes[0] > sizes[1] > sizes[2]
    size = size_of(resolve("embedded:smollm2"))
    assert sizes[1] == (size.parameters - size.linear) * 4 + size.linear


def test_a_limit_makes_models_take_turns_or_is_refused(folders: list[str]) -> None:
    free = make_plan(_config(folders, batch_size=2))
    between = (free.turns + free.resident) // 2
    limit = int(between / 0.9 / MIB)
    plan = make_plan(_config(folders, batch_size=2, memory_limit_mib=limit), process=free.process)
    assert plan.mode == "turns"
    assert plan.models_limit is not None
    takes = [model.weights + plan.largest_cache for model in plan.models]
    assert max(takes) <= plan.models_limit < sum(takes)
    preparation = Preparation(_config(folders, batch_size=2, memory_limit_mib=limit))
    preparation._process = free.process
    assert preparation.plan is not None
    assert preparation.plan.mode == "turns"
    # of this run: not among the notes that are kept with what was fitted
    assert [note.endswith("they take turns") for note in preparation.engine_notes()] == [True]
    assert preparation.notes == []
    small = make_plan(_config(folders, memory_limit_mib=1))
    assert small.mode == "too large"
    with pytest.raises(ConfigError, match="memory_limit_mib=1"):
        check_fits(small)
    with pytest.raises(ConfigError, match="memory_limit_mib=1"):
        Preparation(_config(folders, memory_limit_mib=1)).engine(folders[0])
    with pytest.raises(ConfigError, match="memory_limit_mib=1: with the sentence encoder alone a run takes about"):
        check_fits(make_plan(_config(folders, memory_limit_mib=1), members=[]))


def test_taking_turns_changes_no_answer(folders: list[str]) -> None:
    requests = [Choose(("List.\n", "Ann met Bob.\n", f"{who} is a"), (" person", " none of these")) for who in "AB"]
    lists = [Generate(("List.\n", "Ann met Bob.\n", "Names:"), None, 4)]
    expected = []
    for folder in folders:
        engine = load_engine(folder, device="cpu", dtype="float32")
        expected.append((engine.choose(requests), engine.generate(lists), engine.read(["Ann"], [1])))
        del engine
    size = size_of(resolve(folders[0])).weight_bytes(torch.float32)
    residency = Residency(limit_bytes=size + size // 2)
    engines: list[Any] = [load_engine(f, device="cpu", dtype="float32", residency=residency) for f in folders]
    for _ in range(2):  # stage by stage, as the pipeline asks
        for engine, (scores, _, _) in zip(engines, expected, strict=True):
            for found, wanted in zip(engine.choose(requests), scores, strict=True):
                np.testing.assert_array_equal(found, wanted)
        for engine, (_, replies, states) in zip(engines, expected, strict=True):
            assert engine.generate(lists) == replies
            np.testing.assert_array_equal(engine.read(["Ann"], [1])[0].states[1], states[0].states[1])
            assert residency.n_bytes <= residency.limit_bytes
    # loading, then three switches of two models in each of two rounds but where the same model goes on
    assert residency.departures == residency.arrivals - 1 >= 7
    assert sum(engine._loaded._model is not None for engine in engines) == 1


def test_all_stay_where_they_fit(folders: list[str]) -> None:
    preparation = Preparation(_config([*folders, folders[0]]))
    engines: list[Any] = [preparation.engine(folder) for folder in folders]
    assert preparation.engine(folders[0]) is engines[0]
    for _ in range(2):
        for engine in engines:
            engine.choose([Choose(("a", "b", "c"), (" d",))])
    assert preparation.residency.departures == 0
    assert all(engine._loaded._model is not None for engine in engines)
    predicted = preparation.predicted()
    assert predicted is not None
    assert [model.members for model in predicted.models] == [("m0", "m2"), ("m1",)]


def test_quantisation_without_its_library_is_one_line(folders: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from el4ner.engines import quantization

    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EngineError, match="bitsandbytes") as caught:
        load_engine(folders[0], device="cpu", dtype="float32", quantization="4bit")
    assert "\n" not in str(caught.value)
    with pytest.raises(EngineError, match="none, 8bit or 4bit"):
        load_engine(folders[0], device="cpu", dtype="float32", quantization="2bit")


def test_what_fits_under_a_limit_fits_under_a_higher_one(folders: list[str]) -> None:
    for source, batch_size in (("embedded:smollm2", 128), ("embedded:smollm2", 6), (folders[0], 1)):
        config = _config([source], batch_size=batch_size)
        plans = [make_plan(merge_limit(config, limit), process=400 * MIB) for limit in range(500, 2500, 20)]
        fit = [plan.mode != "too large" for plan in plans]
        assert fit == sorted(fit)
        assert set(fit) == {False, True}
        least = next(plan for plan in plans if plan.mode != "too large")
        assert least.turns <= (least.available or 0) * 0.9
        with pytest.raises(ConfigError, match=r"raise the limit to \d+") as caught:
            check_fits(plans[0])
        wanted = int(re.search(r"raise the limit to (\d+)", str(caught.value))[1])  # type: ignore[index]
        assert make_plan(merge_limit(config, wanted), process=400 * MIB).mode != "too large"


def merge_limit(config: Config, limit: int) -> Config:
    return config.model_copy(update={"memory_limit_mib": limit})


def test_peak_memory_is_unknown_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_mib("cpu") > 0
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert peak_mib("cpu") == 0


def test_a_tight_limit_lets_less_run_at_once_and_changes_no_score(folders: list[str]) -> None:
    plans = {}
    for limit in range(40, 1000, 8):
        plan = make_plan(_config(folders[:1], memory_limit_mib=limit), process=0)
        plans.setdefault((plan.mode, plan.forward_tokens), plan)
        assert plan.mode == "too large" or plan.turns <= limit * MIB * 0.9
    fitting = {tokens for mode, tokens in plans if mode != "too large"}
    assert {tokens for mode, tokens in plans if mode == "too large"} == {LEAST_TOKENS}
    assert max(fitting) == 512
    assert min(fitting) < 512
    tight = next(plan for (mode, tokens), plan in plans.items() if mode != "too large" and tokens < 512)
    # prompts are passes of their own in float32 on a CPU
    assert f"; {decode_replies('cpu', tight.forward_tokens)} replies at once, since more do not fit" in render_plan(
        tight
    )
    reduced = render_plan(replace(tight, dtype="bfloat16"))
    assert f"; {tight.forward_tokens} tokens a forward pass, since more do not fit" in reduced
    assert tight.to_dict()["forward_tokens"] == tight.forward_tokens
    limit = round((tight.available or 0) / MIB)
    preparation = Preparation(_config(folders[:1], memory_limit_mib=limit))
    preparation._process = 1  # as little as nothing, but known
    engine: Any = preparation.engine(folders[0])
    assert engine._forward_tokens == tight.forward_tokens
    usual: Any = load_engine(folders[0], device="cpu", dtype="float32")
    requests = [Choose(("List.\n", f"Ann met {name}.\n", "Ann is a"), (" person", " place")) for name in "BCDEFG"]
    written = [Generate((*request.prompt[:2], "Names:"), None, 4) for request in requests]
    np.testing.assert_array_equal(engine.choose(requests), usual.choose(requests))
    assert [reply.text for reply in engine.generate(written)] == [reply.text for reply in usual.generate(written)]


def test_free_memory_is_no_more_than_a_container_has(tmp_path: Path) -> None:
    (tmp_path / "memory.stat").write_text("anon 70\ninactive_file 20\n")
    (tmp_path / "memory.current").write_text("100\n")
    assert _group_bytes(tmp_path) == []
    (tmp_path / "memory.max").write_text("max\n")
    assert _group_bytes(tmp_path) == []
    (tmp_path / "memory.max").write_text("150\n")
    assert _group_bytes(tmp_path) == [70]  # 100 in use, of which 20 are files that may go
    first = tmp_path / "memory"
    first.mkdir()
    (first / "memory.stat").write_text("inactive_file 0\n")
    (first / "memory.limit_in_bytes").write_text("50\n")
    (first / "memory.usage_in_bytes").write_text("80\n")
    assert _group_bytes(tmp_path) == [70, 0]
    (first / "memory.usage_in_bytes").write_text("many\n")
    assert _group_bytes(tmp_path) == [70]


def test_the_command_loads_no_weights(folders: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    options = ["plan", "--device", "cpu", "--members", f"a={folders[0]}", "--members", f"b={folders[1]}"]
    done = CliRunner().invoke(main, [*options, "--json"])
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert plan["mode"] == "resident"
    assert [model["members"] for model in plan["models"]] == [["a"], ["b"]]
    assert plan["predicted_mib"] == plan["resident_mib"] > sum(model["weights_mib"] for model in plan["models"])
    assert "all models stay in memory" in CliRunner().invoke(main, options).stdout
    broken = Path(folders[0]).parent / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    done = CliRunner().invoke(main, ["plan", "--members", f"a={broken}"])
    assert done.exit_code == 1
    assert "configuration cannot be read" in done.stderr
    done = CliRunner().invoke(main, [*options, "--memory-limit-mib", "1"])
    assert (done.exit_code, "the largest model does not fit" in done.stdout) == (1, True)


def test_a_hub_model_that_cannot_be_had_is_the_same_error_as_in_predict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = CliRunner().invoke(main, ["plan", "--members", "m=nobody/nothing"])
    assert done.exit_code == ModelNotFoundError.exit_code == 2
    assert "nobody/nothing" in done.stderr


def test_libraries_that_are_not_loaded_yet_count_as_the_process() -> None:
    code = """
from el4ner.plan import process_bytes, resident_bytes
before, predicted = resident_bytes(), process_bytes()
import torch
from transformers import AutoModelForCausalLM
print(before, predicted, resident_bytes())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, predicted, loaded = map(int, done.stdout.split())
    if not loaded:
        pytest.skip("the system does not say how much memory a process has")
    assert before < predicted
    assert predicted == pytest.approx(loaded, rel=0.02)


def test_definitions_of_labels_count(folders: list[str], tmp_path: Path) -> None:
    labels = tmp_path / "labels.yaml"
    labels.write_text("".join(f"- {{name: label {i}, definition: {'x' * 200}}}\n" for i in range(40)))
    members = [{"name": "a", "source": folders[0]}]
    plain = make_plan(make_config({"members": members, "examples": "pool.jsonl"}))
    defined = make_plan(make_config({"members": members, "labels": str(labels)}))
    assert defined.models[0].workspace > plain.models[0].workspace
    assert defined.models[0].weights == plain.models[0].weights
