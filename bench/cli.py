"""The command el4ner-bench. Results go to stdout as JSON lines, messages to stderr."""

from __future__ import annotations

import json

import click

from el4ner.errors import El4nerError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="el4ner")
def group() -> None:
    """Measure el4ner: what is timed is checked first."""


@group.command()
@click.option("--op", "ops", multiple=True, help="Only this operation; repeatable. Default: all.")
@click.option("--size", type=click.Choice(["small", "full"]), default="small", show_default=True, help="Input sizes.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Timed calls per backend.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random inputs.")
@click.pass_context
def kernels(context: click.Context, ops: tuple[str, ...], size: str, repeats: int, seed: int) -> None:
    """Check each kernel backend against the reference, then time them in turns.

    One JSON line per operation and backend. A backend that cannot run, or answers wrongly, gets its reason and no time;
    a wrong answer ends the run with exit code 1.
    """
    from el4ner.bench.ops import measure
    from el4ner.kernels import operations

    unknown = sorted(set(ops) - set(operations()))
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}; allowed: {', '.join(operations())}", param_hint="--op")
    wrong = False
    for op in ops or operations():
        for row in measure(op, size=size, repeats=repeats, seed=seed):
            wrong = wrong or row["status"] == "wrong"
            click.echo(json.dumps(row, ensure_ascii=False))
    if wrong:
        context.exit(1)


def main() -> None:
    """Entry point: errors raised on purpose become one line and their exit code."""
    try:
        group()
    except El4nerError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None
