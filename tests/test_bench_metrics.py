"""All metrics of a system: by hand on small cases, and against nervaluate and seqeval on random and real ones."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from el4ner.bench.calibration import calibration, curve, ece, wilson
from el4ner.bench.error_kinds import mistakes
from el4ner.bench.metrics import run_metrics
from el4ner.bench.metrics_semeval import OUTCOMES, SCHEMES, outcomes
from el4ner.metrics import evaluate, pair_records

TEXT = "Ada Lovelace lived in New York ."
ADA, YORK = (0, 12, "person"), (22, 30, "place")
Triple = tuple[int, int, str]


def record(*entities: tuple[Any, ...], id: str = "1", text: str = TEXT, **extra: Any) -> dict[str, Any]:
    keys = ("start", "end", "label", "score")
    return {"id": id, "text": text, "entities": [dict(zip(keys, e, strict=False)) for e in entities], **extra}


def measured(gold: Sequence[Any], predicted: Sequence[Any], **options: Any) -> dict[str, Any]:
    return run_metrics(
        gold, predicted, options.pop("pool", None), options.pop("stages", None), n_bootstrap=50, **options
    )


# By hand


def test_strict_is_evaluate_with_the_same_intervals() -> None:
    gold = [record(ADA, YORK, id=str(n)) for n in range(9)]
    predicted = [record(*(ADA, (22, 25, "place"))[: n % 3], id=str(n)) for n in range(9)]
    strict = run_metrics(gold, predicted, seed=3, n_bootstrap=300)["strict"]
    whole = evaluate(gold, predicted, n_bootstrap=300, seed=3)
    assert whole.intervals is not None
    assert strict["ci95"] == pytest.approx(list(whole.intervals["f1"]), abs=1e-12)
    assert strict["recall_ci95"] == pytest.approx(list(whole.intervals["recall"]), abs=1e-12)
    assert (strict["precision"], strict["recall"], strict["f1"]) == (6 / 9, 6 / 18, 12 / 27)
    assert strict["ci95"][0] < strict["f1"] < strict["ci95"][1]


def test_lost_repeated_and_invented_entities_are_errors_everywhere() -> None:
    gold = [record(ADA, id="1"), record(YORK, id="2")]
    predicted = [record(ADA, ADA, (90, 95, "place"), id="1"), record(YORK, id="9")]  # "2" is lost, "9" is nobody's
    result = measured(gold, predicted)
    for name in ("strict", "spans"):
        assert (result[name]["correct"], result[name]["predicted"], result[name]["support"]) == (1, 4, 2), name
    for scheme in SCHEMES:
        counts = [result["semeval"][scheme][name] for name in OUTCOMES]
        assert counts == [1, 0, 0, 1, 3], scheme
    assert "reason" in result["seqeval"]
    wrong = {kind: n for kind, n in result["errors"].items() if n}
    assert wrong == {"duplicate": 1, "not_in_text": 1, "spurious": 1, "missed": 1}
    assert result["problems"]["lost_records"] == result["problems"]["extra_records"] == 1
    assert result["labels"]["place"]["predicted"] == 2


def test_entities_seen_in_the_pool() -> None:
    pool = [record(ADA, text=TEXT.upper()), record((0, 8, "team"), text="New York won .")]
    gold = [record(ADA, YORK, id="1"), record((0, 4, "place"), text="Oslo .", id="2")]
    predicted = [record(ADA, (22, 30, "team"), id="1"), record((0, 4, "place"), text="Oslo .", id="2")]
    seen = measured(gold, predicted, pool=pool)["seen"]
    counts = {name: [seen[name][key] for key in ("correct", "predicted", "support")] for name in seen}
    # New York is known as a team: calling it one is a claim about a seen entity
    assert counts == {"seen": [1, 2, 1], "seen_other_label": [0, 0, 1], "unseen": [1, 1, 1]}
    assert measured(gold, predicted)["seen"] is None


def test_nested_gold_and_sizes() -> None:
    text = "the human IL-2 gene and CD28"
    outer, inner, flat = (4, 19, "dna"), (10, 14, "protein"), (24, 28, "protein")
    gold = [record(outer, inner, flat, text=text)]
    result = measured(gold, [record(outer, flat, text=text)])
    kept = {place: (row["kept"], row["gold"]) for place, row in result["nested"].items() if row["gold"]}
    assert kept == {"flat": (1, 1), "inner": (0, 1), "outer": (1, 1)}
    assert measured([record(flat, text=text)], [record(flat, text=text)])["nested"] is None
    # "human IL-2 gene" has five word units, "IL-2" three, "CD28" one
    sizes = {name: (row["correct"], row["support"]) for name, row in result["entity_words"].items()}
    assert sizes == {"1": (1, 1), "2": (0, 0), "3": (0, 1), "4": (0, 0), "5+": (1, 1)}
    assert result["sentence_words"]["1-10"]["support"] == 3
    assert list(result["sentence_words"]) == ["1-10", "11-20", "21-40", "41+"]


def test_where_entities_are_lost() -> None:
    gold = [record(ADA, YORK, id="1"), record(YORK, id="2"), record(ADA, id="3")]
    ada, york = list(ADA), list(YORK)
    stages = [
        {"id": "1", "extract": [ada[:2], york[:2], [4, 12]], "classify": [ada, york], "verify": [ada]},
        {"id": "2", "extract": [york[:2]], "classify": [[22, 30, "person"]], "verify": []},
    ]  # nothing is known of "3": it counts as lost at once
    rows = measured(gold, [record(ADA, id="1"), record(id="2"), record(id="3")], stages=stages)["stages"]
    assert [(r["stage"], r["candidates"], r["kept"], r["gold"], r["lost"]) for r in rows] == [
        ("extract", 4, 3, 4, 1),
        ("classify", 3, 2, 4, 1),
        ("verify", 1, 1, 4, 1),
        ("output", 1, 1, 4, 0),
    ]
    assert rows[0]["recall"] == 0.75
    only = measured(gold, [record(ADA, id="1")], stages=[{"id": "1", "extract": []}])["stages"]
    assert [row["stage"] for row in only] == ["extract", "output"]


def test_kinds_of_errors_and_confusion() -> None:
    gold = record(ADA, YORK, (31, 32, "mark"))
    found = [(0, 12, "place"), (22, 25, "place"), (13, 18, "verb"), (26, 30, "team")]
    (pair,) = pair_records([gold], [record(*found)])
    kinds = [(m.kind, m.claim and m.claim.triple, m.gold) for m in mistakes(pair)]
    assert kinds == [
        ("wrong_label", (0, 12, "place"), ADA),
        ("wrong_boundary", (22, 25, "place"), YORK),
        ("spurious", (13, 18, "verb"), None),
        ("wrong_both", (26, 30, "team"), YORK),
        ("missed", None, (31, 32, "mark")),
    ]
    rows = {(row["gold"], row["predicted"]): row["n"] for row in measured([gold], [record(*found)])["confusion"]}
    assert rows == {
        ("person", "place"): 1,
        ("place", ""): 1,
        ("mark", ""): 1,
        ("", "place"): 1,
        ("", "verb"): 1,
        ("", "team"): 1,
    }


def test_nothing_predicted_and_nothing_to_find() -> None:
    result = measured([record(id="1"), record(id="2")], [record(id="1"), record(id="2")])
    assert result["strict"]["f1"] == 0.0
    assert result["calibration"] is None
    assert result["labels"] == {}
    assert result["seqeval"]["macro"]["f1"] == 0.0
    json.dumps(result, allow_nan=False)


# Calibration


def test_calibration_by_hand() -> None:
    scores = np.array([0.9, 0.9, 0.9, 0.9, 0.1, 0.1, 0.1, 0.1])
    right = np.array([1.0, 1, 1, 0, 0, 0, 0, 1])
    assert ece(scores, right, 2) == pytest.approx(0.15)
    found = calibration(scores, right)
    assert found is not None
    assert found["brier"] == pytest.approx((3 * 0.01 + 0.81 + 3 * 0.01 + 0.81) / 8)
    assert found["brier_skill"] == pytest.approx(1 - found["brier"] / 0.25)
    assert (found["entities"], found["right"], found["bins"]) == (8, 4, 8)
    assert [row["n"] for row in curve(np.linspace(0, 1, 31), np.ones(31))] == [3] + [2] * 14
    sure = calibration(np.ones(40), np.ones(40))
    assert sure is not None
    assert (sure["ece"], sure["brier_skill"]) == (0.0, None)  # all right: no rate to be better than
    assert wilson(0.5, 100) == pytest.approx([0.4038, 0.5962], abs=1e-4)


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.booleans()), min_size=1, max_size=60), st.randoms()
)
@settings(max_examples=50, deadline=None)
def test_ties_do_not_depend_on_order(items: list[tuple[float, bool]], rng: random.Random) -> None:
    shuffled = items[:]
    rng.shuffle(shuffled)
    values = [ece(*(np.array(column, dtype=np.float64) for column in zip(*x, strict=True))) for x in (items, shuffled)]
    assert values[0] == pytest.approx(values[1], abs=1e-12)
    assert 0 <= values[0] <= 1


def test_scores_drawn_from_themselves_look_calibrated_and_others_do_not() -> None:
    rng = np.random.default_rng(5)
    scores = rng.random(3000)
    right = (rng.random(3000) < scores).astype(np.float64)
    good, bad = calibration(scores, right), calibration(scores**3, right)
    assert good is not None
    assert bad is not None
    assert good["ece"] < good["ece_if_calibrated"]["p95"] * 1.3 < 0.05
    assert bad["ece"] > 0.1 > bad["ece_if_calibrated"]["p95"]
    assert good["brier_skill"] > max(0.2, bad["brier_skill"])


def test_repeated_and_misplaced_entities_count_as_wrong_scores() -> None:
    gold = [record(ADA)]
    predicted = [record((*ADA, 0.9), (*ADA, 0.9), (90, 99, "x", 0.9), (22, 30, "place"))]
    found = measured(gold, predicted)["calibration"]
    assert (found["entities"], found["right"]) == (3, 1)  # the last has no score


# Against nervaluate


def spans(draw: Any, length: int, is_flat: bool) -> list[Triple]:
    found: set[Triple] = set()
    position = 0
    for _ in range(draw(st.integers(0, 6))):
        start = position + draw(st.integers(0, 3)) if is_flat else draw(st.integers(0, length - 1))
        end = min(length, start + draw(st.integers(1, 5)))
        if start >= end:
            break
        found.add((start, end, draw(st.sampled_from("abc"))))
        position = end
    return sorted(found)


@st.composite
def sentences(draw: Any, is_flat: bool) -> list[tuple[list[Triple], list[Triple]]]:
    return [(spans(draw, 20, is_flat), spans(draw, 20, is_flat)) for _ in range(draw(st.integers(1, 5)))]


def nervaluate_counts(cases: Sequence[tuple[list[Triple], list[Triple]]]) -> dict[str, list[int]]:
    """Counts in the order of OUTCOMES; its ends are inclusive."""
    nervaluate = pytest.importorskip("nervaluate")
    gold, found = (
        [[{"label": label, "start": s, "end": e - 1} for s, e, label in case[side]] for case in cases]
        for side in (0, 1)
    )
    results = nervaluate.Evaluator(gold, found, tags=["a", "b", "c", "x"], loader="dict").evaluate()["overall"]
    names = {"strict": "strict", "exact": "exact", "partial": "partial", "type": "ent_type"}
    return {s: [getattr(results[n], outcome) for outcome in OUTCOMES] for s, n in names.items()}


def our_counts(cases: Sequence[tuple[list[Triple], list[Triple]]], scheme: str) -> list[int]:
    return [int(n) for n in np.sum([outcomes(gold, found, scheme) for gold, found in cases], axis=0)]


@given(sentences(is_flat=True))
@settings(max_examples=300, deadline=None)
def test_equals_nervaluate_on_flat_data(cases: list[tuple[list[Triple], list[Triple]]]) -> None:
    expected = nervaluate_counts(cases)
    assert {scheme: our_counts(cases, scheme) for scheme in SCHEMES} == expected


@given(sentences(is_flat=False))
@settings(max_examples=300, deadline=None)
def test_equals_nervaluate_on_overlapping_data_where_exact_matches_come_first(
    cases: list[tuple[list[Triple], list[Triple]]],
) -> None:
    """nervaluate takes predictions as they come; given those that match exactly first, it counts as we do."""
    for scheme in SCHEMES:
        width = 2 if scheme in ("exact", "partial") else 3
        ordered = []
        for gold, found in cases:
            left, exact = [one[:width] for one in gold], []
            for one in found:
                if one[:width] in left:
                    left.remove(one[:width])
                    exact.append(one)
            ordered.append((gold, exact + [one for one in found if one not in exact]))
        assert our_counts(cases, scheme) == nervaluate_counts(ordered)[scheme], scheme


def test_semeval_where_nervaluate_depends_on_order() -> None:
    gold, found = [(2, 5, "a")], [(0, 5, "a"), (2, 5, "a")]
    assert our_counts([(gold, found)], "strict") == [1, 0, 0, 0, 1]
    assert nervaluate_counts([(gold, found)])["strict"] == [0, 1, 0, 0, 1]  # the inexact one came first


# On real data, with predictions that are wrong in every way


def disturbed(gold: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Gold entities, some lost, moved to other word borders or relabelled; flat."""
    rng = random.Random(seed)
    labels = sorted({e["label"] for g in gold for e in g["entities"]})
    result = []
    for g in gold:
        found: list[tuple[int, int, str, float]] = []
        for e in g["entities"]:
            start, end, label = e["start"], e["end"], e["label"]
            if rng.random() < 0.2:
                continue
            if rng.random() < 0.2:
                end = start + len(g["text"][start:end].split(" ")[0])
            if rng.random() < 0.2:
                label = rng.choice(labels)
            if not found or found[-1][1] <= start:
                found.append((start, end, label, rng.random()))
        result.append(record(*found, id=g["id"], text=g["text"]))
    return result


@pytest.mark.parametrize("name", ["wnut17", "crossner_ai"])
def test_equals_nervaluate_and_seqeval_on_real_data(data_dir: Path, name: str) -> None:
    from iob_tags import spans_to_tags

    from el4ner.records import LabelledSpan, Span

    lines = (data_dir / name / "test.jsonl").read_text(encoding="utf-8").splitlines()
    gold = [json.loads(line) for line in lines]
    predicted = disturbed(gold, 1)
    result = measured(gold, predicted)
    labels = sorted(result["labels"])
    nervaluate = pytest.importorskip("nervaluate")
    dicts = [
        [[{"label": e["label"], "start": e["start"], "end": e["end"] - 1} for e in r["entities"]] for r in side]
        for side in (gold, predicted)
    ]
    overall = nervaluate.Evaluator(*dicts, tags=labels, loader="dict").evaluate()["overall"]
    for scheme, theirs in (("strict", "strict"), ("exact", "exact"), ("partial", "partial"), ("type", "ent_type")):
        ours = result["semeval"][scheme]
        assert [ours[n] for n in OUTCOMES] == [getattr(overall[theirs], n) for n in OUTCOMES], scheme
        assert (ours["precision"], ours["recall"], ours["f1"]) == pytest.approx(
            (overall[theirs].precision, overall[theirs].recall, overall[theirs].f1), abs=1e-12
        )

    seqeval = pytest.importorskip("seqeval.metrics")
    scheme = pytest.importorskip("seqeval.scheme").IOB2
    tags: list[list[list[str]]] = [[], []]
    for g, p in zip(gold, predicted, strict=True):
        offsets, at = [], 0
        for token in g["tokens"]:
            at = g["text"].index(token, at)
            offsets.append(Span(at, at + len(token)))
            at += len(token)
        for side, r in zip(tags, (g, p), strict=True):
            side.append(spans_to_tags(offsets, [LabelledSpan(e["start"], e["end"], e["label"]) for e in r["entities"]]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = seqeval.classification_report(*tags, mode="strict", scheme=scheme, output_dict=True, zero_division=0)
    for ours, theirs in (("micro", "micro avg"), ("macro", "macro avg"), ("weighted", "weighted avg")):
        expected = [float(report[theirs][key]) for key in ("precision", "recall", "f1-score")]
        assert list(result["seqeval"][ours].values()) == pytest.approx(expected, abs=1e-12), ours
