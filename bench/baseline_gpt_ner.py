"""GPT-NER: one label at a time, the sentence written again with @@ and ## around entities, then every claim verified.

Wang et al. 2023, "GPT-NER: Named Entity Recognition via Large Language Models" (arXiv:2304.10428): marked output,
demonstrations by entity-level nearest neighbours, self-verification by yes or no with demonstrations of its own.
What differs: span vectors come from the frozen sentence encoder, in context, where the paper takes those of a
fine-tuned tagger; yes and no are scored instead of written; the model is whatever the run's members are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import Field

from el4ner.bench.baseline_one_prompt import Asking
from el4ner.bench.baseline_prompts import judging_prompt, marking_prompt, read_marks
from el4ner.bench.mention_index import MentionIndex
from el4ner.bench.system import BaselineSettings, Found, Workbench, prediction_of, with_options
from el4ner.engines.base import Choose, FloatArray, Generate, Prompt
from el4ner.pool import Pool
from el4ner.prompts import VERDICT_CHOICES
from el4ner.records import Demonstration, Label, Prediction, Sentence, Span, Usage


class GptNerSettings(BaselineSettings):
    """k: demonstrations of a prompt, None for the run's budget. positives: share of them that must hold an entity of
    the label asked for, where the pool has enough; the others are the nearest of all. verify: whether claims are
    verified, keep: from which probability of yes on they stay."""

    k: int | None = Field(default=None, ge=0)
    positives: float = Field(default=0.5, ge=0, le=1)
    verify: bool = True
    keep: float = Field(default=0.5, ge=0, le=1)


@dataclass
class _Case:
    """One sentence on its way."""

    sentence: Sentence
    cosines: FloatArray
    claims: list[tuple[Span, Label]]
    usage: Usage = field(default_factory=Usage)
    unread: int = 0


class GptNer(Asking):
    """One generation a label and sentence, one choice a claim (implements `System`)."""

    def __init__(self, bench: Workbench, options: Mapping[str, Any]) -> None:
        super().__init__("gpt-ner", bench)
        self._own = with_options(GptNerSettings, options, self.name)
        self._k = bench.demonstrations(self._own.k, self.name)
        self._index: MentionIndex | None = None

    @property
    def settings(self) -> Mapping[str, Any]:
        """Options, model and budget."""
        return {**self.shared_settings, **self._own.model_dump(), "k": self._k}

    def prepare(self, pool: Pool, progress: Callable[[str], None]) -> None:
        """Reads the pool's entities in context, or takes their vectors from the cache."""
        progress("reading the pool's entities")
        self.labels = pool.labels
        self._index = MentionIndex(pool, self.bench.encoder)

    def predict(self, sentences: Sequence[Sentence]) -> list[Prediction]:
        """One prediction per sentence; a label's question that does not fit the model finds nothing and is counted."""
        index = self.index
        vectors = index.likely(sentences)
        cases = [_Case(s, index.cosines(own), []) for s, own in zip(sentences, vectors, strict=True)]
        self._extract(cases)
        scores = self._verify(cases) if self._own.verify else [[1.0] * len(case.claims) for case in cases]
        predictions = []
        for case, own in zip(cases, scores, strict=True):
            found = [
                Found(span, label.name, p)
                for (span, label), p in zip(case.claims, own, strict=True)
                if p >= (self._own.keep if self._own.verify else 0.0)
            ]
            error = f"{case.unread} of {len(self.labels)} labels do not fit the model" if case.unread else None
            overlap = self.bench.config.overlap
            predictions.append(prediction_of(case.sentence, found, overlap, self.name, case.usage, error))
        return predictions

    @property
    def index(self) -> MentionIndex:
        """The pool's entities."""
        assert self._index is not None, "prepare first"
        return self._index

    def _extract(self, cases: Sequence[_Case]) -> None:
        requests: list[Generate] = []
        asked: list[tuple[_Case, Label]] = []
        lengths = self.engine.count_tokens([(case.sentence.text,) for case in cases])
        for case, length in zip(cases, lengths, strict=True):
            new = length + length // 4 + 24  # the sentence again, and marks of two or three tokens each
            for label in self.labels if case.sentence.text.strip() else ():
                prompt = self._marking(case, label, new)
                if prompt is None:
                    case.unread += 1
                else:
                    requests.append(Generate(prompt, None, new))
                    asked.append((case, label))
        for (case, label), reply in zip(asked, self.engine.generate(requests), strict=True):
            case.claims += [(span, label) for span in read_marks(case.sentence, reply.text)]
            case.usage += Usage(reply.prompt_tokens, reply.generated_tokens)

    def _marking(self, case: _Case, label: Label, new: int) -> Prompt | None:
        def build(shown: Sequence[Demonstration]) -> Prompt:
            return marking_prompt(case.sentence.text, shown, label)

        return self.fitted(build, self._demonstrations(case, label), new)

    def _demonstrations(self, case: _Case, label: Label) -> list[Demonstration]:
        """The nearest sentences, enough of them with the label, most similar first; never more than k."""
        if not self._k:
            return []
        index = self.index
        holding = index.sentences(case.cosines, round(self._own.positives * self._k), label.name)
        others = [i for i in index.sentences(case.cosines, 2 * self._k) if i not in holding]
        chosen = {*holding, *others[: self._k - len(holding)]}
        everything = index.sentences(case.cosines, len(index.pool.sentences))
        return [index.pool.sentences[i] for i in everything if i in chosen]

    def _verify(self, cases: Sequence[_Case]) -> list[list[float]]:
        """The probability of yes of every claim; 1 for a claim whose question does not fit the model."""
        spans = [[span for span, _ in case.claims] for case in cases]
        vectors = self.index.vectors([case.sentence for case in cases], spans)
        requests: list[Choose] = []
        places: list[tuple[int, int]] = []
        scores = [[1.0] * len(case.claims) for case in cases]
        for i, (case, own) in enumerate(zip(cases, vectors, strict=True)):
            for j, (claim, vector) in enumerate(zip(case.claims, own, strict=True)):
                prompt = self._judging(case.sentence, claim, vector)
                if prompt is not None:
                    requests.append(Choose(prompt, VERDICT_CHOICES, "choices"))
                    places.append((i, j))
        counts = self.engine.count_tokens([request.prompt for request in requests])
        for (i, j), found, tokens in zip(places, self.engine.choose(requests), counts, strict=True):
            scores[i][j] = float(np.exp(found[0]))
            cases[i].usage += Usage(prompt_tokens=tokens)
        return scores

    def _judging(self, sentence: Sentence, claim: tuple[Span, Label], vector: FloatArray) -> Prompt | None:
        """The question about a claim: the nearest entities with the label and with other ones, in turns."""
        span, label = claim
        index = self.index
        cosines = index.cosines(vector[None])
        n_right = (self._k + 1) // 2
        right = [(m, True) for m in index.nearest(cosines, n_right, label.name, having=True)]
        wrong = [(m, False) for m in index.nearest(cosines, self._k - n_right, label.name, having=False)]
        turns = [pair for both in zip(right, wrong, strict=False) for pair in both]
        turns += right[len(wrong) :] + wrong[len(right) :]
        examples = [(index.pool.sentences[m.sentence], m.span, yes) for m, yes in turns]

        def build(shown: Sequence[Demonstration]) -> Prompt:
            return judging_prompt(sentence.text, span, label, list(reversed(examples[: len(shown)])))

        return self.fitted(build, [d for d, _, _ in examples], 4)
