"""The command el4ner-bench. Results go to stdout as JSON lines, messages to stderr."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from el4ner.bench.cli_options import (
    Progress,
    data_argument,
    json_option,
    names_of,
    show_rows,
    threads_option,
    timing_options,
    use_threads,
)
from el4ner.bench.cli_pipeline import pipeline
from el4ner.bench.cli_report import compare, report
from el4ner.bench.cli_run import ablate, run, tune
from el4ner.cli_messages import escape_what_stdout_lacks, unexpected, warnings_as_messages
from el4ner.errors import El4nerError, debugging
from el4ner.interrupts import INTERRUPTED, end_in_order


class _Commands(click.Group):
    """A group that ends with 130 when it is interrupted, as `el4ner` does; click alone would end with 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="el4ner")
def group() -> None:
    """Measure el4ner: what is timed is checked first."""


@group.command()
@click.option("--op", "ops", multiple=True, help="Only this operation; repeatable. Default: all.")
@click.option("--backend", "backends", multiple=True, help="Only this backend beside the rivals; repeatable.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where to run.")
@click.option("--sizes", default="small", show_default=True, help="Comma-separated: small, full, large, million.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Timed calls per side.")
@click.option("--side", "sides", multiple=True, help="Of span_topk on the CPU: only names that hold this; repeatable.")
@click.option("--input", "inputs", multiple=True, help="Of span_topk on the CPU: only this one, as wnut17; repeatable.")
@click.option("--budget", type=click.FloatRange(0, min_open=True), help="CPU seconds for all calls of a rival there.")
@threads_option
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the random inputs.")
@json_option
@click.pass_context
def kernels(
    context: click.Context, ops: tuple[str, ...], backends: tuple[str, ...], device: str, sizes: str, repeats: int,
    sides: tuple[str, ...], inputs: tuple[str, ...], budget: float | None, threads: int | None, seed: int,
    out: str | None,
) -> None:  # fmt: skip
    """Check each kernel backend and each rival against the reference, then time them in turns.

    Prints a table for each operation and size; --json keeps every row, with hardware, versions and commit. What cannot
    run, or answers wrongly, gets its reason and no time; a wrong answer of a backend ends the run with exit code 1.
    span_topk on the CPU always takes one thread, unless --backend is given.
    """
    import torch

    from el4ner.bench.ceilings import measure_ceilings
    from el4ner.bench.ops import SIZES, measure, table
    from el4ner.bench.rivals_span_topk import INPUTS
    from el4ner.kernels import operations
    from el4ner.kernels._dispatch import BACKENDS

    names = names_of(sizes, "--sizes")
    for given, allowed, option in (
        (ops, operations(), "--op"),
        (backends, BACKENDS, "--backend"),
        (names, SIZES, "--sizes"),
        (inputs, INPUTS, "--input"),
    ):
        if unknown := sorted(set(given) - set(allowed)):
            raise click.BadParameter(f"{', '.join(unknown)}; allowed: {', '.join(allowed)}", param_hint=option)
    if device == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("no CUDA device here; see el4ner doctor", param_hint="--device")
    use_threads(threads)
    ceilings = measure_ceilings(device)
    wrong = False
    for op, size in ((op, size) for op in ops or operations() for size in names if ops or op in SIZES[size]):
        rows = list(
            measure(
                op, size=size, repeats=repeats, seed=seed, device=device, backends=backends, ceilings=ceilings,
                sides=sides, inputs=inputs, budget_s=budget,
            )
        )  # fmt: skip
        wrong = wrong or any(row["status"] == "wrong" and not row["rival"] for row in rows)
        show_rows(rows, table(rows), out)
    if wrong:
        context.exit(1)


@group.command()
@data_argument
@timing_options
@click.option(
    "--source",
    "sources",
    multiple=True,
    default=("embedded:smollm2",),
    show_default=True,
    help="A model, or random:NAME (made here); repeatable, one after another.",
)
@click.option("--sentences", type=click.IntRange(1), default=2, show_default=True, help="How many of its sentences.")
@click.option("--spans", type=click.IntRange(1), default=6, show_default=True, help="Most spans of a sentence.")
@click.option("--shape", is_flag=True, help="6 spans x 2 questions behind a prefix of 700 tokens instead of DATA.")
@click.option("--sides", default="loop,batch,engine", show_default=True, help="Comma-separated; who answers.")
@click.option("--loop-requests", type=click.IntRange(1), help="The loop answers only so many questions.")
@click.option("--rows", type=click.IntRange(1), default=12, show_default=True, help="Prompts in a batch of the rival.")
@click.pass_context
def engine(
    context: click.Context, data: Path | None, sources: tuple[str, ...], device: str, dtype: str, split: str,
    sentences: int, spans: int, shape: bool, sides: str, loop_requests: int | None, rows: int, blocks: int,
    threads: int | None, seed: int, out: str | None,
) -> None:  # fmt: skip
    """Score the questions of the default members with the engine and by hand: answers checked, then timed in blocks.

    DATA is a folder with train (the pool) and a split as JSONL; without it the built-in pool asks about itself. Answers
    that differ end the run with exit code 1, once all models had their turn; nothing of theirs is timed.
    """
    from el4ner.bench.ceilings import measure_ceilings
    from el4ner.bench.engine import SIDES, engine_table, measure_engine
    from el4ner.bench.engine_requests import member_requests, shape_requests, shown_sentences
    from el4ner.bench.random_models import bench_engine, check_source, is_random
    from el4ner.models import prefers_chat

    for source in sources:
        check_source(source)
    names = names_of(sides, "--sides")
    if unknown := sorted(set(names) - set(SIDES)):
        raise click.BadParameter(f"{', '.join(unknown)}; allowed: {', '.join(SIDES)}", param_hint="--sides")
    use_threads(threads)
    progress = Progress()
    shown = None if shape else shown_sentences(data, split, sentences, spans, seed)
    ceilings, wrong = None, False
    for source in sources:
        chat = not is_random(source) and prefers_chat(source)
        model = bench_engine(source, device=device, dtype=dtype, chat=chat)
        ceilings = ceilings or measure_ceilings(model.device.type)
        asked = shape_requests(model, spans=spans) if shown is None else member_requests(shown, model)
        found = list(
            measure_engine(model, asked, sides=names, blocks=blocks, rows=rows, loop_requests=loop_requests,
                           say=progress, ceilings=ceilings)
        )  # fmt: skip
        show_rows(found, engine_table(found), out)
        wrong = wrong or any(row["status"] == "wrong" for row in found)
        del model, asked  # the next one needs the room
    if wrong:
        context.exit(1)


group.add_command(pipeline)
group.add_command(run)
group.add_command(tune)
group.add_command(ablate)
group.add_command(compare)
group.add_command(report)


def _warn(message: str) -> None:
    click.echo(f"warning: {message}", err=True)


def main() -> None:
    """Entry point: errors raised on purpose become one line and their exit code."""
    end_in_order()
    escape_what_stdout_lacks()
    try:
        with warnings_as_messages(_warn):
            group()
    except El4nerError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        if debugging():
            raise
        click.echo(f"error: {unexpected(error)}", err=True)
        raise SystemExit(1) from None
