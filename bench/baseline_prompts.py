"""What the prompting baselines ask and how their replies are read. Pure: no model.

A text stands on one line, its line breaks escaped, as in el4ner's own prompts; replies are one line too. Malformed
pieces of a reply are left out: what cannot be read is no entity.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

from el4ner.alignment import Aligner
from el4ner.bench.system import Found
from el4ner.engines.base import Prompt
from el4ner.escaping import escape_line, split_unescaped, unescape_line
from el4ner.parsing import loose
from el4ner.prompts import EMPTY, instruction, mentions, ordered, quoted, verbalise
from el4ner.records import Demonstration, Label, Sentence, Span
from el4ner.text import words

Wording = Literal["pairs", "arrows", "types"]
"""How entities and their types are written on one line.
pairs: Ada Lovelace (person); London (place). arrows: Ada Lovelace -> person; London -> place.
types: person: Ada Lovelace; Bob | place: London."""

_FORMS: dict[Wording, str] = {
    "pairs": "Write each entity as it stands in the text, its type in brackets, with ; between them",
    "arrows": "Write each entity as it stands in the text, an arrow -> and its type, with ; between them",
    "types": "Write each type, a colon and its entities as they stand in the text, ; between them and | after a type",
}

# One prompt -----------------------------------------------------------------------------------------------------------


def one_prompt(text: str, demonstrations: Sequence[Demonstration], labels: Sequence[Label], wording: Wording) -> Prompt:
    """Asks for all entities with their types in one reply. Demonstrations come most similar first, are shown last."""
    head = instruction(labels).rstrip("\n") + f"\n{_FORMS[wording]}, or {EMPTY}.\n\n"
    blocks = "".join(
        f"Text: {escape_line(d.text)}\nEntities: {write_entities(mentions(d), wording)}\n\n"
        for d in ordered(demonstrations, "last")
    )
    return head, blocks, f"Text: {escape_line(text)}\nEntities:"


def write_entities(pairs: Sequence[tuple[str, str]], wording: Wording) -> str:
    """(surface, label) pairs on one line."""
    if not pairs:
        return EMPTY
    if wording == "pairs":
        return "; ".join(f"{escape_line(surface, also=';(')} ({verbalise(label)})" for surface, label in pairs)
    if wording == "arrows":
        return "; ".join(f"{escape_line(surface, also=';>')} -> {verbalise(label)}" for surface, label in pairs)
    by_label: dict[str, list[str]] = {}
    for surface, label in pairs:
        by_label.setdefault(label, []).append(escape_line(surface, also=";|:"))
    return " | ".join(f"{verbalise(label)}: {'; '.join(surfaces)}" for label, surfaces in by_label.items())


def read_entities(reply: str, labels: Sequence[Label], wording: Wording, *, truncated: bool) -> list[tuple[str, str]]:
    """(surface, label) pairs of a reply; a cut reply loses its last piece, unknown labels and broken pieces are left
    out."""
    line = reply.strip().split("\n", 1)[0].strip()
    if line.casefold().rstrip(".") == EMPTY:
        return []
    known = {loose(form): label.name for label in reversed(labels) for form in (label.name, verbalise(label.name))}
    pieces = _typed_pieces(line) if wording == "types" else _pieces(line, "(" if wording == "pairs" else "->")
    if truncated:
        pieces = pieces[:-1]
    pairs = [(unescape_line(surface).strip(), known.get(loose(label), "")) for surface, label in pieces]
    return [(surface, label) for surface, label in pairs if surface and label]


def _pieces(line: str, mark: str) -> list[tuple[str, str]]:
    found = []
    for item in split_unescaped(line, ";"):
        surface, there, label = item.rpartition(mark)
        if there:
            found.append((surface.strip(), label.rstrip().rstrip(")")))
        elif item.strip():
            found.append(("", ""))
    return found


def _typed_pieces(line: str) -> list[tuple[str, str]]:
    found = []
    for group in split_unescaped(line, "|"):
        label, *rest = split_unescaped(group, ":")
        found += [(surface.strip(), label) for part in rest[:1] for surface in split_unescaped(part, ";")]
    return found


def align_pairs(sentence: Sentence, pairs: Sequence[tuple[str, str]]) -> list[Found]:
    """Every occurrence of every surface; a surface gets the first label that the reply gives it."""
    first: dict[str, str] = {}
    for surface, label in pairs:
        first.setdefault(surface, label)
    aligner = Aligner(sentence.text)
    return [Found(span, label) for surface, label in first.items() for span in aligner.align(surface).spans]


# One label at a time (GPT-NER) ----------------------------------------------------------------------------------------

OPEN, CLOSE = "@@", "##"
_MARKED = re.compile(re.escape(OPEN) + "(.*?)" + re.escape(CLOSE))


def marking_prompt(text: str, demonstrations: Sequence[Demonstration], label: Label) -> Prompt:
    """Asks for the sentence again with the entities of one label between @@ and ##."""
    name = verbalise(label.name)
    meaning = f" ({escape_line(label.definition)})" if label.definition else ""
    head = (
        f"You are an excellent linguist. The task is to label {name} entities{meaning} in the given sentence: write it "
        f"again with {OPEN} before and {CLOSE} after each of them. Here are some examples.\n\n"
    )
    blocks = "".join(
        f"Input: {escape_line(d.text)}\nOutput: {mark(d, label.name)}\n\n" for d in ordered(demonstrations, "last")
    )
    return head, blocks, f"Input: {escape_line(text)}\nOutput:"


def mark(demonstration: Demonstration, label: str) -> str:
    """A sentence with the entities of a label marked; of entities inside one another the outermost."""
    text, out, at = demonstration.text, "", 0
    for entity in sorted(demonstration.entities, key=lambda e: (e.start, -e.end)):
        if entity.label == label and entity.start >= at:
            out += escape_line(text[at : entity.start]) + OPEN + escape_line(text[entity.start : entity.end]) + CLOSE
            at = entity.end
    return out + escape_line(text[at:])


def read_marks(sentence: Sentence, reply: str) -> list[Span]:
    """The marked spans: where the reply repeats the sentence that very place, else every occurrence."""
    line = reply.strip().split("\n", 1)[0].strip()
    aligner = Aligner(sentence.text)
    spans: list[Span] = []
    for match in _MARKED.finditer(line):
        surface = unescape_line(match[1]).strip()
        before = unescape_line(line[: match.start()].replace(OPEN, "").replace(CLOSE, ""))
        places = aligner.align(surface).spans if surface else ()
        here = [span for span in places if sentence.text[: span.start].rstrip() == before.rstrip()]
        spans += here or places
    return list(dict.fromkeys(spans))


def judging_prompt(text: str, span: Span, label: Label, shown: Sequence[tuple[Demonstration, Span, bool]]) -> Prompt:
    """Asks whether a span is an entity of a label, after judged examples; the answers are el4ner's VERDICT_CHOICES."""
    name = verbalise(label.name)
    meaning = f" ({escape_line(label.definition)})" if label.definition else ""
    head = (
        f"The task is to verify whether the word is a {name} entity{meaning} extracted from the given sentence. Answer "
        "yes or no.\n\n"
    )

    def question(of: str, where: Span) -> str:
        surface = quoted(of[where.start : where.end])
        return f"Sentence: {escape_line(of)}\nIs the word {surface} in the sentence a {name} entity?\nAnswer:"

    blocks = "".join(f"{question(d.text, own)} {'yes' if right else 'no'}\n\n" for d, own, right in shown)
    return head, blocks, question(text, span)


Build = Callable[[Sequence[Demonstration]], Prompt]


def word_spans(text: str) -> list[Span]:
    """The words of a text that hold a letter or digit."""
    return [unit for unit in words(text) if any(c.isalnum() for c in text[unit.start : unit.end])]
