"""`el4ner-bench pipeline`: the whole method by el4ner and by a plain script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from el4ner.bench.cli_options import Progress, assigned, data_argument, show_rows, timing_options, use_threads


@click.command()
@data_argument
@timing_options
@click.option("--sentences", type=click.IntRange(1), default=30, show_default=True, help="How many of its sentences.")
@click.option("--pool-limit", type=click.IntRange(1), help="Only so many pool sentences, drawn by content.")
@click.option("--members", multiple=True, metavar="NAME=SOURCE", help="A model, or random:NAME; repeat for several.")
@click.option("--set", "assignments", multiple=True, help="A setting for both sides, as YAML: --set retrieve.k=2.")
@click.option("--no-check", is_flag=True, help="Time answers that differ too: in half precision, with random weights.")
@click.option("--once", is_flag=True, help="Each block predicts sentences of its own, checked and timed in one.")
@click.pass_context
def pipeline(
    context: click.Context, data: Path | None, split: str, sentences: int, pool_limit: int | None,
    members: tuple[str, ...], device: str, dtype: str, assignments: tuple[str, ...], no_check: bool, once: bool,
    blocks: int, threads: int | None, seed: int, out: str | None,
) -> None:  # fmt: skip
    """Predict with every voter by el4ner and by a plain script, on the same weights: entities checked, then timed.

    DATA is a folder with train (the pool) and a split as JSONL; without it the built-in pool is both. Entities that
    differ end the run with exit code 1, before anything is timed. The plain script takes minutes for a sentence:
    --once predicts each one only once, in as many parts as there are blocks, and checks the answers that it timed.
    """
    from el4ner.bench.pipeline import measure_pipeline, pipeline_table
    from el4ner.config import parse_members

    use_threads(threads)
    settings: dict[str, Any] = {"device": device, "dtype": dtype, **assigned(assignments)}
    if members:
        settings["members"] = parse_members(members)
    rows = list(
        measure_pipeline(
            data, split=split, count=sentences, seed=seed, settings=settings, blocks=blocks, pool_limit=pool_limit,
            check=not no_check, once=once, say=Progress(),
        )
    )  # fmt: skip
    show_rows(rows, pipeline_table(rows), out)
    if not no_check and any(row["status"] == "wrong" for row in rows):
        context.exit(1)
