"""`el4ner-bench ablate`: what each stage and each improvement buys, measured by switching it off or varying it.

A variant changes one thing of its base. Bases: `default`, where the pool decides who is asked, and `all`, where
everybody is, so that variants of prompts show even where the pool would ask no prompted member.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from el4ner.bench.compare import compare, holm, sentence_counts
from el4ner.bench.evaluation_data import EvaluationData, load_evaluation_data, record_of
from el4ner.bench.own_system import OwnSystem
from el4ner.bench.report_details import ablation_table
from el4ner.bench.report_markdown import escape, render_table
from el4ner.bench.run import Progress, RunRequest, run_systems
from el4ner.bench.run_folder import RunFolder
from el4ner.bench.system import Workbench
from el4ner.bench.systems import OWN
from el4ner.config import WORDLESS, Config, make_config, merge
from el4ner.errors import InputError
from el4ner.jsonl import json_text
from el4ner.metrics import pair_records
from el4ner.output import OutputFile

Base = Literal["default", "all"]

POOL_SIZES = (25, 50, 100, 200, 500, 1000, 2000, 5000)
KS = (0, 1, 2, 4, 8)


@dataclass(frozen=True)
class Variant:
    """A system of the ablation: its base with other settings, or with a part of the pool."""

    name: str
    what: str
    base: Base = "default"
    settings: Mapping[str, Any] = field(default_factory=dict)
    pool_size: int | None = None


def _voters(config: Config, _: int) -> Iterator[Variant]:
    for name in WORDLESS:
        yield Variant(f"only-{name}", f"{name} voter alone", settings={"voters": [name]})
    for left_out in WORDLESS:
        others = [name for name in WORDLESS if name != left_out]
        yield Variant("+".join(others), f"those that write nothing without {left_out}", settings={"voters": others})
    yield Variant("+".join(WORDLESS), "all voters that write nothing", settings={"voters": list(WORDLESS)})
    members = [member.name for member in config.members]
    if members:
        yield Variant("only-members", "prompted members alone", settings={"voters": members})


def _extract(_: Config, __: int) -> Iterator[Variant]:
    for name, what in (
        ("noun_phrases", "no noun phrases proposed"), ("pool_strings", "no pool strings proposed"),
        ("reading", "no spans proposed by reading"),
    ):  # fmt: skip
        yield Variant(f"no-{name.replace('_', '-')}", what, settings={"extract": {name: False}})


def _reading(_: Config, __: int) -> Iterator[Variant]:
    for name, what, settings in (
        ("read-once", "text read once, not twice", {"twice": False}),
        ("no-encoder-states", "sentence encoder not read", {"encoder_depths": []}),
        ("no-shapes", "no shapes of words", {"shapes": False}),
        ("no-context", "words beside a span not read", {"context": False}),
        ("linear", "linear read-out", {"hidden": 0}),
        ("one-head", "one read-out instead of an average", {"heads": 1}),
        ("one-depth", "one layer read", {"depths": [0.53]}),
        ("all-features", "all features, no principal directions", {"directions": 0}),
        ("no-swaps", "no copies with mentions swapped", {"swaps": 0}),
        ("no-builtin", "built-in pool not used", {"builtin": False}),
    ):
        yield Variant(name, what, settings={"reading": settings})
    # what to compare the variants above with that read other features or have other layers: nothing is shipped for them
    yield Variant("beside", "built-in pool fitted beside, its shipped read-outs not begun at",
                  settings={"stack": {"shipped": False}})  # fmt: skip


def _probing(_: Config, __: int) -> Iterator[Variant]:
    yield Variant("reading+probing", "reading and probing voter", settings={"voters": ["reading", "probing"]})
    for name, what, settings in (
        ("one-probed-layer", "one layer read behind the question", {"depths": [0.8]}),
        ("last-layer", "last layer read behind the question", {"depths": [1.0]}),
        ("one-probe", "one probe instead of an average", {"heads": 1}),
        ("few-probed", "probes fitted on 1,000 candidates", {"sample": 1000}),
    ):
        # beside the reading voter, whatever the pool says of it: to compare with reading+probing
        yield Variant(name, what, settings={"voters": ["reading", "probing"], "probing": settings})


def _stack(_: Config, __: int) -> Iterator[Variant]:
    yield Variant("equal-votes", "nothing fitted: retrieval and members count alike", "all",
                  {"classify": {"combine": "equal"}})  # fmt: skip
    yield Variant("majority", "majority of retrieval and members", "all", {"classify": {"combine": "majority"}})


def _prompts(_: Config, __: int) -> Iterator[Variant]:
    for name, what, settings in (
        ("no-member-lists", "members propose no spans", {"extract": {"members": False}}),
        ("ungrounded", "lists written freely", {"extract": {"grounded": False}}),
        ("generated-labels", "labels written, not scored", {"classify": {"by": "generation"}}),
        ("calibrated-choices", "contextual calibration of choices", {"classify": {"calibrate": True}}),
        ("generated-verdicts", "verdicts written, not scored", {"verify": {"by": "generation"}}),
    ):
        yield Variant(name, what, "all", settings)


def _k(config: Config, _: int) -> Iterator[Variant]:
    for k in (k for k in KS if k != config.retrieve.k):
        yield Variant(f"k{k}", f"{k} demonstrations", "all", {"retrieve": {"k": k}})


def _members(config: Config, _: int) -> Iterator[Variant]:
    names = [member.name for member in config.members]
    for n in range(1, len(names)):
        yield Variant(f"{n}-members", f"{n} prompted members beside all voters that write nothing", "all",
                      {"voters": [*WORDLESS, *names[:n]]})  # fmt: skip


def _verifier(config: Config, _: int) -> Iterator[Variant]:
    yield Variant("no-verifier", "nobody verifies", "all", {"verify": {"enabled": False}})
    for member in config.members[1:]:
        yield Variant(f"verifier-{member.name}", f"{member.name} verifies", "all", {"verify": {"member": member.name}})


def _retrieval(_: Config, __: int) -> Iterator[Variant]:
    for by, what in (
        ("sentence", "demonstrations by sentence embeddings"), ("bm25", "demonstrations by BM25"),
        ("random", "demonstrations at random"),
    ):  # fmt: skip
        yield Variant(f"by-{by}", what, "all", {"retrieve": {"by": by}})
    yield Variant("spans-by-members", "spans of retrieval listed by members", "all",
                  {"retrieve": {"spans": "members"}})  # fmt: skip


def _pool(_: Config, n_pool: int) -> Iterator[Variant]:
    for size in POOL_SIZES:
        if size < n_pool:
            yield Variant(f"pool-{size}", f"{size} pool sentences", pool_size=size)


GROUPS: Mapping[str, Callable[[Config, int], Iterator[Variant]]] = {
    "voters": _voters, "extract": _extract, "reading": _reading, "probing": _probing, "stack": _stack,
    "prompts": _prompts, "k": _k, "members": _members, "verifier": _verifier, "retrieval": _retrieval, "pool": _pool,
}  # fmt: skip


def variants(config: Config, n_pool: int, groups: Sequence[str]) -> list[tuple[str, Variant]]:
    """(group, variant) pairs of the groups, before them the bases that they are compared with."""
    chosen = [(group, variant) for group in groups for variant in GROUPS[group](config, n_pool)]
    bases: list[tuple[str, Variant]] = [("base", Variant("default", "whoever the pool says is worth asking"))]
    if any(variant.base == "all" for _, variant in chosen):
        bases.append(("base", Variant("all", "everybody is asked", "all")))
    return bases + chosen


def make_variant(variant: Variant, bench: Workbench, settings: Mapping[str, Any]) -> OwnSystem:
    """The system of a variant. settings: for all alike, under what the variant changes."""
    base = merge(merge(settings, OWN[variant.base]), {"retrieve": {"k": bench.k}, "seed": bench.seed})
    config = make_config(merge(base, variant.settings), f"variant {variant.name}")
    return OwnSystem(variant.name, config, bench, variant.pool_size)


def ablate_request(request: RunRequest, groups: Sequence[str], progress: Progress, skip: Sequence[str] = ()) -> str:
    """Runs what is missing, writes `ablation.json` and `ablation.md` into the folder, returns the table as Markdown.

    skip: names of variants that are not run. Raises InputError for others than the groups', and what `run` does.
    """
    data = load_evaluation_data(request.data)
    config = make_config(merge(request.settings, {"seed": request.data.seed, "retrieve": {"k": request.k}}))
    bench = Workbench(config, request.k, request.data.seed, remember=request.share)
    # the smallest part's pool, so that every size named is one
    chosen = variants(config, min(len(part.pool.sentences) for part in data.parts), groups)
    optional = [variant.name for group, variant in chosen if group != "base"]
    if unknown := sorted(set(skip) - set(optional)):
        raise InputError(f"--skip {', '.join(unknown)}: no variant of these groups; they are {', '.join(optional)}")
    chosen = [(group, variant) for group, variant in chosen if group == "base" or variant.name not in skip]
    systems = [make_variant(variant, bench, request.settings) for _, variant in chosen]
    refused: dict[str, str] = {}
    run_systems(request, data, bench, systems, progress, refused)
    run = [(group, variant) for group, variant in chosen if variant.name not in refused]
    rows = ablation_rows(data, RunFolder(request.out), run, request.data.seed)
    table = render_table(ablation_table(rows, len(data.gold))).rstrip()
    table += "".join(f"\n\n{escape(name)} was not run: {escape(reason)}" for name, reason in refused.items())
    facts = json_text({"version": 1, "rows": rows, "refused": refused})
    for name, content in (("ablation.json", facts), ("ablation.md", table)):
        with OutputFile(request.out / name) as file:
            file.write(f"{content}\n".encode())
    return table


def ablation_rows(
    data: EvaluationData, folder: RunFolder, chosen: Sequence[tuple[str, Variant]], seed: int
) -> list[dict[str, Any]]:
    """Per variant its F1, and the difference to its base with interval, p and p after Holm over all variants."""
    gold = [record_of(d) for d in data.gold]
    counts = {v.name: sentence_counts(pair_records(gold, folder.predictions(v.name))) for _, v in chosen}
    rows: list[dict[str, Any]] = []
    for group, variant in chosen:
        found = compare(variant.name, counts[variant.name], variant.base, counts[variant.base], seed=seed)
        row: dict[str, Any] = {
            "group": group, "name": variant.name, "what": variant.what, "base": variant.base, "f1": found.f1_a,
            "difference": found.difference, "ci95": list(found.ci95), "p": found.p, "differing": found.differing,
        }  # fmt: skip
        rows.append(row)
    tested = [row for row in rows if row["name"] != row["base"]]
    for row, corrected in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = corrected
    return rows
