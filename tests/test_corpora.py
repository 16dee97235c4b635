"""Tags, spans, tokens and CoNLL files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from iob_tags import locate_tokens, spans_to_tags

from el4ner.corpora import (
    TokenSpan,
    guess_scheme,
    is_columns,
    read_examples,
    scan_conll,
    scan_examples,
    split_tag,
    tagged_sentence,
    tags_to_spans,
)
from el4ner.errors import InputError, PoolError, UsageError
from el4ner.jsonl import read_pool, whole
from el4ner.records import Demonstration, LabelledSpan, Span

LABELS = st.sampled_from(["person", "creative-work", "a-b-c"])


@st.composite
def flat_spans(draw: st.DrawFn) -> tuple[int, list[TokenSpan]]:
    """A number of tokens and flat labelled spans over them; touching ones are common."""
    spans, position = [], 0
    for _ in range(draw(st.integers(0, 6))):
        first = position + draw(st.integers(0, 2))
        position = first + draw(st.integers(1, 3))
        spans.append(TokenSpan(first, position, draw(LABELS)))
    return position + draw(st.integers(0, 2)), spans


def tokens_of(n: int) -> list[Span]:
    return [Span(3 * i, 3 * i + 2) for i in range(n)]


def as_entities(spans: list[TokenSpan]) -> list[LabelledSpan]:
    return [LabelledSpan(3 * span.first, 3 * span.stop - 1, span.label) for span in spans]


def convert(tags: list[str], scheme: str) -> list[str]:
    """IOB2 tags in another scheme, by its definition."""
    result = []
    for index, tag in enumerate(tags):
        prefix, label = split_tag(tag)
        following = tags[index + 1] if index + 1 < len(tags) else "O"
        last = following != f"I-{label}"
        before = split_tag(tags[index - 1])[1] if index else ""
        if prefix == "O":
            result.append("O")
        elif scheme == "iob1":
            result.append(f"{'B' if prefix == 'B' and before == label else 'I'}-{label}")
        else:
            single, end = ("S", "E") if scheme == "bioes" else ("U", "L")
            letter = (single if last else "B") if prefix == "B" else (end if last else "I")
            result.append(f"{letter}-{label}")
    return result


@given(flat_spans())
def test_every_scheme_reads_back_what_was_written(case: tuple[int, list[TokenSpan]]) -> None:
    n, spans = case
    tags = spans_to_tags(tokens_of(n), as_entities(spans))
    assert len(tags) == n
    assert tags_to_spans(tags) == spans
    for scheme in ("iob1", "bioes", "bilou"):
        converted = convert(tags, scheme)
        assert tags_to_spans(converted, scheme) == spans  # type: ignore[arg-type]
        if spans and scheme != "iob1":
            assert guess_scheme([converted]) in (scheme,)


def test_tags_are_split_at_the_first_hyphen() -> None:
    assert split_tag("B-creative-work") == ("B", "creative-work")
    assert split_tag("O") == ("O", "")
    for tag in ("B", "B-", "-person", "X-person", "BI-person", "", "o"):
        with pytest.raises(ValueError, match="is neither O nor"):
            split_tag(tag)


@pytest.mark.parametrize(
    ("tags", "scheme", "begin", "drop"),
    [
        (["O", "I-a", "I-a"], "iob2", [(1, 3, "a")], []),
        (["B-a", "I-b", "B-a"], "iob2", [(0, 1, "a"), (1, 2, "b"), (2, 3, "a")], [(0, 1, "a"), (2, 3, "a")]),
        (["B-a", "I-a", "O"], "bioes", [(0, 2, "a")], []),
        (["B-a", "B-a", "E-a", "E-a"], "bioes", [(0, 1, "a"), (1, 3, "a"), (3, 4, "a")], [(1, 3, "a")]),
        (["I-a", "U-a"], "bilou", [(0, 1, "a"), (1, 2, "a")], [(1, 2, "a")]),
    ],
)
def test_repairs_have_names(tags: list[str], scheme: str, begin: list[TokenSpan], drop: list[TokenSpan]) -> None:
    with pytest.raises(ValueError, match=f"no whole {scheme} entity"):
        tags_to_spans(tags, scheme)  # type: ignore[arg-type]
    assert tags_to_spans(tags, scheme, "begin") == begin  # type: ignore[arg-type]
    assert tags_to_spans(tags, scheme, "drop") == drop  # type: ignore[arg-type]


def test_iob1_never_needs_repair_and_foreign_letters_are_refused() -> None:
    assert tags_to_spans(["I-a", "B-a", "I-b"], "iob1") == [(0, 1, "a"), (1, 2, "a"), (2, 3, "b")]
    with pytest.raises(ValueError, match="is none of iob2"):
        tags_to_spans(["S-a"], "iob2")
    with pytest.raises(UsageError, match="choose one of iob1, iob2, bioes, bilou"):
        tags_to_spans([], "iobes")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="choose one of error, begin, drop"):
        tags_to_spans([], "iob2", "fix")  # type: ignore[arg-type]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)

    def put(content: str | bytes) -> Path:
        Path("x.conll").write_bytes(content if isinstance(content, bytes) else content.encode())
        return Path("x.conll")

    return put


def test_conll_2003_columns(write) -> None:  # type: ignore[no-untyped-def]
    content = (
        "\ufeff-DOCSTART- -X- -X- O\r\n\r\nEU NNP B-NP B-ORG\r\nrejects VBZ B-VP O\r\n. . O O\r\n"
        "\r\n\r\nPeter NNP B-NP B-PER \r\nBlackburn NNP I-NP I-PER"
    )
    first, second = whole(scan_conll(write(content)))
    assert (first.id, first.text, first.entities) == ("3", "EU rejects .", (LabelledSpan(0, 2, "ORG"),))
    assert (second.id, second.text, second.entities) == ("8", "Peter Blackburn", (LabelledSpan(0, 15, "PER"),))


def test_tabs_comments_blanks_in_tokens_and_a_number_sign_token(write) -> None:  # type: ignore[no-untyped-def]
    content = "# id = 1\n# text = plan B and the letter O\nNew York\tB-loc\n#\tO\n# O\tO\n#tag\tB-creative-work\n"
    (sentence,) = whole(scan_conll(write(content)))
    assert sentence.text == "New York # # O #tag"
    assert sentence.entities == (LabelledSpan(0, 8, "loc"), LabelledSpan(15, 19, "creative-work"))


def test_guesses_are_reported(write) -> None:  # type: ignore[no-untyped-def]
    warnings: list[str] = []
    path = write("a I-x\nb B-x\n")
    (sentence,) = whole(scan_conll(path, warn=warnings.append))
    assert len(sentence.entities) == 2
    said = (
        "x.conll: read as IOB1, because an I- begins an entity; "
        "if that is wrong, write B- where entities begin, as IOB2 does"
    )
    assert warnings == [said]
    with pytest.warns(UserWarning, match=said):
        assert read_examples(path) == [sentence]
    with pytest.warns(UserWarning, match=said):
        assert list(scan_examples(path)) == [sentence]
    with pytest.raises(PoolError, match=r"^x\.conll:1: tags 1 to 1 \(I-x\) are no whole iob2 entity"):
        whole(scan_conll(path, "iob2"))
    assert len(whole(scan_conll(path, "iob2", "drop"))[0].entities) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a O\nb\n", 'x.conll:2: "b" has no token and tag; expected columns'),
        ("a O\nb person\n", 'x.conll:2: "b person" ends in "person", which is no tag; expected O, or one of B- I- E- '),
        ("a X-person\n", 'x.conll:1: "a X-person" ends in "X-person", which is no tag'),
        (b"a O\ncaf\xe9 O\n", "x.conll:2: invalid UTF-8"),
        (
            "Ada B-person\nNew York B-place\nleft O\n",
            'x.conll:2: "New York B-place" has 3 columns, other lines have 2; give all lines the same ',
        ),
        ("a NN O\nb O\nc NN O\n", 'x.conll:2: "b O" has 2 columns, other lines have 3; '),
        ("a O\nNew York B-place\n\nb\tO\n", 'x.conll:2: "New York B-place" has 3 columns, other lines have 2; '),
        ("a O\rb B-x\r", "x.conll: its lines end in a carriage return alone; convert it first (tr '\\r' '\\n')"),
        ("a O\rb B-x\n", "x.conll:1: a carriage return within the line; let lines end in a line feed (tr '\\r' '\\n')"),
        ("# comment\ra O\rb B-x\n", "x.conll:1: a carriage return within the line; "),
        ("a O\nb B-\u202ex\n", 'x.conll:2: "b B-\\u202ex" has a label that is "\\u202ex"; leave out line breaks, '),
        (
            "a O\nb B-x\nc E-x\nd L-x\n",
            'x.conll:1: tag 4 ("L-x") is none of bioes; write all tags in one scheme, such as ',
        ),
        ("-DOCSTART- O\n", "x.conll: holds no token; expected columns"),
        ("\n", "x.conll: is empty"),
    ],
)
def test_bad_files(write, content: str | bytes, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError) as caught:
        whole(scan_conll(write(content)))
    assert str(caught.value).startswith(message)


def test_every_wrong_line_is_named_and_sound_sentences_are_read(write) -> None:  # type: ignore[no-untyped-def]
    content = b"a O\nb\nc X\n\nd S-x\n\ncaf\xe9 O\ne I-x\n\nf I-x\n\ng E-x\nh O\n"
    found = list(scan_conll(write(content)))
    assert [item.id if isinstance(item, Demonstration) else str(item).partition(": ")[0] for item in found] == [
        "x.conll:2", "x.conll:3", "5", "x.conll:7", "x.conll:10", "x.conll:12",
    ]  # fmt: skip


def test_lines_of_one_width(write) -> None:  # type: ignore[no-untyped-def]
    content = "-DOCSTART- O\n\n-DOCSTART- -X- O O\n\n# 1\n10\u00a0000 CD B-NP B-count\n\u00a0\nEU NNP B-NP B-org\r\r\n"
    first, second = whole(scan_conll(write(content)))
    assert (first.id, first.text, first.entities) == ("6", "10\u00a0000", (LabelledSpan(0, 6, "count"),))
    assert (second.id, second.text) == ("8", "EU")


def test_real_entities_survive_the_way_over_tags(data_dir: Path) -> None:
    import json

    path = data_dir / "wnut17" / "test.jsonl"
    for line, demonstration in zip(path.read_bytes().strip().split(b"\n"), read_pool(path), strict=True):
        offsets = locate_tokens(demonstration.text, json.loads(line)["tokens"])
        tags = spans_to_tags(offsets, demonstration.entities)
        found = [LabelledSpan(offsets[s.first].start, offsets[s.stop - 1].end, s.label) for s in tags_to_spans(tags)]
        assert tuple(found) == demonstration.entities


# Labelled files of either kind


def test_the_name_says_which_files_hold_columns() -> None:
    for name in ("a.conll", "a.iob", "a.iob2", "a.bio", "a.bioes", "a.bilou", "a.b/c.conll.gz"):
        assert is_columns(name)
    for name in ("a.jsonl", "a.txt", "a.jsonl.gz", "conll", "a.conll/pool.jsonl", "a.conllu", "-"):
        assert not is_columns(name)


def test_examples_are_columns_or_json(tmp_path: Path) -> None:
    columns, lines = tmp_path / "a.conll", tmp_path / "a.jsonl"
    columns.write_text("Ada B-person\nleft O\n\nNobody O\n")
    lines.write_text(
        '{"id": "1", "text": "Ada left", "entities": [{"start": 0, "end": 3, "label": "person"}]}\n'
        '{"id": "4", "text": "Nobody", "entities": []}\n'
    )
    assert read_examples(columns) == read_examples(lines) == list(scan_examples(columns)) == list(scan_examples(lines))
    columns.write_text("Ada I-person\nLovelace E-person\n")
    (problem,) = scan_examples(columns)
    assert isinstance(problem, PoolError)
    with pytest.raises(PoolError, match=r"no whole bioes entity.*the scheme was guessed"):
        read_examples(columns)
    columns.write_text("Ada I-person\nLovelace E-person\n\nNobody O\n\nBob B-person\nleft O\n")
    first, sound, last = scan_examples(columns)
    assert isinstance(sound, Demonstration)
    assert [str(wrong).rpartition("/")[2].partition(" are no")[0] for wrong in (first, last)] == [
        "a.conll:1: tags 1 to 2 (I-person, E-person)", "a.conll:6: tags 1 to 1 (B-person)",
    ]  # fmt: skip


def test_every_token_has_a_tag() -> None:
    with pytest.raises(ValueError, match="2 tokens but 1 tags"):
        tagged_sentence("1", ["a", "b"], ["O"], "iob2")
