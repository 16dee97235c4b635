"""`el4ner-bench pipeline`: the whole method by el4ner and by a plain script."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from el4ner.bench.cli_options import Progress, assigned


@click.command()
@click.argument("data", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--split", default="test", show_default=True, help="The split of DATA that is predicted.")
@click.option("--sentences", type=click.IntRange(1), default=30, show_default=True, help="How many of its sentences.")
@click.option("--pool-limit", type=click.IntRange(1), help="Only so many pool sentences, drawn by content.")
@click.option("--members", multiple=True, metavar="NAME=SOURCE", help="A model, or random:NAME; repeat for several.")
@click.option("--device", default="cpu", show_default=True, help="Where to run.")
@click.option("--dtype", default="float32", show_default=True, help="Precision; auto takes what the device likes.")
@click.option("--set", "assignments", multiple=True, help="A setting for both sides, as YAML: --set retrieve.k=2.")
@click.option("--no-check", is_flag=True, help="Time answers that differ too: in half precision, with random weights.")
@click.option("--blocks", type=click.IntRange(1), default=3, show_default=True, help="Timed blocks, interleaved.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads. Default: torch's.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the sample.")
@click.option(
    "--json", "out", type=click.Path(dir_okay=False, allow_dash=True), help="Append JSON lines here; - prints."
)
@click.pass_context
def pipeline(
    context: click.Context, data: Path | None, split: str, sentences: int, pool_limit: int | None,
    members: tuple[str, ...], device: str, dtype: str, assignments: tuple[str, ...], no_check: bool, blocks: int,
    threads: int | None, seed: int, out: str | None,
) -> None:  # fmt: skip
    """Predict with every voter by el4ner and by a plain script, on the same weights: entities checked, then timed.

    DATA is a folder with train (the pool) and a split as JSONL; without it the built-in pool is both. Entities that
    differ end the run with exit code 1, before anything is timed.
    """
    import torch

    from el4ner.bench.pipeline import measure_pipeline, pipeline_table
    from el4ner.config import parse_members

    if threads is not None:
        torch.set_num_threads(threads)
    settings: dict[str, Any] = {"device": device, "dtype": dtype, **assigned(assignments)}
    if members:
        settings["members"] = parse_members(members)
    rows = list(
        measure_pipeline(
            data, split=split, count=sentences, seed=seed, settings=settings, blocks=blocks, pool_limit=pool_limit,
            check=not no_check, say=Progress(),
        )
    )  # fmt: skip
    click.echo(pipeline_table(rows) + "\n", err=out == "-")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if out == "-":
        click.echo(lines, nl=False)
    elif out is not None:
        with Path(out).open("a", encoding="utf-8") as file:
            file.write(lines)
    if not no_check and any(row["status"] == "wrong" for row in rows):
        context.exit(1)
