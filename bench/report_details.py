"""The parts of a report about where a system loses, what it costs, and whether its scores mean anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from el4ner.bench.compare import show_p
from el4ner.bench.error_kinds import KINDS, Mistake, mistakes
from el4ner.bench.finished_run import FinishedRun
from el4ner.bench.report_charts import Point, reliability_chart, scatter_chart, stage_chart
from el4ner.bench.report_model import Block, Cell, Chart, Charts, Example, Examples, Mark, Row, Section, Table
from el4ner.bench.report_scores import ranked, with_interval
from el4ner.metrics import Pair

_EXAMPLES = 2
_LEGEND = "Double underline or {braces}: gold. Tinted or ⟦brackets⟧: predicted. The most confident mistakes come first."
_AROUND = 90  # characters shown on either side of a mistake


def cost_section(run: FinishedRun) -> Section:
    """F1 beside tokens, seconds, memory and parameters."""
    names = [name for name in ranked(run) if name in run.timings]
    blocks: list[Block] = [_cost_table(run, names)]
    for title, cost in (
        ("seconds per sentence", _seconds),
        ("tokens per sentence, read and written", _tokens),
        ("parameters, in millions", _millions),
    ):
        points = []
        for name in names:
            x, strict = cost(run, name), run.metrics[name]["strict"]
            points += [] if x is None else [Point(name, x, strict["f1"], strict["ci95"])]
        if len({point.x for point in points}) > 1:  # one cost for all is no chart
            caption = f"Strict F1 against {title}"
            blocks.append(Chart(scatter_chart(points, caption, title), caption))
    return Section("What it costs", blocks, level=3)


def _cost_table(run: FinishedRun, names: Sequence[str]) -> Table:
    rows = []
    for name in names:
        timing, millions = run.timings[name], _millions(run, name)
        tokens = [_per_sentence(run, name, key) for key in ("prompt_tokens", "generated_tokens")]
        rows.append(
            [
                name,
                f"{run.metrics[name]['strict']['f1']:.3f}",
                *(_number(one, 1) for one in tokens),
                _number(timing.get("sentences_per_s"), 2),
                _number(timing.get("prediction_s"), 1),
                _number(timing.get("preparation_s"), 1),
                _number(timing.get("peak_memory_mib"), 0),
                "unknown" if millions is None else f"{millions:,.1f} M",
            ]
        )
    columns = ["system", "strict F1", "prompt tokens", "generated tokens", "sentences/s", "prediction s",
               "preparation s", "peak MiB", "parameters"]  # fmt: skip
    threads = ", ".join(sorted({str(run.timings[name].get("threads")) for name in names}))
    note = (
        f"Tokens per sentence; seconds for all sentences, threads: {threads or 'unknown'}. A dash stands for what was "
        "not measured, such as the speed of a system that was answered from memory."
    )
    return Table(columns, rows, note=note)


def _seconds(run: FinishedRun, name: str) -> float | None:
    speed = run.timings[name].get("sentences_per_s")
    return 1 / speed if speed else None


def _millions(run: FinishedRun, name: str) -> float | None:
    weights = run.entry(name).get("parameters")
    return weights / 1e6 if isinstance(weights, int) else None


def _tokens(run: FinishedRun, name: str) -> float | None:
    values = [_per_sentence(run, name, key) for key in ("prompt_tokens", "generated_tokens")]
    return None if None in values else sum(value for value in values if value is not None)


def _per_sentence(run: FinishedRun, name: str, key: str) -> float | None:
    """By the sentences whose cost is known: those of a chunk that was cut off when a run was killed are not."""
    value, timed = run.timings[name].get(key), run.timings[name].get("sentences") or run.data.get("sentences")
    return value / timed if isinstance(value, (int, float)) and timed else None


def _number(value: Any, digits: int) -> str:
    return f"{value:,.{digits}f}" if isinstance(value, (int, float)) else "–"


def stages_section(run: FinishedRun) -> Section | None:
    """Recall after each stage, for systems that have stages."""
    names = [name for name in ranked(run) if run.metrics[name].get("stages")]
    if not names:
        return None
    rows, charts = [], []
    for name in names:
        stages = run.metrics[name]["stages"]
        bars = [(stage["stage"], stage["recall"], stage["ci95"], stage["lost"]) for stage in stages]
        charts.append(Chart(stage_chart(bars, f"Recall of {name} by stage"), name))
        for stage in stages:
            left = f"{stage['kept']:,} of {stage['gold']:,}"
            recall = with_interval(stage["recall"], stage["ci95"])
            rows.append([name, stage["stage"], f"{stage['candidates']:,}", left, recall, f"{stage['lost']:,}"])
    note = "After extract a gold entity is left if its span is a candidate, afterwards if span and label are."
    columns = ["system", "after", "candidates", "gold entities left", "recall [95%]", "lost here"]
    return Section("Entities lost per stage", [*charts, Table(columns, rows, note=note, names=2)], level=3)


def calibration_section(run: FinishedRun) -> Section | None:
    """ECE, Brier skill and reliability of every system that gives scores."""
    names = [name for name in ranked(run) if run.metrics[name]["calibration"]]
    if not names:
        return None
    rows, charts = [], []
    for name in names:
        c = run.metrics[name]["calibration"]
        skill = c["brier_skill"]
        rows.append([name, f"{c['entities']:,}", f"{c['right'] / c['entities']:.3f}", f"{c['ece']:.3f}",
                     f"{c['ece_if_calibrated']['mean']:.3f} ({c['ece_if_calibrated']['p95']:.3f})", f"{c['brier']:.3f}",
                     "–" if skill is None else f"{skill:+.3f}"])  # fmt: skip
        charts.append(Chart(reliability_chart(c["curve"], f"Reliability of {name}"), name))
    columns = ["system", "entities", "right", "ECE", "ECE if calibrated, mean (95%)", "Brier", "Brier skill"]
    note = (
        "ECE over 15 bins of equal mass. If calibrated: the ECE that so many entities would show if every score were "
        "exactly right. Brier skill: above 0 is better than giving every entity the same score."
    )
    legend = "Share of right entities over score, by bin. Bars: 95% Wilson intervals; dashed: perfect calibration."
    return Section("Do scores mean what they say?", [Table(columns, rows, note=note), legend, Charts(charts)], level=3)


def decided_section(run: FinishedRun) -> Section | None:
    """What el4ner's systems decided on the pool: who is asked, who verifies, where scores are cut."""
    rows = []
    for name in ranked(run):
        decided = run.entry(name).get("report") or {}
        if "asked" in decided:
            cut = _number(decided.get("threshold"), 3)
            notes = "; ".join(map(str, decided.get("notes") or ())) or "–"
            rows.append([name, ", ".join(decided["asked"]), decided.get("verifier") or "–", notes, cut])
    if not rows:
        return None
    columns = ["system", "who is asked", "verifier", "notes", "least score"]
    return Section("Decided on the pool", [Table(columns, rows, names=4)], level=3)


def ablation_table(rows: Sequence[Mapping[str, Any]], sentences: int) -> Table:
    """Rows of `el4ner-bench ablate`: F1 of each variant, and what it loses or gains against its base."""
    found = []
    for row in rows:
        difference = p = "–"
        if row["name"] != row["base"]:
            low, high = row["ci95"]
            difference = f"{row['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
            p = show_p(row["p_holm"]).removeprefix("p ").removeprefix("= ")
        found.append([row["group"], row["name"], row["what"], row["base"], f"{row['f1']:.3f}", difference, p])
    columns = ["group", "variant", "what changes", "base", "strict F1", "minus base [95%]", "p, Holm"]
    note = "A variant changes one thing of its base. p: paired permutation test, corrected over all variants."
    return Table(columns, found, f"Strict F1 on {sentences:,} sentences", note, names=4)


def confusion_section(run: FinishedRun) -> Section:
    """A matrix for each system: gold label by predicted label, on the same span."""
    blocks: list[Block] = []
    for name in ranked(run):
        counts = {(row["gold"], row["predicted"]): row["n"] for row in run.metrics[name]["confusion"]}
        labels = sorted({label for key in counts for label in key} - {""})
        most = max((n for (gold, predicted), n in counts.items()), default=1)
        rows: list[list[Cell | str]] = []
        for gold in [*labels, ""]:
            row: list[Cell | str] = [gold or "no entity"]
            for predicted in [*labels, ""]:
                n = counts.get((gold, predicted), 0)
                row.append(Cell(f"{n:,}" if n else "·", (n / most) ** 0.5 if n else None, gold == predicted))
            rows.append(row)
        blocks.append(Table(["gold ↓ predicted →", *labels, "not predicted"], rows, name))
    note = "On exactly the same span. A wrong boundary counts as one entity not predicted and one where none is."
    return Section("Confusion between labels", [note, *blocks], level=3, is_folded=True)


def errors_section(run: FinishedRun) -> Section:
    """How many errors of each kind."""
    rows: list[Row] = []
    for name in ranked(run):
        errors = run.metrics[name]["errors"]
        most = max(1, *errors.values())
        rows.append(
            [name, *(Cell(f"{errors[kind]:,}", errors[kind] / most if errors[kind] else None) for kind in KINDS)]
        )
    return Section(
        "Kinds of errors",
        [Table(["system", *(kind.replace("_", " ") for kind in KINDS)], rows,
               note="One kind for each wrong entity. Missed: gold entities for which no wrong entity stands.")],
        level=3,
    )  # fmt: skip


def examples_sections(run: FinishedRun) -> Iterator[Section]:
    """Examples of each kind of error, one folded section for each system; none for a digest, which has no texts."""
    for name in ranked(run):
        if name in run.pairs:
            found = list(_examples(run.pairs[name]))
            if found:
                yield Section(f"Examples of errors: {name}", [Examples(found, _LEGEND)], level=3, is_folded=True)


def _examples(pairs: Sequence[Pair]) -> Iterator[Example]:
    by_kind: dict[str, list[tuple[float, int, Mistake]]] = {kind: [] for kind in KINDS}
    for number, pair in enumerate(pairs):
        for mistake in mistakes(pair):
            score = mistake.claim.score if mistake.claim and mistake.claim.score is not None else 0.0
            by_kind[mistake.kind].append((-score, number, mistake))
    for kind, found in by_kind.items():
        for _, number, mistake in sorted(found, key=lambda item: item[:2])[:_EXAMPLES]:
            yield _example(kind, pairs[number], mistake)


def _example(kind: str, pair: Pair, mistake: Mistake) -> Example:
    text = pair.text or ""
    spans = [(s, e, k) for s, e, k in _spans(mistake) if 0 <= s < e <= len(text)]
    start = max(0, min((s for s, _, _ in spans), default=0) - _AROUND)
    end = min(len(text), max((e for _, e, _ in spans), default=0) + _AROUND)
    before, after = "… " if start else "", " …" if end < len(text) else ""
    shift = start - len(before)
    marks = [Mark(s - shift, e - shift, k) for s, e, k in _segments(spans)]
    return Example(
        kind.replace("_", " "), f"sentence {pair.id}", before + text[start:end] + after, marks, _says(text, mistake)
    )


def _spans(mistake: Mistake) -> list[tuple[int, int, str]]:
    spans = [] if mistake.gold is None else [(mistake.gold[0], mistake.gold[1], "gold")]
    return spans + ([] if mistake.claim is None else [(mistake.claim.start, mistake.claim.end, "predicted")])


def _segments(spans: Sequence[tuple[int, int, str]]) -> Iterator[tuple[int, int, str]]:
    """Stretches without overlap, in order, each with its kind; "both" where gold and predicted meet."""
    borders = sorted({border for start, end, _ in spans for border in (start, end)})
    for start, end in pairwise(borders):
        kinds = {kind for s, e, kind in spans if s <= start and end <= e}
        if kinds:
            yield start, end, "both" if len(kinds) == 2 else kinds.pop()


def _says(text: str, mistake: Mistake) -> str:
    parts = []
    if mistake.claim is not None:
        claim = mistake.claim
        score = "" if claim.score is None else f" ({claim.score:.2f})"
        inside = 0 <= claim.start < claim.end <= len(text)
        surface = f"“{text[claim.start : claim.end]}”" if inside else f"[{claim.start}:{claim.end}]"
        parts.append(f"predicted {surface} as {claim.label}{score}")
    if mistake.gold is not None:
        start, end, label = mistake.gold
        parts.append(f"gold “{text[start:end]}” is {label}")
    return ", ".join(parts)
