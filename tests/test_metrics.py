"""Scores: by hand on small cases, and against seqeval (strict, IOB2) on random and real ones."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from iob_tags import locate_tokens, spans_to_tags

from el4ner.errors import InputError, UsageError
from el4ner.metrics import MAX_BOOTSTRAP, bootstrap, evaluate, read_gold, read_predicted
from el4ner.records import Demonstration, Entity, LabelledSpan, Prediction, Span

TEXT = "Ada Lovelace lived in London ."
ADA, LONDON = (0, 12, "person"), (22, 28, "place")


def record(*entities: tuple[Any, ...], id: str | None = "1", text: str | None = TEXT, **extra: Any) -> dict[str, Any]:
    keys = ("start", "end", "label", "text")
    listed = [dict(zip(keys, entity, strict=False)) for entity in entities]
    return {"id": id, "text": text, "entities": listed, **extra}


def test_by_hand() -> None:
    gold = [record(ADA, LONDON), record(ADA, id="2"), record(id="3")]
    predicted = [record(ADA, (22, 28, "person")), record(id="2"), record(LONDON, id="3")]
    result = evaluate(gold, predicted, n_bootstrap=0)
    assert (result.micro.correct, result.micro.predicted, result.micro.support) == (1, 3, 3)
    assert (result.micro.precision, result.micro.recall, result.micro.f1) == (1 / 3, 1 / 3, 1 / 3)
    person, place = result.labels["person"], result.labels["place"]
    assert (person.precision, person.recall, person.f1, person.support) == (0.5, 0.5, 0.5, 2)
    assert (place.precision, place.recall, place.f1, place.support) == (0.0, 0.0, 0.0, 1)
    assert (result.macro.f1, result.macro.labels) == (0.25, 2)
    assert (result.spans.correct, result.spans.predicted, result.spans.support) == (2, 3, 3)
    assert result.intervals is None


def test_perfect_and_empty() -> None:
    gold = [record(ADA, LONDON)]
    perfect = evaluate(gold, gold)
    assert perfect.micro.f1 == perfect.macro.f1 == perfect.spans.f1 == 1.0
    assert perfect.intervals == dict.fromkeys(("precision", "recall", "f1"), (1.0, 1.0))
    nothing = evaluate([record()], [record()])
    assert nothing.micro.f1 == 0.0
    assert nothing.labels == {}
    with pytest.raises(UsageError, match="no gold records"):
        evaluate([], gold)
    for wrong in (-1, MAX_BOOTSTRAP + 1):
        with pytest.raises(UsageError, match=f"n_bootstrap={wrong}; use 0"):
            evaluate(gold, gold, n_bootstrap=wrong)


def test_duplicates_are_false_positives() -> None:
    result = evaluate([record(ADA)], [record(ADA, ADA)], n_bootstrap=0)
    assert (result.micro.correct, result.micro.predicted, result.micro.support) == (1, 2, 1)
    assert (result.spans.correct, result.spans.predicted) == (1, 2)
    assert result.problems.duplicates == 1


@pytest.mark.parametrize(
    "entity",
    [
        (-1, 3, "person"),
        (0, 99, "person"),
        (3, 3, "person"),
        (12, 0, "person"),
        (0, 12, "person", "Ada lovelace"),
    ],
)
def test_spans_not_in_the_text_are_false_positives(entity: tuple[Any, ...]) -> None:
    result = evaluate([record(ADA)], [record(entity)], n_bootstrap=0)
    assert (result.micro.correct, result.micro.predicted, result.micro.support) == (0, 1, 1)
    assert (result.spans.correct, result.spans.predicted) == (0, 1)
    assert result.problems.not_in_text == 1


def test_a_changed_text_is_noticed_even_where_entities_do_not_repeat_their_surface() -> None:
    result = evaluate([record(ADA, LONDON)], [record(ADA, LONDON, text=TEXT.lower())], n_bootstrap=0)
    assert result.problems.different_texts == 1
    assert result.problems.not_in_text == 2
    assert result.micro.f1 == 0.0
    without_text = [record(ADA, LONDON, text=None)]
    assert evaluate([record(ADA, LONDON)], without_text, n_bootstrap=0).micro.f1 == 1.0


def test_lost_and_extra_records_count() -> None:
    gold = [record(ADA, id="1"), record(ADA, LONDON, id="2")]
    predicted = [record(LONDON, id="9"), record(ADA, id="1", status="truncated")]
    result = evaluate(gold, predicted, n_bootstrap=0)
    assert (result.problems.lost_records, result.problems.extra_records) == (1, 1)
    assert (result.micro.correct, result.micro.predicted, result.micro.support) == (1, 2, 3)
    assert result.problems.not_ok == {"truncated": 1}
    assert result.sentences == 2


def test_repeated_ids_are_matched_in_order() -> None:
    gold = [record(ADA), record(LONDON), record()]
    assert evaluate(gold, [record(ADA), record(LONDON), record()], n_bootstrap=0).micro.f1 == 1.0
    result = evaluate(gold, [record(LONDON), record(ADA), record(), record(ADA)], n_bootstrap=0)
    assert (result.micro.correct, result.problems.extra_records, result.problems.lost_records) == (0, 1, 0)
    assert evaluate([record(ADA, id=None)], [record(ADA, id="1")], n_bootstrap=0).micro.f1 == 1.0


def test_nested_gold() -> None:
    text = "human IL-2 gene"
    gold = [record((0, 15, "dna"), (6, 10, "protein"), (6, 10, "dna"), text=text)]
    result = evaluate(gold, [record((6, 10, "protein"), (0, 15, "dna"), (0, 10, "dna"), text=text)], n_bootstrap=0)
    assert (result.micro.correct, result.micro.predicted, result.micro.support) == (2, 3, 3)
    assert (result.spans.correct, result.spans.predicted, result.spans.support) == (2, 3, 2)


def test_records_of_the_package_are_accepted_and_bad_ones_refused() -> None:
    gold = Demonstration("1", TEXT, (LabelledSpan(*ADA),))
    predicted = Prediction("1", TEXT, (Entity(0, 12, "Ada Lovelace", "person", 0.9),))
    assert evaluate([gold], [predicted], n_bootstrap=0).micro.f1 == 1.0
    with pytest.raises(ValueError, match="lists an entity twice"):
        evaluate([record(ADA, ADA)], [])
    with pytest.raises(ValueError, match='offset "0"'):
        evaluate([record(("0", 2, "person"))], [])
    with pytest.raises(ValueError, match="label null"):
        evaluate([record((0, 2, None))], [])
    with pytest.raises(ValueError, match="entities is null"):
        evaluate([{"id": "1", "text": "a"}], [])
    with pytest.raises(ValueError, match="status is null"):
        evaluate([record(ADA)], [{**record(ADA), "status": None}])
    with pytest.raises(ValueError, match="label null") as caught:
        evaluate([{**record((0, 2, None)), "id": "x" * 200_000}], [])
    assert len(str(caught.value)) < 200
    with pytest.raises(ValueError, match="text is 5"):
        evaluate([{"id": "1", "text": 5, "entities": []}], [])


def test_intervals_are_percentiles_of_resampled_sentences() -> None:
    rng = np.random.default_rng(3)
    gold_count = rng.integers(0, 4, 60)
    counts = np.stack([rng.binomial(gold_count, 0.6), rng.integers(0, 5, 60), gold_count], axis=1)
    counts[:, 1] = np.maximum(counts[:, 1], counts[:, 0])
    intervals = bootstrap(counts, 2000, seed=1)
    assert intervals == bootstrap(counts, 2000, seed=1)
    assert intervals != bootstrap(counts, 2000, seed=2)
    # A plain loop over the same definition; its own random numbers, so equal only up to the bootstrap's noise.
    samples = []
    for _ in range(2000):
        correct, predicted, gold = counts[rng.integers(0, 60, 60)].sum(axis=0)
        samples.append(2 * correct / (predicted + gold))
    assert intervals["f1"] == pytest.approx(np.percentile(samples, [2.5, 97.5]), abs=0.02)
    correct, predicted, gold = counts.sum(axis=0)
    assert intervals["recall"].low < correct / gold < intervals["recall"].high
    assert intervals["precision"].low < correct / predicted < intervals["precision"].high


def test_large_sets_are_resampled_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = np.tile(np.array([[1, 2, 2], [0, 1, 1]]), (50, 1))
    whole = bootstrap(counts, 500)
    monkeypatch.setattr("el4ner.metrics._CELLS_PER_CHUNK", 1000)
    pieces = bootstrap(counts, 500)
    assert pieces["f1"] == pytest.approx(whole["f1"], abs=0.02)


# Against seqeval


def seqeval_scores(gold: list[list[str]], predicted: list[list[str]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Micro and macro precision, recall, F1. `scheme` must be named, or "strict" falls back to lenient scoring."""
    seqeval = pytest.importorskip("seqeval.metrics")
    scheme = pytest.importorskip("seqeval.scheme").IOB2
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # seqeval warns where a label is never predicted
        for average in ("micro", "macro"):
            options = {"average": average, "mode": "strict", "scheme": scheme, "zero_division": 0}
            functions = (seqeval.precision_score, seqeval.recall_score, seqeval.f1_score)
            results.append(tuple(float(function(gold, predicted, **options)) for function in functions))
    return results[0], results[1]


def perturbed(
    rng: random.Random, n: int, entities: list[tuple[int, int, str]], labels: list[str]
) -> list[tuple[int, int, str]]:
    """Flat token spans like the given ones, with lost, moved, relabelled and invented spans."""
    taken: set[int] = set()
    result = []
    invented = [
        (first, min(n, first + rng.randint(1, 3)), rng.choice(labels)) for first in range(n) if rng.random() < 0.05
    ]
    for first, stop, label in [*entities, *invented]:
        if rng.random() < 0.2:
            continue
        if rng.random() < 0.2:
            first, stop = max(0, first + rng.randint(-1, 0)), min(n, stop + rng.randint(0, 1))
        if rng.random() < 0.2:
            label = rng.choice(labels)
        if not taken & set(range(first, stop)):
            taken |= set(range(first, stop))
            result.append((first, stop, label))
    return sorted(result)


def compare_with_seqeval(cases: list[tuple[str, list[Span], list[LabelledSpan]]], seed: int) -> None:
    rng = random.Random(seed)
    labels = [*sorted({entity.label for _, _, entities in cases for entity in entities}), "invented"]
    gold, predicted, gold_tags, predicted_tags = [], [], [], []
    for number, (text, offsets, entities) in enumerate(cases):
        by_start = {span.start: index for index, span in enumerate(offsets)}
        by_end = {span.end: index + 1 for index, span in enumerate(offsets)}
        token_spans = [(by_start[e.start], by_end[e.end], e.label) for e in entities]
        found = [
            LabelledSpan(offsets[first].start, offsets[stop - 1].end, label)
            for first, stop, label in perturbed(rng, len(offsets), token_spans, labels)
        ]
        gold.append(Demonstration(str(number), text, tuple(entities)))
        predicted.append(Demonstration(str(number), text, tuple(found)))
        gold_tags.append(spans_to_tags(offsets, entities))
        predicted_tags.append(spans_to_tags(offsets, found))
    result = evaluate(gold, predicted, n_bootstrap=0)
    assert 0.2 < result.micro.f1 < 0.95, "the perturbation makes no interesting case"
    micro, macro = seqeval_scores(gold_tags, predicted_tags)
    assert (result.micro.precision, result.micro.recall, result.micro.f1) == pytest.approx(micro, abs=1e-12)
    assert (result.macro.precision, result.macro.recall, result.macro.f1) == pytest.approx(macro, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_equals_seqeval_on_random_flat_data(seed: int) -> None:
    rng = random.Random(seed)
    cases = []
    for _ in range(150):
        tokens = [rng.choice(["a", "bb", "東京", "é", "👩\u200d🔬"]) for _ in range(rng.randint(1, 20))]
        text = " ".join(tokens)
        offsets = locate_tokens(text, tokens)
        spans, position = [], 0
        while (first := position + rng.randint(0, 4)) < len(tokens):
            stop = min(len(tokens), first + rng.randint(1, 3))
            spans.append(
                LabelledSpan(offsets[first].start, offsets[stop - 1].end, rng.choice(["per", "creative-work"]))
            )
            position = stop
        cases.append((text, offsets, spans))
    compare_with_seqeval(cases, seed)


def test_equals_seqeval_on_wnut17(data_dir: Path) -> None:
    path = data_dir / "wnut17" / "test.jsonl"
    tokens = [json.loads(line)["tokens"] for line in path.read_bytes().strip().split(b"\n")]
    gold = read_gold(path)
    cases = [(g.text, locate_tokens(g.text, t), list(g.entities)) for g, t in zip(gold, tokens, strict=True)]
    compare_with_seqeval(cases, 0)


# Files


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gold, predicted = Path("gold.jsonl"), Path("pred.jsonl")
    gold.write_text(json.dumps(record(ADA, id=None)) + "\n" + json.dumps(record(LONDON, id=None)) + "\n")
    predicted.write_text(
        json.dumps(Prediction("1", TEXT, (Entity(0, 12, "Ada Lovelace", "person", 0.9),)).to_dict()) + "\n"
    )
    result = evaluate(read_gold(gold), read_predicted(predicted), n_bootstrap=100)
    assert (result.micro.correct, result.problems.lost_records) == (1, 1)
    assert json.loads(json.dumps(result.to_dict()))["micro"]["support"] == 2
    for line, message in [
        ("{}", 'no "entities"; use a list of {start, end, label}, as el4ner predict writes it'),
        ('{"entities": null}', '"entities" is null; use a list of {start, end, label}, as el4ner predict writes it'),
        ('{"entities": [{"start": null}]}', 'record "2": an entity has the offset null; use integers'),
        ('{"entities": [3]}', 'record "2": an entity is 3; use an object with start, end and label'),
        ('{"id": [], "entities": []}', '"id" is a list ([]); use a string or an integer'),
        ("x", "not JSON"),
    ]:
        predicted.write_text('{"id": "1", "entities": []}\n' + line + "\n")
        with pytest.raises(InputError) as caught:
            read_predicted(predicted)
        assert str(caught.value).startswith(f"pred.jsonl:2: {message}")
