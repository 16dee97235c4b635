"""Inputs: a record for every line, messages with file, line, value and remedy. Outputs: nothing is lost."""

from __future__ import annotations

import gzip
import io
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from el4ner.errors import InputError, PoolError, UsageError
from el4ner.jsonl import (
    OutputFile,
    count_inputs,
    dump_line,
    read_inputs,
    read_pool,
    read_records,
    scan_pool,
    write_predictions,
)
from el4ner.lines import visible
from el4ner.records import Entity, LabelledSpan, Prediction, Sentence

PLAIN = (
    'write one JSON object a line, such as {"id": "1", "text": "..."}; '
    "plain text, a text a line, wants a name that ends in .txt"
)
REMEDY = 'write one JSON object a line, such as {"id": "1", "text": "..."}'


def read(path: Path, content: str | bytes, **options: object) -> list[Sentence]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return list(read_inputs([path], **options))  # type: ignore[arg-type]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder is an empty one, so that messages hold short names."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_ids_texts_and_extra(here: Path) -> None:
    content = (
        '{"id": "a", "text": "Berlin", "entities": [], "n": 1.5}\n\n{"id": 7, "text": ""}\n{"tokens": ["a", "b"]}\n'
    )
    assert read(Path("x.jsonl"), content) == [
        Sentence("a", "Berlin", {"entities": [], "n": 1.5}),
        Sentence("7", ""),
        Sentence("4", "a b", {"tokens": ["a", "b"]}),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{bad}", f'not JSON: "{{bad}}" (Expecting property name enclosed in double quotes at column 2); {REMEDY}'),
        ("[1, 2]", f"not a JSON object but a list: [1, 2]; {REMEDY}; jq -c '.[]' makes that of an array"),
        ("[", f"not JSON: \"[\" (Expecting value at column 2); {REMEDY}; jq -c '.[]' makes that of an array"),
        ("id,text", f'not JSON: "id,text" (Expecting value at column 1); {PLAIN}'),
        ('"Berlin"', f'not a JSON object but a string: "Berlin"; {REMEDY}'),
        ("{}", 'no "text" (keys: none); add "text", or "tokens" as a list of strings'),
        ('{"txt": "x"}', 'no "text" (keys: "txt"); add "text", or "tokens" as a list of strings'),
        ('{"text": 12}', '"text" is a number (12), not a string; write the text in quotes'),
        ('{"text": null}', '"text" is null (null), not a string; write the text in quotes'),
        ('{"tokens": "a b"}', '"tokens" is a string ("a b"); use a list of strings'),
        ('{"tokens": ["a", 1]}', '"tokens" holds a number (1); use strings only'),
        ('{"text": "x", "id": 1.5}', '"id" is a number (1.5); use a string or an integer'),
        ('{"text": "x", "id": true}', '"id" is a boolean (true); use a string or an integer'),
        ('{"text": "x", "text": "y"}', 'the key "text" stands more than once in one object; keep one of them'),
        (
            '{"text": "x", "n": {"a": 1, "b": 2, "a": 3}}',
            'the key "a" stands more than once in one object; keep one of them',
        ),
        ('{"text": "x", "n": NaN}', "NaN is no JSON number; use null or leave it out"),
        ('{"text": "x", "n": -Infinity}', "-Infinity is no JSON number; use null or leave it out"),
        ('{"text": "x", "n": 1e999}', "the number 1e999 is too large; write it as a string"),
        (
            '{"text": "x", "n": ' + "9" * 5000 + "}",
            "an integer of 5000 digits is too long; write it as a string",
        ),
        ("[" * 100_000, "nested deeper than 100 levels; flatten the record"),
        (
            '{"text": "x", "n": ' + "[" * 150 + "]" * 150 + "}",
            "nested deeper than 100 levels; flatten the record",
        ),
        (
            r'{"text": "a\ud800b"}',
            '"text" has a lone surrogate (\\ud800 at character 1), half of a character; write the whole character',
        ),
        (
            r'{"text": "a\udce9b"}',
            '"text" has a lone surrogate (\\udce9 at character 1), half of a character, or a byte that is no UTF-8; '
            "write the whole character in UTF-8",
        ),
    ],
)
def test_a_bad_line_becomes_a_record_and_the_rest_go_on(here: Path, line: str, message: str) -> None:
    first, bad, last = read(Path("docs.jsonl"), '{"text": "one"}\n' + line + '\n{"text": "three"}\n')
    assert (first.error, last.error) == (None, None)
    assert bad.error == f"docs.jsonl:2: {message}"
    assert "\n" not in bad.error


def test_what_is_usable_of_a_bad_record_is_kept(here: Path) -> None:
    bad_text, bad_id, surrogate, bad_utf8 = read(
        Path("x.jsonl"),
        b'{"id": "a", "text": 1, "k": 2}\n{"id": [], "text": "t"}\n{"id": "c", "text": "a\\udc00"}\n'
        b'{"id": "d", "text": "caf\xe9"}\n',
    )
    assert (bad_text.id, bad_text.text, bad_text.extra) == ("a", "", {"text": 1, "k": 2})
    assert (bad_id.id, bad_id.text, bad_id.extra) == ("2", "t", {"id": []})
    assert (surrogate.id, surrogate.text) == ("c", "a\ufffd")
    assert (bad_utf8.id, bad_utf8.text) == ("d", "caf\ufffd")
    assert bad_utf8.error == "x.jsonl:4: invalid UTF-8 (byte 0xe9 at byte 25 of the line); save the file as UTF-8"


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", "9" * 5000])
def test_a_record_with_a_number_that_json_has_not_keeps_its_id_and_text(here: Path, number: str) -> None:
    (bad,) = read(Path("x.jsonl"), f'{{"id": "a", "text": "t", "n": {number}, "m": 1.5}}\n')
    assert bad.error is not None
    assert bad.error.startswith("x.jsonl:1: ")
    assert (bad.id, bad.text, bad.extra) == ("a", "t", {"n": None, "m": 1.5})


def test_of_a_record_with_a_repeated_key_the_last_value_is_kept(here: Path) -> None:
    (bad,) = read(Path("x.jsonl"), '{"id": "a", "text": "t", "text": "u", "k": 2}\n')
    assert bad.error is not None
    assert (bad.id, bad.text, bad.extra) == ("a", "u", {"k": 2})


def test_byte_order_mark_windows_lines_and_missing_last_newline(here: Path) -> None:
    content = b'\xef\xbb\xbf{"text": "a"}\r\n  \r\n{"text": "b"}'
    assert [(s.id, s.text, s.error) for s in read(Path("x.jsonl"), content)] == [("1", "a", None), ("3", "b", None)]


def test_only_a_newline_ends_a_line(here: Path) -> None:
    text = "a\u2028b\u0085c\x0bd\rf"
    assert read(Path("x.txt"), text + "\n")[0].text == text
    assert read(Path("x.jsonl"), json.dumps({"text": text}, ensure_ascii=False) + "\n")[0].text == text


def test_plain_text_is_a_text_a_line_unchanged(here: Path) -> None:
    sentences = read(Path("x.txt"), b'  Berlin \n\n{"text": "x"}\ncaf\xe9\n')
    assert [(s.id, s.text) for s in sentences] == [("1", "  Berlin "), ("3", '{"text": "x"}'), ("4", "caf\ufffd")]
    assert [s.error is None for s in sentences] == [True, True, False]


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.gz"])
def test_gzip(here: Path, name: str) -> None:
    assert read(Path(name), gzip.compress(b'{"text": "a"}\n'))[0].text == "a"
    assert read(Path("x.txt.gz"), gzip.compress(b"a\n"))[0].text == "a"


def test_damaged_gzip(here: Path) -> None:
    rng_lines = b"".join(b'{"text": "%d"}\n' % (i * 7919 % 100_003) for i in range(20_000))
    sentences = read(Path("x.jsonl.gz"), gzip.compress(rng_lines)[:-2000])
    assert len(sentences) > 1000
    assert all(sentence.error is None for sentence in sentences[:-1])
    line = len(sentences)
    assert sentences[-1].id == str(line)
    assert sentences[-1].error is not None
    assert sentences[-1].error.startswith(f"x.jsonl.gz:{line}: the gzip data are damaged or cut off (")
    assert count_inputs(["x.jsonl.gz"]) == line
    with pytest.raises(InputError, match=r"x\.gz:1: the gzip data are damaged or cut off \(Not a gzipped file"):
        read(Path("x.gz"), b'{"text": "a"}\n')
    with pytest.raises(InputError, match="damaged or cut off"):
        read(Path("x.gz"), gzip.compress(b'{"text": "a"}\n')[:12])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x.jsonl: is empty; expected one record a line"),
        (b"\n \n", "x.jsonl: is empty; expected one record a line"),
        (b"\xef\xbb\xbf\n", "x.jsonl: is empty; expected one record a line"),
        ('{"text": "a"}'.encode("utf-16"), "x.jsonl: is UTF-16; convert it to UTF-8 first (iconv -f UTF-16 -t UTF-8)"),
        (
            '{"text": "a"}'.encode("utf-16-le"),
            "x.jsonl: is UTF-16; convert it to UTF-8 first (iconv -f UTF-16LE -t UTF-8)",
        ),
        (
            '{"text": "a"}'.encode("utf-16-be"),
            "x.jsonl: is UTF-16; convert it to UTF-8 first (iconv -f UTF-16BE -t UTF-8)",
        ),
        (
            "Где".encode("utf-16-le"),
            "x.jsonl: looks like UTF-16; convert it to UTF-8 first (iconv -f UTF-16LE -t UTF-8)",
        ),
        (
            "Πού".encode("utf-16-be"),
            "x.jsonl: looks like UTF-16; convert it to UTF-8 first (iconv -f UTF-16BE -t UTF-8)",
        ),
        ('{"text": "a"}'.encode("utf-32"), "x.jsonl: is UTF-32; convert it to UTF-8 first (iconv -f UTF-32 -t UTF-8)"),
        (
            '{"text": "a"}'.encode("utf-32-be"),
            "x.jsonl: is UTF-32; convert it to UTF-8 first (iconv -f UTF-32 -t UTF-8)",
        ),
        (
            b'{"text": "a"}\r{"text": "b"}\r',
            "x.jsonl: its lines end in a carriage return alone; convert it first (tr '\\r' '\\n')",
        ),
        (gzip.compress(b"a", mtime=0), "x.jsonl: is gzip data; let its name end in .gz, or unzip it first (zcat)"),
    ],
)
def test_unusable_files(here: Path, content: bytes, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(Path("x.jsonl"), content)
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


def test_files_are_checked_before_anything_is_read(here: Path) -> None:
    Path("good.jsonl").write_text('{"text": "a"}\n')
    Path("folder").mkdir()
    with pytest.raises(InputError, match=rf"^missing\.jsonl: no such file; check the path .*{here}"):
        read_inputs(["good.jsonl", "missing.jsonl"])
    with pytest.raises(InputError, match=r"^folder: is a folder; name a file in it, or folder/\*\.jsonl"):
        read_inputs(["good.jsonl", "folder"])
    with pytest.raises(InputError, match="no input"):
        read_inputs([])
    with pytest.raises(InputError, match="named twice"):
        read_inputs(["-", "-"])
    with pytest.raises(InputError, match="cannot be read"):
        read_inputs(["a\0b"])


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root and Windows may read everything")
def test_permission_denied(here: Path) -> None:
    Path("x.jsonl").write_text('{"text": "a"}\n')
    Path("x.jsonl").chmod(0)
    with pytest.raises(InputError, match="permission denied; make it readable"):
        read_inputs(["x.jsonl"])


def test_stdin_is_jsonl(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "a"}\nplain text\n')))
    first, second = read_inputs(["-"])
    assert (first.text, first.error) == ("a", None)
    assert second.error == f'stdin:2: not JSON: "plain text" (Expecting value at column 1); {PLAIN}'
    assert not sys.stdin.closed
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(InputError, match=r"^stdin: is empty"):
        list(read_inputs(["-"]))
    assert count_inputs(["-"]) is None


def test_limit_counts_records_over_files(here: Path) -> None:
    Path("a.jsonl").write_text('\n{"text": "1"}\nbad\n')
    Path("b.jsonl").write_text('{"text": "2"}\n{"text": "3"}\n')
    for limit in range(1, 6):
        sentences = list(read_inputs(["a.jsonl", "b.jsonl"], limit=limit))
        assert [s.text for s in sentences] == ["1", "", "2", "3"][:limit]
        assert count_inputs(["a.jsonl", "b.jsonl"], limit) == len(sentences)


def test_repeated_ids_are_kept_and_warned_about(here: Path) -> None:
    warnings: list[str] = []
    ids = ["a", "a", "a", "b", *(f"n{i}" for i in range(7)), *(f"n{i}" for i in range(7))]
    sentences = read(Path("x.jsonl"), "".join(f'{{"id": "{i}", "text": "t"}}\n' for i in ids), warn=warnings.append)
    assert [s.id for s in sentences] == ids
    assert warnings[0] == (
        'x.jsonl:2: id "a" was used before, at x.jsonl:1; both records are kept, '
        "give them different ids to tell their results apart"
    )
    assert len(warnings) == 6
    assert warnings[-1] == "3 more ids are used more than once"


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_one_record_for_each_line_that_is_not_blank(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("bytes") / "x.jsonl"
    path.write_bytes(content)
    expected = sum(bool(line.removeprefix(b"\xef\xbb\xbf").strip()) for line in content.split(b"\n"))
    try:
        sentences = list(read_inputs([path]))
    except InputError:
        unmarked = content[:2].count(0) == 1 or content[:4].count(0) == 3  # UTF-16 or UTF-32 without a byte-order mark
        returns = b"\n" not in content and b"\r" in content.strip()
        marked = content.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff", b"\x1f\x8b"))
        highs = (content[1:4:2], content[0:4:2])  # of UTF-16 in scripts whose code points begin with one control byte
        looks = any(len(high) == 2 and high[0] == high[1] < 32 and high[0] not in b"\t\n\v\f\r\x1b" for high in highs)
        assert not expected or marked or unmarked or returns or looks
        return
    assert len(sentences) == expected
    for sentence in sentences:
        json.loads(dump_line(Prediction(sentence.id, sentence.text, extra=sentence.extra).to_dict()))


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_texts_come_back_unchanged(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("texts") / "x.jsonl"
    with path.open("wb") as stream:
        write_predictions(stream, [Prediction("1", text)])
    (sentence,) = read_inputs([path])
    assert (sentence.text, sentence.error) == (text, None)


# Labelled files


def entity_line(**entity: object) -> str:
    return json.dumps({"text": "Berlin wall", "entities": [{"start": 0, "end": 6, "label": "place", **entity}]})


def test_read_pool(here: Path) -> None:
    Path("pool.jsonl").write_text(
        '{"id": 3, "text": "the \U0001f469\u200d\U0001f52c IL-2 gene", "entities": ['
        '{"start": 8, "end": 17, "label": "dna"}, {"start": 8, "end": 12, "label": "protein", "text": "IL-2"}]}\n'
        '\n{"text": "x", "entities": []}\n{"tokens": ["a", "b"], "entities": [{"start": 2, "end": 3, "label": "l"}]}\n'
    )
    first, second, third = read_pool("pool.jsonl")
    assert first.id == "3"
    assert first.entities == (LabelledSpan(8, 17, "dna"), LabelledSpan(8, 12, "protein"))
    assert (second.id, second.entities) == ("3", ())
    assert (third.text, third.entities) == ("a b", (LabelledSpan(2, 3, "l"),))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", f'not JSON: "nonsense" (Expecting value at column 1); {REMEDY}'),
        ('{"text": "x"}', 'no "entities" (keys: "text"); add "entities", [] where the sentence has none'),
        ('{"text": "x", "entities": {}}', '"entities" is an object ({}); use a list'),
        ('{"entities": []}', 'no "text" (keys: "entities"); add "text", or "tokens" as a list of strings'),
        (
            '{"text": "x", "entities": ["x"]}',
            'entity 1 is a string ("x"); use {"start": 0, "end": 6, "label": "..."}',
        ),
        (
            '{"text": "x", "entities": [{"end": 1}]}',
            'entity 1 has no "start" ({"end": 1}); add it as a code-point offset',
        ),
        (entity_line(start="0"), 'entity 1 has "start" "0", a string; use an integer code-point offset'),
        (entity_line(end=True), 'entity 1 has "end" true, a boolean; use an integer code-point offset'),
        (
            entity_line(end=99),
            "entity 1 spans [0:99] of a text of 11 characters; "
            "offsets are half-open code points with 0 <= start < end <= length",
        ),
        (
            entity_line(start=6),
            "entity 1 spans [6:6] of a text of 11 characters; "
            "offsets are half-open code points with 0 <= start < end <= length",
        ),
        (
            entity_line(text="wall"),
            'entity 1 says "wall" but [0:6] of the text reads "Berlin"; "wall" stands at [7:11]; correct start and end',
        ),
        (
            entity_line(text="Rome"),
            'entity 1 says "Rome" but [0:6] of the text reads "Berlin"; "Rome" is nowhere in it; '
            "correct the entity or the text",
        ),
        (entity_line(start=6, end=7), "entity 1 spans only blanks at [6:7]; correct start and end"),
        (entity_line(label=""), 'entity 1 has a label that is blank (""); name the entity type'),
        (entity_line(label=5), "entity 1 has a label that is a number (5); use a string"),
        (
            entity_line(label="a\nb"),
            'entity 1 has a label that is "a\\nb"; leave out line breaks, control characters and blanks at its ends',
        ),
        (
            entity_line(label="a\u200bb"),
            'entity 1 has a label that is "a<U+200B>b", with U+200B in it, a character that is not seen; remove it',
        ),
        (
            '{"text": "x", "entities": [{"start": 0, "end": 1}]}',
            'entity 1 has no "label" ({"start": 0, "end": 1}); add one',
        ),
        (
            '{"text": "x", "entities": [{"start": 0, "end": 1, "label": "l"}, {"start": 0, "end": 1, "label": "l"}]}',
            'entity 2 repeats "x" [0:1] l; list it once',
        ),
    ],
)
def test_bad_pools(here: Path, line: str, message: str) -> None:
    Path("pool.jsonl").write_text('{"text": "x", "entities": []}\n' + line + "\n")
    with pytest.raises(PoolError) as caught:
        read_pool("pool.jsonl")
    assert str(caught.value) == f"pool.jsonl:2: {message}"
    good, bad = scan_pool("pool.jsonl")
    assert not isinstance(good, PoolError)
    assert isinstance(bad, PoolError)


def test_empty_pool_and_strict_records(here: Path) -> None:
    Path("pool.jsonl").write_text("\n")
    with pytest.raises(InputError, match="is empty"):
        read_pool("pool.jsonl")
    Path("x.jsonl").write_text('{"a": 1}\n[]\n')
    with pytest.raises(InputError, match=r"^x\.jsonl:2: not a JSON object"):
        list(read_records("x.jsonl"))


def test_real_files_are_read_whole(data_dir: Path) -> None:
    for path in sorted(data_dir.glob("*/test.jsonl")):
        pool = read_pool(path)
        assert len(pool) == path.read_bytes().count(b"\n")
        assert [s.text for s in read_inputs([path])] == [d.text for d in pool]


# Output


def test_lines_are_utf8_and_lone_surrogates_do_not_crash() -> None:
    assert dump_line({"text": "Łódź 🙂"}) == '{"text": "Łódź 🙂"}\n'.encode()
    line = dump_line({"text": "é", "extra": {"\ud800": "\udfff"}})
    assert line.isascii()
    assert json.loads(line) == {"text": "é", "extra": {"\ud800": "\udfff"}}


def test_file_appears_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    predictions = [
        Prediction("1", "Berlin", (Entity(0, 6, "Berlin", "place", 0.5),)),
        Prediction("2", "", status="failed"),
    ]
    with OutputFile(path) as stream:
        assert write_predictions(stream, predictions) == {"ok": 1, "failed": 1}
        assert path.read_text() == "old"
    assert [json.loads(line)["id"] for line in path.read_bytes().splitlines()] == ["1", "2"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.jsonl"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.skipif(sys.platform == "win32", reason="needs permissions of Unix")
@pytest.mark.parametrize("mode", [0o600, 0o664, 0o444])
def test_a_replaced_file_hands_on_its_permissions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("private")
    path.chmod(mode)
    created: list[int] = []
    monkeypatch.setattr(os, "fchmod", lambda file, wanted: created.append(os.fstat(file).st_mode & 0o777))
    OutputFile(path)
    assert created == [0o600]  # not readable by others before it has the permissions of the old file
    monkeypatch.undo()
    output = OutputFile(path)
    with output:
        assert output.partial.stat().st_mode & 0o777 == mode
    assert path.stat().st_mode & 0o777 == mode


@pytest.mark.skipif(sys.platform == "win32", reason="needs permissions of Unix")
def test_a_file_whose_permissions_cannot_be_set_is_still_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "fchmod", refuse)
    monkeypatch.setattr(os, "fchown", refuse)
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    assert write_predictions(path, [Prediction("1", "a")]) == {"ok": 1}
    assert json.loads(path.read_text())["id"] == "1"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/fd of Linux")
def test_pipes_are_written_by_the_name_that_was_given(here: Path) -> None:
    reader, writer = os.pipe()
    write_predictions(f"/dev/fd/{writer}", [Prediction("1", "a")])
    os.close(writer)
    with open(reader, "rb") as stream:  # noqa: PTH123 - a number, not a path
        assert json.loads(stream.read())["id"] == "1"
    with Path("unlinked").open("w+b") as unlinked:
        Path("unlinked").unlink()
        write_predictions(f"/dev/fd/{unlinked.fileno()}", [Prediction("2", "b")])
        unlinked.seek(0)
        assert json.loads(unlinked.read())["id"] == "2"
    with Path("log").open("ab") as log:
        log.write(b"before\n")
        log.flush()
        for name in ("3", "4"):
            write_predictions(f"/dev/fd/{log.fileno()}", [Prediction(name, "c")])
    first, *others = Path("log").read_bytes().splitlines()
    assert (first, [json.loads(line)["id"] for line in others]) == (b"before", ["3", "4"])
    Path("log").unlink()
    assert list(here.iterdir()) == []
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s")
        with pytest.raises(UsageError, match="s: is a socket, which is no file; name a file or a pipe"):
            OutputFile("s")


def test_a_broken_run_leaves_what_was_finished_under_another_name(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    output = OutputFile(path)

    def interrupted() -> Iterator[Prediction]:
        yield Prediction("1", "a")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), output as stream:
        write_predictions(stream, interrupted())
    assert not path.exists()
    assert output.left_behind
    assert output.partial.parent == tmp_path
    assert json.loads(output.partial.read_text())["id"] == "1"
    output = OutputFile(path)
    with pytest.raises(ZeroDivisionError), output:
        1 / 0  # noqa: B018
    assert not output.left_behind


def test_zipped_output_is_reproducible(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        assert write_predictions(tmp_path / name, [Prediction("1", "a")]) == {"ok": 1}
    first = (tmp_path / "a.jsonl.gz").read_bytes()
    assert first == (tmp_path / "b.jsonl.gz").read_bytes()
    assert json.loads(gzip.decompress(first))["text"] == "a"


def test_output_places(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder; name a file in it"):
        OutputFile(tmp_path)
    with pytest.raises(UsageError, match="does not exist; create it first"):
        OutputFile(tmp_path / "no" / "out.jsonl")
    assert write_predictions(os.devnull, [Prediction("1", "a")]) == {"ok": 1}
    assert not Path(os.devnull).is_file()
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_predictions(tmp_path / "link", [Prediction("1", "a")])
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "target").read_text())["id"] == "1"


def test_a_name_as_long_as_names_may_be_is_written(tmp_path: Path) -> None:
    for name in ("x" * 249 + ".jsonl", "é" * 124 + ".jsonl"):
        write_predictions(tmp_path / name, [Prediction("1", "a")])
        assert json.loads((tmp_path / name).read_text())["id"] == "1"


def test_visible_escapes_what_would_move_the_cursor_and_keeps_the_rest() -> None:
    assert visible("a\x1b[31m\n\u202eb\ud800\u2028") == r"a\x1b[31m\n\u202eb\ud800\u2028"
    family = "👩\u200d👩\u200d👧 é e\u0301 İ 東京\u00a0"
    assert visible(family) == family


def test_text_files_say_once_that_their_ids_repeat(tmp_path: Path) -> None:
    for name in ("a.txt", "B.TXT"):
        (tmp_path / name).write_text("one\ntwo\nthree\n")
    said: list[str] = []
    found = list(read_inputs([tmp_path / "a.txt", tmp_path / "B.TXT"], warn=said.append))
    assert [s.text for s in found] == ["one", "two", "three"] * 2  # read as plain text, in capitals too
    assert len(said) == 1
    assert "B.TXT:1: lines of a text file have their numbers for ids" in said[0]


def test_files_that_were_joined_keep_every_record(tmp_path: Path) -> None:
    """Each of them began with a byte-order mark."""
    path = tmp_path / "joined.jsonl"
    part = b'\xef\xbb\xbf{"id": "x", "text": "Ada"}\n{"id": "y", "text": "Bob"}\n'
    path.write_bytes(part + part)
    found = list(read_inputs([path]))
    assert [(s.id, s.text, s.error) for s in found] == [("x", "Ada", None), ("y", "Bob", None)] * 2


def test_a_file_named_like_a_folder_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(InputError, match="Not a directory"):
        read_inputs([f"{tmp_path}/a.jsonl/"])
