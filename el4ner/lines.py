"""Bytes of a file to numbered lines, a line to a JSON object; and how values are shown in messages.

Blank lines are skipped, byte-order marks and Windows line ends accepted. A whole file that cannot be read is an
`InputError`; one line that cannot be used is a `LineError`, and its caller decides what becomes of it.
"""

from __future__ import annotations

import datetime
import gzip
import json
import math
import os
import stat
import sys
import unicodedata
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from el4ner.errors import InputError

STDIN = "-"
MAX_DEPTH = 100
"""Deeper nesting than this is refused, so that what was read can also be written."""
MAX_INTEGER_DIGITS = 1000

EXAMPLE = '{"id": "1", "text": "..."}'
_BOM = b"\xef\xbb\xbf"
_BIDI_CONTROLS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c")


class LineError(ValueError):
    """A line cannot be used; the message lacks the file and line, which the caller knows."""


class DamagedError(InputError):
    """Reading broke off in the middle of a file, at line `line`."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


def visible(text: str) -> str:
    """The text with control characters, lone surrogates, line and direction marks written as escapes.

    Safe to print on any terminal; everything else, emoji joiners included, stays as it is.
    """
    if text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _BIDI_CONTROLS
        else character
        for character in text
    )


def excerpt(value: object, length: int = 40) -> str:
    """A JSON value on one line, cut to about `length` characters, for use in a message."""
    try:
        text = visible(json.dumps(value, ensure_ascii=False, default=_as_written))
    except (TypeError, ValueError):  # YAML has keys that JSON has not, and values that hold themselves
        text = visible(repr(value))
    return text if len(text) <= length else text[: length - 1] + "…"


def _as_written(value: object) -> str:
    """What YAML reads besides JSON's values, as it stands in a file."""
    return value.isoformat() if isinstance(value, datetime.date) else repr(value)


def kind(value: object) -> str:
    """What a value of JSON or YAML is, in words."""
    if value is None:
        return "null"
    if isinstance(value, datetime.date):
        return "a date"
    names = {bool: "a boolean", str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def display_name(path: str | Path) -> str:
    """How a file is called in messages."""
    return "stdin" if str(path) == STDIN else visible(str(path))


# Reading bytes


def check_readable(path: str | Path, *, may_be_empty: bool = False) -> None:
    """Raises InputError if a file is missing, a folder, empty or not permitted, without reading it."""
    if str(path) == STDIN:
        return
    name = display_name(path)
    if not str(path):
        raise InputError("the name of an input file is empty; name a file, or - for stdin")
    try:
        info = os.stat(path)  # noqa: PTH116  a Path would forget a slash at the end
    except FileNotFoundError:
        raise InputError(f"{name}: no such file; check the path (the current folder is {_here()})") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: cannot be read ({error}); check the path and its permissions") from None
    if stat.S_ISDIR(info.st_mode):
        raise InputError(f"{name}: is a folder; name a file in it, or {name.rstrip('/')}/*.jsonl for all of them")
    if stat.S_ISREG(info.st_mode) and info.st_size == 0 and not may_be_empty:
        raise InputError(f"{name}: is empty; expected one record a line")
    if not os.access(path, os.R_OK):
        raise InputError(f"{name}: permission denied; make it readable (chmod u+r)")


def _here() -> str:
    try:
        return str(Path.cwd())
    except OSError:
        return "gone"


def is_zipped(path: str | Path) -> bool:
    """Whether a file's name says that it is gzipped."""
    return str(path).lower().endswith(".gz")


@contextmanager
def _opened(path: str | Path) -> Iterator[BinaryIO]:
    """The bytes of a file (unzipped if its name ends in .gz) or of stdin, which is left open."""
    check_readable(path, may_be_empty=True)
    if str(path) == STDIN:
        if sys.stdin is None:
            raise InputError("stdin: is closed; name a file, or give it an input")
        yield sys.stdin.buffer
        return
    try:
        # Opened outside `with`, so that only opening errors are translated here, not those of the caller's block.
        stream = gzip.open(path, "rb") if is_zipped(path) else Path(path).open("rb")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"{display_name(path)}: cannot be read ({error.strerror}); check the file") from None
    with stream:
        yield cast(BinaryIO, stream)


_HIGH_BYTES = frozenset(range(1, 32)) - frozenset(b"\t\n\v\f\r\x1b")
"""First bytes of two-byte code points from U+0100 on that are control characters in any text of single bytes."""


def _check_encoding(beginning: bytes, name: str) -> None:
    if beginning[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff") or (len(beginning) > 3 and beginning[:4].count(0) == 3):
        raise InputError(f"{name}: is UTF-32; convert it to UTF-8 first (iconv -f UTF-32 -t UTF-8)")
    unmarked = len(beginning) > 1 and (beginning[0] == 0) != (beginning[1] == 0)
    if beginning.startswith((b"\xff\xfe", b"\xfe\xff")) or unmarked:
        scheme = "UTF-16" if not unmarked else "UTF-16BE" if beginning[0] == 0 else "UTF-16LE"
        raise InputError(f"{name}: is UTF-16; convert it to UTF-8 first (iconv -f {scheme} -t UTF-8)")
    for scheme, high in (("UTF-16LE", beginning[1:4:2]), ("UTF-16BE", beginning[0:4:2])):
        # of Greek, Cyrillic, Arabic and other letters all first bytes are the same
        if len(high) == 2 and high[0] == high[1] and high[0] in _HIGH_BYTES:
            raise InputError(f"{name}: looks like UTF-16; convert it to UTF-8 first (iconv -f {scheme} -t UTF-8)")
    if beginning.startswith(b"\x1f\x8b"):
        raise InputError(f"{name}: is gzip data; let its name end in .gz, or unzip it first (zcat)")


def _check_line_ends(raw: bytes, name: str) -> None:
    """raw: the whole of a file that holds no newline."""
    if b"\r" in raw.strip():
        raise InputError(f"{name}: its lines end in a carriage return alone; convert it first (tr '\\r' '\\n')")


def numbered_lines(path: str | Path) -> Generator[tuple[int, bytes], None, None]:
    """The lines of a file that are not blank, each with its number (from 1), without line end or byte-order mark.

    Raises InputError if the file cannot be read, holds no line that is not blank, is UTF-16 or misnamed gzip data, or
    has lines that end in carriage returns alone; DamagedError if reading breaks off later.
    """
    name = display_name(path)
    number = 0
    found = False
    with _opened(path) as stream:
        try:
            for number, raw in enumerate(stream, start=1):
                if number == 1:
                    _check_encoding(raw[:4], name)
                    if not raw.endswith(b"\n"):
                        _check_line_ends(raw, name)
                raw = raw.removeprefix(_BOM)  # files that were joined have one where each began
                if raw.strip():
                    found = True
                    yield number, raw[:-2] if raw.endswith(b"\r\n") else raw.removesuffix(b"\n")
        except (OSError, EOFError, zlib.error) as error:
            what = "the gzip data are damaged or cut off" if is_zipped(path) else "reading failed"
            message = f"{name}:{number + 1}: {what} ({error}); what follows is lost, fetch or write the file again"
            raise DamagedError(message, number + 1) from None
    if not found:
        raise InputError(f"{name}: is empty; expected one record a line")


def check_beginning(path: str | Path) -> None:
    """Raises InputError if a file cannot be read up to its first line that is not blank, as `numbered_lines` would.

    Stdin and pipes are only looked at from outside, since they can be read only once.
    """
    check_readable(path)
    if str(path) != STDIN and Path(path).is_file():
        with closing(numbered_lines(path)) as lines:
            next(lines, None)


def read_text(path: str | Path) -> str:
    """A whole UTF-8 file, without byte-order mark. Raises InputError if it cannot be read or decoded."""
    name = display_name(path)
    with _opened(path) as stream:
        try:
            raw = stream.read()
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{name}: cannot be read ({error}); fetch or write the file again") from None
    _check_encoding(raw[:4], name)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{name}:{line}: invalid UTF-8 (byte 0x{raw[error.start]:02x}); save the file as UTF-8"
        ) from None


# Lines to JSON


def decode_line(raw: bytes) -> str:
    """Raises LineError if the line is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LineError(
            f"invalid UTF-8 (byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line); "
            "save the file as UTF-8"
        ) from None


def _refuse_constant(name: str) -> float:
    raise LineError(f"{name} is no JSON number; use null or leave it out")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise LineError(f"the number {digits[:20]} is too large; write it as a string")
    return value


def _integer(digits: str) -> int:
    if len(digits) > MAX_INTEGER_DIGITS:
        raise LineError(f"an integer of {len(digits)} digits is too long; write it as a string")
    return int(digits)


def _too_deep(value: Any) -> bool:
    """Whether a JSON value is nested deeper than MAX_DEPTH, found without recursion."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return False
    return True


def repeated_key(pairs: Sequence[tuple[str, Any]]) -> str | None:
    """The first key of a JSON object's pairs that stands there again, None where each stands once."""
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return key
        seen.add(key)
    return None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = repeated_key(pairs)
    if repeated is not None:
        raise LineError(f"the key {excerpt(repeated)} stands more than once in one object; keep one of them")
    return dict(pairs)


def parse_object(line: str, *, may_be_plain: bool = False) -> dict[str, Any]:
    """The JSON object a line holds. Raises LineError if it holds anything else, or a key twice.

    may_be_plain: plain text is read too, by the file's name, which the message says of what looks like text.
    """
    remedy = f"write one JSON object a line, such as {EXAMPLE}"
    if line.lstrip().startswith("["):
        remedy += "; jq -c '.[]' makes that of an array"
    try:
        value = json.loads(
            line,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_integer,
            object_pairs_hook=_without_repeats,
        )
    except json.JSONDecodeError as error:
        looks_plain = may_be_plain and line.lstrip()[:1] not in '{["}]'
        plain = "" if not looks_plain else "; plain text, a text a line, wants a name that ends in .txt"
        raise LineError(
            f"not JSON: {excerpt(line)} ({error.msg.removesuffix(' at')} at column {error.colno}); {remedy}{plain}"
        ) from None
    except RecursionError:
        raise LineError(f"nested deeper than {MAX_DEPTH} levels; flatten the record") from None
    if line.count("[") + line.count("{") > MAX_DEPTH and _too_deep(value):
        raise LineError(f"nested deeper than {MAX_DEPTH} levels; flatten the record")
    if not isinstance(value, dict):
        raise LineError(f"not a JSON object but {kind(value)}: {excerpt(value)}; {remedy}")
    return value


def readable_part(line: str) -> dict[str, Any]:
    """What can be kept of a line that `parse_object` refuses for a number or a repeated key, {} where nothing can.

    null stands for such numbers, the last of several values for their key.
    """
    try:
        value = json.loads(
            line,
            parse_constant=lambda _: None,
            parse_float=lambda digits: float(digits) if math.isfinite(float(digits)) else None,
            parse_int=lambda digits: int(digits) if len(digits) <= MAX_INTEGER_DIGITS else None,
        )
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) and not _too_deep(value) else {}


def check_encodable(text: str, name: str) -> None:
    """Raises LineError if the text holds a lone surrogate, which no UTF-8 file can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # Python's place for bytes of arguments and file names that it cannot decode
        of_a_byte = 0xDC80 <= ord(text[error.start]) <= 0xDCFF
        what = "half of a character" + (", or a byte that is no UTF-8" if of_a_byte else "")
        what += "; write the whole character" + (" in UTF-8" if of_a_byte else "")
        raise LineError(
            f"{name} has a lone surrogate (\\u{ord(text[error.start]):04x} at character {error.start}), {what}"
        ) from None


def id_of(record: Mapping[str, Any], line: int) -> str:
    """The record's id as a string, the line number where it is missing or null. Raises LineError for other types."""
    value = record.get("id")
    if value is None:
        return str(line)
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise LineError(f'"id" is {kind(value)} ({excerpt(value)}); use a string or an integer')


def text_of(record: Mapping[str, Any]) -> str:
    """The record's `text`, or else its `tokens` joined by one space. Raises LineError if neither is usable."""
    if "text" in record:
        text = record["text"]
        if not isinstance(text, str):
            raise LineError(f'"text" is {kind(text)} ({excerpt(text)}), not a string; write the text in quotes')
        return text
    if "tokens" not in record:
        keys = ", ".join(excerpt(key, 20) for key in list(record)[:6]) or "none"
        raise LineError(f'no "text" (keys: {keys}); add "text", or "tokens" as a list of strings')
    tokens = record["tokens"]
    if not isinstance(tokens, (list, tuple)):  # a tuple comes from Python, never from JSON
        raise LineError(f'"tokens" is {kind(tokens)} ({excerpt(tokens)}); use a list of strings')
    for token in tokens:
        if not isinstance(token, str):
            raise LineError(f'"tokens" holds {kind(token)} ({excerpt(token)}); use strings only')
    return " ".join(tokens)
