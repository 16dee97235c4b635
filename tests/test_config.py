"""Settings: what is refused, with which message, and who wins over whom."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from el4ner.config import PAPER, Config, fingerprint, load_config, make_config, parse_members
from el4ner.errors import ConfigError
from el4ner.pipeline import El4ner


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"batchsize": 3}, ["unknown setting 'batchsize'", "did you mean 'batch_size'?"]),
        ({"retrieve": {"kk": 3}}, ["unknown setting 'retrieve.kk'", "did you mean 'k'?"]),
        ({"zzz": 1}, ["unknown setting 'zzz'", "choose from preset, members"]),
        ({"reading": {"qqqq": 1}}, ["unknown setting 'reading.qqqq'", "choose from depths, twice"]),
        ({"members": [{"name": "a", "source": "b", "wording": "ask"}]}, ["members.0.wording"]),
        ({"batch_size": 0}, ["batch_size=0", "greater than or equal to 1"]),
        ({"batch_size": "many"}, ['batch_size="many"', "use a whole number, without quotes"]),
        ({"batch_size": "8"}, ['batch_size="8"', "use a whole number, without quotes"]),
        ({"batch_size": 8.0}, ["batch_size=8.0", "use a whole number"]),
        ({"seed": True}, ["seed=true", "use a whole number"]),
        ({"reading": {"decay": "0.1"}}, ['reading.decay="0.1"', "use a number, without quotes"]),
        ({"extract": {"members": "no"}}, ['extract.members="no"', "use true or false, without quotes"]),
        ({"verify": {"enabled": 1}}, ["verify.enabled=1", "use true or false"]),
        ({"encoder": 5}, ["encoder=5", "use a string"]),
        ({"encoder": ""}, ['encoder=""', "it is empty; write a name"]),
        ({"examples": ""}, ['examples=""', "it is empty; write a name"]),
        ({"labels": ""}, ['labels=""', "it is empty; write a name"]),
        ({"encoder": None}, ["encoder=null: use a string"]),
        ({"device": "tpu"}, ['device="tpu"', "choose auto, cpu, mps, cuda or cuda:N"]),
        ({"device": "cuda:x"}, ['device="cuda:x"', "choose auto, cpu, mps, cuda or cuda:N"]),
        ({"dtype": "int8"}, ['dtype="int8"', "float32"]),
        ({"preset": "fast"}, ['preset="fast"', "'default' or 'paper'"]),
        ({"overlap": "some"}, ['overlap="some"', "choose 'flat' or 'nested'"]),
        ({"min_score": 0.5, "target_precision": 0.9}, ["min_score and target_precision", "give one of them"]),
        ({"target_precision": 1.0}, ["target_precision=1.0", "less than 1"]),
        ({"min_score": 1.5}, ["min_score=1.5", "use a value less than or equal to 1"]),
        ({"extract": {"reading_floor": 0}}, ["extract.reading_floor=0"]),
        ({"reading": {"depths": [1.5]}}, ["reading.depths", "between 0 and 1"]),
        ({"reading": {"depths": []}}, ["reading.depths", "no layer is read; name one depth"]),
        ({"reading": {"decay": float("inf")}}, ["reading.decay=Infinity: use a finite number"]),
        ({"retrieval": {"sharpness": float("nan")}}, ["retrieval.sharpness=NaN: use a finite number"]),
        (
            {"extract": dict.fromkeys(("members", "noun_phrases", "pool_strings", "reading"), False)},
            ["extract: nobody proposes spans", "leave members"],
        ),
        ({"voters": "auto, reading"}, ["voters", "'auto' is unknown"]),
        (
            {"voters": ["readng"]},
            ["'readng' is unknown", "auto, all or from reading, tagging, probing, retrieval, smollm2-list"],
        ),
        ({"voters": ""}, ["voters: none named"]),
        ({"voters": []}, ["voters: none named"]),
        ({"voters": "reading,"}, ["voters: a name is empty", "one comma between two"]),
        ({"voters": ["reading", ""]}, ["voters: a name is empty"]),
        ({"voters": "reading, retrieval, reading"}, ["voters: reading named twice"]),
        ({"seed": 2**63}, ["seed=9223372036854775808", "less than or equal to"]),
        ({"verify": {"member": "nobody"}}, ["verify.member: 'nobody' is no member", "smollm2-list"]),
        ({"members": [{"name": "A b", "source": "x"}]}, ['members.0.name="A b"', "use lower-case letters, digits"]),
        ({"members": [{"name": "a", "source": ""}]}, ['members.0.source=""', "write a name"]),
        ({"members": [{"name": "a"}]}, ["members.0.source: is missing; add it"]),
        ({"members": {"a": 1}}, ['members={"a": 1}: use a list']),
        ({"members": 5}, ["members=5: use a list"]),
        ({"members": [{"name": "a", "source": "x"}] * 2}, ["members: a named twice"]),
        ({"members": [{"name": "reading", "source": "x"}]}, ["'reading' is the name of a voter"]),
        ({"members": [{"name": "reading.a", "source": "x"}]}, ["'reading.a' is the name of a voter"]),
        ({"members": [{"name": "pool-strings", "source": "x"}]}, ["'pool-strings' is the name of a voter or proposer"]),
        ({"members": [{"name": "all", "source": "x"}]}, ["'all' is the name", "choose another"]),
        ({"preset": "paper", "voters": "reading"}, ["the paper preset has prompted members only, not reading"]),
        ({"preset": "paper", "voters": ["smollm2-ask", "retrieval"]}, ["prompted members only, not retrieval"]),
        ({"preset": "paper", "members": []}, ["the paper preset needs at least one"]),
        ({"preset": "paper", "classify": {"combine": "stack"}}, ["classify.combine: ", "choose majority or equal"]),
        ({"preset": "paper", "extract": {"reading": True}}, ["extract.reading: ", "or choose preset default"]),
        ({"voters": 5}, ["voters=5: choose auto, all, or a list of names"]),
        ({"voters": [5]}, ["voters=[5]: choose auto, all, or a list of names"]),
        ({"retrieve": 5}, ["retrieve=5: use a mapping of settings"]),
        ({True: 5}, ["setting true is a boolean; settings have names"]),
        ({5: 5}, ["setting 5 is a number; settings have names"]),
        ({"encoder": ["x"] * 1000}, ['encoder=["x", ', "…: use a string"]),
    ],
)
def test_wrong_settings_are_one_line_with_setting_value_and_remedy(settings: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(settings, "settings.yaml")
    message = str(caught.value)
    assert message.startswith("settings.yaml: ")
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_paper_changes_what_it_names_and_nothing_else() -> None:
    default, paper = make_config({}), make_config({"preset": "paper"})
    for key, value in PAPER.items():
        if isinstance(value, dict):
            for inner, wanted in value.items():
                assert getattr(getattr(paper, key), inner) == wanted
        else:
            assert getattr(paper, key) == value
    back = make_config({**paper.model_dump(), **{key: default.model_dump()[key] for key in PAPER}, "preset": "default"})
    assert back == default


def test_settings_win_over_the_preset_and_options_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("preset: paper\nretrieve: {k: 7}\nbatch_size: 3\nvoters: smollm2-ask, smollm2-list\n")
    config = load_config(str(path))
    assert (config.retrieve.k, config.retrieve.spans, config.retrieve.pos_of) == (7, "members", "first")
    assert config.voters == ("smollm2-ask", "smollm2-list")
    config = load_config(str(path), {"batch_size": 5, "retrieve": {"pos_of": "last"}})
    assert (config.batch_size, config.retrieve.k, config.retrieve.pos_of) == (5, 7, "last")


def test_json_is_a_settings_file_too(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"members": [{"name": "a", "source": "x/y", "variant": "ask"}]}))
    assert load_config(str(path)).members[0].variant == "ask"
    path.write_text('{\n\t"seed": 1,\n\t"retrieve": {"k": 3}\n}\n')
    assert load_config(str(path)).retrieve.k == 3
    for content, message in [
        ('{"seed": 1,}', ":1: not JSON ("),
        ("seed: 1\n", ":1: not JSON ("),
        ('{\n\t"seed": 1,\n\t"seed": 2\n}\n', ':3: key "seed" stands twice'),
        ('{\n\t"batch_size": 1,\n\t"seed": "a\\tb"\n}\n', ':3: seed="a\\tb": use a whole number'),
    ]:
        path.write_text(content)
        with pytest.raises(ConfigError) as caught:
            load_config(str(path))
        assert str(caught.value).startswith(f"{path}{message}")


def test_messages_about_settings_on_standard_input_say_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    for content, message in [
        ("a: [", "stdin:1: not YAML ("),
        ("- 1\n", "stdin: holds a list, not a mapping"),
        ("seed: many\n", 'stdin:1: seed="many": '),
    ]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
        with pytest.raises(ConfigError) as caught:
            load_config("-")
        assert str(caught.value).startswith(message)


def test_the_name_of_a_settings_file_is_not_empty() -> None:
    with pytest.raises(ConfigError, match=r"^config: the name of the settings file is empty; name a file"):
        load_config("")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"- 1\n", ": holds a list, not a mapping of settings; write lines such as"),
        (b"", ": holds nothing, not a mapping of settings"),
        (b"a: [1\nb: {", ":2: not YAML ("),
        (b"a: \xff\n", ":1: invalid UTF-8 (byte 0xff)"),
        (b"!!python/object/apply:os.getcwd []\n", ":1: not YAML ("),
        (b"seed: 1\nbatch_size: 2\nseed: 3\n", ':3: key "seed" stands twice in one mapping; keep one'),
        (b"retrieve:\n  k: 1\n  k: 2\n", ':3: key "k" stands twice in one mapping'),
        (b'{"seed": 1, "seed": 2}', ':1: key "seed" stands twice in one mapping'),
        (b"a: " + b"[" * 3000, ": nested too deeply; flatten it"),
        (b"encoder: " + b"[" * 100 + b"]" * 100, ":1: encoder=[[["),
        (b"encoder: &a [*a]", ":1: encoder="),
        (b"2020-13-45: 1", ": holds a value YAML cannot read"),
        (None, ": no such file"),
    ],
)
def test_settings_files_that_cannot_be_used(tmp_path: Path, content: bytes | None, part: str) -> None:
    path = tmp_path / "settings.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert str(caught.value).startswith(f"{path}{part}")
    assert "\n" not in str(caught.value)


def test_integers_are_numbers_and_lists_are_tuples(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("min_score: 1\nreading: {depths: [0, 0.5], decay: 0}\nvoters: [reading]\nlabels: null\n")
    config = load_config(str(path))
    assert (config.min_score, config.reading.depths, config.voters) == (1.0, (0.0, 0.5), ("reading",))
    path.write_text("base: &base {k: 1}\nretrieve: {<<: *base, k: 2}\n")
    with pytest.raises(ConfigError, match="unknown setting 'base'"):  # a merge may be overridden
        load_config(str(path))


def test_members_on_the_command_line() -> None:
    config = load_config(None, {"members": ["q=Qwen/Qwen2.5-0.5B-Instruct", "local=./folder=x"]})
    assert [(m.name, m.source) for m in config.members] == [
        ("q", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("local", "./folder=x"),
    ]
    long = "x" * 300
    assert load_config(None, {"members": [f"a=b/c+{long}"]}).members[0].adapter == long
    for wrong in ("name", "=source", "name=", ""):
        with pytest.raises(ConfigError, match="write NAME=SOURCE"):
            parse_members([wrong])


def test_the_api_merges_overrides_into_nested_settings(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("retrieve: {k: 2}\n")
    given: dict[str, Any] = {"retrieve": {"k": 2}}
    for base in (str(path), path, given, make_config(given)):
        config = El4ner.from_config(base, retrieve={"pos_of": "last"}, batch_size=2).config
        assert (config.retrieve.k, config.retrieve.pos_of, config.batch_size) == (2, "last", 2)
    paper = make_config({"preset": "paper", "retrieve": {"k": 2, "pos_of": "first"}, "seed": 3})
    back = El4ner.from_config(paper, preset="default").config
    assert back == make_config({"retrieve": {"k": 2}, "seed": 3})  # nothing of the paper preset stays
    assert El4ner.from_config(paper, seed=4).config == make_config({**paper.model_dump(), "seed": 4})
    assert El4ner.from_config({"members": []}).config.members == ()
    assert El4ner.from_config(members=["a=b/c"]).config.members[0].source == "b/c"
    with pytest.raises(ConfigError, match=r"^config is list; give a path, a mapping of settings or a Config$"):
        El4ner.from_config([{"seed": 1}])  # type: ignore[arg-type]
    for wrong in (5, {"a": 1}, "a"):
        for call in (lambda w: El4ner.from_config({"members": w}), lambda w: El4ner.from_config(members=w)):
            with pytest.raises(ConfigError, match=r"^settings: members=.*: use a list$"):
                call(wrong)
    paper = El4ner.from_config(make_config({"preset": "paper"}), seed=3).config
    assert (paper.classify.by, paper.seed) == ("generation", 3)


def test_settings_are_frozen_and_come_back_from_their_own_data() -> None:
    config = make_config({"preset": "paper", "voters": "smollm2-ask"})
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1
    assert Config.model_validate(config.model_dump()) == config
    assert Config.model_validate(json.loads(config.model_dump_json())) == config


def test_a_fingerprint_sees_its_parts_only() -> None:
    one, other = make_config({"seed": 1}), make_config({"seed": 2})
    assert fingerprint(one, "seed") != fingerprint(other, "seed")
    assert fingerprint(one, "retrieve", "extract") == fingerprint(other, "retrieve", "extract")


@pytest.mark.parametrize(
    ("text", "line", "about"),
    [
        ("batch_size: 4\nretrieve:\n  by: spans\n  kk: 3\n", 4, "unknown setting 'retrieve.kk'"),
        ("# a comment\nseed: many\n", 2, 'seed="many"'),
        ("members:\n- {name: a, source: x/y}\n- name: b\n  source: x/y\n  variant: odd\n", 5, "members.1.variant"),
        ("voters: {a: 1}\n", 1, "voters"),
    ],
)
def test_a_wrong_setting_has_its_line(tmp_path: Path, text: str, line: int, about: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert str(caught.value).startswith(f"{path}:{line}: {about}")


def test_all_wrong_settings_are_named_in_the_order_of_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(
        "batchsize: 4\nzzz: 1\nqqq: 2\nreading:\n  hiden: 3\n  heads: many\nmembers: [{name: a, chat: 5}]\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    first, second, *others = str(caught.value).split("; also ")
    assert first == f"{path}:1: unknown setting 'batchsize'; did you mean 'batch_size'?"
    assert second.startswith(f"{path}:2: unknown setting 'zzz'; choose from preset, members, voters")
    assert others == [  # what there is to choose from stands there once
        f"{path}:3: unknown setting 'qqq'",
        f"{path}:5: unknown setting 'reading.hiden'; did you mean 'hidden'?",
        f'{path}:6: reading.heads="many": use a whole number, without quotes; 2 more are wrong',
    ]
    # a setting of several types is wrong once
    with pytest.raises(
        ConfigError, match=r"^settings: members\.0\.chat=5: choose auto, true or false, without quotes$"
    ):
        make_config({"members": [{"name": "a", "source": "b", "chat": 5}]})


def test_an_overridden_setting_has_no_line(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("batch_size: 4\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(str(path), {"batch_size": 0})
    assert str(caught.value).startswith(f"{path}: batch_size=0")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in pairwise("abcdefghij")
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, r"settings\.yaml:\d+: holds more than 100,000 values, aliases written out; use fewer"),
        (BOMB + "seed: *j\n", "holds more than 100,000 values"),
        ("a: &a {x: 1}\nb: &b {<<: [*a, *a]}\nseed: [" + "*b, " * 40_000 + "*b]\n", "holds more than 100,000 values"),
    ],
)
def test_aliases_of_aliases_are_refused_at_once(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(str(path))


def test_aliases_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("retrieve: &r {k: 3}\nextract: {members: true}\nseed: 2\n")
    assert load_config(str(path)).retrieve.k == 3
    path.write_text("members:\n- &m {name: a, source: b/c}\n- {<<: *m, name: d}\n")
    assert [(m.name, m.source) for m in load_config(str(path)).members] == [("a", "b/c"), ("d", "b/c")]
