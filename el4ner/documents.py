"""YAML and JSON files that hold one value: no key stands twice, and what is wrong has its line."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from el4ner.lines import excerpt, repeated_key

_TOO_DEEP = "nested too deeply; flatten it"
_MOST_VALUES = 100_000
"""Values that a document may hold once its aliases are written out; a few lines of aliases of aliases hold billions."""


class DocumentError(ValueError):
    """A text is no usable document; the message lacks the file, which the caller knows, and the line, if there is one.

    line: from 1, None where it is unknown.
    """

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line

    def at(self, name: str) -> str:
        """The message with file and line before it."""
        return f"{name}: {self}" if self.line is None else f"{name}:{self.line}: {self}"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which would let the last of equal keys win. Keys of a merge (`<<`) may be overridden."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                message = f"key {excerpt(key.value)} stands twice in one mapping; keep one"
                raise DocumentError(message, key.start_mark.line + 1)
            seen.add((key.tag, key.value))
        return node


def read_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """The value of a YAML text, and its node, which knows the lines. Raises DocumentError."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        _check_size(node)
        return yaml.load(text, Loader=_Loader), node  # as safe as safe_load: the loader is a subclass of its
    except DocumentError:
        raise
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise DocumentError(f"not YAML ({error.problem or error.context}); correct it", line) from None
    except yaml.YAMLError as error:
        raise DocumentError(f"not YAML ({' '.join(str(error).split())}); correct it") from None
    except RecursionError:
        raise DocumentError(_TOO_DEEP) from None
    except ValueError as error:
        raise DocumentError(f"holds a value YAML cannot read ({error}); put it in quotes") from None


def _check_size(root: yaml.Node | None) -> None:
    """Raises DocumentError where aliases make a short text hold more values than can be read."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) in open_nodes:  # what holds itself is refused where it is used
            return 1
        if id(node) not in sizes:
            open_nodes.add(id(node))
            inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
            sizes[id(node)] = 1 + sum(map(size, inner))
            open_nodes.remove(id(node))
        if sizes[id(node)] > _MOST_VALUES:
            message = f"holds more than {_MOST_VALUES:,} values, aliases written out; use fewer"
            raise DocumentError(message, node.start_mark.line + 1)
        return sizes[id(node)]

    if root is not None:
        size(root)


def read_json(text: str) -> tuple[Any, yaml.Node | None]:
    """The value of a JSON text, and a node that knows its lines (None: YAML cannot read it). Raises DocumentError."""
    try:
        return json.loads(text, object_pairs_hook=_once), _json_node(text)
    except DocumentError as error:
        try:
            yaml.compose(_without_tabs(text), Loader=_Loader)
        except DocumentError as located:
            error.line = located.line
        except (yaml.YAMLError, ValueError, RecursionError):
            pass
        raise
    except json.JSONDecodeError as error:
        raise DocumentError(f"not JSON ({error.msg}); correct it, or use YAML", error.lineno) from None
    except RecursionError:
        raise DocumentError(_TOO_DEEP) from None
    except ValueError as error:
        raise DocumentError(f"not usable JSON ({error}); correct it") from None


def _without_tabs(text: str) -> str:
    """JSON with spaces for tabs, which stand only between its values: within strings they are escaped."""
    return text.replace("\t", " ")


def _json_node(text: str) -> yaml.Node | None:
    """Most JSON is YAML once no tabs stand between its values; not what holds a DEL, or a key of 1,000 characters."""
    try:
        node: yaml.Node | None = yaml.compose(_without_tabs(text), Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    return node


def lines_of(node: yaml.Node | None) -> Callable[[Sequence[int | str]], int | None]:
    """By the path to a value, keys and positions, its line, or that of the innermost value around it; else None."""

    def line(location: Sequence[int | str]) -> int | None:
        place: Any = node
        found: int | None = None
        for step in location:
            if isinstance(place, yaml.MappingNode):
                pair = next(((k, v) for k, v in place.value if getattr(k, "value", None) == str(step)), None)
                if pair is None:  # missing there, or a part that a schema adds to a path
                    break
                found, place = pair[0].start_mark.line + 1, pair[1]
            elif isinstance(place, yaml.SequenceNode) and isinstance(step, int) and step < len(place.value):
                place = place.value[step]
                found = place.start_mark.line + 1
            else:
                break
        return found

    return line


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = repeated_key(pairs)
    if repeated is not None:
        raise DocumentError(f"key {excerpt(repeated)} stands twice in one object; keep one")
    return dict(pairs)
