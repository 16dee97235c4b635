"""Input files to sentences, labelled files to demonstrations, predictions to output files: one JSON object a line.

An input line that cannot be used becomes a `Sentence` whose `error` says why, so that every input line gives one
record. A labelled file is all or nothing: its first wrong line is a `PoolError`.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from el4ner.errors import InputError, PoolError
from el4ner.lines import (
    STDIN,
    DamagedError,
    LineError,
    check_beginning,
    check_encodable,
    decode_line,
    display_name,
    excerpt,
    id_of,
    kind,
    numbered_lines,
    parse_object,
    readable_part,
    text_of,
    visible,
)
from el4ner.output import OutputFile
from el4ner.records import Demonstration, LabelledSpan, Prediction, Sentence

MAX_ID_WARNINGS = 5


# Lines to sentences


def _replace_surrogates(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def make_sentence(text: str, where: str, identifier: str, extra: Mapping[str, Any] | None = None) -> Sentence:
    """A sentence of a text that is at hand; one with lone surrogates gets an error that begins with `where`."""
    try:
        check_encodable(text, '"text"')
    except LineError as error:
        return Sentence(identifier, _replace_surrogates(text), extra or {}, f"{where}: {error}")
    return Sentence(identifier, text, extra or {})


def record_sentence(record: Mapping[str, Any], where: str, number: int) -> Sentence:
    """A record, of a file or handed in, to a sentence: `text` (or `tokens`) and `id`, by default its number.

    What else it holds goes to `extra`, as do values that could not be used; then `error` says why, after `where`.
    """
    identifier, text, problems = str(number), "", []
    unused = dict(record)
    try:
        identifier = id_of(record, number)
        unused.pop("id", None)
    except LineError as error:
        problems.append(str(error))
    try:
        text = text_of(record)
        unused.pop("text", None)
    except LineError as error:
        problems.append(str(error))
    sentence = make_sentence(text, where, identifier, unused)
    if not problems:
        return sentence
    return Sentence(identifier, sentence.text, unused, f"{where}: {'; also '.join(problems)}")


def _json_sentence(line_text: str, where: str, line: int) -> Sentence:
    try:
        return record_sentence(parse_object(line_text, may_be_plain=True), where, line)
    except LineError as error:
        part = readable_part(line_text)
        kept = record_sentence(part, where, line) if part else Sentence(str(line), "")
        return Sentence(kept.id, kept.text, kept.extra, f"{where}: {error}")


def _line_sentence(raw: bytes, where: str, line: int, plain: bool) -> Sentence:
    try:
        text = decode_line(raw)
    except LineError as error:
        # What is readable is kept with U+FFFD for the bad bytes, so that the user recognises the record.
        text = raw.decode("utf-8", "replace")
        usable = Sentence(str(line), text) if plain else _json_sentence(text, where, line)
        return Sentence(usable.id, usable.text, usable.extra, f"{where}: {error}")
    return make_sentence(text, where, str(line)) if plain else _json_sentence(text, where, line)


def _is_plain(path: str | Path) -> bool:
    return str(path).lower().endswith((".txt", ".txt.gz"))


def _file_sentences(path: str | Path, others: bool) -> Iterator[tuple[int, Sentence]]:
    """The records of one file. What breaks off is one more record if there are others, else an error."""
    name = display_name(path)
    plain = _is_plain(path)
    try:
        for line, raw in numbered_lines(path):
            others = True
            yield line, _line_sentence(raw, f"{name}:{line}", line, plain)
    except InputError as error:
        if not others:
            raise
        broken = error.line if isinstance(error, DamagedError) else 1
        yield broken, Sentence(str(broken), "", {}, str(error))


class _Repeats:
    """Warns about repeated ids: each of the first MAX_ID_WARNINGS once, the rest as one count.

    Plain text has no place for an id: that its line numbers repeat from file to file is said once.
    """

    def __init__(self, warn: Callable[[str], None] | None) -> None:
        self._warn = warn
        self._first: dict[str, str] = {}
        self._repeated: set[str] = set()
        self._plain = False

    def add(self, identifier: str, where: str, plain: bool) -> None:
        if self._warn is None:
            return
        if plain and identifier in self._first:
            if not self._plain:
                self._warn(
                    f"{where}: lines of a text file have their numbers for ids, which were used before; the order of "
                    "the records is that of the files"
                )
            self._plain = True
            return
        first = self._first.setdefault(identifier, where)
        if first is where or identifier in self._repeated:
            return
        self._repeated.add(identifier)
        if len(self._repeated) <= MAX_ID_WARNINGS:
            self._warn(
                f"{where}: id {excerpt(identifier)} was used before, at {first}; both records are kept, "
                "give them different ids to tell their results apart"
            )

    def finish(self) -> None:
        rest = len(self._repeated) - MAX_ID_WARNINGS
        if self._warn is not None and rest > 0:
            self._warn(f"{rest} more ids are used more than once")


def read_inputs(
    paths: Sequence[str | Path], limit: int | None = None, warn: Callable[[str], None] | None = None
) -> Iterator[Sentence]:
    """The records of input files, in order, one for each line that is not blank; at most `limit`.

    A name that ends in .txt or .txt.gz is read as a text a line; everything else, stdin ("-") included, as one JSON
    object a line with `text` (or `tokens`, joined by one space) and optionally `id`; what else it holds is carried in
    `extra`. A missing id is the line number. Repeated ids are kept and reported to `warn`. An unusable line becomes a
    sentence with `error`.
    Raises InputError at once if a file is missing, a folder or not readable, if it holds no line that is not blank, or
    if its first such line cannot be unzipped or is UTF-16; for stdin and pipes, which can be read only once, when they
    are read. What turns bad after records have been read gives one more record, with an error, and the next file.
    """
    if not paths:
        raise InputError("no input; name a file, or - for stdin")
    if [str(path) for path in paths].count(STDIN) > 1:
        raise InputError("stdin (-) is named twice; it can be read only once")
    for path in paths:
        check_beginning(path)
    return _sentences(paths, limit, warn)


def _sentences(
    paths: Sequence[str | Path], limit: int | None, warn: Callable[[str], None] | None
) -> Iterator[Sentence]:
    repeats = _Repeats(warn)
    count = 0
    for path in paths:
        name = display_name(path)
        if limit is not None and count >= limit:
            break
        for line, sentence in _file_sentences(path, others=count > 0):
            repeats.add(sentence.id, f"{name}:{line}", _is_plain(path))
            yield sentence
            count += 1
            if limit is not None and count >= limit:
                break
    repeats.finish()


def count_inputs(paths: Sequence[str | Path], limit: int | None = None) -> int | None:
    """How many records `read_inputs` will give; None if that is not known without consuming a stream."""
    count = 0
    for path in paths:
        if str(path) == STDIN or not Path(path).is_file():
            return None
        try:
            for _ in numbered_lines(path):
                count += 1
                if count == limit:
                    return count
        except InputError:  # a record that says so
            count += 1
    return count


def read_records(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a file with their line numbers. Raises InputError at the first line that is none."""
    name = display_name(path)
    for line, raw in numbered_lines(path):
        try:
            yield line, parse_object(decode_line(raw))
        except LineError as error:
            raise InputError(f"{name}:{line}: {error}") from None


# Labelled sentences


def _is_unseen(character: str) -> bool:
    """Whether a character takes no room and no label needs it; joiners and tags belong to scripts and to emoji."""
    joins = character in "\u200c\u200d" or "\U000e0020" <= character <= "\U000e007f"
    return character == "\u034f" or (unicodedata.category(character) == "Cf" and not joins)


def check_label(label: object) -> str:
    """The label, if it can be one: a string that is not blank, not padded, free of control and unseen characters.

    Raises LineError otherwise.
    """
    if not isinstance(label, str):
        raise LineError(f"is {kind(label)} ({excerpt(label)}); use a string")
    if all(unicodedata.category(character)[0] in "ZC" for character in label):  # also what has no width
        raise LineError(f"is blank ({excerpt(label)}); name the entity type")
    if label != label.strip() or visible(label) != label:
        raise LineError(f"is {excerpt(label)}; leave out line breaks, control characters and blanks at its ends")
    unseen = next((character for character in label if _is_unseen(character)), None)
    if unseen is not None:
        escape = f"U+{ord(unseen):04X}"
        shown = excerpt(label.replace(unseen, f"<{escape}>"))
        raise LineError(f"is {shown}, with {escape} in it, a character that is not seen; remove it")
    return label


def _check_offset(entity: Mapping[str, Any], key: str) -> int:
    if key not in entity:
        raise LineError(f'has no "{key}" ({excerpt(entity, 60)}); add it as a code-point offset')
    value = entity[key]
    if not isinstance(value, int) or isinstance(value, bool):
        raise LineError(f'has "{key}" {excerpt(value)}, {kind(value)}; use an integer code-point offset')
    return value


def _occurrence(surface: str, text: str) -> str:
    position = text.find(surface)
    if position < 0:
        return f"{excerpt(surface)} is nowhere in it; correct the entity or the text"
    return f"{excerpt(surface)} stands at [{position}:{position + len(surface)}]; correct start and end"


def check_entity(entity: object, text: str) -> LabelledSpan:
    """One gold annotation `{start, end, label, text?}` of a text. Raises LineError if it does not fit the text."""
    if not isinstance(entity, dict):
        raise LineError(f'is {kind(entity)} ({excerpt(entity)}); use {{"start": 0, "end": 6, "label": "..."}}')
    start, end = _check_offset(entity, "start"), _check_offset(entity, "end")
    if not 0 <= start < end <= len(text):
        raise LineError(
            f"spans [{start}:{end}] of a text of {len(text)} characters; "
            "offsets are half-open code points with 0 <= start < end <= length"
        )
    surface = entity.get("text", text[start:end])
    if surface != text[start:end]:
        found = _occurrence(surface, text) if isinstance(surface, str) and surface else "its text must be a string"
        raise LineError(
            f"says {excerpt(surface)} but [{start}:{end}] of the text reads {excerpt(text[start:end])}; {found}"
        )
    if not surface.strip():
        raise LineError(f"spans only blanks at [{start}:{end}]; correct start and end")
    if "label" not in entity:
        raise LineError(f'has no "label" ({excerpt(entity, 60)}); add one')
    try:
        return LabelledSpan(start, end, check_label(entity["label"]))
    except LineError as error:
        raise LineError(f"has a label that {error}") from None


def _demonstration(raw: bytes, line: int) -> Demonstration:
    record = parse_object(decode_line(raw))
    identifier, text = id_of(record, line), text_of(record)
    check_encodable(text, '"text"')
    if "entities" not in record:
        keys = ", ".join(excerpt(key, 20) for key in list(record)[:6])
        raise LineError(f'no "entities" (keys: {keys}); add "entities", [] where the sentence has none')
    if not isinstance(record["entities"], list):
        raise LineError(f'"entities" is {kind(record["entities"])} ({excerpt(record["entities"])}); use a list')
    entities: dict[LabelledSpan, None] = {}
    for number, item in enumerate(record["entities"], start=1):
        try:
            entity = check_entity(item, text)
        except LineError as error:
            raise LineError(f"entity {number} {error}") from None
        if entity in entities:
            raise LineError(
                f"entity {number} repeats {excerpt(text[entity.start : entity.end])} "
                f"[{entity.start}:{entity.end}] {entity.label}; list it once"
            )
        entities[entity] = None
    return Demonstration(identifier, text, tuple(entities))


def scan_pool(path: str | Path) -> Iterator[Demonstration | PoolError]:
    """Every labelled sentence of a JSONL file, or what is wrong with its line.

    Raises InputError if the file cannot be read.
    """
    name = display_name(path)
    for line, raw in numbered_lines(path):
        try:
            yield _demonstration(raw, line)
        except LineError as error:
            yield PoolError(f"{name}:{line}: {error}")


def read_pool(path: str | Path) -> list[Demonstration]:
    """The labelled sentences of a JSONL file: `text` (or `tokens`) and `entities` [{start, end, label, text?}].

    Offsets are half-open code points; nested and crossing entities are allowed.
    Raises PoolError at the first line that is wrong, InputError if the file cannot be read or is empty.
    """
    return whole(scan_pool(path))


def whole(items: Iterable[Demonstration | PoolError]) -> list[Demonstration]:
    """The sentences, if nothing is wrong. Raises the first error among them."""
    sentences: list[Demonstration] = []
    for item in items:
        if isinstance(item, PoolError):
            raise item
        sentences.append(item)
    return sentences


# Writing


def json_text(value: Any) -> str:
    """A value as indented JSON that UTF-8 can hold: lone surrogates are written as escapes, which JSON allows."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, ensure_ascii=True, indent=2)
    return text


def dump_line(record: Mapping[str, Any]) -> bytes:
    """One record as a line of UTF-8 JSON. Lone surrogates are written as escapes, which JSON allows and UTF-8 not."""
    try:
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError:
        line = json.dumps(record, ensure_ascii=True, allow_nan=False).encode("ascii")
    return line + b"\n"


def write_predictions(
    target: str | Path | BinaryIO, predictions: Iterable[Prediction], *, flush: bool = True
) -> Counter[str]:
    """Writes one line a prediction, as soon as it is there; returns how many there were of each status.

    A path is written through `OutputFile`; a binary stream is left open and, if `flush`, flushed after each line.
    """
    if isinstance(target, (str, Path)):
        with OutputFile(target) as stream:
            return write_predictions(stream, predictions, flush=False)
    statuses: Counter[str] = Counter()
    for prediction in predictions:
        target.write(dump_line(prediction.to_dict()))
        if flush:
            target.flush()
        statuses[prediction.status] += 1
    return statuses
