"""Strict scores of predicted entities against gold ones, with bootstrap intervals and counts of what went wrong.

A predicted entity is correct if a gold entity of its sentence has the same start, end and label. Each sentence is a
set of (start, end, label), so nested and crossing entities are scored like any others. Nothing is removed before
counting: a span that is not in the text, a second copy of an entity and every entity of a record that gold does not
have are false positives; the gold entities of a lost record are missed.

    precision = correct / predicted    recall = correct / gold    F1 = 2 correct / (predicted + gold)

A ratio without denominator is 0. Micro scores sum the counts over all sentences, macro scores are the means of the
labels' scores over all labels that occur in gold or prediction, as seqeval defines them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from el4ner.errors import InputError, UsageError
from el4ner.jsonl import read_pool, read_records
from el4ner.lines import LineError, display_name, excerpt, id_of, kind
from el4ner.records import Demonstration

_CELLS_PER_CHUNK = 2_000_000  # sampled sentences held at once: about 64 MB
MAX_BOOTSTRAP = 1_000_000
"""More resamplings than this change no digit that is shown."""


class Interval(NamedTuple):
    """A 95% bootstrap interval."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Score:
    """Precision, recall and F1 with the counts they are made of; `support` is the number of gold entities."""

    precision: float
    recall: float
    f1: float
    correct: int
    predicted: int
    support: int


@dataclass(frozen=True, slots=True)
class Mean:
    """Precision, recall and F1 averaged over `labels` labels."""

    precision: float
    recall: float
    f1: float
    labels: int


@dataclass(frozen=True, slots=True)
class Problems:
    """What counted as an error besides wrong spans and labels.

    lost_records: gold records without prediction. extra_records: predictions without gold record.
    different_texts: records whose predicted text is not the gold text. not_in_text: entities whose offsets lie
    outside the gold text or whose surface is not what stands there. duplicates: second copies of an entity.
    not_ok: predicted records by status, where it is not "ok".
    """

    lost_records: int = 0
    extra_records: int = 0
    different_texts: int = 0
    not_in_text: int = 0
    duplicates: int = 0
    not_ok: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of `evaluate`. `spans` ignores labels; `intervals` is None if no bootstrap was asked for."""

    sentences: int
    micro: Score
    intervals: Mapping[str, Interval] | None
    macro: Mean
    spans: Score
    labels: Mapping[str, Score]
    problems: Problems
    n_bootstrap: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, unrounded."""
        micro: dict[str, Any] = _plain(self.micro)
        if self.intervals is not None:
            micro["intervals"] = {name: list(interval) for name, interval in self.intervals.items()}
        return {
            "sentences": self.sentences,
            "micro": micro,
            "macro": _plain(self.macro),
            "spans": _plain(self.spans),
            "labels": {label: _plain(score) for label, score in self.labels.items()},
            "problems": {**_plain(self.problems), "not_ok": dict(self.problems.not_ok)},
            "bootstrap": {"samples": self.n_bootstrap, "seed": self.seed, "level": 0.95},
        }


def _plain(record: Score | Mean | Problems) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


class _Entity(NamedTuple):
    start: int
    end: int
    label: str
    surface: str | None  # None where the prediction does not repeat it
    score: float | None = None


class _Record(NamedTuple):
    id: str
    text: str | None
    entities: tuple[_Entity, ...]
    status: str


class Claim(NamedTuple):
    """A predicted entity and what it is worth: "valid" may be right; the others are errors whatever gold says."""

    start: int
    end: int
    label: str
    score: float | None
    kind: Literal["valid", "duplicate", "not_in_text"]

    @property
    def triple(self) -> tuple[int, int, str]:
        """Offsets and label, as gold lists them."""
        return self.start, self.end, self.label


@dataclass(frozen=True, slots=True)
class Pair:
    """What gold and prediction say of one sentence.

    text: as gold has it. is_lost: there is no prediction. is_extra: there is no gold record, so every claim is wrong.
    """

    id: str
    text: str | None
    gold: tuple[tuple[int, int, str], ...]
    claims: tuple[Claim, ...]
    is_lost: bool = False
    is_extra: bool = False

    @property
    def found(self) -> set[tuple[int, int, str]]:
        """The valid claims, each once; none of an extra record counts as found."""
        return set() if self.is_extra else {claim.triple for claim in self.claims if claim.kind == "valid"}


class _Sentence(NamedTuple):
    """What one sentence adds to the counts."""

    correct: Counter[str]
    predicted: Counter[str]
    gold: Counter[str]
    span_counts: tuple[int, int, int]  # correct, predicted, gold, labels ignored
    not_in_text: int
    duplicates: int


def pair_records(gold: Sequence[Any], predicted: Sequence[Any]) -> list[Pair]:
    """Each gold sentence with its checked prediction, in gold's order; then predictions without gold record.

    Arguments and matching are those of `evaluate`. Raises ValueError if gold is malformed or lists an entity twice.
    """
    pairs, extra = _match(
        [_record(item, position) for position, item in enumerate(gold, start=1)],
        [_record(item, position) for position, item in enumerate(predicted, start=1)],
    )
    return [_pair(one, other) for one, other in pairs] + [_pair(None, record) for record in extra]


def evaluate(gold: Sequence[Any], predicted: Sequence[Any], n_bootstrap: int = 1000, seed: int = 0) -> Evaluation:
    """Strict scores of predictions against gold.

    gold, predicted: mappings with `id`, `text`, `entities` as read from files (a missing id is the position, from 1),
    or objects with such attributes (Demonstration, Prediction). Records are matched by id, and by order among equal
    ids. Intervals are percentiles of `n_bootstrap` resamplings of the sentences (0: none), reproducible by `seed`.
    Raises ValueError if gold is malformed or lists an entity twice, UsageError if there is no gold at all or
    n_bootstrap is negative or above MAX_BOOTSTRAP.
    """
    if not 0 <= n_bootstrap <= MAX_BOOTSTRAP:
        raise UsageError(f"n_bootstrap={n_bootstrap}; use 0 for no intervals, 1000, or at most {MAX_BOOTSTRAP}")
    gold_records = [_record(item, position) for position, item in enumerate(gold, start=1)]
    if not gold_records:
        raise UsageError("no gold records; give at least one labelled sentence")
    predicted_records = [_record(item, position) for position, item in enumerate(predicted, start=1)]
    pairs, extra = _match(gold_records, predicted_records)
    sentences = [_compare(_pair(one, other)) for one, other in pairs]
    sentences += [_compare(_pair(None, record)) for record in extra]
    problems = Problems(
        lost_records=sum(1 for _, other in pairs if other is None),
        extra_records=len(extra),
        different_texts=sum(
            1 for one, other in pairs if other is not None and other.text is not None and other.text != one.text
        ),
        not_in_text=sum(sentence.not_in_text for sentence in sentences),
        duplicates=sum(sentence.duplicates for sentence in sentences),
        not_ok=dict(sorted(Counter(record.status for record in predicted_records if record.status != "ok").items())),
    )
    correct = _total(sentence.correct for sentence in sentences)
    found = _total(sentence.predicted for sentence in sentences)
    support = _total(sentence.gold for sentence in sentences)
    labels = {
        label: _score(correct[label], found[label], support[label]) for label in sorted(set(found) | set(support))
    }
    span_counts = np.array([sentence.span_counts for sentence in sentences], dtype=np.int64).sum(axis=0)
    counts = np.array(
        [(item.correct.total(), item.predicted.total(), item.gold.total()) for item in sentences], dtype=np.int64
    )
    return Evaluation(
        sentences=len(gold_records),
        micro=_score(*(int(value) for value in counts.sum(axis=0))),
        intervals=bootstrap(counts, n_bootstrap, seed) if n_bootstrap else None,
        macro=_mean(labels.values()),
        spans=_score(*(int(value) for value in span_counts)),
        labels=labels,
        problems=problems,
        n_bootstrap=n_bootstrap,
        seed=seed,
    )


def _total(counters: Iterable[Counter[str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for counter in counters:
        total.update(counter)
    return total


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _score(correct: int, predicted: int, support: int) -> Score:
    return Score(
        _ratio(correct, predicted),
        _ratio(correct, support),
        _ratio(2 * correct, predicted + support),
        correct,
        predicted,
        support,
    )


def _mean(scores: Iterable[Score]) -> Mean:
    table = [(score.precision, score.recall, score.f1) for score in scores]
    if not table:
        return Mean(0.0, 0.0, 0.0, 0)
    precision, recall, f1 = (sum(column) / len(table) for column in zip(*table, strict=True))
    return Mean(precision, recall, f1, len(table))


def bootstrap(counts: NDArray[np.int64], n_bootstrap: int, seed: int = 0) -> dict[str, Interval]:
    """95% percentile intervals of micro precision, recall and F1 over resampled sentences.

    counts (N, 3) i64: correct, predicted and gold entities of each sentence. Source: Efron, bootstrap percentile
    interval; sentences are the units, because entities of one sentence are not independent.
    """
    rng = np.random.default_rng(seed)
    n = len(counts)
    step = max(1, _CELLS_PER_CHUNK // n)
    sums = np.concatenate(
        [
            counts[rng.integers(0, n, size=(min(step, n_bootstrap - done), n))].sum(axis=1)
            for done in range(0, n_bootstrap, step)
        ]
    ).astype(np.float64)  # (n_bootstrap, 3)
    correct, predicted, gold = sums.T
    samples = {
        "precision": correct / np.maximum(predicted, 1),
        "recall": correct / np.maximum(gold, 1),
        "f1": 2 * correct / np.maximum(predicted + gold, 1),
    }
    return {
        name: Interval(*(float(value) for value in np.percentile(values, (2.5, 97.5))))
        for name, values in samples.items()
    }


def _field(item: Any, name: str, default: Any = None) -> Any:
    return item.get(name, default) if isinstance(item, Mapping) else getattr(item, name, default)


def _record(item: Any, position: int) -> _Record:
    identifier, text, entities = _field(item, "id"), _field(item, "text"), _field(item, "entities")
    where = f"record {position}" if identifier is None else f"record {excerpt(identifier)}"
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{where}: text is {excerpt(text)}; use a string")
    if entities is None or isinstance(entities, (str, Mapping)):
        raise ValueError(f"{where}: entities is {excerpt(entities)}; use a list")
    status = _field(item, "status", "ok")
    if not isinstance(status, str):
        raise ValueError(f'{where}: status is {excerpt(status)}; use a string, such as "ok"')
    return _Record(
        str(position) if identifier is None else str(identifier),
        text,
        tuple(_entity(entity, where) for entity in entities),
        status,
    )


def _entity(entity: Any, where: str) -> _Entity:
    if not isinstance(entity, Mapping) and not hasattr(entity, "start"):
        raise ValueError(f"{where}: an entity is {excerpt(entity)}; use an object with start, end and label")
    start, end, label = (_field(entity, name) for name in ("start", "end", "label"))
    for value in (start, end):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
            raise ValueError(
                f"{where}: an entity has the offset {excerpt(value)}; use integers, counted in code points"
            )
    if not isinstance(label, str):
        raise ValueError(f"{where}: an entity has the label {excerpt(label)}; use a string")
    score = _field(entity, "score")
    is_number = isinstance(score, (int, float)) and not isinstance(score, bool)
    return _Entity(int(start), int(end), label, _field(entity, "text"), float(score) if is_number else None)


def _check_score(entity: Mapping[str, Any]) -> None:
    """Raises LineError unless a predicted entity's score, if it has one, is a number from 0 to 1."""
    score = entity.get("score")
    if score is None:
        return
    if not isinstance(score, (int, float)) or isinstance(score, bool) or not 0 <= score <= 1:
        raise LineError(f"an entity has the score {excerpt(score)}; use a number from 0 to 1, or leave it out")


def _match(
    gold: Sequence[_Record], predicted: Sequence[_Record]
) -> tuple[list[tuple[_Record, _Record | None]], list[_Record]]:
    """Each gold record with its prediction, and the predictions left over; by id, by order among equal ids."""
    waiting: dict[str, list[_Record]] = defaultdict(list)
    for record in reversed(predicted):
        waiting[record.id].append(record)
    pairs = [(record, waiting[record.id].pop() if waiting.get(record.id) else None) for record in gold]
    return pairs, [record for records in waiting.values() for record in reversed(records)]


def _pair(gold: _Record | None, predicted: _Record | None) -> Pair:
    """Checks each predicted entity against the gold text and the entities before it."""
    gold_entities = [] if gold is None else [(entity.start, entity.end, entity.label) for entity in gold.entities]
    if gold is not None and len(set(gold_entities)) < len(gold_entities):
        raise ValueError(f"gold record {excerpt(gold.id)} lists an entity twice; list it once")
    seen: set[tuple[int, int, str]] = set()
    claims = []
    for entity in () if predicted is None else predicted.entities:
        triple = entity[:3]
        kind: Literal["valid", "duplicate", "not_in_text"] = "valid"
        if gold is not None and not _in_text(entity, gold, predicted):
            kind = "not_in_text"
        elif triple in seen:
            kind = "duplicate"
        else:
            seen.add(triple)
        claims.append(Claim(*triple, entity.score, kind))
    record = predicted if gold is None else gold
    return Pair(
        "" if record is None else record.id,
        None if gold is None else gold.text,
        tuple(gold_entities),
        tuple(claims),
        is_lost=predicted is None,
        is_extra=gold is None,
    )


def _compare(pair: Pair) -> _Sentence:
    """Counts of one sentence. Without gold record every predicted entity is wrong."""
    wanted = set(pair.gold)
    valid = [claim for claim in pair.claims if claim.kind == "valid"]
    spans = {(claim.start, claim.end) for claim in valid}
    wanted_spans = {(start, end) for start, end, _ in wanted}
    return _Sentence(
        Counter(claim.label for claim in valid if claim.triple in wanted),
        Counter(claim.label for claim in pair.claims),
        Counter(label for _, _, label in wanted),
        (len(spans & wanted_spans), len(spans) + len(pair.claims) - len(valid), len(wanted_spans)),
        sum(1 for claim in pair.claims if claim.kind == "not_in_text"),
        sum(1 for claim in pair.claims if claim.kind == "duplicate"),
    )


def _in_text(entity: _Entity, gold: _Record, predicted: _Record | None) -> bool:
    """Whether the entity lies in the gold text, and the gold text reads there as the prediction says."""
    text = gold.text
    if text is None:
        return 0 <= entity.start < entity.end
    if not 0 <= entity.start < entity.end <= len(text):
        return False
    surface = entity.surface
    if surface is None and predicted is not None and predicted.text is not None:
        surface = predicted.text[entity.start : entity.end]
    return surface is None or surface == text[entity.start : entity.end]


def read_gold(path: str | Path) -> list[Demonstration]:
    """Labelled sentences to score against, as `el4ner.jsonl.read_pool` reads them; same errors."""
    return read_pool(path)


def read_predicted(path: str | Path) -> list[dict[str, Any]]:
    """Output records, or any JSONL with `entities` [{start, end, label, text?}], to be scored.

    A missing id is the line number, as in `read_gold`. Offsets are not compared with the text here: `evaluate` counts
    those that do not fit as errors. Raises InputError naming the line if a record or an entity is malformed.
    """
    return list(iterate_predicted(path))


def iterate_predicted(path: str | Path) -> Iterator[dict[str, Any]]:
    """The same, one record after the other."""
    name = display_name(path)
    for line, record in read_records(path):
        try:
            record["id"] = id_of(record, line)
            if not isinstance(record.get("entities"), list):
                found = f'"entities" is {kind(record["entities"])}' if "entities" in record else 'no "entities"'
                raise LineError(f"{found}; use a list of {{start, end, label}}, as el4ner predict writes it")
            _record(record, line)
            for entity in record["entities"]:
                _check_score(entity)
        except ValueError as error:
            raise InputError(f"{name}:{line}: {error}") from None
        yield record
