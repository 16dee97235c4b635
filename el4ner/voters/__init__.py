"""Voters: spans in, label distributions out.

Whoever votes on a span returns a distribution over the labels and "none of these" (the last column). A voter that can
also find spans proposes them. Everything is batched over sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from el4ner.engines.base import FloatArray
from el4ner.records import Sentence, Span


class Voter(Protocol):
    """Gives every span of every sentence a label distribution.

    `vote` takes N sentences and their spans and returns N arrays (n_spans, L + 1) f32 whose rows sum to one, in the
    order of `labels`, "none" last.
    """

    name: str
    labels: tuple[str, ...]

    def vote(self, sentences: Sequence[Sentence], spans: Sequence[Sequence[Span]]) -> list[FloatArray]:
        """One array (n_spans, L + 1) f32 per sentence."""
        ...
