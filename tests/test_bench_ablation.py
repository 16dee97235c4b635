"""el4ner-bench ablate: every variant is a valid setting and differs from its base; table and files of a small run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from el4ner.bench.ablation import GROUPS, POOL_SIZES, make_variant, variants
from el4ner.bench.cli import group
from el4ner.bench.report_details import ablation_table
from el4ner.bench.report_markdown import render_table
from el4ner.bench.sharing import Remembering
from el4ner.bench.system import Workbench
from el4ner.config import make_config
from el4ner.engines.base import Generate
from el4ner.engines.scripted import ScriptedEngine


def test_every_variant_changes_something_and_only_once() -> None:
    bench = Workbench(make_config({}), 4, 3)
    config = make_config({"retrieve": {"k": 4}})
    chosen = variants(config, 600, list(GROUPS))
    made = {variant.name: make_variant(variant, bench, {"overlap": "nested"}) for _, variant in chosen}
    assert len(made) == len(chosen)
    settings = [json.dumps(dict(system.settings), sort_keys=True) for system in made.values()]
    assert len(set(settings)) == len(settings)
    for system in made.values():
        own: Any = system.settings
        assert (own["seed"], own["overlap"]) == (3, "nested")
        assert own["retrieve"]["k"] == (int(system.name[1:]) if system.name.startswith("k") else 4)
    pools = [v.pool_size for name, v in chosen if name == "pool"]
    assert pools == [size for size in POOL_SIZES if size < 600]
    assert {name for name, _ in chosen} == {"base", *GROUPS}


def test_only_the_bases_that_are_needed_run() -> None:
    config = make_config({})
    assert [v.name for _, v in variants(config, 10, ["reading"]) if v.name in ("default", "all")] == ["default"]
    assert [v.name for _, v in variants(config, 10, ["k"]) if v.name in ("default", "all")] == ["default", "all"]


def test_the_table_says_what_differs() -> None:
    rows = [
        {"group": "base", "name": "default", "what": "w", "base": "default", "f1": 0.5},
        {"group": "k", "name": "k1", "what": "one", "base": "default", "f1": 0.4, "difference": -0.1,
         "ci95": [-0.2, 0.05], "p_holm": 0.04},
    ]  # fmt: skip
    table = render_table(ablation_table(rows, 7))
    assert table.startswith("Strict F1 on 7 sentences")
    assert "| k | k1 | one | default | 0.400 | -0.100 [-0.200, +0.050] | 0.040 |" in table
    assert "| base | default | w | default | 0.500 | – | – |" in table


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from el4ner.bench import sharing
    from el4ner.engines.base import TokenStates

    def read(text: str, layers: Any) -> TokenStates:
        return TokenStates(np.zeros((1, 2), np.int64), {layer: np.zeros((1, 4), np.float32) for layer in layers})

    engine = ScriptedEngine(read=read, generate=lambda request: "x", n_layers=2)
    monkeypatch.setattr(sharing, "STATES_BYTES", 20)
    memory = Remembering(engine)
    assert [len(memory.read([text, text], [1])) for text in "aabbab"] == [2] * 6
    assert (memory.answered, len(engine.requests)) == (2, 4)  # room for one text of 16 bytes, the last
    for _ in range(2):
        memory.generate([Generate(("a",)), Generate(("a",))])
    assert (memory.answered, len(engine.requests)) == (3, 5)


@pytest.mark.embedded
def test_a_small_ablation_leaves_table_and_folder(tmp_path: Path) -> None:
    """A pool too small to fit on: the retrieval voter is asked, the reading voter refused and named."""
    place = {"start": 0, "end": 4, "label": "place"}
    for split, texts in (("train", ["Rome burns", "Oslo is cold"]), ("test", ["Rome is old", "Oslo burns"])):
        lines = [json.dumps({"text": text, "entities": [place]}) + "\n" for text in texts]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    out = tmp_path / "out"
    command = ["ablate", "--data", str(tmp_path), "--groups", "voters", "--out", str(out), "--set", "members=[]"]
    done = CliRunner().invoke(group, command)
    assert done.exit_code == 0, done.output
    found = json.loads((out / "ablation.json").read_text())
    assert {row["name"] for row in found["rows"]} >= {"default", "only-retrieval"}
    assert "only-reading" in found["refused"]
    assert "only-reading was not run: " in (out / "ablation.md").read_text()
    again = CliRunner().invoke(group, command)
    assert again.stdout == done.stdout
    fewer = CliRunner().invoke(group, [*command, "--skip", "only-probing,only-retrieval"])
    assert fewer.exit_code == 0, fewer.output
    rows = {row["name"] for row in json.loads((out / "ablation.json").read_text())["rows"]}
    assert rows == {row["name"] for row in found["rows"]} - {"only-probing", "only-retrieval"}
    wrong = CliRunner().invoke(group, [*command, "--skip", "k8"])
    assert "--skip k8: no variant of these groups; they are only-reading, only-tagging, only-probing" in str(
        wrong.exception
    )
