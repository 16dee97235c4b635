"""The command line in a process of its own: pipes, signals, terminals, closed and full outputs; a fake pipeline."""

from __future__ import annotations

import gzip
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from el4ner.cli import main


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EL4NER_DEBUG", raising=False)


def records(output: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.split(b"\n") if line]


def write(name: str, *texts: str) -> str:
    Path(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return name


FAKE = """
import signal, sys, time, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs tests in the background ignores it
from el4ner.records import Prediction
class El4ner:
    @classmethod
    def from_config(cls, config): return cls()
    def predict_iter(self, sentences):
        self.progress("reading the pool")
        for sentence in sentences:
            if sentence.text == "wait": time.sleep(60)
            yield Prediction(sentence.id, sentence.text)
    def report(self): return {"seconds": 1.5, "fitted": {}}
    def memory(self): return {}
sys.modules["el4ner.pipeline"] = module = types.ModuleType("el4ner.pipeline")
module.El4ner = El4ner
from el4ner.cli import main
main()
"""


def start(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "TERM": "xterm", "COLUMNS": "80"}
    command = [sys.executable, "-c", FAKE, *arguments]
    return subprocess.Popen(command, env=environment, **{"stderr": subprocess.PIPE, **options})  # type: ignore[arg-type]


def shell(arguments: str, before: str = "") -> subprocess.CompletedProcess[bytes]:
    """The same through a shell, which can close streams, after what it does `before`."""
    fake = Path("fake.py").absolute()
    fake.write_text(FAKE)
    line = f"{before}{shlex.quote(sys.executable)} {shlex.quote(str(fake))} {arguments}"
    return subprocess.run(line, shell=True, capture_output=True, env={**os.environ, "PYTHONSAFEPATH": "1"})


def test_records_are_streamed_and_ctrl_c_keeps_them() -> None:
    write("x.jsonl", "a", "b", "wait")
    with start("predict", "x.jsonl", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert [json.loads(process.stdout.readline())["text"] for _ in range(2)] == ["a", "b"]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == b"el4ner: interrupted\n"
        assert process.stdout.read() == b""


def test_ctrl_c_with_an_output_file_names_the_part() -> None:
    write("x.jsonl", "a", "wait")
    with start("predict", "x.jsonl", "-o", "out.jsonl.gz", stdout=subprocess.PIPE) as process:
        while not list(Path().glob("*.partial")):
            assert process.poll() is None
        # The partial file exists once the run has begun; give it the moment it needs to reach the sleeping record.
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr is not None
        (partial,) = Path().glob("*.partial")
        assert partial.name in process.stderr.read().decode()
    assert len(records(gzip.decompress(partial.read_bytes()))) == 1


def test_a_closed_pipe_is_no_traceback() -> None:
    write("x.jsonl", *["long text " * 100] * 2000)
    with start("predict", "x.jsonl", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(30) == 1
        assert process.stderr.read() == b""


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="needs /dev/fd")
def test_records_and_report_go_to_pipes_by_name() -> None:
    write("x.jsonl", "a", "b")
    done = shell("predict x.jsonl -o /dev/stdout --report /dev/fd/2")
    assert (done.returncode, len(records(done.stdout)), json.loads(done.stderr)["seconds"]) == (0, 2, 1.5)


@pytest.mark.parametrize(("patience", "output"), [(10, b"ready\nending\ndone\n"), (0, b"ready\nending\n")])
def test_more_interrupts_do_not_break_into_the_end(patience: int, output: bytes) -> None:
    """Until the command has had its time; then another press ends the process where it is."""
    code = f"""
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from el4ner import interrupts
interrupts._PATIENCE_S = {patience}
interrupts.end_in_order()
try:
    print("ready", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("ending", flush=True)
    time.sleep(1.5)
    print("done", flush=True)
    sys.exit(130)
"""
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        said = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        said += process.stdout.readline()
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        assert process.wait(30) == 130
        assert said + process.stdout.read() == output
        assert process.stderr.read() == b""


def test_an_interrupt_while_modules_load_is_no_traceback() -> None:
    """As if Ctrl-C came when the first module of another package is imported."""
    code = """
import sys
class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == "click": raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
from el4ner.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONSAFEPATH": "1"})
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"el4ner: interrupted\n")


def test_an_interrupt_while_options_are_read_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("click.Command.parse_args", interrupt)
    result = CliRunner().invoke(main, ["predict", "--text", "x"])
    assert (result.exit_code, result.stderr) == (130, "el4ner: interrupted\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "arguments",
    [["predict", "x.jsonl", "-o", "/dev/full"], ["predict", "x.jsonl"], ["show", "p.jsonl"]],
    ids=["file", "records", "text"],
)
def test_a_full_disk_is_one_line(arguments: list[str]) -> None:
    write("x.jsonl", "a", "b")
    Path("p.jsonl").write_text('{"text": "x", "entities": []}\n')
    with Path("/dev/full").open("wb") as full, start(*arguments, stdout=full) as process:
        assert process.wait(30) == 1
        assert process.stderr is not None
        assert process.stderr.read() == (
            b"el4ner: error: output cannot be written (No space left on device); make room, or write somewhere else\n"
        )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["predict", "--help"]])
def test_help_that_nobody_takes_is_one_line(arguments: list[str]) -> None:
    with Path("/dev/full").open("wb") as full, start(*arguments, stdout=full) as process:
        assert process.wait(30) == 1
        assert process.stderr is not None
        assert process.stderr.read() == (
            b"el4ner: error: output cannot be written (No space left on device); make room, or write somewhere else\n"
        )


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell of Unix")
def test_a_folder_that_is_gone_is_one_line() -> None:
    for arguments in ("pool check nofile", "predict --text a -o out.jsonl"):
        done = shell(arguments, before="mkdir -p gone && cd gone && rmdir ../gone && ")
        assert done.returncode == 2, done.stderr
        assert done.stderr.count(b"\n") == 1
        assert b"unexpected" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell of Unix")
def test_closed_standard_streams_are_one_line() -> None:
    write("x.jsonl", "a")
    Path("p.jsonl").write_text('{"text": "x", "entities": []}\n')
    remedies = {
        "predict x.jsonl": "open it, or name a file with -o",
        "show p.jsonl": "open it",
        "evaluate p.jsonl p.jsonl": "open it",
        "pool check p.jsonl": "open it",
        "doctor": "open it",
    }
    for arguments, remedy in remedies.items():
        done = shell(f"{arguments} >&-")
        assert done.returncode == 2, arguments
        assert done.stderr.decode() == f"el4ner: error: stdout is closed, so results would be lost; {remedy}\n"
    assert shell("predict x.jsonl -o out.jsonl >&-").returncode == 0
    assert shell("predict x.jsonl 2>&-").stdout.count(b"\n") == 1
    done = shell("predict - <&-")
    assert (done.returncode, done.stderr) == (2, b"el4ner: error: stdin: is closed; name a file, or give it an input\n")


def test_a_stdout_that_is_not_utf8_gets_escapes_and_json_stays_json(monkeypatch: pytest.MonkeyPatch) -> None:
    labelled = {"text": "é🙂", "entities": [{"start": 0, "end": 1, "label": "ł"}]}
    Path("p.jsonl").write_text(json.dumps(labelled) + "\n")

    def output(encoding: str, *arguments: str) -> bytes:
        monkeypatch.setenv("PYTHONIOENCODING", encoding)
        with start(*arguments, stdout=subprocess.PIPE) as process:
            out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, b"")
        return out

    assert output("ascii", "show", "p.jsonl") == rb"1  [\u00e9](\u0142)\ud83d\ude42" + b"\n"
    assert output("latin-1", "show", "p.jsonl") == b"1  [\xe9](\\u0142)\\ud83d\\ude42\n"
    assert output("latin-1", "pool", "check", "p.jsonl").endswith(b" \\u0142\n")
    for encoding in ("ascii", "latin-1"):
        scores = json.loads(output(encoding, "evaluate", "p.jsonl", "p.jsonl", "--json"))
        assert list(scores["labels"]) == ["ł"]
        assert records(output(encoding, "predict", "p.jsonl"))[0]["text"] == "é🙂"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_progress_bar_with_rate_on_a_terminal_only() -> None:
    import pty

    write("x.jsonl", *["t"] * 30)
    Path("x.jsonl").write_text(Path("x.jsonl").read_text() + '{"id": "1", "text": "t"}\n')
    leader, follower = pty.openpty()
    with start("predict", "x.jsonl", stdout=subprocess.PIPE, stderr=follower) as process:
        assert process.stdout is not None
        assert len(records(process.stdout.read())) == 31
        assert process.wait(30) == 0
    os.close(follower)
    shown = b""
    try:
        while chunk := os.read(leader, 65536):
            shown += chunk
    except OSError:
        assert shown, "Linux reports the end of a pseudo-terminal as an error"
    os.close(leader)
    assert b"31/31" in shown
    assert b"/s" in shown
    assert b"el4ner: reading the pool" in shown
    assert b"warning: x.jsonl:31: id" in shown


def test_the_installed_command_imports_no_torch_for_help_and_bad_usage() -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom el4ner.cli import main\n"
        "for a in (['--help'], ['predict', '--help'], ['predict', 'missing.jsonl'], ['show', 'missing.jsonl']):\n"
        "    CliRunner().invoke(main, a)\n"
        "print([name for name in ('torch', 'transformers', 'numba') if name in sys.modules])\n"
    )
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout == "[]\n"
