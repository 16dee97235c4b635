"""el4ner-bench compare: the permutation test by brute force, its error rate, its refusals."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from el4ner.bench.cli import group
from el4ner.bench.compare import Counts, compare, compare_all, holm, sentence_counts, show_p
from el4ner.metrics import pair_records


def f1(correct: int, predicted: int, gold: int) -> float:
    return 2 * correct / (predicted + gold)


def by_brute_force(a: Counts, b: Counts) -> float:
    """Every choice of sentences whose answers change sides."""
    gold = int(a[:, 2].sum())
    found = []
    for sides in itertools.product((False, True), repeat=len(a)):
        one = np.array([b[i] if swapped else a[i] for i, swapped in enumerate(sides)]).sum(axis=0)
        other = np.array([a[i] if swapped else b[i] for i, swapped in enumerate(sides)]).sum(axis=0)
        found.append(abs(f1(one[0], one[1], gold) - f1(other[0], other[1], gold)))
    seen = abs(f1(*a.sum(axis=0)) - f1(*b.sum(axis=0)))
    return float(np.mean([value >= seen - 1e-12 for value in found]))


def random_counts(rng: np.random.Generator, n: int, skill: float, gold: Any) -> Counts:
    correct = rng.binomial(gold, skill)
    return np.stack([correct, correct + rng.integers(0, 2, n), gold], axis=1)


@pytest.mark.parametrize("seed", range(4))
def test_small_cases_are_exact_and_larger_ones_near(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gold = rng.integers(1, 4, 10)
    a, b = random_counts(rng, 10, 0.7, gold), random_counts(rng, 10, 0.5, gold)
    exact = compare("a", a, "b", b)
    assert exact.is_exact
    assert exact.p == pytest.approx(by_brute_force(a, b), abs=1e-12)
    sampled = compare("a", a, "b", b, permutations=200 if exact.differing > 7 else 100)
    if not sampled.is_exact:
        assert sampled.p == pytest.approx(exact.p, abs=0.12)
    assert (exact.f1_a, exact.f1_b) == (f1(*a.sum(axis=0)), f1(*b.sum(axis=0)))
    assert exact.ci95[0] <= exact.difference <= exact.ci95[1]


def test_a_system_is_not_better_than_itself_and_sides_may_be_exchanged() -> None:
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 4, 300)
    a, b = random_counts(rng, 300, 0.7, gold), random_counts(rng, 300, 0.5, gold)
    same = compare("a", a, "a", a)
    assert (same.p, same.difference, same.differing) == (1.0, 0.0, 0)
    one, other = compare("a", a, "b", b), compare("b", b, "a", a)
    assert one.difference == -other.difference
    assert one.p == other.p
    assert one.p < 0.01
    assert not one.is_exact
    with pytest.raises(ValueError, match="same sentences"):
        compare("a", a, "b", b[:-1])


def test_equal_systems_are_told_apart_about_as_often_as_promised() -> None:
    values = []
    for seed in range(150):
        rng = np.random.default_rng(1000 + seed)
        gold = rng.integers(0, 4, 80)
        sides = random_counts(rng, 80, 0.6, gold), random_counts(rng, 80, 0.6, gold)
        values.append(compare("a", sides[0], "b", sides[1], seed=seed, permutations=300, n_bootstrap=1).p)
    assert 0.005 < np.mean([p < 0.1 for p in values]) < 0.19
    assert 0.4 < np.mean(values) < 0.6


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    assert (show_p(0.0004), show_p(0.0361)) == ("p < 0.001", "p = 0.036")


def test_several_systems_against_the_best_or_the_one_named() -> None:
    rng = np.random.default_rng(2)
    gold = rng.integers(1, 4, 60)
    counts = {name: random_counts(rng, 60, skill, gold) for name, skill in (("low", 0.2), ("high", 0.9), ("mid", 0.5))}
    found = compare_all(counts, permutations=200)
    assert [(c.a, c.b) for c in found] == [("mid", "high"), ("low", "high")]
    assert all(c.p_holm is not None and c.p_holm >= c.p for c in found)
    assert [(c.a, c.b) for c in compare_all(counts, "mid", permutations=200)] == [("high", "mid"), ("low", "mid")]


def test_predictions_without_gold_count_against_a_system() -> None:
    gold = [{"id": "1", "text": "Oslo .", "entities": [{"start": 0, "end": 4, "label": "place"}]}]
    extra = {"id": "9", "text": "Rome", "entities": [{"start": 0, "end": 4, "label": "place"}]}
    assert sentence_counts(pair_records(gold, [*gold, extra])).tolist() == [[1, 2, 1]]


# The command


def lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_files(tmp_path: Path) -> None:
    entity = {"start": 0, "end": 4, "label": "place"}
    gold = [{"id": str(n), "text": "Oslo .", "entities": [entity]} for n in range(12)]
    good = [{**g, "entities": [entity] if n else []} for n, g in enumerate(gold)]
    bad = [{**g, "entities": []} for g in gold]
    a, b = lines(tmp_path / "a.jsonl", good), lines(tmp_path / "b.jsonl", bad)
    golden = lines(tmp_path / "gold.jsonl", gold)
    done = CliRunner().invoke(group, ["compare", str(a), str(b), "--gold", str(golden), "--json"])
    assert done.exit_code == 0, done.output
    row = json.loads(done.stdout)
    assert (row["f1_b"], row["differing"], row["is_exact"]) == (0.0, 11, True)
    assert row["p"] == 2 / 2**11  # only this split and its mirror image are so far apart
    text = CliRunner().invoke(group, ["compare", str(a), str(b), "--gold", str(golden)]).stdout
    assert "+0.957" in text
    assert "p < 0.001" in text
    for arguments, message in (
        ([str(a), str(b)], "--gold FILE"),
        ([str(a), str(b), str(a)], "3 places"),
        ([str(a), "nowhere:x", "--gold", str(golden)], "neither a predictions file nor DIR:NAME"),
        ([str(tmp_path), "--gold", str(golden)], "--gold goes with A and B"),
    ):
        done = CliRunner().invoke(group, ["compare", *arguments])
        assert done.exit_code != 0
        assert message in str(done.exception)


def test_files_without_a_common_id_are_told_apart_from_bad_predictions(tmp_path: Path) -> None:
    gold, other = tmp_path / "gold.jsonl", tmp_path / "other.jsonl"
    for path, name in ((gold, "a"), (other, "b")):
        entity = {"start": 0, "end": 3, "label": "person"}
        path.write_text(json.dumps({"id": name, "text": "Ada", "entities": [entity]}) + "\n")
    with pytest.warns(UserWarning, match="none of its ids occurs in gold"):
        done = CliRunner().invoke(group, ["compare", str(gold), str(other), "--gold", str(gold)])
    assert done.exit_code == 0, done.output
