"""The parts of a report about how right systems are: strict scores and comparisons, other schemes, labels, groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from el4ner.bench.compare import show_p
from el4ner.bench.finished_run import FinishedRun
from el4ner.bench.metrics_semeval import SCHEMES
from el4ner.bench.report_charts import Bar, interval_chart
from el4ner.bench.report_model import Block, Cell, Chart, Row, Section, Table

_SEEN = {
    "seen": "in the pool with this label",
    "seen_other_label": "in the pool with other labels only",
    "unseen": "not in the pool",
}


def with_interval(value: float, interval: Sequence[float] | None) -> str:
    """ "0.475 [0.407, 0.546]" """
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def f1_of(score: Mapping[str, Any]) -> str:
    """F1 with its interval; a dash where there was nothing to find and nothing was found."""
    return with_interval(score["f1"], score.get("ci95")) if has_entities(score) else "–"


def has_entities(score: Mapping[str, Any]) -> bool:
    """Whether a score is about anything."""
    return bool(score["support"] or score["predicted"])


def ranked(run: FinishedRun) -> list[str]:
    """The run's systems, best strict F1 first."""
    return sorted(run.metrics, key=lambda name: (-run.metrics[name]["strict"]["f1"], name))


def strict_section(run: FinishedRun) -> Section:
    """Strict scores with intervals, as a chart and a table, and each system's comparison with the reference."""
    tests = {row["a"]: row for row in run.comparisons}
    reference = run.comparisons[0]["b"] if run.comparisons else ""
    names = ranked(run)
    best = run.metrics[names[0]]["strict"]["f1"]
    rows: list[Row] = []
    for name in names:
        m = run.metrics[name]
        rows.append(
            [
                name,
                Cell(f1_of(m["strict"]), is_strong=m["strict"]["f1"] == best),
                f"{m['strict']['precision']:.3f}",
                f"{m['strict']['recall']:.3f}",
                f"{m['macro']['f1']:.3f}",
                with_interval(m["spans"]["f1"], m["spans"]["ci95"]),
                f"{m['strict']['predicted']:,}",
                *_against(tests.get(name), is_reference=name == reference),
            ]
        )
    columns = ["system", "strict F1 [95%]", "precision", "recall", "macro F1", "spans F1 [95%]", "predicted"]
    blocks: list[Block] = [
        Chart(
            interval_chart(
                [Bar(n, run.metrics[n]["strict"]["f1"], run.metrics[n]["strict"]["ci95"]) for n in names],
                f"Strict F1 on {run.data['name']} with 95% intervals",
            ),
            "Strict F1 with 95% bootstrap intervals over sentences",
        ),
        Table(
            [*columns, f"F1 minus {reference} [95%]", "p", "p, Holm"] if run.comparisons else columns,
            rows if run.comparisons else [row[:7] for row in rows],
            note="Strict: same boundaries and same label. Spans: labels ignored. p: two-sided paired permutation test "
            "over sentences; Holm: corrected for the number of comparisons in this table. Invented, repeated and lost "
            "entities count as errors.",
        ),
    ]
    blocks += [_problems(run)] if _has_problems(run) else []
    return Section("Strict scores", blocks, level=3)


def _against(test: Mapping[str, Any] | None, *, is_reference: bool) -> list[str]:
    if test is None:
        return ["reference" if is_reference else "–", "", ""]
    low, high = test["ci95"]
    holm = test["p"] if test.get("p_holm") is None else test["p_holm"]
    return [
        f"{test['difference']:+.3f} [{low:+.3f}, {high:+.3f}]",
        *(show_p(p).removeprefix("p ").removeprefix("= ") for p in (test["p"], holm)),
    ]


_PROBLEMS = ("lost_records", "extra_records", "different_texts", "not_in_text", "duplicates")


def _has_problems(run: FinishedRun) -> bool:
    return any(m["problems"][p] for m in run.metrics.values() for p in (*_PROBLEMS, "not_ok"))


def _problems(run: FinishedRun) -> Table:
    rows = []
    for name in ranked(run):
        problems = run.metrics[name]["problems"]
        states = ", ".join(f"{n} {state}" for state, n in problems["not_ok"].items()) or "–"
        rows.append([name, *(f"{problems[p]:,}" for p in _PROBLEMS), states])
    return Table(
        ["system", *(p.replace("_", " ") for p in _PROBLEMS), "records not ok"], rows, "Problems, counted above"
    )


def schemes_section(run: FinishedRun) -> Section:
    """SemEval-2013 schemes and seqeval's averages."""
    names = ranked(run)
    semeval = [
        [
            name,
            *(
                with_interval(run.metrics[name]["semeval"][s]["f1"], run.metrics[name]["semeval"][s]["ci95"])
                for s in SCHEMES
            ),
        ]
        for name in names
    ]
    counts = [
        [f"{name}, {scheme}", *(f"{found[o]:,}" for o in ("correct", "incorrect", "partial", "missed", "spurious"))]
        for name in names
        for scheme, found in run.metrics[name]["semeval"].items()
    ]
    averages = []
    for name in names:
        found = run.metrics[name]["seqeval"]
        if "reason" in found:
            averages.append([name, found["reason"], "", ""])
        else:
            averages.append([name, *(f"{found[a]['f1']:.3f}" for a in ("micro", "macro", "weighted"))])
    note = "strict: span and label. exact: span. partial: half credit for overlap. type: overlap with the right label."
    outcomes = ["system, scheme", "correct", "incorrect", "partial", "missed", "spurious"]
    blocks = [
        Table(["system", *SCHEMES], semeval, "SemEval-2013 task 9.1, F1 [95%]", note),
        Table(outcomes, counts, "Counts behind it"),
        Table(["system", "micro F1", "macro F1", "weighted F1"], averages, "As seqeval in strict mode (IOB2)"),
    ]
    return Section("Other schemes", blocks, level=3, is_folded=True)


def labels_section(run: FinishedRun) -> Section:
    """F1 by label and system."""
    names = ranked(run)
    labels: dict[str, int] = {}
    for name in names:
        for label, score in run.metrics[name]["labels"].items():
            labels[label] = max(labels.get(label, 0), score["support"])
    rows: list[list[Cell | str]] = []
    for label in sorted(labels, key=lambda one: (-labels[one], one)):
        row: list[Cell | str] = [label, f"{labels[label]:,}"]
        for name in names:
            score = run.metrics[name]["labels"].get(label)
            row.append("–" if score is None else Cell(f1_of(score), score["f1"]))
        rows.append(row)
    return Section(
        "By label",
        [Table(["label", "gold", *names], rows, "Strict F1 [95%] by label")],
        level=3,
        is_folded=len(names) > 6,
    )


def groups_section(run: FinishedRun) -> Section:
    """Entities by whether the pool has them, by nesting, by length; sentences by length."""
    names = ranked(run)
    blocks: list[Block] = []
    known = [name for name in names if run.metrics[name]["seen"] is not None]
    if known:
        blocks.append(
            _grouped(run, known, "seen", _SEEN, "Strict F1 [95%] by whether the pool has the surface (case folded)")
        )
    nested = [name for name in names if run.metrics[name]["nested"] is not None]
    if nested:
        places = [p for p in run.metrics[nested[0]]["nested"] if run.metrics[nested[0]]["nested"][p]["gold"]]
        rows = [
            [
                place.replace("_", " "),
                f"{run.metrics[nested[0]]['nested'][place]['gold']:,}",
                *(
                    with_interval(run.metrics[n]["nested"][place]["recall"], run.metrics[n]["nested"][place]["ci95"])
                    for n in nested
                ),
            ]
            for place in places
        ]
        blocks.append(Table(["gold entity", "gold", *nested], rows, "Recall [95%] of nested entities"))
    for key, title in (("entity_words", "Strict F1 [95%] by length of the entity in words"),
                       ("sentence_words", "Strict F1 [95%] by length of the sentence in words")):  # fmt: skip
        blocks.append(_grouped(run, names, key, None, title))
    return Section("By kind of entity and sentence", blocks, level=3, is_folded=len(names) > 6)


def _grouped(run: FinishedRun, names: Sequence[str], key: str, titles: Mapping[str, str] | None, caption: str) -> Table:
    rows: list[list[Cell | str]] = []
    for group, score in run.metrics[names[0]][key].items():
        row: list[Cell | str] = [group if titles is None else titles.get(group, group), f"{score['support']:,}"]
        for name in names:
            found = run.metrics[name][key][group]
            row.append(Cell(f1_of(found), found["f1"] if has_entities(found) else None))
        rows.append(row)
    return Table(["group", "gold", *names], rows, caption)
