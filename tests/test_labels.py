"""Label files: what is read, and one clear message for everything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from el4ner.errors import InputError, LabelsError
from el4ner.jsonl import check_label
from el4ner.labels import read_labels
from el4ner.lines import LineError
from el4ner.records import Label

YAML = """\
# comment
- name: person
  definition: >
    A human being,
    real or fictional.
  examples: [Ada Lovelace, "no"]
  counter_examples:
    - engineer
- name: 組織
"""
EXPECTED = "write a list of labels, such as - {name: person, definition: A human being.}"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)

    def put(content: str | bytes, name: str = "labels.yaml") -> Path:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return Path(name)

    return put


def test_yaml_json_and_a_labels_key_read_the_same(write) -> None:  # type: ignore[no-untyped-def]
    labels = (
        Label("person", "A human being, real or fictional.", ("Ada Lovelace", "no"), ("engineer",)),
        Label("組織"),
    )
    assert read_labels(write(YAML)) == labels
    indented = "".join("  " + line + "\n" for line in YAML.splitlines())
    assert read_labels(write("labels:\n" + indented)) == labels
    assert read_labels(write(b"\xef\xbb\xbf" + YAML.replace("\n", "\r\n").encode())) == labels
    json_text = (
        '[\t{"name": "person", "definition": "A human being,\\nreal or fictional.", '
        '"examples": ["Ada Lovelace", "no"], "counter_examples": ["engineer"]}, {"name": "\\u7d44\\u7e54"}]'
    )
    assert read_labels(write(json_text, "labels.json")) == labels
    assert read_labels(write('{"labels": [{"name": "\\ud83d\\ude00"}]}', "labels.json")) == (Label("😀"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", f"labels.yaml: is empty; {EXPECTED}"),
        ("# only a comment\n", f"labels.yaml: holds null (null); {EXPECTED}"),
        ("[]", f"labels.yaml: defines no label; {EXPECTED}"),
        ("person", f'labels.yaml: holds a string ("person"); {EXPECTED}'),
        ("- person\n", "labels.yaml:1: a label is a string (\"person\"), not a mapping; write '- name: person'"),
        (
            "person: A human being.\n",
            f'labels.yaml: holds an object ({{"person": "A human being."}}); {EXPECTED}',
        ),
        (
            "labels:\n- name: a\nversion: 2\n",
            'labels.yaml: unknown key "version"; only labels may stand beside it; remove it',
        ),
        (
            "- name: person\n  defintion: A human being.\n",
            'labels.yaml:2: unknown key "defintion"; did you mean "definition"? '
            "allowed: name, definition, examples, counter_examples",
        ),
        (
            "- name: a\n- name: b\n  colour: red\n",
            'labels.yaml:3: unknown key "colour"; allowed: name, definition, examples, counter_examples',
        ),
        (
            "- name: a\n  counter-examples: []\n",
            'labels.yaml:2: unknown key "counter-examples"; did you mean "counter_examples"? '
            "allowed: name, definition, examples, counter_examples",
        ),
        ("- definition: x\n", 'labels.yaml:1: a label has no "name" ({"definition": "x"}); add one'),
        ("- name: a\n\n- name: a\n", 'labels.yaml:3: label "a" is defined twice; keep one'),
        ("- name: a\n  name: b\n", 'labels.yaml:2: key "name" stands twice in one mapping; keep one'),
        ("- name: ' '\n", 'labels.yaml:1: "name" is blank (" "); name the entity type'),
        (
            "- name: no\n",
            'labels.yaml:1: "name" is a boolean (false); use a string; put quotes around it if it is text',
        ),
        (
            "- name: 2020-01-01\n",
            'labels.yaml:1: "name" is a date ("2020-01-01"); use a string; put quotes around it if it is text',
        ),
        (
            "- name: a\n  definition: 5\n",
            'labels.yaml:2: "definition" of "a" is a number (5); use a string, or leave it out; '
            "put quotes around it if it is text",
        ),
        (
            "- name: a\n  definition:\n",
            'labels.yaml:2: "definition" of "a" is empty (null); use a string, or leave it out',
        ),
        (
            "- name: a\n  examples: Berlin\n",
            'labels.yaml:2: "examples" of "a" is a string ("Berlin"); use a list of strings: examples: ["..."]',
        ),
        (
            "- name: a\n  examples: [x, 1]\n",
            'labels.yaml:2: "examples" of "a" holds an entry that is a number (1); use strings that are not blank; '
            "put quotes around it if it is text",
        ),
        (
            "- name: a\n  examples: ['']\n",
            'labels.yaml:2: "examples" of "a" holds an entry that is blank (""); use strings that are not blank',
        ),
        ("- name: [a\n", "labels.yaml:2: not YAML (expected ',' or ']', but got '<stream end>'); correct it"),
        ("- !!python/object:os.system {}\n", None),
        ("- name: a\n--- \n- name: b\n", None),
        ("- \x00\n", None),
        ("[" * 900, None),
        ("2020-01-01: x\n", f"labels.yaml: holds an object ({{datetime.date(2020, 1, 1): 'x'}}); {EXPECTED}"),
        ("- &a [*a]\n", f"labels.yaml:1: a label is a list ([[...]]), not a mapping; {EXPECTED}"),
        ("- name: a\n  definition: {? [x] : 1}\n", None),
        ("- name: 2020-13-45\n", None),
    ],
)
def test_bad_files(write, content: str, message: str | None) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(LabelsError) as caught:
        read_labels(write(content))
    assert caught.value.exit_code == 2
    text = str(caught.value)
    assert text.startswith("labels.yaml:")
    assert "\n" not in text
    if message is not None:
        assert text == message


def test_bad_json_and_bytes(write) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(LabelsError, match=r"^labels\.json:2: not JSON \(Expecting value\); correct it, or use YAML"):
        read_labels(write("[\nx]", "labels.json"))
    with pytest.raises(LabelsError, match=r'^labels\.json:2: label 1: unknown key "nam"; did you mean "name"'):
        read_labels(write('[\n{"nam": "a"}]', "labels.json"))
    with pytest.raises(LabelsError, match=r'^labels\.json:2: label 1: unknown key "nam"; did you mean "name"'):
        read_labels(write('[\n\t{"nam":\t"\\ud83d\\ude00"}]', "labels.json"))
    with pytest.raises(LabelsError, match=r'^labels\.json: label 1: unknown key "nam"; did you mean "name"'):
        read_labels(write('[{"nam": "\x7f"}]', "labels.json"))  # no YAML, so the line is not known
    with pytest.raises(LabelsError, match=r'^labels\.json:2: key "name" stands twice in one object; keep one'):
        read_labels(write('[{"name": "a",\n"name": "b"}]', "labels.json"))
    with pytest.raises(LabelsError, match=r'label 1: "name" is .* leave out line breaks, control characters'):
        read_labels(write('[{"name": "a\\ud800"}]', "labels.json"))
    with pytest.raises(LabelsError, match='label 1: label "a": its wording has a lone surrogate'):
        read_labels(write('[{"name": "a", "definition": "\\ud800"}]', "labels.json"))
    with pytest.raises(InputError, match=r"^labels\.yaml:2: invalid UTF-8 \(byte 0xe9\); save the file as UTF-8"):
        read_labels(write(b"- name: a\n- name: caf\xe9\n"))
    with pytest.raises(InputError, match="no such file"):
        read_labels("missing.yaml")


def test_labels_of_a_merge_key(write) -> None:  # type: ignore[no-untyped-def]
    assert read_labels(write("- &a {name: a, definition: x}\n- {<<: *a, name: b}\n")) == (
        Label("a", "x"),
        Label("b", "x"),
    )


@pytest.mark.parametrize("label", ["\u200b", "\u00a0\u200d", " ", ""])
def test_a_label_that_cannot_be_seen_is_blank(label: str) -> None:
    with pytest.raises(LineError, match="is blank"):
        check_label(label)
