"""All metrics of one system on one set of sentences, each with a 95% bootstrap interval over sentences.

Strict scores, macro scores, scores by label and counts of problems are `el4ner.metrics.evaluate`'s: nothing is removed
before counting, so invented, repeated and lost entities are errors. Beside them stand the SemEval-2013 schemes,
seqeval's averages, unlabelled spans, entities by whether the pool has them, by nesting and by length, recall after each
stage, calibration of scores, kinds of errors and confusion between labels.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from el4ner.bench.calibration import calibration, scored_claims
from el4ner.bench.error_kinds import confusion, error_counts
from el4ner.bench.metrics_semeval import Triple, overlaps, semeval
from el4ner.bench.resampling import Resampling
from el4ner.metrics import Pair, evaluate, pair_records
from el4ner.text import words

VERSION = 1
"""Changes when a metric is defined otherwise; what was computed before is then computed again."""

_SEEN = ("seen", "seen_other_label", "unseen")
_ENTITY_WORDS = (1, 2, 3, 4)
_SENTENCE_WORDS = (10, 20, 40)
_STAGES = ("extract", "classify", "verify")


def run_metrics(
    gold: Sequence[Any],
    predictions: Sequence[Any],
    pool: Sequence[Mapping[str, Any]] | None = None,
    stages: Sequence[Mapping[str, Any]] | None = None,
    *,
    seed: int = 0,
    n_bootstrap: int = 1000,
) -> dict[str, Any]:
    """Metrics of one system, plain data for JSON, unrounded.

    gold, predictions: records as `el4ner.metrics.evaluate` takes them. pool: records with `text` and `entities`, for
    entities seen and unseen; stages: per sentence {"id", "extract", "classify", "verify"}, for recall after each stage;
    where either is None, so is what needs it. Raises what `evaluate` raises.
    """
    whole = evaluate(gold, predictions, n_bootstrap=0, seed=seed)
    pairs = pair_records(gold, predictions)
    resampling = Resampling(len(pairs), n_bootstrap, seed)
    count = lru_cache(maxsize=None)(lambda text: len(words(text)))
    problems = {name: getattr(whole.problems, name) for name in whole.problems.__dataclass_fields__}
    return {
        "version": VERSION,
        "sentences": whole.sentences,
        "strict": _grouped(pairs, resampling, ["all"], lambda _text, _entity: "all")["all"],
        "macro": {name: getattr(whole.macro, name) for name in ("precision", "recall", "f1", "labels")},
        "labels": _grouped(pairs, resampling, list(whole.labels), lambda _, entity: entity[2]),
        "spans": resampling.score(np.array([_span_counts(pair) for pair in pairs], dtype=np.int64)),
        "semeval": semeval(pairs, resampling),
        "seqeval": seqeval_averages(pairs),
        "seen": None if pool is None else _by_seen(pairs, pool, resampling),
        "nested": _by_nesting(pairs, resampling),
        "entity_words": _by_size(pairs, resampling, _ENTITY_WORDS, lambda text, e: count(text[e[0] : e[1]])),
        "sentence_words": _by_size(pairs, resampling, _SENTENCE_WORDS, lambda text, _: count(text)),
        "stages": None if stages is None else _by_stage(pairs, stages, resampling),
        "problems": {**problems, "not_ok": dict(whole.problems.not_ok)},
        "errors": error_counts(pairs),
        "confusion": confusion(pairs),
        "calibration": calibration(*scored_claims(pairs), seed=seed),
        "bootstrap": {"samples": n_bootstrap, "seed": seed, "level": 0.95},
    }


def _grouped(
    pairs: Sequence[Pair], resampling: Resampling, groups: Sequence[str], group_of: Callable[[str, Triple], str]
) -> dict[str, Any]:
    """Strict scores by group of entities; group_of(text, triple) names a gold or claimed entity's group."""
    index = {group: number for number, group in enumerate(groups)}
    counts = np.zeros((len(groups), len(pairs), 3), dtype=np.int64)
    for row, pair in enumerate(pairs):
        text = pair.text or ""
        claimed = [claim.triple for claim in pair.claims]
        for column, entities in enumerate((pair.found & set(pair.gold), claimed, pair.gold)):
            for one in entities:
                counts[index[group_of(text, one)], row, column] += 1
    return {group: resampling.score(counts[number]) for group, number in index.items()}


def _span_counts(pair: Pair) -> tuple[int, int, int]:
    """Correct, predicted and gold spans of a sentence, labels ignored; claims that are not valid are wrong."""
    found = {one[:2] for one in pair.found}
    wanted = {one[:2] for one in pair.gold}
    claimed = len(pair.claims) if pair.is_extra else len(found) + sum(1 for c in pair.claims if c.kind != "valid")
    return len(found & wanted), claimed, len(wanted)


def _recall(pairs: Sequence[Pair], resampling: Resampling, kept: Sequence[set[Triple]], among: Any) -> dict[str, Any]:
    """Recall of the gold entities in `among` (per sentence a set), where `kept` are those that are still there."""
    counts = [(len(keep & group), 0, len(group)) for _, keep, group in zip(pairs, kept, among, strict=True)]
    score = resampling.score(np.array(counts, dtype=np.int64))
    return {"recall": score["recall"], "ci95": score["recall_ci95"], "kept": score["correct"], "gold": score["support"]}


def seqeval_averages(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Micro, macro and weighted averages as seqeval gives them in strict mode (IOB2), for flat data.

    Spans that do not overlap are the same as IOB2 tags over tokens whose borders are theirs, and tags made from spans
    are well formed, so the lenient conlleval score is the same number. What tags cannot say leaves {"reason": ...}.
    """
    for name, groups in (("gold", [pair.gold for pair in pairs]), ("predicted", [_claimed(pair) for pair in pairs])):
        if any(overlaps(one, other) for group in groups for one, other in zip(sorted(group), sorted(group)[1:])):  # noqa: B905
            return {"reason": f"{name} entities overlap or repeat; tags cannot hold them"}
    if any(claim.kind == "not_in_text" for pair in pairs for claim in pair.claims) or any(p.is_extra for p in pairs):
        return {"reason": "predictions outside the gold texts; tags cannot hold them"}
    found = Counter(one[2] for pair in pairs for one in pair.found)
    wanted = Counter(one[2] for pair in pairs for one in pair.gold)
    correct = Counter(one[2] for pair in pairs for one in pair.found & set(pair.gold))
    labels = sorted(set(found) | set(wanted))
    rows = [_ratios(correct[label], found[label], wanted[label]) for label in labels]
    total = sum(wanted.values())
    return {
        "micro": _named(_ratios(sum(correct.values()), sum(found.values()), total)),
        "macro": _named(np.mean(rows, axis=0) if rows else (0, 0, 0)),
        "weighted": _named(
            np.average(rows, axis=0, weights=[wanted[label] for label in labels]) if total else (0, 0, 0)
        ),
    }


def _claimed(pair: Pair) -> list[Triple]:
    return [claim.triple for claim in pair.claims]


def _ratios(correct: int, found: int, wanted: int) -> tuple[float, float, float]:
    return correct / max(found, 1), correct / max(wanted, 1), 2 * correct / max(found + wanted, 1)


def _named(values: Iterable[float]) -> dict[str, float]:
    return dict(zip(("precision", "recall", "f1"), (float(value) for value in values), strict=True))


def _by_seen(pairs: Sequence[Pair], pool: Sequence[Mapping[str, Any]], resampling: Resampling) -> dict[str, Any]:
    """Entities whose surface (case folded) the pool has with that label, with another label only, or not at all."""
    known: dict[str, set[str]] = {}
    for record in pool:
        for entity in record["entities"]:
            surface = record["text"][entity["start"] : entity["end"]].casefold()
            known.setdefault(surface, set()).add(entity["label"])

    def kind(text: str, one: Triple) -> str:
        labels = known.get(text[one[0] : one[1]].casefold())
        return "unseen" if labels is None else "seen" if one[2] in labels else "seen_other_label"

    return _grouped(pairs, resampling, _SEEN, kind)


def _by_nesting(pairs: Sequence[Pair], resampling: Resampling) -> dict[str, Any] | None:
    """Recall of gold entities by how they lie to others of their sentence; None if no two gold entities overlap."""
    if not any(_place(one, pair.gold) != "flat" for pair in pairs for one in pair.gold):
        return None
    found = [pair.found for pair in pairs]
    return {
        place: _recall(pairs, resampling, found, [{e for e in p.gold if _place(e, p.gold) == place} for p in pairs])
        for place in ("flat", "inner", "outer", "same_span", "crossing")
    }


def _place(one: Triple, gold: Sequence[Triple]) -> str:
    others = [other for other in gold if other != one and overlaps(one, other)]
    if any(other[:2] == one[:2] for other in others):
        return "same_span"
    if any(other[0] <= one[0] and one[1] <= other[1] for other in others):
        return "inner"
    if any(one[0] <= other[0] and other[1] <= one[1] for other in others):
        return "outer"
    return "crossing" if others else "flat"


def _by_size(
    pairs: Sequence[Pair], resampling: Resampling, bounds: Sequence[int], size: Callable[[str, Triple], int]
) -> dict[str, Any]:
    """Strict scores by size in words: up to each bound, and above the last."""
    lows = [1, *(bound + 1 for bound in bounds)]
    names = [str(low) if low == high else f"{low}-{high}" for low, high in zip(lows, bounds, strict=False)]
    names.append(f"{lows[-1]}+")
    return _grouped(pairs, resampling, names, lambda text, one: names[bisect_left(bounds, size(text, one))])


def _by_stage(
    pairs: Sequence[Pair], stages: Sequence[Mapping[str, Any]], resampling: Resampling
) -> list[dict[str, Any]]:
    """Recall of gold entities after each stage, and how many were lost in it; last the output itself.

    After "extract" an entity is there if its span is a candidate; afterwards, if span and label are.
    """
    waiting: dict[str, list[Mapping[str, Any]]] = {}
    for record in reversed(stages):
        waiting.setdefault(str(record["id"]), []).append(record)
    records = [waiting[pair.id].pop() if waiting.get(pair.id) else {} for pair in pairs]
    gold = [set(pair.gold) for pair in pairs]
    before, rows = gold, []
    for stage in [stage for stage in _STAGES if any(stage in record for record in records)] + ["output"]:
        if stage == "output":
            listed: list[set[Any]] = [set(pair.found) for pair in pairs]
        else:
            width = 2 if stage == "extract" else 3
            listed = [{tuple(entry[:width]) for entry in record.get(stage, ())} for record in records]
        width = 2 if stage == "extract" else 3
        kept = [{one for one in wanted if one[:width] in there} for wanted, there in zip(gold, listed, strict=True)]
        row = {"stage": stage, "candidates": sum(len(there) for there in listed)}
        row |= _recall(pairs, resampling, kept, gold)
        row["lost"] = sum(len(was - now) for was, now in zip(before, kept, strict=True))
        rows.append(row)
        before = kept
    return rows
