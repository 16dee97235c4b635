"""el4ner-bench run, tune and ablate: systems on data, into a folder that says how it came about."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from el4ner.bench.cli_options import Progress, assigned, names_of
from el4ner.config import merge
from el4ner.errors import ConfigError

if TYPE_CHECKING:
    from el4ner.bench.run import RunRequest

C = TypeVar("C", bound=Callable[..., Any])


def _data_options(split: str) -> Callable[[C], C]:
    """The options that say what is evaluated on, and where the answers go. split: the default of --split."""
    return lambda command: _with_data_options(command, split)


def _with_data_options(command: C, split: str) -> C:
    for option in reversed(
        (
            click.option("--data", required=True, help="Folder of splits, a file, or a Hugging Face dataset id."),
            click.option("--split", default=split, show_default=True, help="The split that is predicted."),
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
                         help="Answer from memory what another system asked (no speed then). On in ablate, tune."),
            click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path),
                         help="Folder to write; a run that was killed goes on in its own."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


@click.command()
@_data_options("test")
@click.option("--systems", default="default", show_default=True, help="Comma-separated names or configuration files.")
@click.option(
    "--options",
    "tuned",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Options of baselines as el4ner-bench tune chose them (tuned.json).",
)
@click.option("--option", "fixed", multiple=True, help="An option of one baseline: --option kate.wording=types.")
def run(systems: str, tuned: Path | None, fixed: tuple[str, ...], **shared: Any) -> None:
    """Evaluate systems on the same sentences, pool and budget of demonstrations; one JSON line a system.

    Systems: default, all, paper, reading-voter, tagging-voter, probing-voter, retrieval-voter, members (the prompted
    ones together), member:NAME (one of them), a configuration file, and the baselines zero-shot, kate, gpt-ner, deer,
    dictionary, fine-tuned; their options are chosen by el4ner-bench tune, on dev.
    default@0.9 is the default at the operating point of --target-precision 0.9. A system whose settings do not suit the
    pool is named at the end, after the others. Copies of test sentences are dropped from the pool. --out gets manifest,
    gold, predictions, stages, timings and metrics.
    """
    from el4ner.bench.run import run as run_request
    from el4ner.bench.run import strict_row
    from el4ner.bench.systems import short_name

    names = names_of(systems, "--systems")
    options = merge(_tuned(tuned, names), _by_system(fixed))
    request = _run_request(shared, names, options, share=bool(shared["share"]))
    refused: dict[str, str] = {}
    metrics = run_request(request, Progress(), refused)
    timings = json.loads((request.out / "timings.json").read_text(encoding="utf-8")) if metrics["systems"] else {}
    for name in map(short_name, request.systems):
        if name not in refused:
            click.echo(json.dumps(strict_row(name, metrics, timings), ensure_ascii=False))
    if refused:
        raise ConfigError("; ".join(f"{name} was not run: {reason}" for name, reason in refused.items()))


@click.command()
@_data_options("dev")
@click.option("--systems", default="kate", show_default=True, help="Comma-separated names of baselines.")
@click.option("--try", "tries", multiple=True, help="Values to try: --try 'kate.k=[1, 2, 4]'. Default: a grid.")
@click.option("--option", "fixed", multiple=True, help="An option of one baseline that is not tried.")
def tune(systems: str, tries: tuple[str, ...], fixed: tuple[str, ...], **shared: Any) -> None:
    """Choose options of baselines on dev, or on a held-out part of train (--split train); never on test.

    One option after the other; of its values the one with the best strict F1 stays. One JSON line a system; what was
    chosen stands in tuned.json of --out, which el4ner-bench run takes by --options.
    """
    from el4ner.bench.tune import default_grid
    from el4ner.bench.tune import tune as tune_request

    names, given = names_of(systems, "--systems"), _by_system(tries, "--try")
    for name in given:
        if name not in names:
            raise click.BadParameter(f"{name} is not among --systems {systems}", param_hint="--try")
        for key, values in given[name].items():
            if not isinstance(values, list) or not values:
                raise click.BadParameter(f"{name}.{key}={values!r}: write a list, [A, B]", param_hint="--try")
    usual = default_grid(shared["k"])
    grid = {name: given.get(name, usual.get(name, {})) for name in names}
    request = _run_request(shared, (), _by_system(fixed), share=shared["share"] is not False)
    for name, options in tune_request(request, grid, Progress())["options"].items():
        click.echo(json.dumps({"system": name, "options": options}, ensure_ascii=False))


@click.command()
@_data_options("test")
@click.option("--groups", default="all", show_default=True, help="Comma-separated; which kinds of variants to run.")
@click.option("--skip", default="", help="Comma-separated; variants of these groups that are not run.")
def ablate(groups: str, skip: str, **shared: Any) -> None:
    """What each stage and improvement buys: settings switched off or varied in turn, one table.

    Groups: voters, extract, reading, probing, stack, prompts, k, members, verifier, retrieval, pool. What concerns
    prompts is varied with all voters asked, whatever the pool says of them; the rest in the default. The folder is that
    of el4ner-bench run, with ablation.json and ablation.md beside.
    """
    from el4ner.bench.ablation import GROUPS, ablate_request

    chosen = list(GROUPS) if groups == "all" else names_of(groups, "--groups")
    if unknown := sorted(set(chosen) - set(GROUPS)):
        raise click.BadParameter(f"{', '.join(unknown)}; allowed: all, {', '.join(GROUPS)}", param_hint="--groups")
    request = _run_request(shared, (), {}, share=shared["share"] is not False)
    click.echo(ablate_request(request, chosen, Progress(), names_of(skip, "--skip") if skip else ()))


def _run_request(
    given: Mapping[str, Any], systems: Sequence[str], options: Mapping[str, Mapping[str, Any]], *, share: bool
) -> RunRequest:
    """What is asked by the values of `_data_options`. Raises click.BadParameter for settings that a run has options
    for."""
    from el4ner.bench.evaluation_data import DataRequest
    from el4ner.bench.run import RunRequest

    data = DataRequest(
        given["data"], given["split"], given["limit"], given["seed"], given["pool_size"], given["pool"],
        given["labels"], given["parts"],
    )  # fmt: skip
    settings = assigned(given["assignments"])
    retrieve = settings.get("retrieve")
    if isinstance(retrieve, dict) and "k" in retrieve:
        raise click.BadParameter("retrieve.k: all systems may show as many demonstrations; use --k", param_hint="--set")
    return RunRequest(data, systems, given["out"], given["k"], settings, options, given["chunk"], share)


def _by_system(assignments: tuple[str, ...], option: str = "--option") -> dict[str, dict[str, Any]]:
    """`SYSTEM.SETTING=VALUE` strings by system. Raises click.BadParameter for one without a setting."""
    options = assigned(assignments, option)
    for system, own in options.items():
        if not isinstance(own, dict):
            raise click.BadParameter(f"{system}: write SYSTEM.SETTING=VALUE", param_hint=option)
    return options


def _tuned(path: Path | None, names: list[str]) -> dict[str, Any]:
    """What a file says of the systems that run."""
    from el4ner.bench.run_folder import read_json
    from el4ner.bench.tune import tuned_options

    if path is None:
        return {}
    found = read_json(path, "give the tuned.json that el4ner-bench tune wrote")
    return {name: own for name, own in tuned_options(found, path.name).items() if name in names}
