"""The `el4ner` command: translates options into settings and calls; results on stdout, everything else on stderr.

Exit codes: 0 complete, 1 failure, 2 usage or unusable input, 3 finished but some record is not ok, 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from typing import TYPE_CHECKING, Any, NoReturn

import click

from el4ner.cli_messages import escape_what_stdout_lacks, need_stdout, say_warning, unexpected, warnings_as_messages
from el4ner.cli_plan import plan
from el4ner.cli_pool import pool
from el4ner.cli_predict import predict
from el4ner.errors import El4nerError, debugging
from el4ner.interrupts import INTERRUPTED
from el4ner.jsonl import json_text
from el4ner.lines import STDIN, visible

if TYPE_CHECKING:
    from rich.console import Console

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What the system says when it takes no more output."""


def _say(message: str) -> None:
    if debugging():
        click.echo(traceback.format_exc(), err=True, nl=False)
    click.echo(f"el4ner: {visible(message)}", err=True)  # it may quote a text, which must not move the cursor


def _discard_stdout() -> None:
    """Stdout takes no more; what Python still holds for it must not raise when the interpreter ends."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (AttributeError, OSError, ValueError):  # stdout is closed, or no file, as in tests: nothing is held
        return


def _console() -> Console:
    """For results: so wide that no column of a table is left out or cut, whatever COLUMNS says; terminals wrap."""
    from rich.console import Console

    return Console(width=max(Console().width, 120))


class _Commands(click.Group):
    """A group that ends with one line on stderr and the right exit code whatever happens inside."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        try:
            return super().make_context(info_name, args, parent, **extra)
        except KeyboardInterrupt:  # click would say "Aborted!" and end with 1
            _say("interrupted")
            raise click.exceptions.Exit(INTERRUPTED) from None
        except OSError as error:  # of --help and --version, whose output nobody takes
            if not isinstance(error, BrokenPipeError):
                _say(f"error: output cannot be written ({error.strerror}); make room, or write somewhere else")
            _discard_stdout()
            raise click.exceptions.Exit(1) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings_as_messages(say_warning):
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except El4nerError as error:
            _say(f"error: {error}")
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            _say("interrupted")
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:
            _discard_stdout()
            ctx.exit(1)
        except OSError as error:
            if error.errno not in _FULL:
                self._unexpected(ctx, error)
            _say(f"error: output cannot be written ({error.strerror}); make room, or write somewhere else")
            _discard_stdout()
            ctx.exit(1)
        except Exception as error:  # noqa: BLE001 - the last resort: a message instead of a traceback, exit code 1
            self._unexpected(ctx, error)

    @staticmethod
    def _unexpected(ctx: click.Context, error: Exception) -> NoReturn:
        _say(f"error: {unexpected(error)}")
        ctx.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="el4ner", prog_name="el4ner", message="%(prog)s %(version)s")
def main() -> None:
    """Find entities in text with an ensemble of small language models, without training.

    Exit codes: 0 complete, 1 failure, 2 usage or unusable input, 3 finished but some record is not ok, 130 interrupted.
    """
    escape_what_stdout_lacks()


main.add_command(predict)
main.add_command(pool)
main.add_command(plan)


@main.command()
@click.argument("gold", type=click.Path(allow_dash=True))
@click.argument("pred", type=click.Path(allow_dash=True))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option(
    "--bootstrap",
    "n_bootstrap",
    type=click.IntRange(min=0),
    default=1000,
    show_default=True,
    metavar="N",
    help="Resamplings for the 95% intervals; 0: no intervals.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the resampling.")
def evaluate(gold: str, pred: str, as_json: bool, n_bootstrap: int, seed: int) -> None:
    """Strict precision, recall and F1 of PRED (from `el4ner predict`) against GOLD (JSONL with `entities`).

    Records are matched by id. Entities that are not in the text, second copies, and the entities of lost or extra
    records count as errors and are reported.
    """
    need_stdout()
    if gold == pred == STDIN:
        raise click.UsageError("GOLD and PRED are both stdin (-), which can be read only once; name a file for one")
    from el4ner import metrics

    if n_bootstrap > metrics.MAX_BOOTSTRAP:
        raise click.UsageError(f"--bootstrap {n_bootstrap}: use at most {metrics.MAX_BOOTSTRAP}, or 0 for no intervals")
    result = metrics.evaluate(metrics.read_gold(gold), metrics.read_predicted(pred), n_bootstrap, seed)
    from el4ner.show import nothing_in_common, show_evaluation

    if as_json:
        click.echo(json_text(result.to_dict()))
        if warning := nothing_in_common(result):  # in words too, which the tables have
            say_warning(warning)
        return
    show_evaluation(result, _console())


@main.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(allow_dash=True))
def show(files: tuple[str, ...]) -> None:
    """Print predictions (or labelled sentences) readably, entities in brackets with label and score; - is stdin."""
    need_stdout()
    from el4ner.metrics import iterate_predicted
    from el4ner.show import show_records

    console = _console()
    for path in files:
        show_records(iterate_predicted(path), console)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def doctor(as_json: bool) -> None:
    """Say what is installed, what works, and why the rest does not."""
    need_stdout()
    from el4ner.doctor import diagnose, render
    from el4ner.errors import KernelError
    from el4ner.kernels._dispatch import check_environment

    try:
        check_environment()
    except KernelError as error:
        click.echo(f"el4ner: {error}; runs refuse it", err=True)
    diagnosis = diagnose()
    click.echo(json_text(diagnosis.to_dict()) if as_json else render(diagnosis))


@main.command()
@click.argument("what", metavar="embedded")
@click.option("--from-hub", is_flag=True, help="Fetch the originals from the Hugging Face hub, and use them.")
def download(what: str, from_hub: bool) -> None:
    """Install the embedded models."""
    from el4ner import models

    models.download(what, from_hub=from_hub, report=lambda message: click.echo(message, err=True))
