"""What the commands say on stderr, warnings of libraries included, and what stdout can take."""

from __future__ import annotations

import codecs
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from io import TextIOWrapper
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from el4ner.errors import UsageError, debugging
from el4ner.lines import visible

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


SILENT_S = 10.0
"""Seconds for which a run without a progress bar says nothing about what it is at."""


def say_warning(message: str) -> None:
    """One warning on stderr."""
    click.echo(f"el4ner: warning: {message}", err=True)


@contextmanager
def warnings_as_messages(warn: Callable[[str], None]) -> Iterator[None]:
    """Within the block Python warnings go to `warn` as one line, without file, line number and source."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        warn(visible(" ".join(str(message).split())) or category.__name__)

    # what is put back afterwards is the function alone: filters that somebody sets meanwhile are theirs
    before = warnings.showwarning
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def unexpected(error: Exception) -> str:
    """An error that nobody raised on purpose, in one line."""
    hint = "" if debugging() else "; run with EL4NER_DEBUG=1 for the traceback"
    return f"unexpected {type(error).__name__}: {' '.join(str(error).split()) or 'no message'}{hint}"


def need_stdout(remedy: str = "open it") -> None:
    """Raises UsageError if stdout is closed, as by `>&-`: results would go nowhere."""
    if sys.stdout is None:
        raise UsageError(f"stdout is closed, so results would be lost; {remedy}")


class Messages:
    """Warnings on stderr, and a progress bar where stderr is a terminal that does not also show the results."""

    def __init__(self, quiet: bool, results_on_stdout: bool) -> None:
        self._quiet = quiet
        self._began = time.monotonic()
        on_terminal = sys.stderr is not None and sys.stderr.isatty()  # None: closed, as by 2>&-
        self._bar_wanted = not quiet and on_terminal and not (results_on_stdout and sys.stdout.isatty())
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
        if self._progress is None:
            say_warning(message)
        else:
            line = f"el4ner: warning: {message}"
            self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def note(self, message: str) -> None:
        """What is going on, above the bar; without one, once a run has lasted so long that silence would puzzle."""
        if self._quiet:
            return
        if self._progress is None:
            if time.monotonic() - self._began >= SILENT_S:
                click.echo(f"el4ner: {message}", err=True)
        else:
            self._progress.console.print(f"el4ner: {message}", markup=False, highlight=False, soft_wrap=True)

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


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """What stdout's encoding has not, as the escapes of JSON: readable for people, and valid where JSON is printed."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{high:02x}{low:02x}" for high, low in zip(units[::2], units[1::2], strict=True)), error.end


codecs.register_error("el4ner.escaped", _escaped)


def escape_what_stdout_lacks() -> None:
    """From now on what stdout's encoding has not is written as escapes; it would end a command with an error."""
    if isinstance(sys.stdout, TextIOWrapper):  # not where it is closed, or replaced
        sys.stdout.reconfigure(errors="el4ner.escaped")
