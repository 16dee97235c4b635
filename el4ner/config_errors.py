"""What is wrong with settings, in words: pydantic's errors as one line with places, values and remedies."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from el4ner.errors import ConfigError
from el4ner.lines import excerpt

Lines = Callable[[Sequence[int | str]], int | None]
"""By the path to a setting its line, None where it has none."""

MOST_SHOWN = 5
"""Wrong settings that a message describes; of the others it has the number."""

_TYPES = {
    "int_type": "use a whole number, without quotes",
    "float_type": "use a number, without quotes",
    "bool_type": "use true or false, without quotes",
    "string_type": "use a string",
    "string_too_short": "it is empty; write a name",
    "tuple_type": "use a list",
    "model_type": "use a mapping of settings",
    "missing": "is missing; add it",
}
_PATTERNS = {
    "device": "choose auto, cpu, mps, cuda or cuda:N",
    "name": "use lower-case letters, digits, dots, hyphens and underscores",
}
_UNIONS = {
    "voters": "choose auto, all, or a list of names",
    "chat": "choose auto, true or false, without quotes",
}
"""Settings of several types, for each of which pydantic has an error of its own."""


def explain(error: ValidationError, model: type[BaseModel], origin: str, lines: Lines | None) -> ConfigError:
    """Every wrong setting of `model`, each once, in the order of their lines where those are known.

    lines: where in `origin` a setting stands.
    """
    wrong: dict[tuple[int | str, ...], Mapping[str, Any]] = {}
    for one in error.errors(include_url=False):
        union = next((position for position, step in enumerate(one["loc"]) if step in _UNIONS), len(one["loc"]))
        wrong.setdefault(one["loc"][: union + 1], one)
    line_of = {place: None if lines is None else lines(place) for place in wrong}
    ordered = sorted(wrong, key=lambda place: line_of[place] or 0)
    listed: set[tuple[int | str, ...]] = set()
    found = []
    for place in ordered[:MOST_SHOWN]:
        where = origin if line_of[place] is None else f"{origin}:{line_of[place]}"
        unknown = wrong[place]["type"] == "extra_forbidden"
        found.append(f"{where}: {_unknown(place, model, listed) if unknown else _wrong(place, wrong[place])}")
    rest = f"; {len(ordered) - MOST_SHOWN} more are wrong" if len(ordered) > MOST_SHOWN else ""
    return ConfigError("; also ".join(found) + rest)


def _unknown(place: tuple[int | str, ...], model: type[BaseModel], listed: set[tuple[int | str, ...]]) -> str:
    """An unknown setting with the nearest known one, or with all of its section, once a section."""
    message = f"unknown setting {'.'.join(map(str, place))!r}"
    known = _field_names(place[:-1], model)
    near = difflib.get_close_matches(str(place[-1]), known, n=1)
    if near:
        return f"{message}; did you mean {near[0]!r}?"
    if place[:-1] in listed:
        return message
    listed.add(place[:-1])
    return f"{message}; choose from {', '.join(known)}"


def _field_names(section: Sequence[int | str], model: Any) -> list[str]:
    for step in section:
        if isinstance(step, str) and step in model.model_fields:
            annotation = model.model_fields[step].annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                model = annotation
    return list(model.model_fields)


def _wrong(place: tuple[int | str, ...], error: Mapping[str, Any]) -> str:
    if not place:
        return _remedy(error)
    reason = _UNIONS.get(str(place[-1])) or _remedy(error)
    silent = place[-1] == "api_key" or error["type"] in ("value_error", "missing")
    came = "" if silent else f"={shown(error.get('input'))}"
    return f"{'.'.join(map(str, place))}{came}: {reason}"


def _remedy(error: Mapping[str, Any]) -> str:
    """What to do about an error of pydantic, whose own texts say what its types are called."""
    if error["type"] == "string_pattern_mismatch":
        return _PATTERNS[str(error["loc"][-1])]
    if error["type"] in _TYPES:
        return _TYPES[error["type"]]
    message = str(error["msg"]).removeprefix("Value error, ")
    choose = "choose " if error["type"] == "literal_error" else "use a value "
    return message.replace("Input should be a ", "use a ").replace("Input should be ", choose)


def shown(value: object) -> str:
    """A value in the words of a file, on one line, cut where it is long; whatever it is nested in."""
    try:
        return excerpt(value, 60)
    except RecursionError:
        return "…"
