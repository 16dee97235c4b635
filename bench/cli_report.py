"""el4ner-bench compare and report: what finished runs say."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import click

from el4ner.errors import UsageError


@click.command()
@click.argument("places", nargs=-1, required=True, metavar="A B | DIR")
@click.option("--gold", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="What A and B answer.")
@click.option("--against", help="Of one DIR: the system that all others are compared with. Default: the best.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of swaps and resampling.")
@click.option("--permutations", type=click.IntRange(100), default=10_000, show_default=True, help="Random swaps.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines instead of text.")
def compare(
    places: tuple[str, ...], gold: Path | None, against: str | None, seed: int, permutations: int, as_json: bool
) -> None:
    """Paired permutation test on strict F1: is A better than B, or are DIR's systems better than one of them?

    A and B are predictions files (then --gold), or DIR:NAME for a system of a run's folder; DIR alone may be a run's
    digest too. The p-value is two-sided; the interval of the difference resamples sentences.
    """
    from el4ner.bench.compare import compare as compare_two
    from el4ner.bench.compare import compare_all, comparison_lines, sentence_counts
    from el4ner.bench.finished_run import answers_of, load_run

    if len(places) == 1:
        if gold is not None:
            raise UsageError("--gold goes with A and B; a run's folder has its own gold sentences")
        run = load_run(Path(places[0]))
        if not run.counts:
            raise UsageError(f"{places[0]}: has no finished systems to compare")
        if len(run.counts) == 1:
            raise UsageError(f"{places[0]}: has one finished system, {next(iter(run.counts))}; a comparison needs two")
        if against is not None and against not in run.counts:
            raise UsageError(f"--against {against}: no finished system; there are {', '.join(run.counts)}")
        found = compare_all(run.counts, against, seed=seed, permutations=permutations)
    elif len(places) == 2:
        if against is not None:
            raise UsageError("--against goes with one DIR; of two, the first is compared with the second")
        (name_a, a), (name_b, b) = (answers_of(place, gold) for place in places)
        if [(p.id, p.gold) for p in a if not p.is_extra] != [(p.id, p.gold) for p in b if not p.is_extra]:
            raise UsageError(f"{places[0]} and {places[1]} do not answer the same sentences")
        for place, answers in zip(places, (a, b), strict=True):
            if all(p.is_lost for p in answers if not p.is_extra):
                warnings.warn(f"{place}: none of its ids occurs in gold; give the records the same ids", stacklevel=1)
        names = (name_a, name_b) if name_a != name_b else places
        sides = sentence_counts(a), sentence_counts(b)
        found = [compare_two(names[0], sides[0], names[1], sides[1], seed=seed, permutations=permutations)]
    else:
        raise UsageError(f"{len(places)} places; give A and B, or one DIR")
    lines = [json.dumps(c.to_dict(), ensure_ascii=False) for c in found] if as_json else comparison_lines(found)
    for line in lines:
        click.echo(line)


@click.command()
@click.argument("places", nargs=-1, type=click.Path(exists=True, path_type=Path), metavar="DIR...")
@click.option("--html", "html_file", type=click.Path(dir_okay=False, path_type=Path), help="Write one HTML file.")
@click.option("--markdown", "markdown_file", type=click.Path(dir_okay=False, path_type=Path), help="Write Markdown.")
@click.option("--title", default="Evaluation of named-entity recognition", show_default=True, help="Its title.")
@click.option(
    "--keep", type=click.Path(file_okay=False, path_type=Path),
    help="Write each run's digest (numbers, no texts) into this folder, to be committed.",
)  # fmt: skip
@click.option(
    "--write-results", is_flag=True,
    help="Make bench/RESULTS.md and README.md's results from bench/results, in the current folder.",
)  # fmt: skip
def report(
    places: tuple[Path, ...], html_file: Path | None, markdown_file: Path | None, title: str, keep: Path | None,
    write_results: bool,
) -> None:  # fmt: skip
    """Report on runs: tables with intervals, costs, calibration, errors with examples, published results.

    DIR is the folder of a run, a digest of one, or a folder of digests. The HTML file is complete in itself: it can be
    viewed without network, and nothing in it runs.
    """
    from el4ner.bench.report import build_report, load_places
    from el4ner.bench.report_html import render_html
    from el4ner.bench.report_markdown import render_markdown
    from el4ner.bench.results_files import keep_digests
    from el4ner.bench.results_files import write_results as write_public
    from el4ner.output import OutputFile

    if not (html_file or markdown_file or keep or write_results):
        raise UsageError("nothing to write; give --html FILE, --markdown FILE, --keep FOLDER or --write-results")
    if (html_file or markdown_file or keep) and not places:
        raise UsageError("no runs; give the folder of a run, as el4ner-bench run --out wrote it")
    runs = load_places(places) if places else []
    written = keep_digests(runs, keep) if keep else []
    for path, render in ((html_file, render_html), (markdown_file, render_markdown)):
        if path is not None:
            with OutputFile(path) as file:
                file.write(render(build_report(runs, title)).encode())
            written.append(path)
    if write_results:
        written += write_public(Path())
    for path in written:
        click.echo(f"wrote {path}", err=True)
