"""el4ner-bench run and ablate: systems on data, into a folder that says how it came about."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from el4ner.bench.cli_options import Progress, assigned, names_of

C = TypeVar("C", bound=Callable[..., Any])


def _data_options(command: C) -> C:
    """The options that say what is evaluated on, and where the answers go."""
    for option in reversed(
        (
            click.option("--data", required=True, help="Folder of splits, a file, or a Hugging Face dataset id."),
            click.option("--split", default="test", show_default=True, help="The split that is predicted."),
            click.option("--limit", type=click.IntRange(1), help="Only so many sentences, drawn by the seed."),
            click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of sample and fits."),
            click.option("--pool", help="A file to take the pool from instead of the train split."),
            click.option("--pool-size", type=click.IntRange(1), help="Only so many pool sentences, drawn by content."),
            click.option("--labels", type=click.Path(exists=True, dir_okay=False), help="Definitions of the labels."),
            click.option("--parts", type=click.IntRange(2), default=10, show_default=True,
                         help="Parts of the split left out in turn where there is no train split."),
            click.option("--k", type=click.IntRange(0, 64), default=4, show_default=True,
                         help="Demonstrations that a prompt of any system may show."),
            click.option("--set", "assignments", multiple=True, help="A setting for all: --set overlap=nested."),
            click.option("--chunk", type=click.IntRange(1), default=32, show_default=True,
                         help="Sentences predicted between two writes."),
            click.option("--share/--no-share", default=None,
                         help="Answer from memory what another system asked (no speed then). On in ablate."),
            click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path),
                         help="Folder to write; a run that was killed goes on in its own."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


@click.command()
@_data_options
@click.option("--systems", default="default", show_default=True, help="Comma-separated names or configuration files.")
@click.option("--option", "tuned", multiple=True, help="An option of one baseline: --option kate.wording=types.")
def run(
    data: str, systems: str, split: str, limit: int | None, seed: int, pool: str | None, pool_size: int | None,
    labels: str | None, parts: int, k: int, assignments: tuple[str, ...], tuned: tuple[str, ...], chunk: int,
    share: bool | None, out: Path,
) -> None:  # fmt: skip
    """Evaluate systems on the same sentences, pool and budget of demonstrations; one JSON line a system.

    Systems: default, all, paper, reading-voter, retrieval-voter, member:NAME, a configuration file, and the baselines
    zero-shot, kate, gpt-ner, deer, dictionary, fine-tuned. Tune options on dev, never on test. Copies of test
    sentences are dropped from the pool. --out gets manifest, gold, predictions, stages, timings and metrics.
    """
    from el4ner.bench.run import RunRequest, strict_row
    from el4ner.bench.run import run as run_request

    request = RunRequest(
        _data_request(data, split, limit, seed, pool, pool_size, labels, parts), names_of(systems, "--systems"), out, k,
        assigned(assignments), _options(tuned), chunk, bool(share),
    )  # fmt: skip
    metrics = run_request(request, Progress())
    timings = json.loads((out / "timings.json").read_text(encoding="utf-8"))
    for name in request.systems:
        click.echo(json.dumps(strict_row(name, metrics, timings), ensure_ascii=False))


@click.command()
@_data_options
@click.option("--groups", default="all", show_default=True, help="Comma-separated; which kinds of variants to run.")
def ablate(
    data: str, groups: str, split: str, limit: int | None, seed: int, pool: str | None, pool_size: int | None,
    labels: str | None, parts: int, k: int, assignments: tuple[str, ...], chunk: int, share: bool | None, out: Path,
) -> None:  # fmt: skip
    """What each stage and improvement buys: settings switched off or varied in turn, one table.

    Groups: voters, extract, reading, stack, prompts, k, members, verifier, retrieval, pool. What concerns prompts is
    varied with all voters asked, whatever the pool says of them; the rest in the default. The folder is that of
    el4ner-bench run, with ablation.json and ablation.md beside.
    """
    from el4ner.bench.ablation import GROUPS, ablate_request

    chosen = list(GROUPS) if groups == "all" else names_of(groups, "--groups")
    if unknown := sorted(set(chosen) - set(GROUPS)):
        raise click.BadParameter(f"{', '.join(unknown)}; allowed: all, {', '.join(GROUPS)}", param_hint="--groups")
    from el4ner.bench.run import RunRequest

    request = RunRequest(
        _data_request(data, split, limit, seed, pool, pool_size, labels, parts), (), out, k, assigned(assignments), {},
        chunk, share is not False,
    )  # fmt: skip
    click.echo(ablate_request(request, chosen, Progress()))


def _data_request(
    data: str, split: str, limit: int | None, seed: int, pool: str | None, pool_size: int | None, labels: str | None,
    parts: int,
) -> Any:  # fmt: skip
    from el4ner.bench.evaluation_data import DataRequest

    return DataRequest(data, split, limit, seed, pool_size, pool, labels, parts)


def _options(tuned: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """`SYSTEM.SETTING=VALUE` strings by system. Raises click.BadParameter for one without a setting."""
    options = assigned(tuned, "--option")
    for system, own in options.items():
        if not isinstance(own, dict):
            raise click.BadParameter(f"{system}: write SYSTEM.SETTING=VALUE", param_hint="--option")
    return options
