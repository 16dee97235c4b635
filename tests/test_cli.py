"""The command line: what it makes of options, where it writes, how it ends. The pipeline is replaced by a small fake;
`test_cli_process.py` starts processes, `test_cli_real.py` runs the real pipeline."""

from __future__ import annotations

import gzip
import json
import sys
import types
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner, Result

from el4ner.cli import main
from el4ner.config import Config
from el4ner.errors import ConfigError, EngineError, ModelNotFoundError
from el4ner.records import Entity, Prediction, Sentence

KEYS = ["id", "text", "entities", "status", "error", "usage", "extra"]


class FakeEl4ner:
    """Finds "Berlin"; skips unusable sentences; does what a text that names a trouble asks for."""

    configs: ClassVar[list[Config]] = []
    prepared = 0
    progress: Any = None

    @classmethod
    def from_config(cls, config: Config) -> FakeEl4ner:
        cls.configs.append(config)
        if config.members[0].source == "nowhere":
            raise ModelNotFoundError("model 'nowhere' is unknown; name a folder")
        return cls()

    def predict_iter(self, sentences: Iterable[Sentence]) -> Iterator[Prediction]:
        for sentence in sentences:
            if sentence.error is not None:
                yield Prediction(sentence.id, sentence.text, (), "skipped", sentence.error, extra=sentence.extra)
                continue
            if sentence.text == "interrupt":
                raise KeyboardInterrupt
            if sentence.text == "engine":
                raise EngineError("out of memory: batch_size=16; choose a smaller one")
            if sentence.text == "crash":
                raise ZeroDivisionError("division\nby zero")
            if sentence.text == "quote":
                raise ValueError("what is \x1b[2J here?")
            if sentence.text == "lose":
                continue
            if sentence.text == "fit":
                self.progress("fitting, 5 folds")
            if sentence.text == "warn":
                warnings.warn("something\nis odd: \x1b[2J", UserWarning, stacklevel=1)
            at = sentence.text.find("Berlin")
            entities = () if at < 0 else (Entity(at, at + 6, "Berlin", "place", 0.75),)
            status = "truncated" if sentence.text == "long" else "ok"
            yield Prediction(sentence.id, sentence.text, entities, status, extra=sentence.extra)

    def memory(self) -> dict[str, Any]:
        return {"peak": 7}

    def report(self) -> dict[str, Any]:
        return {"seconds": 1.5, "fitted": {}}

    def prepare(self, progress: Any = None) -> None:
        progress("reading states of 3 sentences")
        type(self).prepared += 1


@pytest.fixture(autouse=True)
def pipeline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakeEl4ner]:
    module = types.ModuleType("el4ner.pipeline")
    module.El4ner = FakeEl4ner  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "el4ner.pipeline", module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EL4NER_DEBUG", raising=False)
    FakeEl4ner.configs, FakeEl4ner.prepared = [], 0
    return FakeEl4ner


def run(*arguments: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, list(arguments), input=stdin)


def records(output: str | bytes) -> list[dict[str, Any]]:
    lines = output.split("\n") if isinstance(output, str) else output.decode().split("\n")
    return [json.loads(line) for line in lines if line]


def write(name: str, *texts: str) -> str:
    Path(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return name


# predict: records


def test_records_go_to_stdout_in_order_and_nothing_else_does() -> None:
    result = run("predict", write("a.jsonl", "in Berlin", "x"), write("b.jsonl", ""))
    assert result.exit_code == 0
    found = records(result.stdout)
    assert [list(record) for record in found] == [KEYS] * 3
    assert [(record["id"], record["text"]) for record in found] == [("1", "in Berlin"), ("2", "x"), ("1", "")]
    assert found[0]["entities"][0]["text"] == "Berlin"
    assert result.stderr.splitlines() == [
        'el4ner: warning: b.jsonl:1: id "1" was used before, at a.jsonl:1; both records are kept, '
        "give them different ids to tell their results apart"
    ]
    assert run("predict", "--quiet", "a.jsonl", "b.jsonl").stderr == ""


def test_bad_records_are_skipped_and_end_with_three() -> None:
    Path("x.jsonl").write_text('{"text": "Berlin"}\nnot json\n{"text": "long"}\n{"txt": 1}\n')
    result = run("predict", "x.jsonl")
    assert result.exit_code == 3
    assert [record["status"] for record in records(result.stdout)] == ["ok", "skipped", "truncated", "skipped"]
    assert records(result.stdout)[1]["error"].startswith('x.jsonl:2: not JSON: "not json" (')
    assert result.stderr == ("el4ner: 3 of 4 records are not ok (2 skipped, 1 truncated); their `error` says why\n")
    Path("one.jsonl").write_text('{"txt": 1}\n')
    assert run("predict", "one.jsonl").stderr.endswith("1 of 1 record is not ok (1 skipped); its `error` says why\n")


def test_stdin_text_files_gzip_and_limit() -> None:
    assert records(run("predict", "-", stdin='{"text": "Berlin"}\n').stdout)[0]["text"] == "Berlin"
    Path("x.txt").write_text("one\n\ntwo\nthree\n")
    assert [r["id"] for r in records(run("predict", "x.txt", "--limit", "2").stdout)] == ["1", "3"]
    Path("x.jsonl.gz").write_bytes(gzip.compress(b'{"text": "zipped"}\n'))
    assert records(run("predict", "x.jsonl.gz").stdout)[0]["text"] == "zipped"


def test_texts_on_the_command_line() -> None:
    result = run("predict", "--text", "Berlin 🙂", "--text", "", "--text", "x", "--limit", "2")
    assert result.exit_code == 0
    assert [(r["id"], r["text"]) for r in records(result.stdout)] == [("1", "Berlin 🙂"), ("2", "")]
    broken = run("predict", "--text", "caf\udce9")
    assert broken.exit_code == 3
    assert records(broken.stdout)[0]["error"].startswith(
        '--text 1: "text" has a lone surrogate (\\udce9 at character 3)'
    )


def test_output_file_and_report() -> None:
    write("x.jsonl", "Berlin", "y")
    result = run("predict", "x.jsonl", "-o", "out.jsonl", "--report", "report.json")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert len(records(Path("out.jsonl").read_bytes())) == 2
    assert json.loads(Path("report.json").read_text()) == {"seconds": 1.5, "fitted": {}, "memory, MiB": {"peak": 7}}
    assert sorted(path.name for path in Path().iterdir()) == ["out.jsonl", "report.json", "x.jsonl"]
    assert records(run("predict", "x.jsonl", "-o", "-").stdout) == records(Path("out.jsonl").read_bytes())


def test_the_same_input_gives_the_same_bytes() -> None:
    write("x.jsonl", "Berlin", "y")
    assert run("predict", "x.jsonl").stdout_bytes == run("predict", "x.jsonl").stdout_bytes


# predict: options to settings


def test_only_what_was_given_reaches_the_settings(pipeline: type[FakeEl4ner]) -> None:
    run("predict", "--text", "x")
    assert pipeline.configs == [Config()]
    Path("settings.yaml").write_text("batch_size: 3\nseed: 5\n")
    result = run(
        *("predict", "--text", "x", "--config", "settings.yaml", "--examples", "pool.jsonl", "--labels", "labels.yaml"),
        *("--members", "one=embedded:smollm2", "--members", "two=./folder", "--voters", "two, reading"),
        *("--device", "cpu", "--dtype", "float32", "--seed", "7", "--min-score", "0.5", "--overlap", "nested"),
    )
    assert result.exit_code == 0, result.stderr
    config = pipeline.configs[1]
    assert (config.batch_size, config.seed, config.min_score, config.overlap) == (3, 7, 0.5, "nested")
    assert (config.examples, config.labels, config.device, config.dtype) == (
        "pool.jsonl",
        "labels.yaml",
        "cpu",
        "float32",
    )
    assert [(member.name, member.source) for member in config.members] == [
        ("one", "embedded:smollm2"),
        ("two", "./folder"),
    ]
    assert config.voters == ("two", "reading")
    run("predict", "--text", "x", "--preset", "paper", "--voters", "all", "--batch-size", "2")
    assert (pipeline.configs[2].preset, pipeline.configs[2].voters, pipeline.configs[2].batch_size) == (
        "paper",
        "all",
        2,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Error: no input; name a file, - for stdin, or give --text"),
        (["-", "--examples", "-"], "Error: - (stdin) is named for INPUT and --examples; it can be read only once"),
        (["-", "--labels", "-"], "Error: - (stdin) is named for INPUT and --labels"),
        (["-", "--config", "-"], "Error: - (stdin) is named for INPUT and --config; it can be read only once"),
        (["x.jsonl", "--config", "-", "--labels", "-"], "Error: - (stdin) is named for --labels and --config"),
        (["-", "--config", "stdin.yaml"], "Error: - (stdin) is named for INPUT and --labels"),
        (["--text", "x", "x.jsonl"], "Error: INPUT and --text exclude each other; give one of them"),
        (["missing.jsonl"], "el4ner: error: missing.jsonl: no such file; check the path"),
        (["empty.jsonl"], "el4ner: error: empty.jsonl: is empty; expected one record a line"),
        (["blank.jsonl"], "el4ner: error: blank.jsonl: is empty; expected one record a line"),
        (["folder"], "el4ner: error: folder: is a folder; name a file in it, or folder/*.jsonl for all of them"),
        (["x.jsonl", "-o", "x.jsonl"], "Error: --output x.jsonl is also an input; choose another name"),
        (["x.jsonl", "-o", "link.jsonl"], "Error: --output link.jsonl is also an input; choose another name"),
        (["x.jsonl", "-o", "hard.jsonl"], "Error: --output hard.jsonl is also an input; choose another name"),
        (["x.jsonl", "--examples", "folder/../x.txt", "-o", "x.txt"], "Error: --output x.txt is also the pool"),
        (["x.jsonl", "--examples", "x.txt", "--report", "x.txt"], "Error: --report x.txt is also the pool"),
        (["x.jsonl", "--labels", "x.txt", "-o", "x.txt"], "Error: --output x.txt is also the labels file (--labels)"),
        (["x.jsonl", "--config", "s.yaml", "-o", "s.yaml"], "Error: --output s.yaml is also the settings file"),
        (["x.jsonl", "--config", "s.yaml", "-o", "x.txt"], "Error: --output x.txt is also the labels file (--labels)"),
        (["x.jsonl", "--members", "a=x.txt", "-o", "x.txt"], "Error: --output x.txt is also the model of member a"),
        (["x.jsonl", "-o", "new", "--report", "./new"], "Error: --report ./new is also --output; choose another name"),
        (["x.jsonl", "--report", "-"], "Error: --report -: stdout belongs to the records; name a file"),
        (["x.jsonl", "-o", "/proc/x"], "el4ner: error: /proc/x: cannot be written ("),
        (["x.jsonl", "bad.jsonl.gz"], "el4ner: error: bad.jsonl.gz:1: the gzip data are damaged or cut off"),
        (["x.jsonl", "blank.jsonl"], "el4ner: error: blank.jsonl: is empty; expected one record a line"),
        (["x.jsonl", "utf16.jsonl"], "el4ner: error: utf16.jsonl: is UTF-16; convert it to UTF-8 first"),
        (["x.jsonl", "--device", "cuda:99"], "Error: device cuda:99: "),
        (["x.jsonl", "--seed", "9" * 30], "el4ner: error: settings: seed=999"),
        (["x.jsonl", "--voters", "reading,reading"], "el4ner: error: settings: voters: reading named twice"),
        ([""], "el4ner: error: the name of an input file is empty"),
        (["x.jsonl", "-o", ""], "el4ner: error: the name of an output file is empty"),
        (["x.jsonl", "--report", ""], "el4ner: error: the name of an output file is empty"),
        (["x.jsonl", "-o", "n" * 300], f"el4ner: error: {'n' * 300}: cannot be written (File name too long)"),
        (["x.jsonl", "-o", "x.jsonl/y"], "el4ner: error: x.jsonl/y: cannot be written (Not a directory)"),
        (["x.jsonl", "-o", "no/out.jsonl"], "el4ner: error: no/out.jsonl: the folder "),
        (["x.jsonl", "-o", "folder"], "el4ner: error: folder: is a folder; name a file in it"),
        (["x.jsonl", "--report", "no/r.json"], "el4ner: error: no/r.json: the folder "),
        (["x.jsonl", "--preset", "best"], "Error: Invalid value for '--preset': 'best' is not one of"),
        (["x.jsonl", "--limit", "0"], "Error: Invalid value for '--limit': 0 is not in the range x>=1."),
        (["x.jsonl", "--min-score", "2"], "el4ner: error: "),
        (["x.jsonl", "--min-score", "nan"], "el4ner: error: "),
        (["x.jsonl", "--device", "gpu"], "el4ner: error: "),
        (["x.jsonl", "--members", "nameless"], "el4ner: error: "),
        (["x.jsonl", "--members", "a=nowhere"], "el4ner: error: model 'nowhere' is unknown; name a folder"),
        (["x.jsonl", "--voters", "a,,b"], "el4ner: error: settings: voters: a name is empty; write names only"),
        (["x.jsonl", "--voters", "reading,"], "el4ner: error: settings: voters: a name is empty; write names only"),
        (["x.jsonl", "--voters", ""], "el4ner: error: settings: voters: none named"),
        (["x.jsonl", "--examples", ""], 'el4ner: error: settings: examples="": it is empty; write a name'),
        (["x.jsonl", "--labels", ""], 'el4ner: error: settings: labels="": it is empty; write a name'),
        (["x.jsonl", "--config", ""], "el4ner: error: config: the name of the settings file is empty; name a file"),
        (["x.jsonl", "--members", "a=openai:m"], "el4ner: error: model 'openai:m': no server is named; write openai:"),
        (["x.jsonl", "--members", "a=embedded:minilm"], "el4ner: error: member 'a': embedded:minilm is an encoder, "),
        (["x.jsonl", "--members", "a=openai:"], "el4ner: error: a source that starts with openai: names no model"),
        (["x.jsonl", "--members", "a=x+folder"], "el4ner: error: adapter 'folder': no adapter_config.json there; name"),
        (["x.jsonl", "--config", "missing.yaml"], "el4ner: error: "),
        (["x.jsonl", "--colour", "red"], "Error: No such option"),
    ],
)
def test_usage_errors_end_with_two_and_one_line(
    arguments: list[str], message: str, pipeline: type[FakeEl4ner], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("x.jsonl", "Berlin")
    Path("x.txt").write_text("kept\n")
    Path("s.yaml").write_text("labels: x.txt\n")
    Path("stdin.yaml").write_text("labels: '-'\n")
    Path("link.jsonl").symlink_to("x.jsonl")
    Path("hard.jsonl").hardlink_to("x.jsonl")
    Path("empty.jsonl").touch()
    Path("blank.jsonl").write_text("\n\n")
    Path("bad.jsonl.gz").write_text('{"text": "x"}\n')
    Path("utf16.jsonl").write_text('{"text": "x"}\n', encoding="utf-16")
    Path("folder").mkdir()
    before = {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    result = run("predict", *arguments, stdin='{"text": "a"}\n{"text": "b"}\n')
    assert {path: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before
    assert result.exit_code == 2
    assert result.stdout == ""
    assert pipeline.configs == [] or arguments[1:2] == ["--members"]
    last = result.stderr.splitlines()[-1]
    assert last.startswith(message)
    assert len(last) > len("el4ner: error: ")
    assert "Traceback" not in result.stderr
    assert not list(Path().glob("*.partial"))


def test_settings_errors_are_raised_before_models_are_loaded(pipeline: type[FakeEl4ner]) -> None:
    Path("settings.yaml").write_text("batchsize: 3\n")
    result = run("predict", "--text", "x", "--config", "settings.yaml")
    assert result.exit_code == ConfigError.exit_code == 2
    assert "batchsize" in result.stderr
    assert pipeline.configs == []


def test_a_gpu_that_is_not_there_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for device, words in (("mps", "not available here"), ("cuda", "0 CUDA devices found")):
        for command in (["predict", "--text", "x"], ["pool", "build"], ["plan"]):
            result = run(*command, "--device", device)
            assert (result.exit_code, result.stdout) == (2, "")
            assert f"device {device}: {words}; choose auto or cpu" in result.stderr


def test_devices_are_no_files_to_be_overwritten() -> None:
    write("x.jsonl", "Berlin")
    assert run("predict", "x.jsonl", "-o", "/dev/null", "--report", "/dev/null").exit_code == 0
    assert run("predict", "x.jsonl", "--examples", "builtin", "-o", "builtin").exit_code == 0
    refused = run("predict", "x.jsonl", "--examples", "./builtin", "-o", "builtin")
    assert (refused.exit_code, "is also the pool" in refused.stderr) == (2, True)


# predict: how it ends


@pytest.mark.parametrize("stderr_is_terminal", [False, True])
def test_what_turns_bad_later_loses_no_record(stderr_is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was sound when the run began: its records before the damage are kept, and the next file is read."""
    from el4ner import cli_predict, jsonl

    write("a.jsonl", "one", "two")
    write("c.jsonl", "three")
    zipped = gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(20000)))
    Path("b.jsonl.gz").write_bytes(zipped[: len(zipped) // 2])
    Path("gone.jsonl").write_text("\n \n")
    monkeypatch.setattr(jsonl, "check_beginning", lambda path: None)
    monkeypatch.setattr(cli_predict.Messages, "counts", property(lambda self: stderr_is_terminal))
    result = run("predict", "a.jsonl", "b.jsonl.gz", "gone.jsonl", "c.jsonl", "-o", "out.jsonl", "-q")
    assert result.exit_code == 3
    found = records(Path("out.jsonl").read_bytes())
    assert [r["text"] for r in found[:3]] == ["one", "two", "0"]
    assert found[-1]["text"] == "three"
    bad = [r for r in found if r["status"] != "ok"]
    assert [r["status"] for r in bad] == ["skipped", "skipped"]
    assert "the gzip data are damaged or cut off" in bad[0]["error"]
    assert bad[1]["error"] == "gone.jsonl: is empty; expected one record a line"
    assert f"2 of {len(found)} records are not ok (2 skipped)" in result.stderr


def test_an_engine_error_keeps_what_was_finished() -> None:
    write("x.jsonl", "Berlin", "engine")
    result = run("predict", "x.jsonl", "-o", "out.jsonl")
    assert result.exit_code == 1
    (partial,) = Path().glob("out.jsonl.*.partial")
    assert result.stderr == (
        f"el4ner: what was finished is in {partial.resolve()}\n"
        "el4ner: error: out of memory: batch_size=16; choose a smaller one\n"
    )
    assert not Path("out.jsonl").exists()
    assert len(records(partial.read_bytes())) == 1
    assert len(records(run("predict", "x.jsonl").stdout)) == 1


@pytest.mark.filterwarnings("always::UserWarning")
def test_warnings_of_libraries_are_messages() -> None:
    write("x.jsonl", "warn")
    assert run("predict", "x.jsonl").stderr == "el4ner: warning: something is odd: \\x1b[2J\n"
    assert run("predict", "x.jsonl", "-q").stderr == ""


def test_an_interrupted_run_ends_with_130() -> None:
    result = run("predict", write("x.jsonl", "Berlin", "interrupt", "y"))
    assert result.exit_code == 130
    assert result.stderr == "el4ner: interrupted\n"
    assert len(records(result.stdout)) == 1


def test_an_unexpected_error_is_one_line_unless_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    write("x.jsonl", "crash")
    result = run("predict", "x.jsonl")
    assert result.exit_code == 1
    assert result.stderr == (
        "el4ner: error: unexpected ZeroDivisionError: division by zero; run with EL4NER_DEBUG=1 for the traceback\n"
    )
    write("q.jsonl", "quote")
    result = run("predict", "q.jsonl")
    # what a document holds does not reach the terminal as a command
    assert result.stderr.startswith("el4ner: error: unexpected ValueError: what is \\x1b[2J here?; run with ")
    monkeypatch.setenv("EL4NER_DEBUG", "1")
    result = run("predict", "x.jsonl")
    assert result.exit_code == 1
    assert result.stderr.startswith("Traceback")
    assert result.stderr.endswith("el4ner: error: unexpected ZeroDivisionError: division by zero\n")


def test_a_lost_record_is_noticed() -> None:
    result = run("predict", write("x.jsonl", "a", "lose", "b"))
    assert result.exit_code == 1
    assert "3 records went in but 2 came out" in result.stderr


# pool, evaluate, show, doctor, download


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ("nothere", 'encoder="nothere": is no model folder and no known name'),
        ("folder", 'encoder="folder": is no model folder and no known name'),
        ("openai:m@http://localhost:1/v1", "a server cannot serve as encoder"),
        ("model.gguf", "a gguf cannot serve as encoder"),
    ],
)
def test_an_encoder_that_cannot_be_one_is_refused_before_a_model_loads(
    encoder: str, message: str, pipeline: type[FakeEl4ner]
) -> None:
    Path("folder").mkdir()
    Path("model.gguf").write_bytes(b"GGUF")
    Path("s.yaml").write_text(f"encoder: {encoder}\n")
    for command in (("predict", "--text", "x"), ("plan",)):
        result = run(*command, "--config", "s.yaml")
        assert (result.exit_code, result.stdout, pipeline.configs) == (2, "", [])
        assert message in result.stderr
        assert result.stderr.endswith("name embedded:minilm, a model folder or a Hugging Face id (owner/name)\n")


def test_pool_build_prepares_with_the_same_options(pipeline: type[FakeEl4ner], monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("pool", "build", "--examples", "pool.jsonl", "--device", "cpu")
    assert (result.exit_code, result.stdout) == (0, "")
    assert pipeline.prepared == 1
    assert pipeline.configs == [Config(examples="pool.jsonl", device="cpu")]
    assert result.stderr.splitlines() == ["el4ner: reading states of 3 sentences", "el4ner: the pool is ready"]
    assert run("pool", "build", "--quiet").stderr == ""
    monkeypatch.setenv("EL4NER_CACHE", "x/y")
    Path("x").write_text("a file where the folder should be")
    nowhere = run("pool", "build")
    assert (nowhere.exit_code, pipeline.prepared) == (2, 2)
    assert nowhere.stderr.endswith("so nothing would be kept; set EL4NER_CACHE to a writable folder\n")
    monkeypatch.delenv("EL4NER_CACHE")
    run("pool", "build", "--overlap", "nested")
    assert pipeline.configs[-1].overlap == "nested"
    for command in (["pool", "build"], ["plan"]):
        twice = run(*command, "--examples", "-", "--labels", "-", stdin="{}")
        assert (twice.exit_code, "is named for --examples and --labels" in twice.stderr) == (2, True)
    prepared = pipeline.prepared
    for wrong, message in (
        (["--examples", "-", "--config", "-"], "is named for --examples and --config"),
        (["--members", "a=openai:m"], "no server is named"),
        (["--members", "a=x+folder"], "no adapter_config.json there"),
    ):
        result = run("pool", "build", *wrong, stdin="not settings")
        assert (result.exit_code, message in result.stderr, pipeline.prepared) == (2, True, prepared)


def test_evaluate_tables_and_json() -> None:
    Path("gold.jsonl").write_text(
        '{"text": "in Berlin", "entities": [{"start": 3, "end": 9, "label": "place"}]}\n'
        '{"text": "Ada", "entities": [{"start": 0, "end": 3, "label": "[red]x"}]}\n'
    )
    write("in.jsonl", "in Berlin")
    run("predict", "in.jsonl", "-o", "pred.jsonl")
    result = run("evaluate", "gold.jsonl", "pred.jsonl", "--bootstrap", "200")
    assert (result.exit_code, result.stderr) == (0, "")
    rows = {line[:16].strip(): line.split()[-6:] for line in result.stdout.splitlines()}
    assert rows["place"] == ["1.0000", "1.0000", "1.0000", "1", "1", "1"]
    assert rows["[red]x"][2] == "0.0000"
    assert rows["micro (strict)"] == ["1.0000", "0.5000", "0.6667", "2", "1", "1"]
    assert "1 gold record without prediction (its entities count as missed)" in result.stdout
    scores = json.loads(run("evaluate", "gold.jsonl", "pred.jsonl", "--json").stdout)
    assert scores["micro"]["f1"] == pytest.approx(2 / 3)
    assert len(scores["micro"]["intervals"]["f1"]) == 2
    assert scores["problems"]["lost_records"] == 1
    assert (
        "intervals"
        not in json.loads(run("evaluate", "gold.jsonl", "pred.jsonl", "--json", "--bootstrap", "0").stdout)["micro"]
    )
    many = run("evaluate", "gold.jsonl", "pred.jsonl", "--bootstrap", "1000000000")
    assert (many.exit_code, many.stdout) == (2, "")
    assert "--bootstrap 1000000000: use at most" in many.stderr
    Path("gold.jsonl").write_text('{"text": "a", "entities": [{"start": 0, "end": 2, "label": "l"}]}\n')
    bad = run("evaluate", "gold.jsonl", "pred.jsonl")
    assert (bad.exit_code, bad.stdout) == (2, "")
    assert bad.stderr.startswith("el4ner: error: gold.jsonl:1: entity 1 spans [0:2] of a text of 1 characters")


def test_doctor_and_download(monkeypatch: pytest.MonkeyPatch) -> None:
    from el4ner import doctor, models

    class Diagnosis:
        def to_dict(self) -> dict[str, str]:
            return {"python": "3.x"}

    calls: list[tuple[str, bool]] = []

    def download(what: str, *, from_hub: bool, report: Any) -> list[Any]:
        report("smollm2: here")
        calls.append((what, from_hub))
        return []

    monkeypatch.setattr(doctor, "diagnose", Diagnosis)
    monkeypatch.setattr(doctor, "render", lambda diagnosis: "all is well")
    monkeypatch.setattr(models, "download", download)
    assert run("doctor").stdout == "all is well\n"
    assert json.loads(run("doctor", "--json").stdout) == {"python": "3.x"}
    assert run("doctor").stderr == ""
    with monkeypatch.context() as wrong:
        wrong.setenv("EL4NER_BACKEND", "bogus")
        result = run("doctor")
    assert (result.exit_code, result.stdout) == (0, "all is well\n")
    assert "bogus" in result.stderr
    assert result.stderr.endswith("; runs refuse it\n")
    result = run("download", "embedded", "--from-hub")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "smollm2: here\n")
    assert calls == [("embedded", True)]
    monkeypatch.undo()
    assert run("download", "everything").exit_code == 2


def test_version_and_help() -> None:
    assert run("--version").stdout.startswith("el4ner ")
    for command in ([], ["predict"], ["evaluate"], ["show"], ["doctor"], ["download"], ["pool"], ["pool", "check"]):
        assert run(*command, "--help").exit_code == 0
    assert run("pridict").exit_code == 2


def test_what_takes_long_is_said_on_stderr_without_a_terminal_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("predict", "--text", "fit").stderr == ""  # quick runs have nothing to say
    monkeypatch.setattr("el4ner.cli_messages.SILENT_S", 0.0)
    done = run("predict", "--text", "fit")
    assert (done.exit_code, done.stderr) == (0, "el4ner: fitting, 5 folds\n")
    assert len(done.stdout.splitlines()) == 1
    assert run("predict", "--text", "fit", "-q").stderr == ""
