"""Labelled spans to IOB2 tags, the way back from what `el4ner.corpora` reads, for tests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from el4ner.records import LabelledSpan, Span


def locate_tokens(text: str, tokens: Sequence[str]) -> list[Span]:
    """Where each token stands in the text: the first place after the token before it."""
    spans, at = [], 0
    for token in tokens:
        at = text.index(token, at)
        spans.append(Span(at, at + len(token)))
        at += len(token)
    return spans


def spans_to_tags(offsets: Sequence[Span], entities: Iterable[LabelledSpan]) -> list[str]:
    """IOB2 tags of tokens that stand at `offsets`; every entity begins and ends with a token, and none overlap."""
    tags = ["O"] * len(offsets)
    for entity in entities:
        first = next(i for i, span in enumerate(offsets) if span.start == entity.start)
        stop = next(i for i, span in enumerate(offsets) if span.end == entity.end) + 1
        assert tags[first:stop] == ["O"] * (stop - first)
        tags[first:stop] = [f"B-{entity.label}"] + [f"I-{entity.label}"] * (stop - first - 1)
    return tags
