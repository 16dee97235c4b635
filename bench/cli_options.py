"""Options of el4ner-bench that several commands have: lists of names, assignments, messages on the way."""

from __future__ import annotations

import time
from typing import Any

import click

from el4ner.documents import DocumentError, read_yaml


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
