"""The fit that comes with the package: it belongs to this code, pool and models, and is used where nothing differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from el4ner.cache import cache_root, read_arrays
from el4ner.config import make_config
from el4ner.metrics import evaluate
from el4ner.pipeline import El4ner
from el4ner.pool import load_pool
from el4ner.preparation import Preparation
from el4ner.shipped import NAME, shipped_fit
from el4ner.stages.team import Team
from el4ner.voters.reading import Start

pytestmark = pytest.mark.embedded


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing comes from an earlier run but the converted weights."""
    converted = cache_root() / "converted"
    if converted.is_dir():
        (tmp_path / "converted").symlink_to(converted.resolve(), target_is_directory=True)
    monkeypatch.setenv("EL4NER_CACHE", str(tmp_path))


def shipped_for(**settings: Any) -> dict[str, Any] | None:
    config = make_config(settings)
    pool = load_pool(config.examples, config.labels, config.stack.folds)
    return shipped_fit(Preparation(config), Team(config, pool))


def test_it_belongs_to_the_code_and_the_pool_as_they_are() -> None:
    assert shipped_for() is not None, "stale: run `make builtin` and commit what it writes"
    assert shipped_for(dtype="bfloat16", batch_size=3, min_score=0.4) is not None
    assert shipped_for(examples="builtin") is not None
    flat, nested = shipped_for(), shipped_for(overlap="nested")
    assert flat is not None
    assert nested is not None
    assert flat.keys() & nested.keys() >= {"rest", "points", "stack weights", "reader 0 0 word", "prober 0 mean"}
    np.testing.assert_array_equal(flat["reader 0 0 word"], nested["reader 0 0 word"])
    assert flat["points"].tobytes() != nested["points"].tobytes()


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": 1},
        {"reading": {"heads": 2}},
        {"voters": ["reading"]},
        {"stack": {"shipped": False}},
    ],
)
def test_it_is_passed_over_where_a_setting_differs(settings: dict[str, Any]) -> None:
    assert shipped_for(**settings) is None


def test_it_is_passed_over_for_other_pools(root: Path) -> None:
    assert shipped_for(examples=str(root / "examples/pools/jobs.jsonl")) is None


def test_a_first_run_fits_nothing_and_finds_what_the_pool_marks(root: Path) -> None:
    """What it learnt by heart it finds; features other than those it was fitted on would give nonsense."""
    stored = read_arrays(root / "el4ner" / "data" / NAME)
    assert (root / "el4ner" / "data" / NAME).stat().st_size < 20e6
    pool = load_pool(None, None)
    known = [pool.sentences[i] for i in pool.sample(30)]
    said: list[str] = []
    model = El4ner(make_config({"dtype": "float32", "device": "cpu"}))
    model.prepare(said.append)
    assert not [
        message for message in said if "fitting" in message or "trying" in message or "reading the pool" in message
    ]
    predictions = [p.to_dict() for p in model.predict([d.text for d in known])]
    gold = []
    for prediction, known_one in zip(predictions, known, strict=True):
        entities = [{"start": e.start, "end": e.end, "label": e.label} for e in known_one.entities]
        gold.append({"id": prediction["id"], "text": known_one.text, "entities": entities})
    assert evaluate(gold, predictions).to_dict()["micro"]["f1"] > 0.9
    report = model.report()
    assert report["fitted"]["shipped"] is True
    # as it was out of fold when it was fitted
    assert (
        report["fitted"]["cross-validated F1"]
        == json.loads(stored["flat rest"].tobytes())["facts"]["cross-validated F1"]
    )
    assert report["fitted"]["cross-validated F1"] > 0.75


def start_for(root: Path, **settings: Any) -> Start | None:
    config = make_config({"examples": str(root / "examples/pools/jobs.jsonl"), "dtype": "float32", **settings})
    pool = load_pool(config.examples, config.labels, config.stack.folds)
    preparation = Preparation(config)
    (voter,) = preparation.readers(pool)
    return preparation.start(pool, voter)


def test_fits_on_other_pools_begin_at_it(root: Path) -> None:
    stored = read_arrays(root / "el4ner" / "data" / NAME)
    start = start_for(root)
    assert start is not None
    assert len(start.heads) == make_config({}).reading.heads
    np.testing.assert_array_equal(start.heads[0].word, stored["reader 0 0 word"].astype(np.float32))
    np.testing.assert_array_equal(start.projection.mean, stored["reader 0 mean"].astype(np.float32))
    other = start_for(root, seed=1, reading={"heads": 2, "decay": 0.1}, dtype="bfloat16")
    assert other is not None
    assert other.key == start.key


@pytest.mark.parametrize(
    "settings",
    [
        {"reading": {"builtin": False}},
        {"reading": {"hidden": 64}},
        {"reading": {"hidden": 0}},
        {"reading": {"depths": [0.2]}},
        {"reading": {"directions": 0}},
        {"stack": {"shipped": False}},
    ],
)
def test_nothing_begins_at_it_where_other_features_are_read_or_it_is_not_wanted(
    root: Path, settings: dict[str, Any]
) -> None:
    assert start_for(root, **settings) is None


def test_a_pool_with_a_sentence_of_the_builtin_one_does_not_begin_at_it(root: Path, tmp_path: Path) -> None:
    """Its read-outs have seen the sentence, in whatever fold it lies."""
    own = (root / "examples/pools/jobs.jsonl").read_text(encoding="utf-8")
    shared = (root / "el4ner" / "data" / "pool.jsonl").read_text(encoding="utf-8").splitlines()[7]
    labels = {"entities": [], **{k: v for k, v in json.loads(shared).items() if k in ("id", "text")}}
    (tmp_path / "mixed.jsonl").write_text(own + json.dumps(labels) + "\n", encoding="utf-8")
    assert start_for(root, examples=str(tmp_path / "mixed.jsonl")) is None
