"""`el4ner pool`: check labelled sentences, and prepare what is computed from them."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import click

from el4ner.cli_messages import Messages, need_stdout, warnings_as_messages
from el4ner.cli_predict import check_device, check_models, check_stdin, given, model_options, overlap_option
from el4ner.corpora import scan_examples
from el4ner.errors import PoolError
from el4ner.lines import display_name, excerpt, visible
from el4ner.pool import one_label
from el4ner.records import Demonstration, LabelledSpan

MAX_PROBLEMS = 20

_SHOWN = 60
"""Characters of a label that are shown; of a longer one the beginning."""


@click.group()
def pool() -> None:
    """Work on a pool of labelled sentences."""


@pool.command()
@model_options
@overlap_option
@click.option("-q", "--quiet", is_flag=True, help="Say nothing while it works.")
def build(config: str | None, quiet: bool, **options: Any) -> None:
    """Compute and cache everything `el4ner predict` needs from a pool, with the same options."""
    from el4ner.cache import check_writable
    from el4ner.config import load_config
    from el4ner.pipeline import El4ner

    def say(message: str) -> None:
        if not quiet:
            click.echo(f"el4ner: {message}", err=True)

    check_stdin((), config, options)
    settings = load_config(config, overrides=given(options))
    check_stdin((), config, settings)
    check_device(settings.device)
    check_writable()
    check_models(settings)
    with warnings_as_messages(Messages(quiet, results_on_stdout=False).warn):
        El4ner.from_config(settings).prepare(progress=say)
    say("the pool is ready")


def _nested(entities: Sequence[LabelledSpan]) -> int:
    """How many entities lie inside another one."""
    twice = Counter(entity.span for entity in entities)
    inside, furthest = 0, -1
    for span in sorted(twice, key=lambda span: (span.start, -span.end)):
        inside += twice[span] if span.end <= furthest or twice[span] > 1 else 0
        furthest = max(furthest, span.end)
    return inside


def _crossing(entities: Sequence[LabelledSpan]) -> int:
    """How many entities begin inside another one and end after it."""
    crossing, ends = 0, [0]
    for _, own in groupby(sorted(entities), key=lambda entity: entity.start):
        beginning = list(own)
        for start, end, _ in beginning:
            at = bisect_right(ends, start)
            crossing += at < len(ends) and ends[at] < end
        for _, end, _ in beginning:
            insort(ends, end)
    return crossing


def _overview(sentences: list[Demonstration], wrong: int) -> list[str]:
    """Counts, of which `wrong` lines are left out, then the labels."""
    labels = Counter(entity.label for sentence in sentences for entity in sentence.entities)
    by_text: dict[str, set[frozenset[LabelledSpan]]] = {}
    for sentence in sentences:
        by_text.setdefault(sentence.text, set()).add(frozenset(sentence.entities))
    counts = {
        "sentences": len(sentences),
        "without entities": sum(not sentence.entities for sentence in sentences),
        "entities": labels.total(),
        "inside another": sum(_nested(sentence.entities) for sentence in sentences),
        "spans with two labels (only the first counts)": sum(
            len(d.entities) - len(one_label(d).entities) for d in sentences
        ),
        "crossing another": sum(_crossing(sentence.entities) for sentence in sentences),
        "repeated texts": len(sentences) - len(by_text),
        "texts with conflicting entities": sum(len(annotations) > 1 for annotations in by_text.values()),
    }
    if wrong:
        counts["wrong lines, which no other count has in it"] = wrong
    lines = [f"{count:>8} {name}" for name, count in counts.items()]
    lines += ["", f"{'entities':>8} label"]
    lines += [
        f"{count:>8} {visible(label) if len(label) <= _SHOWN else excerpt(label)}"
        for label, count in sorted(labels.items(), key=lambda item: (-item[1], item[0]))
    ]
    return lines


@pool.command()
@click.argument("path", metavar="POOL", type=click.Path(allow_dash=True))
def check(path: str) -> None:
    """Count the sentences and labels of POOL and list what is wrong with it; exit code 1 if something is."""
    need_stdout()
    sentences: list[Demonstration] = []
    problems: list[PoolError] = []
    for item in scan_examples(path):
        if isinstance(item, PoolError):
            problems.append(item)
        else:
            sentences.append(item)
    if sentences:
        click.echo("\n".join(_overview(sentences, len(problems))))
    for problem in problems[:MAX_PROBLEMS]:
        click.echo(f"el4ner: {problem}", err=True)
    if problems:
        rest = len(problems) - MAX_PROBLEMS
        more = f" ({rest} more not shown)" if rest > 0 else ""
        found = (
            "1 line is wrong; correct it"
            if len(problems) == 1
            else f"{len(problems)} lines are wrong{more}; correct them"
        )
        click.echo(f"el4ner: error: {display_name(path)}: {found}", err=True)
        click.get_current_context().exit(1)
