"""el4ner-bench tune: one option after the other, on dev or a part of train, never on test; the budget holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from el4ner.bench.cli import group
from el4ner.bench.evaluation_data import DataRequest, load_tuning_data
from el4ner.bench.run import RunRequest
from el4ner.bench.system import Workbench
from el4ner.bench.systems import BASELINES, make_system
from el4ner.bench.tune import default_grid, tune, tuned_options
from el4ner.config import make_config
from el4ner.errors import ConfigError, InputError, UsageError


def line(text: str, *surfaces: str) -> str:
    spans = [{"start": text.index(s), "end": text.index(s) + len(s), "label": "place"} for s in surfaces]
    return json.dumps({"text": text, "entities": spans}) + "\n"


TRAIN = [line("Rome burns", "Rome"), line("rome again", "rome"), line("Oslo is cold", "Oslo"), line("Oslo is cold"),
         line("all roads lead to Rome", "Rome")]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "little"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(TRAIN))
    (data / "dev.jsonl").write_text(line("ROME and OSLO", "ROME", "OSLO") + line("nothing here"))
    (data / "test.jsonl").write_text(line("Rome is old", "Rome"))
    return data


def test_the_best_value_of_each_option_stays(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    grid = {"dictionary": {"folded": (False, True), "least_share": (1.0, 0.0, 0.2)}}
    found = tune(RunRequest(DataRequest(str(folder), "dev"), (), out), grid, lambda _: None)
    assert [(t["option"], t["options"], t["f1"]) for t in found["tried"]] == [
        ("folded", {"folded": False}, 0.0),
        ("folded", {"folded": True}, 1.0),
        ("least_share", {"folded": True, "least_share": 1.0}, pytest.approx(2 / 3)),
        ("least_share", {"folded": True, "least_share": 0.0}, 1.0),
        ("least_share", {"folded": True, "least_share": 0.2}, 1.0),
    ]
    assert found["options"] == {"dictionary": {"folded": True, "least_share": 0.0}}  # of equal ones the first
    assert json.loads((out / "tuned.json").read_text()) == json.loads(json.dumps(found))
    done = tune(RunRequest(DataRequest(str(folder), "dev"), (), out), grid, lambda _: None)
    assert done["tried"] == found["tried"]


def test_what_was_chosen_is_what_runs(folder: Path, tmp_path: Path) -> None:
    tuned, out = tmp_path / "tuned", tmp_path / "out"
    command = ["tune", "--data", str(folder), "--systems", "dictionary", "--out", str(tuned),
               "--try", "dictionary.folded=[false, true]"]  # fmt: skip
    done = CliRunner().invoke(group, command)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"system": "dictionary", "options": {"folded": True}}
    run = ["run", "--data", str(folder), "--systems", "dictionary", "--options", str(tuned / "tuned.json"), "--out"]
    for more, folded in (([], True), (["--option", "dictionary.folded=false"], False)):
        done = CliRunner().invoke(group, [*run, str(out / str(folded)), *more])
        assert done.exit_code == 0, done.output
        manifest = json.loads((out / str(folded) / "manifest.json").read_text())
        assert manifest["systems"]["dictionary"]["settings"]["folded"] is folded
    (tmp_path / "broken.json").write_text("{")
    broken = CliRunner().invoke(group, [*run[:-2], str(tmp_path / "broken.json"), "--out", str(out / "none")])
    assert str(broken.exception).endswith("; give the tuned.json that el4ner-bench tune wrote")
    for wrong in ("dictionary.folded=true", "kate.k=[1]"):
        assert CliRunner().invoke(group, [*command[:-1], wrong]).exit_code == 2


def test_nothing_is_tuned_on_test(folder: Path, tmp_path: Path) -> None:
    for source, split in ((folder, "test"), (folder / "test.jsonl", "dev")):
        with pytest.raises(UsageError, match="never on test"):
            tune(RunRequest(DataRequest(str(source), split), (), tmp_path / "o"), {"dictionary": {}}, lambda _: None)
    with pytest.raises(ConfigError, match="only baselines"):
        tune(RunRequest(DataRequest(str(folder), "dev"), (), tmp_path / "o"), {"default": {}}, lambda _: None)
    for content in ({}, [], {"options": {"kate": 3}}):
        with pytest.raises(InputError, match="holds no options"):
            tuned_options(content, "x.json")


def test_a_part_of_train_is_held_out_with_its_copies(folder: Path) -> None:
    for seed in range(8):
        data = load_tuning_data(DataRequest(str(folder), "train", limit=2, seed=seed))
        held_out = {d.text for d in data.gold}
        assert len(data.gold) == 2
        assert held_out.isdisjoint(d.text for d in data.pool.sentences)
        assert len(data.pool.sentences) + len(data.dropped) == 3
    with pytest.raises(InputError, match="leave no pool"):
        load_tuning_data(DataRequest(str(folder), "train"))


def test_the_grid_holds_valid_options_within_the_budget() -> None:
    bench = Workbench(make_config({}), 3, 0)
    grid = default_grid(3)
    assert set(grid) == set(BASELINES)
    for name, options in grid.items():
        assert options
        for key, values in options.items():
            for value in values:
                settings: Any = make_system(name, bench, {}, {name: {key: value}}).settings
                assert settings[key] == value
    assert grid["kate"]["k"] == (3, 2, 1)
    for name in ("kate", "deer", "gpt-ner"):
        with pytest.raises(ConfigError, match=rf"{name}\.k=4: above the budget of all systems, --k 3"):
            make_system(name, bench, {}, {name: {"k": 4}})
