"""A label definition file: YAML or JSON, a list of labels with name, definition, examples and counter-examples."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from el4ner.documents import DocumentError, read_json, read_yaml
from el4ner.errors import LabelsError
from el4ner.jsonl import check_label
from el4ner.lines import LineError, check_encodable, display_name, excerpt, kind, read_text
from el4ner.records import Label

KEYS = ("name", "definition", "examples", "counter_examples")
_EXPECTED = "write a list of labels, such as - {name: person, definition: A human being.}"


@dataclass(frozen=True, slots=True)
class _Item:
    """One label as read: its data, which one it is ("" where its line says so), and the lines of it and of its keys.

    line: from 1, None where it is unknown.
    """

    data: Any
    number: str
    line: int | None
    key_lines: Mapping[str, int]

    def at(self, name: str, key: str | None = None) -> str:
        """The place of the label, or of one of its keys, for messages."""
        line = self.line if key is None else self.key_lines.get(key, self.line)
        place = name if line is None else f"{name}:{line}"
        return f"{place}: {self.number}" if self.number else place


def read_labels(path: str | Path) -> tuple[Label, ...]:
    """The labels a file defines, in its order.

    The file is a list of mappings (or a mapping whose only key is `labels`) with `name` and, if wanted, `definition`,
    `examples` and `counter_examples`. Raises LabelsError naming file, line and value for anything else, InputError if
    the file cannot be read.
    """
    name = display_name(path)
    text = read_text(path)
    if not text.strip():
        raise LabelsError(f"{name}: is empty; {_EXPECTED}")
    items = _items(text, name)
    if not items:
        raise LabelsError(f"{name}: defines no label; {_EXPECTED}")
    labels: dict[str, Label] = {}
    for item in items:
        label = _label(item, name)
        if label.name in labels:
            raise LabelsError(f"{item.at(name, 'name')}: label {excerpt(label.name)} is defined twice; keep one")
        labels[label.name] = label
    return tuple(labels.values())


def _suggestion(key: object, allowed: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(key).lower().replace("-", "_"), allowed, n=1, cutoff=0.5)
    hint = f'did you mean "{near[0]}"? ' if near else ""
    return f"{hint}allowed: {', '.join(allowed)}"


def _list_of(data: Any, name: str) -> list[Any]:
    """The list of labels, at the top or under the key `labels`."""
    if isinstance(data, dict) and "labels" in data:
        unknown = [key for key in data if key != "labels"]
        if unknown:
            raise LabelsError(f"{name}: unknown key {excerpt(unknown[0])}; only labels may stand beside it; remove it")
        data = data["labels"]
    if not isinstance(data, list):
        raise LabelsError(f"{name}: holds {kind(data)} ({excerpt(data)}); {_EXPECTED}")
    return data


def _items(text: str, name: str) -> list[_Item]:
    is_json = name.endswith(".json")
    try:
        data, node = read_json(text) if is_json else read_yaml(text)
    except DocumentError as error:
        raise LabelsError(error.at(name)) from None
    items = _list_of(data, name)
    if isinstance(node, yaml.MappingNode):
        node = next((value for key, value in node.value if key.value == "labels"), None)
    if node is None:  # JSON that is no YAML, or `labels` came in through a YAML merge key, whose lines are elsewhere
        return [_Item(item, f"label {number}", None, {}) for number, item in enumerate(items, start=1)]
    return [
        _located(item, item_node, f"label {number}" if is_json else "")  # JSON may stand on one line
        for number, (item, item_node) in enumerate(zip(items, node.value, strict=True), start=1)
    ]


def _located(data: Any, node: yaml.Node, number: str) -> _Item:
    """Adds the lines of a label and its keys."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    key_lines = {str(key.value): key.start_mark.line + 1 for key, _ in pairs}
    return _Item(data, number, node.start_mark.line + 1, key_lines)


def _label(item: _Item, name: str) -> Label:
    data = item.data
    if not isinstance(data, dict):
        hint = f"write '- name: {data}'" if isinstance(data, str) and "\n" not in data else _EXPECTED
        raise LabelsError(f"{item.at(name)}: a label is {_kind(data)} ({excerpt(data)}), not a mapping; {hint}")
    for key in data:
        if key not in KEYS:
            place = item.at(name, str(key))
            raise LabelsError(f"{place}: unknown key {excerpt(key)}; {_suggestion(key, KEYS)}")
    if "name" not in data:
        raise LabelsError(f'{item.at(name)}: a label has no "name" ({excerpt(data)}); add one')
    try:
        label_name = check_label(data["name"])
    except LineError as error:
        quoted = _quotes_hint(data["name"])
        raise LabelsError(f'{item.at(name, "name")}: "name" {error}{quoted}') from None
    definition = data.get("definition", "")
    if definition is None or not isinstance(definition, str):
        place = item.at(name, "definition")
        raise LabelsError(
            f'{place}: "definition" of {excerpt(label_name)} is {_kind(definition)} ({excerpt(definition)}); '
            f"use a string, or leave it out{_quotes_hint(definition)}"
        )
    label = Label(
        label_name,
        " ".join(definition.split()),  # a sentence for prompts: YAML's line folding is no part of it
        _strings(item, name, "examples"),
        _strings(item, name, "counter_examples"),
    )
    try:
        check_encodable(" ".join((label.definition, *label.examples, *label.counter_examples)), "its wording")
    except LineError as error:
        raise LabelsError(f"{item.at(name)}: label {excerpt(label_name)}: {error}") from None
    return label


def _kind(value: object) -> str:
    return "empty" if value is None else kind(value)


def _quotes_hint(value: object) -> str:
    """YAML reads `no`, `1` and `2020-01-01` as other things than text, and JSON what stands without quotes."""
    return "" if value is None or isinstance(value, (str, list, dict)) else "; put quotes around it if it is text"


def _strings(item: _Item, name: str, key: str) -> tuple[str, ...]:
    value = item.data.get(key, [])
    place = item.at(name, key)
    label_name = excerpt(item.data["name"])
    if not isinstance(value, list):
        raise LabelsError(
            f'{place}: "{key}" of {label_name} is {_kind(value)} ({excerpt(value)}); '
            f'use a list of strings: {key}: ["..."]'
        )
    for entry in value:
        if not isinstance(entry, str) or not entry.strip():
            what = "blank" if isinstance(entry, str) else _kind(entry)
            raise LabelsError(
                f'{place}: "{key}" of {label_name} holds an entry that is {what} ({excerpt(entry)}); '
                f"use strings that are not blank{_quotes_hint(entry)}"
            )
    return tuple(value)
