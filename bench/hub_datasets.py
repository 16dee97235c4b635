"""Datasets with token and tag columns, from the Hugging Face hub or saved on disk, as the folder that is measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from el4ner.bench.evaluation_data import record_of
from el4ner.cache import cache_root, content_key
from el4ner.corpora import guess_scheme, tagged_sentence
from el4ner.errors import InputError, PoolError
from el4ner.hub import hub_answers
from el4ner.jsonl import dump_line
from el4ner.output import OutputFile
from el4ner.records import Demonstration

TOKEN_COLUMNS = ("tokens", "words")
TAG_COLUMNS = ("ner_tags", "tags", "labels")
SPLITS = {"dev": "validation"}
"""What a split may be called there, where none has its name here."""


def dataset_folder(source: str, splits: Iterable[str]) -> Path:
    """A folder with SPLIT.jsonl for the splits of a dataset, in the cache.

    source: a folder that `datasets` saved, or a hub id, with a configuration after a colon where there are several.
    Raises InputError if there is no such dataset or split, or if it has no columns of tokens and tags.
    """
    found = {split: read_dataset(source, split) for split in dict.fromkeys(splits)}
    lines = {split: b"".join(dump_line(record_of(d)) for d in own) for split, own in found.items()}
    name = source.rstrip("/").rpartition("/")[2].replace(":", "-")
    folder = cache_root() / "bench" / "datasets" / content_key(*lines.values(), list(lines))[:16] / name
    folder.mkdir(parents=True, exist_ok=True)
    for split, content in lines.items():
        with OutputFile(folder / f"{split}.jsonl") as file:
            file.write(content)
    return folder


def read_dataset(source: str, split: str) -> list[Demonstration]:
    """The sentences of a split; the text is the tokens joined by one space, the id the row's own or its number.

    Tags are names, or numbers of named classes; their scheme is guessed. Raises as `dataset_folder`.
    """
    rows = _load(source, split)
    token_column = _column(source, rows.column_names, TOKEN_COLUMNS)
    tag_column = _column(source, rows.column_names, TAG_COLUMNS)
    names = getattr(getattr(rows.features[tag_column], "feature", None), "names", None)
    tagged = [(row[token_column], _tags(source, row[tag_column], names)) for row in rows]
    try:
        scheme = guess_scheme(tags for _, tags in tagged)
        ids = rows["id"] if "id" in rows.column_names else range(1, len(rows) + 1)
        # what a scheme does not allow begins an entity, as conlleval has it
        return [tagged_sentence(str(i), tokens, tags, scheme, "begin")
                for i, (tokens, tags) in zip(ids, tagged, strict=True)]  # fmt: skip
    except ValueError as error:
        raise PoolError(f"{source}: {error}") from None


def split_names(source: str) -> list[str]:
    """What the splits of a dataset are called there. Raises InputError if there is no such dataset."""
    return list(_load_all(source))


def _load(source: str, split: str) -> Any:
    loaded = _load_all(source)
    name = split if split in loaded else SPLITS.get(split, split)
    if name not in loaded:
        raise InputError(f"{source}: no split {split!r}; there are {', '.join(loaded)}")
    return loaded[name]


def _load_all(source: str) -> Mapping[str, Any]:
    try:
        import datasets
    except ImportError:
        raise InputError(f"{source}: datasets is not installed; run: pip install 'el4ner[bench]'") from None
    try:
        if Path(source).is_dir():
            loaded = datasets.load_from_disk(source)
        else:
            name, _, configuration = source.partition(":")
            if not hub_answers():  # it would be asked again and again, with pauses, before the cache is
                datasets.config.HF_HUB_OFFLINE = True
            loaded = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # the hub's client, its HTTP library and the disk each have their own kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{source}: no folder of .jsonl files, and no dataset that can be loaded ({reason}); check the name, the "
            "network and HF_HUB_OFFLINE"
        ) from error
    if not isinstance(loaded, Mapping):
        raise InputError(f"{source}: has no splits; save a DatasetDict with train and test")
    return loaded


def _column(source: str, there: Sequence[str], wanted: Sequence[str]) -> str:
    for name in wanted:
        if name in there:
            return name
    raise InputError(f"{source}: has the columns {', '.join(there)}; expected one called {' or '.join(wanted)}")


def _tags(source: str, tags: Sequence[Any], names: Sequence[str] | None) -> list[str]:
    if names is not None:
        strange = [tag for tag in tags if not 0 <= tag < len(names)]
        if strange:
            raise InputError(f"{source}: tag {strange[0]} is none of the {len(names)} classes; the data are damaged")
        return [names[tag] for tag in tags]
    if not all(isinstance(tag, str) for tag in tags):
        raise InputError(f"{source}: its tags are numbers without names; expected names, such as B-person")
    return list(tags)
