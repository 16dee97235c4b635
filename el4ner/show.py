"""Predictions and scores as a person reads them: on a terminal with colours, elsewhere as plain text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from el4ner.lines import LineError, text_of, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from el4ner.metrics import Evaluation, Score

_STYLES = ("cyan", "magenta", "green", "yellow", "blue", "red")
"""Colours of labels, given in the order in which labels appear; the basic ones, which every terminal theme sets."""


class _Mark(NamedTuple):
    start: int
    end: int
    label: str
    score: float | None


class _Piece(NamedTuple):
    """A stretch of output: text of the document, or what was added to show an entity; `depth` 0 is outside."""

    text: str
    label: str
    is_added: bool


def plain_record(record: Mapping[str, Any]) -> str:
    """A record with its entities as `[surface](label score)`, nested ones inside each other.

    The text is `text` or else `tokens`, as in inputs and pools. Entities that cross one shown in the text, or lie
    outside it, follow on a line of their own. Control characters are shown as escapes.
    """
    pieces, rest = _pieces(record)
    lines = ["".join(piece.text for piece in pieces)]
    lines += ["  also " + "".join(piece.text for piece in extra) for extra in rest]
    return "\n".join([_heading(record) + lines[0], *lines[1:]])


def terminal_record(record: Mapping[str, Any], styles: dict[str, str]) -> Text:
    """The same with colours: one a label, remembered in `styles` from record to record."""
    from rich.text import Text

    pieces, rest = _pieces(record)
    output = Text()
    output.append(_heading(record), style="dim" if _status(record) == "ok" else "bold red")
    for line, group in enumerate([pieces, *rest]):
        if line:
            output.append("\n  also ", style="dim")
        for piece in group:
            output.append(piece.text, style=_style(piece, styles))
    return output


def show_records(records: Iterable[Mapping[str, Any]], console: Console) -> None:
    """Prints one record after the other, as they come; coloured if the console is a terminal."""
    styles: dict[str, str] = {}
    for record in records:
        if console.is_terminal:
            console.print(terminal_record(record, styles), soft_wrap=True)
        else:
            console.print(plain_record(record), markup=False, highlight=False, emoji=False, soft_wrap=True)


def _style(piece: _Piece, styles: dict[str, str]) -> str:
    if not piece.label:
        return "default"
    colour = styles.setdefault(piece.label, _STYLES[len(styles) % len(_STYLES)])
    return f"{colour} dim" if piece.is_added else f"bold {colour}"


def _status(record: Mapping[str, Any]) -> str:
    return str(record.get("status", "ok"))


def _heading(record: Mapping[str, Any]) -> str:
    status = _status(record)
    heading = f"{visible(str(record.get('id', '')))}  "
    if status == "ok":
        return heading
    return f"{heading}{visible(status)}: {visible(str(record.get('error')))}\n  "


def _marks(record: Mapping[str, Any]) -> list[_Mark]:
    """Entities by start, longer first, so that what lies inside another follows it."""
    marks = [
        _Mark(entity["start"], entity["end"], str(entity["label"]), entity.get("score"))
        for entity in record.get("entities", ())
    ]
    return sorted(marks, key=lambda mark: (mark.start, -mark.end, mark.label))


def _pieces(record: Mapping[str, Any]) -> tuple[list[_Piece], list[list[_Piece]]]:
    """The text cut at entity borders with brackets added, and the entities that do not fit into the brackets."""
    pieces: list[_Piece] = []
    try:
        text = text_of(record)
    except LineError:
        text = ""
        pieces.append(_Piece("(no text)", "", True))
    crossing: list[list[_Piece]] = []
    open_marks: list[_Mark] = []
    position = 0

    def advance(to: int) -> None:
        nonlocal position
        label = open_marks[-1].label if open_marks else ""
        if to > position:
            pieces.append(_Piece(visible(text[position:to]), label, False))
        position = max(position, to)

    def close_until(to: int) -> None:
        while open_marks and open_marks[-1].end <= to:
            advance(open_marks[-1].end)
            pieces.append(_closing(open_marks.pop()))

    for mark in _marks(record):
        close_until(mark.start)
        in_text = 0 <= mark.start < mark.end <= len(text)
        if not in_text or (open_marks and mark.end > open_marks[-1].end):
            shown = text[mark.start : mark.end] if in_text else f"not in the text: {mark.start}:{mark.end}"
            surface = _Piece(visible(shown), mark.label, False)
            crossing.append([_Piece("[", mark.label, True), surface, _closing(mark)])
            continue
        advance(mark.start)
        pieces.append(_Piece("[", mark.label, True))
        open_marks.append(mark)
    close_until(len(text))
    advance(len(text))
    return pieces, crossing


def _closing(mark: _Mark) -> _Piece:
    score = "" if mark.score is None else f" {mark.score:.2f}"
    return _Piece(f"]({visible(mark.label)}{score})", mark.label, True)


# Scores


def _row(name: str, score: Score) -> Sequence[str]:
    return (
        name,
        f"{score.precision:.4f}",
        f"{score.recall:.4f}",
        f"{score.f1:.4f}",
        str(score.support),
        str(score.predicted),
        str(score.correct),
    )


def problem_lines(evaluation: Evaluation) -> list[str]:
    """What counted as an error besides wrong spans and labels, a line each; empty if there was nothing."""
    problems = evaluation.problems
    named = [
        (problems.lost_records, "gold record without prediction (its entities count as missed)",
         "gold records without prediction (their entities count as missed)"),
        (problems.extra_records, "predicted record without gold (its entities count as wrong)",
         "predicted records without gold (their entities count as wrong)"),
        (problems.different_texts, "record whose text differs from gold", "records whose texts differ from gold"),
        (problems.not_in_text, "entity that is not in the text (counts as wrong)",
         "entities that are not in the text (count as wrong)"),
        (problems.duplicates, "entity given twice (the second counts as wrong)",
         "entities given twice (the second counts as wrong)"),
    ]  # fmt: skip
    lines = [f"{count} {one if count == 1 else several}" for count, one, several in named if count]
    lines += [
        f"{count} record{'s'[: count != 1]} with status {visible(status)}" for status, count in problems.not_ok.items()
    ]
    return lines + [line for line in [nothing_in_common(evaluation)] if line is not None]


def nothing_in_common(evaluation: Evaluation) -> str | None:
    """What to say where no record was predicted: everything is missed, which says little about the predictions."""
    if evaluation.problems.lost_records < evaluation.sentences:
        return None
    return (
        "no id of the predictions occurs in gold: were the two files made from the same input? give their records the "
        "same ids"
    )


def show_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Prints micro scores with intervals, macro and span scores, the label table, and problems if there are any."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("label", overflow="fold")
    for column in ("precision", "recall", "F1", "gold", "predicted", "correct"):
        table.add_column(column, justify="right", no_wrap=True)
    for label, score in evaluation.labels.items():
        table.add_row(*_row(escape(visible(label)), score))
    table.add_section()
    table.add_row(*_row("micro (strict)", evaluation.micro))
    if evaluation.intervals is not None:
        intervals = [evaluation.intervals[name] for name in ("precision", "recall", "f1")]
        table.add_row("  95% from", *(f"{interval.low:.4f}" for interval in intervals))
        table.add_row("  95% to", *(f"{interval.high:.4f}" for interval in intervals))
    macro = evaluation.macro
    table.add_row("macro", *(f"{value:.4f}" for value in (macro.precision, macro.recall, macro.f1)))
    table.add_row(*_row("spans, any label", evaluation.spans))
    console.print(table)
    bootstrap = f", intervals from {evaluation.n_bootstrap} bootstrap samples" if evaluation.intervals else ""
    n = evaluation.sentences
    console.print(f"\n{n} sentence{'s'[: n != 1]}{bootstrap}", highlight=False)
    for line in problem_lines(evaluation):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
