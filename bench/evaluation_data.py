"""The data of an evaluation: gold sentences, the pool every system gets, and what the two shared before.

    folder with train and SPLIT (JSONL or columns) -> one part: all gold sentences, the pool is train without copies
    no train                                       -> parts of SPLIT left out in turn, the pool is the rest of it

A Hugging Face dataset is written as such a folder first.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from el4ner.bench.contamination import NearCopy, folded, near_copies, without_copies
from el4ner.corpora import COLUMN_SUFFIXES, read_examples
from el4ner.errors import InputError, UsageError
from el4ner.jsonl import dump_line
from el4ner.labels import read_labels
from el4ner.pool import Pool, labels_of
from el4ner.records import Demonstration, Label, Sentence

SUFFIXES = (".jsonl", ".jsonl.gz", *COLUMN_SUFFIXES, *(f"{suffix}.gz" for suffix in COLUMN_SUFFIXES))
TRAIN = "train"


@dataclass(frozen=True)
class Part:
    """Gold sentences begin to end (half-open) and the pool they are predicted with."""

    pool: Pool
    begin: int
    end: int


@dataclass(frozen=True)
class EvaluationData:
    """Everything that is measured on.

    gold: the evaluated sentences, part by part. parts: one where there is a train split. pool: all sentences that
    serve as pool for any of them. sentences: of the split, before `limit`. dropped: pool sentences that are copies of
    the split's, left out. near: pool sentences nearly like one of the split's; they stay in the pool.
    """

    name: str
    source: str
    split: str
    limit: int | None
    seed: int
    sentences: int
    gold: tuple[Demonstration, ...]
    parts: tuple[Part, ...]
    pool: Pool
    dropped: tuple[Demonstration, ...]
    near: tuple[tuple[str, str, float], ...]
    left_out: bool

    @property
    def sha256(self) -> str:
        """Of the gold sentences as they are evaluated."""
        return hashlib.sha256(b"".join(dump_line(record_of(d)) for d in self.gold)).hexdigest()

    @property
    def _pool_sha256(self) -> str:
        """Of the pool; where parts are left out in turn, of every part's pool and place."""
        if not self.left_out:
            return self.pool.content
        places = [f"{part.begin} {part.end} {part.pool.content}\n" for part in self.parts]
        return hashlib.sha256("".join(places).encode()).hexdigest()

    def pool_facts(self) -> dict[str, Any]:
        """The pool's entry in a manifest."""
        facts: dict[str, Any] = {
            "sentences": len(self.pool.sentences),
            "entities": sum(len(d.entities) for d in self.pool.sentences),
            "sha256": self._pool_sha256,
            "dropped_duplicates": len(self.dropped),
            "near_duplicates": len(self.near),
        }
        if self.left_out:
            facts["left_out_in_turn"] = len(self.parts)
        return facts


@dataclass(frozen=True)
class DataRequest:
    """What is to be evaluated on.

    source: a folder of splits, one file, or a Hugging Face dataset id. pool: a file to take the pool from instead of
    the train split. labels: a file of definitions. parts: how many parts are left out in turn without a train split.
    """

    source: str
    split: str = "test"
    limit: int | None = None
    seed: int = 0
    pool_size: int | None = None
    pool: str | None = None
    labels: str | None = None
    parts: int = 10


def record_of(demonstration: Demonstration) -> dict[str, Any]:
    """A labelled sentence as a line of `gold.jsonl`."""
    entities = [{"start": e.start, "end": e.end, "label": e.label} for e in demonstration.entities]
    return {"id": demonstration.id, "text": demonstration.text, "entities": entities}


def load_evaluation_data(request: DataRequest) -> EvaluationData:
    """The data of a request; the same request gives the same sentences, pool and order.

    The pool loses copies of any sentence of the split, evaluated or not, before `pool_size` sentences are drawn by
    content. Without a pool, `parts` parts of the split are left out in turn (each sentence alone where the split has
    no more than that); copies of a text fall into one part, so nothing is dropped.
    Raises InputError, PoolError or LabelsError for data that cannot be read or have no split of that name.
    """
    if request.split == TRAIN and request.pool is None:
        raise UsageError("--split train is the pool itself; choose another split, or give --pool FILE")
    name, gold_file, pool_file = _files(request)
    whole = read_examples(gold_file)
    train = read_examples(pool_file) if pool_file is not None else None
    labels = read_labels(request.labels) if request.labels is not None else labels_of(train or whole)
    if not labels:
        raise InputError(f"{request.source}: no sentence of the pool has an entity; give --labels FILE")
    if train is None:
        return _left_out(request, name, whole, labels)
    kept, dropped = without_copies(train, whole)
    if not kept:
        raise InputError(f"{request.source}: every pool sentence is a copy of one of {request.split}; give --pool FILE")
    pool = smaller(Pool(tuple(kept), labels, name=name), request.pool_size)
    chosen = drawn(whole, request.limit, request.seed)
    near = near_copies(pool.sentences, whole)
    return EvaluationData(
        name, _shown(request.source), request.split, request.limit, request.seed, len(whole), tuple(chosen),
        (Part(pool, 0, len(chosen)),), pool, tuple(dropped), _named(near, pool.sentences, whole), left_out=False,
    )  # fmt: skip


def load_tuning_data(request: DataRequest) -> EvaluationData:
    """As `load_evaluation_data`; split "train" holds out `limit` of its sentences (200 where none is given).

    The pool is then the rest of them, without copies of those held out.
    """
    if request.split != TRAIN or request.pool is not None:
        return load_evaluation_data(request)
    name, file, _ = _files(request)
    whole = read_examples(file)
    labels = read_labels(request.labels) if request.labels is not None else labels_of(whole)
    held_out = drawn(whole, request.limit or 200, request.seed)
    ids = set(map(id, held_out))
    kept, dropped = without_copies([d for d in whole if id(d) not in ids], held_out)
    if not kept or not labels:
        raise InputError(f"{request.source}: {len(whole):,} sentences of train leave no pool; give a smaller --limit")
    pool = smaller(Pool(tuple(kept), labels, name=name), request.pool_size)
    return EvaluationData(
        name, _shown(request.source), TRAIN, len(held_out), request.seed, len(whole), tuple(held_out),
        (Part(pool, 0, len(held_out)),), pool, tuple(dropped),
        _named(near_copies(pool.sentences, held_out), pool.sentences, held_out), left_out=False,
    )  # fmt: skip


def _left_out(
    request: DataRequest, name: str, whole: Sequence[Demonstration], labels: Sequence[Label]
) -> EvaluationData:
    texts = sorted({folded(d.text) for d in whole}, key=lambda text: hashlib.sha256(text.encode()).digest())
    if len(texts) < 2:
        raise InputError(f"{request.source}: one sentence and no train split leave no pool; give --pool FILE")
    n_parts = min(request.parts, len(texts))
    part_of = {text: position % n_parts for position, text in enumerate(texts)}
    chosen = drawn(whole, request.limit, request.seed)
    gold: list[Demonstration] = []
    parts: list[Part] = []
    near: list[tuple[str, str, float]] = []
    for number in range(n_parts):
        inside = [d for d in chosen if part_of[folded(d.text)] == number]
        outside = tuple(d for d in whole if part_of[folded(d.text)] != number)
        pool = smaller(Pool(outside, tuple(labels), name=name), request.pool_size)
        if inside:
            parts.append(Part(pool, len(gold), len(gold) + len(inside)))
            near += _named(near_copies(pool.sentences, inside), pool.sentences, inside)
            gold += inside
    serving = {digest for part in parts for digest in part.pool.digests}
    everything = Pool(tuple(whole), tuple(labels), name=name)
    used = tuple(d for d, digest in zip(everything.sentences, everything.digests, strict=True) if digest in serving)
    everything = replace(everything, sentences=used)
    return EvaluationData(
        name, _shown(request.source), request.split, request.limit, request.seed, len(whole), tuple(gold), tuple(parts),
        everything, (), tuple(near), left_out=True,
    )  # fmt: skip


def smaller(pool: Pool, limit: int | None) -> Pool:
    """The pool, or `limit` of its sentences, always the same ones, whatever their order."""
    if limit is None or limit >= len(pool.sentences):
        return pool
    return replace(pool, sentences=tuple(pool.sentences[i] for i in pool.sample(limit)))


def drawn(whole: Sequence[Demonstration], limit: int | None, seed: int) -> list[Demonstration]:
    """All sentences, or `limit` of them drawn by `seed`, in their order."""
    if limit is None or limit >= len(whole):
        return list(whole)
    return [whole[i] for i in sorted(random.Random(seed).sample(range(len(whole)), limit))]


def _named(
    near: Sequence[NearCopy], pool: Sequence[Demonstration], tested: Sequence[Demonstration]
) -> tuple[tuple[str, str, float], ...]:
    return tuple((pool[n.pool].id, tested[n.tested].id, round(n.similarity, 3)) for n in near)


def _shown(source: str) -> str:
    """A source as a manifest names it: files without the folders above them, dataset ids whole."""
    return Path(source).resolve().name if Path(source).exists() else source


# Files


def find_split(folder: Path, split: str) -> Path | None:
    """The file of a split in a folder, JSONL before columns, plain before zipped; None if there is none."""
    return next((folder / f"{split}{suffix}" for suffix in SUFFIXES if (folder / f"{split}{suffix}").is_file()), None)


def split_file(folder: Path, split: str) -> Path:
    """The file of a split. Raises InputError naming what is there."""
    found = find_split(folder, split)
    if found is None:
        there = ", ".join(sorted(p.name for suffix in SUFFIXES for p in folder.glob(f"*{suffix}")))
        raise InputError(f"{folder}: no split {split!r}; there are {there or 'no files of sentences'}")
    return found


def sample_sentences(path: Path, limit: int | None, seed: int) -> list[Sentence]:
    """All sentences of a file of a split, or `limit` of them drawn by `seed`, in file order."""
    return [Sentence(id=d.id, text=d.text) for d in drawn(read_examples(path), limit, seed)]


def _files(request: DataRequest) -> tuple[str, Path, Path | None]:
    """Name of the data, file of the split, file of the pool. Raises InputError if there is no such split."""
    pool = None if request.pool is None else Path(request.pool)
    path = Path(request.source)
    if path.is_file():
        return path.name.partition(".")[0], path, pool
    folder = path
    if not any(True for suffix in SUFFIXES for _ in path.glob(f"*{suffix}")):
        from el4ner.bench.hub_datasets import dataset_folder, split_names

        wanted = [request.split]
        if pool is None and TRAIN in split_names(request.source):
            wanted.append(TRAIN)
        folder = dataset_folder(request.source, wanted)
    gold = find_split(folder, request.split)
    if gold is None:
        there = ", ".join(sorted(p.name for suffix in SUFFIXES for p in folder.glob(f"*{suffix}")))
        raise InputError(f"{request.source}: no split {request.split!r}; there are {there or 'no files of sentences'}")
    return folder.resolve().name, gold, pool or find_split(folder, TRAIN)
