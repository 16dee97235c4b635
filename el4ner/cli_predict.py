"""`el4ner predict`, and the options it shares with `el4ner pool build`."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import click

from el4ner.errors import El4nerError
from el4ner.jsonl import OutputFile, count_inputs, make_sentence, read_inputs, write_predictions
from el4ner.lines import STDIN, display_name, visible
from el4ner.records import Prediction, Sentence

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from el4ner.pipeline import El4ner

INCOMPLETE = 3

_Command = TypeVar("_Command", bound=Callable[..., Any])


# Options


def _split_voters(_: click.Context, __: click.Parameter, value: str | None) -> str | list[str] | None:
    if value is None or value in ("auto", "all"):
        return value
    return [name.strip() for name in value.split(",")]


_MODEL_OPTIONS = (
    click.option("--examples", metavar="POOL", help="Labelled sentences (JSONL); default: the built-in pool."),
    click.option("--labels", metavar="FILE", help="Label definitions (YAML or JSON); default: those of the pool."),
    click.option("--preset", type=click.Choice(["default", "paper"]), help="Settings to start from."),
    click.option("--config", metavar="FILE", help="Settings file (YAML); options given here win over it."),
    click.option("--members", multiple=True, metavar="NAME=SOURCE", help="A model to ask; repeat for several."),
    click.option("--voters", callback=_split_voters, metavar="auto|all|NAMES", help="Who votes; names with commas."),
    click.option("--device", metavar="auto|cpu|cuda[:N]", help="Where models run."),
    click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), help="Precision of models."),
    click.option("--seed", type=click.IntRange(min=0), help="Seed of everything that is sampled."),
)


def model_options(command: _Command) -> _Command:
    """Adds the options that say which models read which pool."""
    for option in reversed(_MODEL_OPTIONS):
        command = option(command)
    return command


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were on the command line."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in options.items()
        if value is not None and value != ()
    }


# Messages


class Messages:
    """Warnings on stderr, and a progress bar where stderr is a terminal that does not also show the results."""

    def __init__(self, quiet: bool, results_on_stdout: bool) -> None:
        self._quiet = quiet
        self._bar_wanted = not quiet and sys.stderr.isatty() and not (results_on_stdout and sys.stdout.isatty())
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    @property
    def counts(self) -> bool:
        """Whether the number of records is wanted, for the time left."""
        return self._bar_wanted

    def warn(self, message: str) -> None:
        """One warning, above the bar if there is one."""
        if self._quiet:
            return
        line = f"el4ner: warning: {message}"
        if self._progress is None:
            click.echo(line, err=True)
        else:
            self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def bar(self, total: int | None) -> AbstractContextManager[object]:
        """Shows the bar within a `with` block, if one is wanted."""
        return _Bar(self, total) if self._bar_wanted else nullcontext()

    def start(self, progress: Progress, task: TaskID) -> None:
        """The bar is drawn from now on."""
        self._progress, self._task = progress, task

    def stop(self) -> None:
        """The bar is gone."""
        self._progress = self._task = None

    def advance(self) -> None:
        """One more record is finished."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task)


class _Bar:
    """Records done, rate and time left, drawn by rich on stderr."""

    def __init__(self, messages: Messages, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
        from rich.text import Text

        class Rate(ProgressColumn):
            def render(self, task: Task) -> Text:
                return Text("-/s" if task.speed is None else f"{task.speed:.1f}/s")

        self._messages = messages
        # stdout stays untouched: results are written to its bytes.
        self._progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            Rate(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=Console(stderr=True),
            redirect_stdout=False,
        )
        self._task = self._progress.add_task("records", total=total)

    def __enter__(self) -> None:
        self._progress.start()
        self._messages.start(self._progress, self._task)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._messages.stop()
        self._progress.stop()


# The command


def _typed_sentences(texts: Iterable[str]) -> Iterator[Sentence]:
    for number, text in enumerate(texts, start=1):
        yield make_sentence(text, f"--text {number}", str(number))


def _output_file(option: str, path: str | None, inputs: tuple[str, ...]) -> OutputFile | None:
    """A checked output; None for stdout. Raises click.UsageError if it would replace an input."""
    if path is None or path == STDIN:
        return None
    if os.path.realpath(path) in {os.path.realpath(name) for name in inputs if name != STDIN}:
        raise click.UsageError(f"{option} {visible(path)} is also an input; choose another name")
    return OutputFile(path)


def _finished(predictions: Iterable[Prediction], messages: Messages) -> Iterator[Prediction]:
    for prediction in predictions:
        yield prediction
        messages.advance()


class _Counted:
    """Sentences on their way into the pipeline, counted."""

    def __init__(self, sentences: Iterator[Sentence]) -> None:
        self._sentences = sentences
        self.count = 0

    def __iter__(self) -> Iterator[Sentence]:
        for sentence in self._sentences:
            self.count += 1
            yield sentence


def _stream(output: OutputFile | None) -> AbstractContextManager[BinaryIO]:
    if output is not None:
        return output
    return nullcontext(sys.stdout.buffer)


def _run(
    model: El4ner, sentences: Iterator[Sentence], output: OutputFile | None, messages: Messages, total: int | None
) -> Counter[str]:
    """Predicts and writes; returns how many records there are of each status."""
    counted = _Counted(sentences)
    try:
        with messages.bar(total), _stream(output) as stream:
            predictions = _finished(model.predict_iter(counted), messages)
            statuses = write_predictions(stream, predictions, flush=output is None)
            if statuses.total() != counted.count:
                raise El4nerError(
                    f"{counted.count} records went in but {statuses.total()} came out; this is a bug, please report it"
                )
    except BaseException:
        if output is not None and output.left_behind:
            click.echo(f"el4ner: what was finished is in {display_name(output.partial)}", err=True)
        raise
    return statuses


def _summary(statuses: Counter[str]) -> str:
    bad = {status: count for status, count in sorted(statuses.items()) if status != "ok"}
    counts = ", ".join(f"{count} {status}" for status, count in bad.items())
    return f"{sum(bad.values())} of {statuses.total()} records are not ok ({counts}); their `error` says why"


@click.command()
@click.argument("inputs", nargs=-1, metavar="INPUT...", type=click.Path(allow_dash=True))
@click.option("--text", "texts", multiple=True, metavar="TEXT", help="A text to read instead of files; repeatable.")
@click.option("-o", "--output", metavar="OUT", help="Where records go; default: stdout. Zipped if it ends in .gz.")
@model_options
@click.option("--batch-size", type=click.IntRange(min=1), metavar="N", help="Sentences a model reads at once.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Read only the first N records.")
@click.option("--min-score", type=float, metavar="X", help="Leave out entities below this score, 0 to 1.")
@click.option("--overlap", type=click.Choice(["flat", "nested"]), help="Whether entities may overlap.")
@click.option("--report", "report_path", metavar="FILE", help="Write what the run did and took, as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar and no warnings.")
def predict(
    inputs: tuple[str, ...],
    texts: tuple[str, ...],
    output: str | None,
    config: str | None,
    limit: int | None,
    report_path: str | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Find the entities in INPUT: one JSON record out for each record in, in the same order.

    INPUT is JSONL with `text` (or `tokens`) and optionally `id`, a .txt file with a text a line, either of them with
    .gz, or - for JSONL on stdin. Blank lines are skipped; a line that cannot be used gives a record with status
    "skipped" and an error, and exit code 3.
    """
    if inputs and texts:
        raise click.UsageError("INPUT and --text exclude each other; give one of them")
    if not inputs and not texts:
        raise click.UsageError("no input; name a file, - for stdin, or give --text")
    from el4ner.config import load_config

    settings = load_config(config, overrides=given(options))
    messages = Messages(quiet, results_on_stdout=output is None or output == STDIN)
    sentences = read_inputs(inputs, limit, messages.warn) if inputs else _typed_sentences(texts[:limit])
    target = _output_file("--output", output, inputs)
    report_file = _output_file("--report", report_path, inputs)
    total = None
    if messages.counts:
        total = count_inputs(inputs, limit) if inputs else len(texts[:limit])

    from el4ner.pipeline import El4ner

    model = El4ner.from_config(settings)
    statuses = _run(model, sentences, target, messages, total)
    if report_file is not None:
        with report_file as stream:
            stream.write(json.dumps(model.report(), ensure_ascii=False, indent=2).encode() + b"\n")
    if set(statuses) - {"ok"}:
        click.echo(f"el4ner: {_summary(statuses)}", err=True)
        click.get_current_context().exit(INCOMPLETE)
