"""Tags to spans and back, CoNLL column files to labelled sentences, and labelled files of either kind.

Tags: IOB1, IOB2, BIOES (IOBES) and BILOU are read, IOB2 is written. A tag is split at its first hyphen, so
`B-creative-work` is a "creative-work".
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from el4ner.errors import PoolError, UsageError
from el4ner.jsonl import check_label, scan_pool, whole
from el4ner.lines import LineError, decode_line, display_name, excerpt, numbered_lines
from el4ner.records import Demonstration, LabelledSpan

Scheme = Literal["iob1", "iob2", "bioes", "bilou"]
Repair = Literal["error", "begin", "drop"]
"""What becomes of a piece of an entity that the scheme does not allow there, such as an I- without its B-:
"error" refuses it, "begin" lets it begin an entity (as conlleval does), "drop" reads it as O."""

OUTSIDE = "O"
DOCUMENT = "-DOCSTART-"
COLUMN_SUFFIXES = (".conll", ".iob", ".iob2", ".bio", ".bioes", ".bilou")
_PREFIXES: dict[str, frozenset[str]] = {
    "iob1": frozenset("BI"),
    "iob2": frozenset("BI"),
    "bioes": frozenset("BIES"),
    "bilou": frozenset("BILU"),
}


class TokenSpan(NamedTuple):
    """Half-open token positions and a label."""

    first: int
    stop: int
    label: str


def split_tag(tag: str) -> tuple[str, str]:
    """A tag's prefix and label; ("O", "") for O. Raises ValueError if it is neither O nor PREFIX-LABEL."""
    if tag == OUTSIDE:
        return OUTSIDE, ""
    prefix, hyphen, label = tag.partition("-")
    if not hyphen or not label or len(prefix) != 1 or prefix not in "BIESLU":
        raise ValueError(f"tag {excerpt(tag)} is neither O nor one of B- I- E- S- L- U- with a label")
    return prefix, label


def guess_scheme(sentences: Iterable[Sequence[str]]) -> Scheme:
    """The scheme of tagged sentences: BIOES or BILOU by their letters, IOB1 if an I- begins an entity, else IOB2.

    A file without such an I- reads the same under IOB2 unless it is IOB1 with touching entities, which begin with B-
    under both.
    """
    orphan = False
    for tags in sentences:
        before = ""
        for tag in tags:
            prefix, label = split_tag(tag)
            if prefix in ("E", "S"):
                return "bioes"
            if prefix in ("L", "U"):
                return "bilou"
            orphan = orphan or (prefix == "I" and label != before)
            before = label
    return "iob1" if orphan else "iob2"


def tags_to_spans(tags: Sequence[str], scheme: Scheme = "iob2", repair: Repair = "error") -> list[TokenSpan]:
    """The entities of one tagged sentence, as token positions.

    Raises ValueError if a tag does not belong to the scheme, or stands where the scheme does not allow it and
    `repair` is "error".
    """
    if scheme not in get_args(Scheme):
        raise UsageError(f"scheme {scheme!r}; choose one of {', '.join(get_args(Scheme))}")
    if repair not in get_args(Repair):
        raise UsageError(f"repair {repair!r}; choose one of {', '.join(get_args(Repair))}")
    spans: list[TokenSpan] = []
    open_first: int | None = None  # first token of the entity being read
    open_label = ""
    open_sound = True  # begun as the scheme wants
    closes = scheme in ("bioes", "bilou")

    def close(stop: int, ended: bool) -> None:
        nonlocal open_first
        if open_first is None:
            return
        sound = open_sound and (ended or not closes)
        if not sound and repair == "error":
            raise ValueError(
                f"tags {open_first + 1} to {stop} ({', '.join(tags[open_first:stop])}) are no whole {scheme} entity; "
                "correct them (from Python: or repair='begin' or 'drop')"
            )
        if sound or repair == "begin":
            spans.append(TokenSpan(open_first, stop, open_label))
        open_first = None

    for index, tag in enumerate(tags):
        prefix, label = split_tag(tag)
        if prefix != OUTSIDE and prefix not in _PREFIXES[scheme]:
            raise ValueError(
                f"tag {index + 1} ({excerpt(tag)}) is none of {scheme}; write all tags in one scheme, such as IOB2 "
                "(from Python: or give another scheme=)"
            )
        continues = open_first is not None and label == open_label and prefix in ("I", "E", "L")
        if not continues:
            close(index, ended=False)
            if prefix == OUTSIDE:
                continue
            open_first, open_label = index, label
            open_sound = prefix in ("B", "S", "U") or (scheme == "iob1" and prefix == "I")
        if prefix in ("E", "S", "L", "U"):
            close(index + 1, ended=True)
    close(len(tags), ended=False)
    return spans


def tagged_sentence(
    identifier: str, tokens: Sequence[str], tags: Sequence[str], scheme: Scheme, repair: Repair = "error"
) -> Demonstration:
    """Tokens joined by one space, with the entities their tags say. Raises ValueError as `tags_to_spans` does."""
    if len(tokens) != len(tags):
        raise ValueError(f"{len(tokens)} tokens but {len(tags)} tags ({excerpt(' '.join(tokens))}); one tag a token")
    starts = [0]
    for token in tokens:
        starts.append(starts[-1] + len(token) + 1)
    found = tags_to_spans(tags, scheme, repair)
    entities = tuple(LabelledSpan(starts[span.first], starts[span.stop] - 1, span.label) for span in found)
    return Demonstration(identifier, " ".join(tokens), entities)


class _Row(NamedTuple):
    line: int
    token: str
    tag: str


class _Block(NamedTuple):
    """The rows of one sentence, and what is wrong with others of its lines."""

    rows: list[_Row]
    problems: list[PoolError]


def _columns(raw: bytes) -> list[str]:
    """Cells of a line, separated by tabs if there is one (tokens may then hold blanks), else by blanks.

    Other white space, such as a no-break space, separates nothing. Raises LineError if the line is not UTF-8, or
    has a carriage return within it, as files with line ends of old Macs have.
    """
    text = decode_line(raw).rstrip()
    if "\r" in text:
        raise LineError("a carriage return within the line; let lines end in a line feed (tr '\\r' '\\n')")
    separator = "\t" if "\t" in text else " "
    return [cell.strip() for cell in text.split(separator) if cell or separator == "\t"]


def _is_tag(cell: str) -> bool:
    try:
        split_tag(cell)
    except ValueError:
        return False
    return True


def _token_and_tag(cells: Sequence[str], width: int, token_column: int, tag_column: int) -> tuple[str, str]:
    """What a line of a file with `width` columns says. Raises LineError if it says no token and tag."""
    shown = excerpt(" ".join(cells))
    try:
        token, tag = cells[token_column], cells[tag_column]
    except IndexError:
        token = tag = ""
    if len(cells) < 2 or not token or not tag:
        raise LineError(f"{shown} has no token and tag; expected columns, such as 'Berlin B-place'")
    if len(cells) != width:
        raise LineError(
            f"{shown} has {len(cells)} columns, other lines have {width}; give all lines the same columns, with tabs "
            "between them where a token holds blanks"
        )
    if not _is_tag(tag):
        raise LineError(
            f"{shown} ends in {excerpt(tag)}, which is no tag; expected O, or one of B- I- E- S- L- U- with a label, "
            "as in 'Berlin B-place'"
        )
    if tag != OUTSIDE:
        try:
            check_label(split_tag(tag)[1])
        except LineError as error:
            raise LineError(f"{shown} has a label that {error}") from None
    return token, tag


def _blocks(path: str | Path, token_column: int, tag_column: int) -> list[_Block]:
    """Sentences of a column file; blank lines and -DOCSTART- lines end a sentence, comments are left out."""
    lines: list[tuple[int, list[str] | LineError]] = []
    for line, raw in numbered_lines(path):
        try:
            lines.append((line, _columns(raw)))
        except LineError as error:
            lines.append((line, error))
    rows = [cells for _, cells in lines if isinstance(cells, list) and cells and cells[0] != DOCUMENT]
    # A line that begins with # is a token, not a comment, if it has a tag and as many columns as the other lines.
    widths = Counter(len(cells) for cells in rows if not cells[0].startswith("#"))
    width = widths.most_common(1)[0][0] if widths else 2
    blocks = [_Block([], [])]
    last_line = 0
    for line, cells in lines:
        if line != last_line + 1:  # blank lines were skipped
            blocks.append(_Block([], []))
        last_line = line
        if isinstance(cells, LineError):
            blocks[-1].problems.append(PoolError(f"{display_name(path)}:{line}: {cells}"))
        elif not cells or cells[0] == DOCUMENT:
            blocks.append(_Block([], []))
        elif not cells[0].startswith("#") or (len(cells) == width and _is_tag(cells[-1])):
            try:
                blocks[-1].rows.append(_Row(line, *_token_and_tag(cells, width, token_column, tag_column)))
            except LineError as error:
                blocks[-1].problems.append(PoolError(f"{display_name(path)}:{line}: {error}"))
    return [block for block in blocks if block.rows or block.problems]


def scan_conll(
    path: str | Path,
    scheme: Scheme | None = None,
    repair: Repair = "error",
    *,
    token_column: int = 0,
    tag_column: int = -1,
    warn: Callable[[str], None] | None = None,
) -> Iterator[Demonstration | PoolError]:
    """Every sentence of a CoNLL column file, or what is wrong with it, in one of its lines or with its tags.

    The text is the tokens joined by one space, the id its first line's number. Columns are separated by tabs or blanks,
    the same number of them in every line; blank lines and -DOCSTART- lines separate sentences; comment lines,
    byte-order mark, Windows line ends and .gz are accepted. Without `scheme` it is guessed from the sentences whose
    lines are sound, and a guess of IOB1 is reported to `warn`. Raises PoolError for a file of separators and comments
    alone, InputError if it cannot be read or is empty.
    """
    name = display_name(path)
    blocks = _blocks(path, token_column, tag_column)
    if not blocks:
        raise PoolError(f"{name}: holds no token; expected columns, such as 'Berlin B-place'")
    guessed = "" if scheme else " (the scheme was guessed from the tags of the file)"
    if scheme is None:
        scheme = guess_scheme([row.tag for row in block.rows] for block in blocks if not block.problems)
        if scheme == "iob1" and warn is not None:
            remedy = "if that is wrong, write B- where entities begin, as IOB2 does"
            warn(f"{name}: read as IOB1, because an I- begins an entity; {remedy}")
    for rows, problems in blocks:
        if problems:
            yield from problems
            continue
        line = rows[0].line
        try:
            yield tagged_sentence(str(line), [row.token for row in rows], [row.tag for row in rows], scheme, repair)
        except ValueError as error:
            yield PoolError(f"{name}:{line}: {error}{guessed}")


def is_columns(path: str | Path) -> bool:
    """Whether a file is read as columns, by its name: it ends in one of COLUMN_SUFFIXES, or in one and .gz."""
    return str(path).lower().removesuffix(".gz").endswith(COLUMN_SUFFIXES)


def scan_examples(path: str | Path) -> Iterator[Demonstration | PoolError]:
    """Every labelled sentence of a file, or what is wrong with it.

    Raises InputError if the file cannot be read.
    """
    if not is_columns(path):
        yield from scan_pool(path)
        return
    try:
        yield from scan_conll(path, warn=_warn)
    except PoolError as error:  # no columns at all
        yield error


def read_examples(path: str | Path) -> list[Demonstration]:
    """The labelled sentences of a file: columns of tokens and tags where its name says so, JSONL elsewhere.

    The scheme of columns is guessed, with a warning where the guess is IOB1. Raises PoolError at the first line that is
    wrong, InputError if the file cannot be read or is empty.
    """
    return whole(scan_examples(path))


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)
