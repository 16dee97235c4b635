"""What several commands of el4ner-bench have: options of timings, lists of names, assignments, rows, messages."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from el4ner.documents import DocumentError, read_yaml

C = TypeVar("C", bound=Callable[..., Any])


def _can_be_written(_: click.Context, __: click.Parameter, out: str | None) -> str | None:
    """Opens the file before hours are measured for it. Raises click.BadParameter where that fails."""
    if out is not None and out != "-":
        try:
            Path(out).open("a", encoding="utf-8").close()
        except OSError as error:
            said = f"{out}: cannot be written ({error.strerror}); name a file in a folder that is there"
            raise click.BadParameter(said) from None
    return out


threads_option = click.option("--threads", type=click.IntRange(1), help="CPU threads. Default: torch's.")
json_option = click.option(
    "--json",
    "out",
    type=click.Path(dir_okay=False, allow_dash=True),
    callback=_can_be_written,
    help="Append JSON lines here; - prints.",
)
data_argument = click.argument("data", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))


def timing_options(command: C) -> C:
    """The options of a timing of models: where they run, how often, where rows go."""
    for option in reversed(
        (
            click.option("--split", default="test", show_default=True, help="The split of DATA that is asked about."),
            click.option("--device", default="cpu", show_default=True, help="Where to run."),
            click.option("--dtype", default="float32", show_default=True,
                         help="Precision; auto takes what the device likes."),
            click.option("--blocks", type=click.IntRange(1), default=3, show_default=True,
                         help="Timed blocks, interleaved."),
            threads_option,
            click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the sample."),
            json_option,
        )
    ):  # fmt: skip
        command = option(command)
    return command


def use_threads(threads: int | None) -> None:
    """Let torch use so many threads; None leaves it as it is."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def show_rows(rows: Sequence[dict[str, Any]], table: str, out: str | None) -> None:
    """A table for reading, and rows as JSON lines: on stdout for "-" (the table then on stderr), at the end of a file,
    or nowhere."""
    click.echo(table + "\n", err=out == "-")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if out == "-":
        click.echo(lines, nl=False)
    elif out is not None:
        with Path(out).open("a", encoding="utf-8") as file:
            file.write(lines)


def names_of(value: str, option: str) -> list[str]:
    """Names separated by commas. Raises click.BadParameter if there is none."""
    found = [name.strip() for name in value.split(",") if name.strip()]
    if not found:
        raise click.BadParameter(f"{value!r} names nothing; write names, separated by commas", param_hint=option)
    return found


def assigned(assignments: tuple[str, ...], option: str = "--set") -> dict[str, Any]:
    """`a.b=c` -> {"a": {"b": c}}, values read as YAML. Raises click.BadParameter for what is no assignment."""
    settings: dict[str, Any] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        steps = path.split(".")
        if not equals or not all(steps):
            raise click.BadParameter(f"{assignment!r}: write NAME=VALUE", param_hint=option)
        try:
            value, _ = read_yaml(text)
        except DocumentError as error:
            raise click.BadParameter(f"{assignment!r}: {error}", param_hint=option) from None
        place = settings
        for step in steps[:-1]:
            place = place.setdefault(step, {})
            if not isinstance(place, dict):
                raise click.BadParameter(f"{assignment!r}: {step} has a value already", param_hint=option)
        if isinstance(place.get(steps[-1]), dict):
            raise click.BadParameter(f"{assignment!r}: parts of {path} are set already", param_hint=option)
        place[steps[-1]] = value
    return settings


class Progress:
    """Messages on stderr, at most one in five seconds."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, message: str) -> None:
        """Say it, unless something was said just now."""
        now = time.monotonic()
        if now - self._last >= 5:
            self._last = now
            click.echo(message, err=True)
