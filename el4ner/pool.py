"""The pool: labelled sentences in a canonical order, their labels, folds and strings.

The order in which a file lists its sentences does not matter: the pool sorts them by content, and every later choice
(folds, samples, ties) depends on content alone.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from el4ner.errors import LabelsError, PoolError
from el4ner.grouping import FOLDS_VERSION, folds_of
from el4ner.lines import excerpt
from el4ner.records import Demonstration, Label, LabelledSpan, Sentence, Span
from el4ner.text import occurrences, words

BUILTIN = "builtin"
"""Stands for the pool and the labels that come with el4ner; a file of that name is ./builtin."""


@dataclass(frozen=True)
class Pool:
    """Labelled sentences, sorted by content, and the labels in use.

    folds (N): the fold of each sentence, as of `grouping.folds_of`: copies of a text share one, neighbours mostly do.
    A span carries one label: of several that a sentence lists for it the first counts. second_labels: how many do not.
    name, labels_name: what messages call the pool and the file that defines its labels.
    """

    sentences: tuple[Demonstration, ...]
    labels: tuple[Label, ...]
    n_folds: int = 5
    name: str = BUILTIN
    labels_name: str = "the labels file"
    digests: tuple[str, ...] = field(init=False)
    second_labels: int = field(init=False)

    def __post_init__(self) -> None:
        single = [one_label(d) for d in self.sentences]
        dropped = sum(len(d.entities) - len(own.entities) for d, own in zip(self.sentences, single, strict=True))
        object.__setattr__(self, "second_labels", dropped)
        keyed = sorted((_digest(d), position, d) for position, d in enumerate(single))
        object.__setattr__(self, "sentences", tuple(d for _, _, d in keyed))
        object.__setattr__(self, "digests", tuple(key for key, _, _ in keyed))
        known = {label.name for label in self.labels}
        for demonstration in self.sentences:
            for entity in demonstration.entities:
                if entity.label not in known:
                    raise PoolError(
                        f"pool {self.name}: sentence {demonstration.id!r} ({excerpt(demonstration.text)}) uses label "
                        f"{entity.label!r}, which {self.labels_name} does not define; add it there or choose from "
                        f"{', '.join(sorted(known))}"
                    )

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the labels, in the order every voter uses."""
        return tuple(label.name for label in self.labels)

    @cached_property
    def content(self) -> str:
        """SHA-256 over sentences, labels and the way folds are made; the order of the sentences does not matter."""
        digest = hashlib.sha256("\n".join(self.digests).encode())
        digest.update(repr((self.labels, FOLDS_VERSION)).encode())
        return digest.hexdigest()

    @cached_property
    def folds(self) -> tuple[int, ...]:
        """The fold of each sentence."""
        return folds_of(self.sentences, self.n_folds)

    @cached_property
    def strings(self) -> PoolStrings:
        """The entity surfaces of the pool, to be found in other texts."""
        return PoolStrings(d.text[e.start : e.end] for d in self.sentences for e in d.entities)

    def strings_without(self, fold: int) -> PoolStrings:
        """The entity surfaces that occur outside a fold, for proposals in that fold's own sentences."""
        return self._strings_by_fold[fold]

    @cached_property
    def _strings_by_fold(self) -> dict[int, PoolStrings]:
        return {
            fold: PoolStrings(
                d.text[e.start : e.end]
                for d, own in zip(self.sentences, self.folds, strict=True)
                if own != fold
                for e in d.entities
            )
            for fold in range(self.n_folds)
        }

    def sample(self, size: int, seed: int | None = None) -> list[int]:
        """Indices of `size` sentences, ascending; drawn by hash, so the same for the same pool in any order.

        seed: another draw for every seed; None for one that never changes.
        """
        salted = self.digests if seed is None else [f"{seed} {digest}" for digest in self.digests]
        keys = [hashlib.sha256(text.encode()).digest() for text in salted]
        order = sorted(range(len(self.sentences)), key=keys.__getitem__)
        return sorted(order[:size])

    def truth(self, index: int, spans: Iterable[Span]) -> NDArray[np.int64]:
        """The label index of each span (n,) of a sentence; the number of labels for a span that is no entity."""
        labels = {label: position for position, label in enumerate(self.label_names)}
        gold = {entity.span: labels[entity.label] for entity in self.sentences[index].entities}
        return np.array([gold.get(span, len(labels)) for span in spans], dtype=np.int64)

    def as_sentences(self, indices: Iterable[int]) -> list[Sentence]:
        """Pool sentences as if they were input."""
        return [Sentence(id=self.sentences[i].id, text=self.sentences[i].text) for i in indices]


class PoolStrings:
    """Finds the strings of a pool in a text, at word boundaries, exactly as written."""

    def __init__(self, surfaces: Iterable[str]) -> None:
        self._by_first_word: dict[str, list[str]] = {}
        for surface in sorted(set(surfaces)):
            units = words(surface)
            if units:
                self._by_first_word.setdefault(surface[units[0].start : units[0].end], []).append(surface)

    def find(self, text: str, units: Sequence[Span]) -> list[Span]:
        """Every occurrence in `text` of every string, sorted."""
        seen: set[str] = set()
        found: set[Span] = set()
        for unit in units:
            word = text[unit.start : unit.end]
            if word in seen:
                continue
            seen.add(word)
            for surface in self._by_first_word.get(word, ()):
                found.update(occurrences(text, surface, units))
        return sorted(found)


def one_label(demonstration: Demonstration) -> Demonstration:
    """The sentence with the first of the labels that it lists for a span."""
    first: dict[Span, LabelledSpan] = {}
    for entity in demonstration.entities:
        first.setdefault(entity.span, entity)
    if len(first) == len(demonstration.entities):
        return demonstration
    return replace(demonstration, entities=tuple(first.values()))


def _digest(demonstration: Demonstration) -> str:
    entities = sorted((e.start, e.end, e.label) for e in demonstration.entities)
    return hashlib.sha256(f"{demonstration.text}\0{entities}".encode("utf-8", "surrogatepass")).hexdigest()


def labels_of(sentences: Sequence[Demonstration]) -> tuple[Label, ...]:
    """The labels that occur, by name, without definitions."""
    names = sorted({entity.label for demonstration in sentences for entity in demonstration.entities})
    return tuple(Label(name) for name in names)


def folds_for(n_sentences: int, most: int) -> int:
    """Folds of a pool: `most` in small ones, fewer where a fit is dear and a part of the pool is plenty to fit on."""
    return min(most, 2 if n_sentences >= 4000 else 3 if n_sentences >= 300 else most)


_DATA = Path(__file__).parent / "data"


def labels_file(examples: str | None, labels_path: str | None) -> str | None:
    """The file that defines the labels of a run, None where a pool's own are taken, which have names only."""
    if labels_path is not None:
        return labels_path
    return str(_DATA / "labels.yaml") if examples in (None, BUILTIN) else None


def load_pool(examples: str | None, labels_path: str | None, n_folds: int = 5) -> Pool:
    """The pool of a run.

    Neither given: the built-in pool and labels. Examples only: the labels are those of the examples. Labels only: no
    sentences, zero-shot. Both: labels with their definitions, which the examples must not leave.
    Raises InputError, PoolError or LabelsError.
    """
    from el4ner.corpora import read_examples
    from el4ner.labels import read_labels

    if examples is None and labels_path is not None:
        return Pool((), read_labels(labels_path), n_folds, name=labels_path)
    if examples is None or examples == BUILTIN:
        labels = read_labels(str(labels_file(examples, labels_path)))
        builtin = tuple(read_examples(str(_DATA / "pool.jsonl")))
        named = {} if labels_path is None else {"labels_name": labels_path}
        return Pool(builtin, labels, folds_for(len(builtin), n_folds), **named)
    sentences = tuple(read_examples(examples))
    n_folds = folds_for(len(sentences), n_folds)
    labels = read_labels(labels_path) if labels_path is not None else labels_of(sentences)
    if not labels:
        raise LabelsError(f"{examples}: no sentence has an entity, so there are no labels; give --labels FILE")
    pool = Pool(sentences, labels, n_folds, name=examples, labels_name=labels_path or examples)
    if pool.second_labels:
        warnings.warn(
            f"{examples}: {pool.second_labels} spans have two labels, of which only the first counts; "
            "give a span one label",
            stacklevel=2,
        )
    return pool
