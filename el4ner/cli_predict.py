"""`el4ner predict`, and the options it shares with `el4ner pool build`."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

import click

from el4ner.cli_messages import Messages, need_stdout, warnings_as_messages
from el4ner.errors import ConfigError, El4nerError, ModelNotFoundError
from el4ner.jsonl import count_inputs, json_text, make_sentence, read_inputs, write_predictions
from el4ner.lines import STDIN, display_name, excerpt, visible
from el4ner.output import OutputFile
from el4ner.records import Prediction, Sentence

if TYPE_CHECKING:
    from el4ner.config import Config
    from el4ner.pipeline import El4ner

INCOMPLETE = 3

_Command = TypeVar("_Command", bound=Callable[..., Any])


# Options


_MODEL_OPTIONS = (
    click.option(
        "--examples",
        metavar="POOL",
        help="Labelled sentences (JSONL, .conll); default: builtin, but none beside --labels.",
    ),
    click.option("--labels", metavar="FILE", help="Label definitions (YAML or JSON); default: those of the pool."),
    click.option("--preset", type=click.Choice(["default", "paper"]), help="Settings to start from."),
    click.option("--config", metavar="FILE", help="Settings file (YAML or JSON); options given here win over it."),
    click.option(
        "--members", multiple=True, metavar="NAME=SOURCE[+ADAPTER]", help="A model to ask; repeat for several."
    ),
    click.option("--base-url", metavar="URL", help="Server of members openai:MODEL; default: OPENAI_BASE_URL."),
    click.option("--api-key", metavar="KEY", help="Its key; OPENAI_API_KEY is safer: other users see arguments."),
    click.option(
        "--voters",
        metavar="auto|all|NAMES",
        help="Who votes: auto (whoever helps on the pool), all, or names with commas.",
    ),
    click.option("--device", metavar="auto|cpu|mps|cuda[:N]", help="Where models run."),
    click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), help="Precision of models."),
    click.option(
        "--memory-limit-mib", type=click.IntRange(min=1), metavar="MIB", help="Most memory for models, by prediction."
    ),
    click.option("--seed", type=click.IntRange(min=0), help="Seed of everything that is sampled."),
)


overlap_option = click.option("--overlap", type=click.Choice(["flat", "nested"]), help="Whether entities may overlap.")


batch_size_option = click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Texts taken in at a time; default 128, 1 for a live pipe.",
)


def model_options(command: _Command) -> _Command:
    """Adds the options that say which models read which pool."""
    for option in reversed(_MODEL_OPTIONS):
        command = option(command)
    return command


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were on the command line, as settings."""
    found = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in options.items()
        if value is not None and value != ()
    }
    server = {name: found.pop(name) for name in ("base_url", "api_key") if name in found}
    return found | ({"server": server} if server else {})


def check_device(device: str) -> None:
    """Raises click.UsageError for a GPU that is not there, before anything is read or loaded."""
    if device in ("auto", "cpu"):
        return
    import torch

    if device == "mps":
        if not torch.backends.mps.is_available():
            raise click.UsageError("device mps: not available here; choose auto or cpu")
        return
    count = torch.cuda.device_count()
    if int(device.partition(":")[2] or 0) >= count:
        remedy = f"choose {f'one below {count}, ' if count else ''}auto or cpu; `el4ner doctor` says what is here"
        raise click.UsageError(f"device {device}: {count} CUDA devices found; {remedy}")


def check_models(settings: Config) -> None:
    """Raises UsageError or ModelNotFoundError where a server, an adapter or the encoder is not there, or is none.

    What is wrong with them would show late, the encoder only after minutes of reading.
    """
    from el4ner.models import SERVER_PREFIX, adapter_folder, server_url, writes

    for member in settings.members:
        if not writes(member.source):
            raise ConfigError(f"member {member.name!r}: {member.source} is an encoder, which answers no questions; "
                              "name a language model, such as embedded:smollm2")  # fmt: skip
        if member.source.startswith(SERVER_PREFIX):
            server_url(member.source, settings.server.base_url)
        elif member.adapter is not None:
            adapter_folder(member.adapter)
    if "encoder" in settings.model_fields_set:  # the default may be missing where nobody needs it
        _check_encoder(settings.encoder)


def _check_encoder(source: str) -> None:
    from el4ner.models import known_names, resolve

    reason = "is no model folder and no known name"
    try:
        kind = resolve(source).kind
        if kind in ("folder", "hub"):
            return
        reason = f"a {kind} cannot serve as encoder"
    except ModelNotFoundError:
        if source in known_names():  # not installed; the message says how to
            raise
    raise ConfigError(
        f"encoder={excerpt(source)}: {reason}; name embedded:minilm, a model folder or a Hugging Face id (owner/name)"
    )


# The command


def _typed_sentences(texts: Iterable[str]) -> Iterator[Sentence]:
    for number, text in enumerate(texts, start=1):
        yield make_sentence(text, f"--text {number}", str(number))


def _is_same_file(one: str, other: str) -> bool:
    """Whether two paths lead to one regular file, by whatever links; also where none of them exists yet."""
    try:
        return Path(one).samefile(other) and Path(one).is_file()
    except OSError:  # one of them is not there
        pass
    except ValueError:  # one of them cannot be a path
        return False
    try:
        return os.path.realpath(one) == os.path.realpath(other)
    except OSError:  # the current folder is gone
        return one == other


def _files_read(inputs: Sequence[str], config_path: str | None, settings: Config) -> list[tuple[str, str]]:
    """(what it is, path) of every file a run reads."""
    from el4ner.pool import BUILTIN

    read = [("an input", path) for path in inputs if path != STDIN]
    # the built-in pool has a name but no path here; a file of that name is ./builtin
    examples = None if settings.examples == BUILTIN else settings.examples
    named = {"the pool (--examples)": examples, "the labels file (--labels)": settings.labels}
    read += [(what, path) for what, path in named.items() if path is not None]
    read += [("the settings file (--config)", config_path)] if config_path is not None else []
    return read + [(f"the model of member {member.name}", member.source) for member in settings.members]


def check_stdin(inputs: Sequence[str], config_path: str | None, settings: Config | Mapping[str, Any]) -> None:
    """Raises click.UsageError where standard input is named for more than one thing: it can be read only once.

    settings: as a whole, or the options alone, before a settings file is read.
    """
    values = settings if isinstance(settings, Mapping) else vars(settings)
    named = {
        "INPUT": STDIN in inputs, "--examples": values["examples"] == STDIN, "--labels": values["labels"] == STDIN,
        "--config": config_path == STDIN,
    }  # fmt: skip
    readers = [what for what, reads in named.items() if reads]
    if len(readers) > 1:
        raise click.UsageError(f"- (stdin) is named for {' and '.join(readers)}; it can be read only once, name files")


def _outputs(
    output: str | None, report: str | None, read: Sequence[tuple[str, str]]
) -> tuple[OutputFile | None, OutputFile | None]:
    """Where records and report go, checked; None for stdout, and for no report.

    Raises click.UsageError if one of them would replace a file that is read, or the other one.
    """
    if report == STDIN:
        raise click.UsageError("--report -: stdout belongs to the records; name a file")
    output = None if output == STDIN else output
    for option, path in (("--output", output), ("--report", report)):
        for what, name in read if path is not None else ():
            if _is_same_file(path or "", name):
                raise click.UsageError(f"{option} {visible(path or '')} is also {what}; choose another name")
    if output is not None and report is not None and _is_same_file(output, report):
        raise click.UsageError(f"--report {visible(report)} is also --output; choose another name")
    return None if output is None else OutputFile(output), None if report is None else OutputFile(report)


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
    return nullcontext(cast(BinaryIO, sys.stdout.buffer))


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
    total, n_bad = statuses.total(), sum(bad.values())
    verb, owner = ("is", "its") if n_bad == 1 else ("are", "their")
    return f"{n_bad} of {total} record{'s'[: total != 1]} {verb} not ok ({counts}); {owner} `error` says why"


def _not_fitted(report: Mapping[str, Any]) -> str:
    size, fitted = report["pool"]["sentences"], report["fitted"]
    named = fitted["named, but not asked"]
    silent = f"; not asked without a fit: {', '.join(named)}" if named else ""
    return (
        f"nothing was fitted on the pool ({size} sentence{'s'[: size != 1]}{fitted['why nothing was fitted']}): voters "
        f"count alike, scores are no probabilities{silent}"
    )


def _promise(point: Mapping[str, Any]) -> str:
    recall = point["expected on texts like the pool"]["recall"]
    return (
        f"kept from a score of {point['threshold']:g}, for a precision of {point['target precision']:g}; "
        f"on texts like the pool expect a recall of {recall:.2f}"
    )


@click.command()
@click.argument("inputs", nargs=-1, metavar="INPUT...", type=click.Path(allow_dash=True))
@click.option("--text", "texts", multiple=True, metavar="TEXT", help="A text to read instead of files; repeatable.")
@click.option("-o", "--output", metavar="OUT", help="Where records go; default: stdout. Zipped if it ends in .gz.")
@model_options
@batch_size_option
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Read only the first N records.")
@click.option(
    "--min-score",
    type=float,
    metavar="X",
    help="Leave out entities below this score, 0 to 1; default: the best on the pool.",
)
@click.option(
    "--target-precision", type=float, metavar="P", help="Leave out entities so that a share of P of the rest is right."
)
@overlap_option
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
    if output is None or output == STDIN:
        need_stdout("open it, or name a file with -o")
    from el4ner.config import load_config

    check_stdin(inputs, config, options)
    settings = load_config(config, overrides=given(options))
    check_stdin(inputs, config, settings)
    check_device(settings.device)
    check_models(settings)
    messages = Messages(quiet, results_on_stdout=output is None or output == STDIN)
    target, report_file = _outputs(output, report_path, _files_read(inputs, config, settings))
    sentences = read_inputs(inputs, limit, messages.warn) if inputs else _typed_sentences(texts[:limit])
    total = None
    if messages.counts:
        total = count_inputs(inputs, limit) if inputs else len(texts[:limit])

    from el4ner.pipeline import El4ner

    with warnings_as_messages(messages.warn):
        model = El4ner.from_config(settings)
        model.progress = messages.note
        statuses = _run(model, sentences, target, messages, total)
        fitted = model.report()["fitted"]
        if fitted.get("calibrated") is False and settings.preset == "default":
            messages.warn(_not_fitted(model.report()))
        promised = fitted.get("operating point")  # without a text to read nothing was fitted
        if promised is not None and not quiet:
            click.echo(f"el4ner: {_promise(promised)}", err=True)
        if report_file is not None:
            with report_file as stream:
                stream.write(json_text(model.report() | {"memory, MiB": model.memory()}).encode() + b"\n")
    if set(statuses) - {"ok"}:
        click.echo(f"el4ner: {_summary(statuses)}", err=True)
        click.get_current_context().exit(INCOMPLETE)
