"""What models reply, read into data. Pure, and never raises: a malformed reply is data with `malformed` set.

Reading undoes what prompts.py writes: `parse(render(x)) == x`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from el4ner.escaping import split_unescaped, unescape_line

CLS = "[CLS]"
SEP = "[SEP]"
ARROW = " -> "

_TRUE = frozenset({"true", "yes"})
_FALSE = frozenset({"false", "no"})
_VERDICT_WORD = re.compile(r"[a-z']+")


@dataclass(frozen=True, slots=True)
class SpanList:
    """The surfaces a reply lists, in its order, repetitions included, and whether its form was broken."""

    surfaces: tuple[str, ...]
    malformed: bool = False


@dataclass(frozen=True, slots=True)
class LabelList:
    """The (surface, label) pairs a reply gives, the pairs whose label is not in the set, and whether its form broke."""

    pairs: tuple[tuple[str, str], ...]
    unknown: tuple[tuple[str, str], ...] = ()
    malformed: bool = False


def parse_span_list(
    reply: str, separator: str = "; ", *, empty: str = "none", truncated: bool = False, verbatim: bool = False
) -> SpanList:
    """A separator-joined list, or `empty`.

    verbatim: the items are substrings of the text as they stand (grounded decoding), so backslashes are no escapes, and
    only the whole separator parts them: "AT&amp;T" is one item.
    truncated: the token limit cut the reply, so its last item is dropped unless it is verbatim.
    Malformed: an empty reply, an empty item, a cut reply.
    """
    line = reply.strip().split("\n", 1)[0].strip()
    if not line:
        return SpanList((), malformed=True)
    if line.casefold().rstrip(".") == empty.casefold():
        return SpanList(())
    mark = separator.strip() or separator
    if verbatim:
        # a cut reply may end in a part of the separator
        items = [item.strip() for item in (line.removesuffix(mark) if truncated else line).split(separator)]
    else:
        items = [item.strip() for item in split_unescaped(line, mark)]
    if items and not items[-1]:
        items.pop()  # a closing separator is common and harmless
    if truncated and not verbatim and items:
        items.pop()
    surfaces = [item if verbatim else unescape_line(item) for item in items]
    named = tuple(surface for surface in surfaces if surface.strip())  # an escaped line break is no surface
    return SpanList(named, malformed=truncated or len(named) < len(surfaces))


def parse_paper_list(reply: str, *, truncated: bool = False) -> SpanList:
    """A list like "[CLS]a[SEP]b[SEP]"; the markers at both ends may be missing, more than one line is malformed.

    Malformed: no marker at all, more than one [CLS], text before [CLS], a cut reply (its last item is dropped).
    """
    lines = reply.strip().split("\n", 1)
    parts = split_unescaped(lines[0], CLS)
    malformed = len(lines) > 1 or len(parts) > 2 or (len(parts) == 2 and bool(parts[0].strip()))
    content = parts[1] if len(parts) > 1 else parts[0]
    items = [item.strip() for item in split_unescaped(content, SEP)]
    malformed = malformed or (len(parts) == 1 and len(items) == 1)
    if truncated:
        items = items[:-1]
    surfaces = [unescape_line(item) for item in items]
    named = tuple(surface for surface in surfaces if surface.strip())
    # an empty item is how an empty list is written, and how a list ends
    return SpanList(named, malformed=malformed or truncated or len(named) < sum(map(bool, items)))


def parse_labels(reply: str, labels: Sequence[str], *, truncated: bool = False) -> LabelList:
    """Pairs like "Berlin -> location[SEP]Ada -> person". Labels are compared verbatim, then by case, "-" and "_".

    Malformed: an item without arrow, no pair at all, a cut reply (its last item is dropped).
    """
    exact = {label: label for label in labels}
    alike = {loose(label): label for label in reversed(labels)}
    items = [
        item.strip()
        for line in "".join(split_unescaped(reply, CLS)).splitlines()
        for item in split_unescaped(line, SEP)
        if item.strip()
    ]
    if truncated:
        items = items[:-1]
    pairs: list[tuple[str, str]] = []
    unknown: list[tuple[str, str]] = []
    malformed = truncated or not items
    for item in items:
        # The last arrow: labels have theirs escaped, surfaces need not.
        surface, arrow, written = item.rpartition(ARROW)
        surface, written = unescape_line(surface.strip()), unescape_line(written.strip())
        if not arrow or not surface.strip():
            malformed = True
            continue
        label = exact.get(written) or alike.get(loose(written))
        if label is None:
            unknown.append((surface, written))
        else:
            pairs.append((surface, label))
    return LabelList(tuple(pairs), tuple(unknown), malformed)


def loose(label: str) -> str:
    """A label by which different spellings are compared: without case, and with blanks for hyphens and underscores."""
    return re.sub(r"[\s_-]+", " ", label.casefold()).strip(" .\"'")


def parse_verdict(reply: str) -> bool | None:
    """True for "true" or "yes", False for "false" or "no"; None if the first line says neither, both, or negates."""
    found = _VERDICT_WORD.findall(reply.strip().split("\n", 1)[0].casefold())
    if "not" in found:
        return None
    yes, no = not _TRUE.isdisjoint(found), not _FALSE.isdisjoint(found)
    return None if yes == no else yes
