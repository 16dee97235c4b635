"""Datasets with token and tag columns, saved on disk or named on the hub, as input of el4ner-bench run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from el4ner.bench import hub_datasets
from el4ner.bench.hub_datasets import dataset_folder, read_dataset
from el4ner.errors import InputError
from el4ner.jsonl import read_pool
from el4ner.records import Demonstration, LabelledSpan

datasets = pytest.importorskip("datasets")

TOKENS = [["Ada", "Lovelace", "left", "London"], ["Nobody", "came"]]
TAGS = [["B-person", "I-person", "O", "B-place"], ["O", "O"]]
WANTED = [
    Demonstration("1", "Ada Lovelace left London", (LabelledSpan(0, 12, "person"), LabelledSpan(18, 24, "place"))),
    Demonstration("2", "Nobody came", ()),
]


def save(path: Path, **columns: Any) -> str:
    """A dataset of two splits on disk, as `datasets` saves it."""
    features = columns.pop("features", None)
    one = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"train": one, "validation": one}).save_to_disk(str(path))
    return str(path)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EL4NER_CACHE", str(tmp_path / "cache"))


def test_tags_may_be_names_or_numbers_of_classes(tmp_path: Path) -> None:
    assert read_dataset(save(tmp_path / "names", tokens=TOKENS, ner_tags=TAGS), "train") == WANTED
    names = ["O", "B-person", "I-person", "B-place"]
    numbers = [[names.index(tag) for tag in tags] for tags in TAGS]
    classes = datasets.Sequence(datasets.ClassLabel(names=names))
    features = datasets.Features({"words": datasets.Sequence(datasets.Value("string")), "tags": classes})
    assert read_dataset(save(tmp_path / "classes", words=TOKENS, tags=numbers, features=features), "dev") == WANTED


def test_a_split_with_its_own_name_is_taken_before_the_usual_one(tmp_path: Path) -> None:
    one = datasets.Dataset.from_dict({"tokens": TOKENS, "tags": TAGS})
    other = datasets.Dataset.from_dict({"tokens": TOKENS[:1], "tags": TAGS[:1]})
    datasets.DatasetDict({"dev": other, "validation": one}).save_to_disk(str(tmp_path / "both"))
    assert read_dataset(str(tmp_path / "both"), "dev") == WANTED[:1]


def test_ids_are_kept_and_an_orphan_begins_an_entity(tmp_path: Path) -> None:
    tags = [["I-person", "I-person", "O", "S-place"], ["O", "O"]]
    source = save(tmp_path / "d", id=["a", "b"], tokens=TOKENS, ner_tags=tags)
    found = read_dataset(source, "train")
    assert [d.id for d in found] == ["a", "b"]
    assert [d.entities for d in found] == [d.entities for d in WANTED]


def test_the_folder_holds_what_was_read(tmp_path: Path) -> None:
    folder = dataset_folder(save(tmp_path / "little", tokens=TOKENS, ner_tags=TAGS), ["train", "dev"])
    assert folder.name == "little"
    assert [path.name for path in sorted(folder.iterdir())] == ["dev.jsonl", "train.jsonl"]
    assert read_pool(folder / "train.jsonl") == WANTED


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"tokens": TOKENS, "pos": TAGS},
            "has the columns tokens, pos; expected one called ner_tags or tags or labels",
        ),
        ({"text": ["a", "b"], "tags": TAGS}, "expected one called tokens or words"),
        ({"tokens": TOKENS, "tags": [[0, 1, 2, 3], [0, 0]]}, "its tags are numbers without names"),
        ({"tokens": TOKENS, "tags": [["person"] * 4, ["O", "O"]]}, 'tag "person" is neither O nor'),
        ({"tokens": TOKENS, "tags": [["O"], ["O", "O"]]}, "4 tokens but 1 tags"),
    ],
)
def test_what_is_no_tagged_dataset_is_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    source = save(tmp_path / "d", **columns)
    with pytest.raises(InputError) as caught:
        read_dataset(source, "train")
    assert str(caught.value).startswith(f"{source}: ")
    assert message in str(caught.value)


def test_what_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    for source in (str(tmp_path), "nobody/nothing"):
        with pytest.raises(InputError, match="no dataset that can be loaded") as caught:
            read_dataset(source, "train")
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no split 'test'; there are train, validation"):
        read_dataset(save(tmp_path / "d", tokens=TOKENS, ner_tags=TAGS), "test")


def test_a_silent_hub_is_not_asked_for_a_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.load.HfApi, "hf_hub_download", lambda *_, **__: asked.append("hub"))
    monkeypatch.setattr(hub_datasets, "hub_answers", lambda: False)
    with pytest.raises(InputError, match="no dataset that can be loaded"):
        read_dataset("nope", "test")
    assert asked == []
