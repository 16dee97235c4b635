"""A member that is asked: extracts, classifies and verifies by prompting one engine.

Default style: grounded lists and choice scoring. Paper style: free generation throughout.
Every stage makes one engine call for all sentences of a chunk, and for all members of one engine (`conversations`).
What a reply costs and what was wrong with it comes back beside the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal, get_args

import numpy as np

from el4ner.alignment import Aligner
from el4ner.engines.base import Choose, Completion, Engine, FloatArray, Generate, Prompt, SubstringList
from el4ner.errors import ConfigError
from el4ner.paper_prompts import paper_classification_prompt, paper_extraction_prompt, paper_verification_prompt
from el4ner.parsing import SpanList, parse_labels, parse_paper_list, parse_span_list, parse_verdict
from el4ner.prompts import (
    CONTENT_FREE,
    EMPTY,
    NONE_CHOICE,
    SEPARATOR,
    VARIANTS,
    VERDICT_CHOICES,
    FittedDemonstrations,
    Nearest,
    Variant,
    classification_question,
    extraction_question,
    fit_demonstrations,
    label_choices,
    prefix,
    verification_question,
)
from el4ner.records import Demonstration, Label, Sentence, Span, Usage
from el4ner.voters.conversations import Batch, Conversation, alone

Style = Literal["default", "paper"]
By = Literal["choice", "generation"]
Claim = tuple[Span, str]
Demonstrations = Sequence[Sequence[Demonstration]]

QUESTION_RESERVE = 64
"""Tokens kept free beside a question about the whole sentence, for the wordings of the other stages."""


@dataclass(frozen=True, slots=True)
class MemberSettings:
    """How a member is asked.

    grounded: lists are decoded under a grammar that admits only substrings of the text.
    classify_by, verify_by: score fixed choices, or generate and parse.
    calibrate: subtract what the same prompt says about a content-free span (Zhao et al. 2021); choices only.
    nearest: where the most similar demonstration stands; "first" is the order of the re-implementation.
    list_labels: write the label set out when labels are generated; the re-implementation does not.
    max_prompt_tokens: most tokens of demonstrations and sentence, whatever the instruction takes; the least similar
    demonstrations are dropped to meet it, or what the engine allows. None for what the engine allows.
    """

    grounded: bool = True
    classify_by: By = "choice"
    verify_by: By = "choice"
    calibrate: bool = False
    nearest: Nearest = "last"
    list_labels: bool = True
    none_choice: str = NONE_CHOICE
    max_items: int = 32
    max_new_tokens: int = 96
    max_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_items", "max_new_tokens", "max_prompt_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}; give 1 or more")
        for name, allowed in (("classify_by", By), ("verify_by", By), ("nearest", Nearest)):
            value = getattr(self, name)
            if value not in get_args(allowed):
                raise ConfigError(f"{name}={value!r}; choose {' or '.join(get_args(allowed))}")


PAPER_SETTINGS = MemberSettings(
    grounded=False,
    classify_by="generation",
    verify_by="generation",
    calibrate=False,
    nearest="first",
    list_labels=False,
)
"""The published method as far as it is known; `list_labels` and `nearest` follow the re-implementation."""


@dataclass(frozen=True, slots=True)
class ExtractedSpans:
    """What one member lists for one sentence.

    spans: every occurrence of every listed surface, sorted, once. absent: listed surfaces that are not in the text.
    malformed: the reply broke the form. truncated: the token limit ended it. too_long: the sentence does not fit the
    model even without demonstrations, so it was not asked. dropped_demonstrations: left out to meet the budget.
    """

    spans: tuple[Span, ...]
    malformed: bool = False
    absent: tuple[str, ...] = ()
    prompt_tokens: int = 0
    generated_tokens: int = 0
    truncated: bool = False
    too_long: bool = False
    dropped_demonstrations: int = 0

    @property
    def usage(self) -> Usage:
        """Tokens as a record."""
        return Usage(self.prompt_tokens, self.generated_tokens)


@dataclass(frozen=True, slots=True)
class MemberVotes:
    """A member's votes on one sentence: distributions (n_spans, L + 1) f32, "none" last; a row of NaN abstains.

    too_long: the question about its spans does not fit the model even without demonstrations, so it was not asked.
    """

    votes: FloatArray
    usage: Usage = field(default_factory=Usage)
    malformed: bool = False
    too_long: bool = False


@dataclass(frozen=True, slots=True)
class MemberVerdicts:
    """A member's probability that each claim of one sentence holds; NaN where it gave no usable answer.

    too_long: the question about some claim does not fit the model, so it was not asked.
    """

    probabilities: tuple[float, ...]
    usage: Usage = field(default_factory=Usage)
    malformed: int = 0
    too_long: bool = False


class PromptedMember:
    """A model and a prompt variant. Several members may share one engine.

    labels: names in order, as every voter has them; definitions: the same with their definitions.
    Raises ConfigError on an unknown variant or style, or labels that cannot be told apart as words.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        variant: Variant,
        labels: Sequence[Label],
        style: Style = "default",
        settings: MemberSettings | None = None,
    ) -> None:
        if variant not in VARIANTS:
            raise ConfigError(f"member {name!r}: variant={variant!r}; choose one of {', '.join(VARIANTS)}")
        if style not in ("default", "paper"):
            raise ConfigError(f"member {name!r}: style={style!r}; choose default or paper")
        self.name = name
        self.engine = engine
        self.variant: Variant = variant
        self.definitions = tuple(labels)
        self.labels = tuple(label.name for label in labels)
        self.style: Style = style
        self.settings = settings or (PAPER_SETTINGS if style == "paper" else MemberSettings())
        self._choices = label_choices(self.definitions, self.settings.none_choice)

    # Stage 1 and 2

    def extract(
        self, sentences: Sequence[Sentence], demonstrations: Demonstrations | None = None
    ) -> list[ExtractedSpans]:
        """Lists spans of N sentences, shown N lists of demonstrations (most similar first); zero-shot without."""
        return alone(self.extraction(sentences, demonstrations))

    def extraction(
        self, sentences: Sequence[Sentence], demonstrations: Demonstrations | None = None
    ) -> Conversation[list[ExtractedSpans]]:
        """`extract` as a conversation, to be held beside those of other members."""
        shown = [()] * len(sentences) if demonstrations is None else demonstrations
        fitted = self._fit_paper(sentences, shown) if self.style == "paper" else self._fit(sentences, shown)
        asked = [i for i, sentence in enumerate(sentences) if fitted[i].fits and sentence.text.strip()]
        requests = [self._extraction_request(sentences[i].text, fitted[i].demonstrations) for i in asked]
        results = [ExtractedSpans((), too_long=not fit.fits, dropped_demonstrations=fit.dropped) for fit in fitted]
        completions = yield Batch(self.engine, requests)
        for i, completion in zip(asked, completions, strict=True):
            results[i] = self._extracted(sentences[i].text, completion, fitted[i].dropped)
        return results

    def _extraction_request(self, text: str, demonstrations: Sequence[Demonstration]) -> Generate:
        settings = self.settings
        grammar = SubstringList(text, SEPARATOR, EMPTY, settings.max_items) if settings.grounded else None
        if self.style == "paper":
            prompt = paper_extraction_prompt(text, demonstrations, nearest=settings.nearest)
        else:
            prompt = (*self._prefix(text, demonstrations), extraction_question(self.variant))
        return Generate(prompt, grammar, settings.max_new_tokens)

    def _extracted(self, text: str, completion: Completion, dropped: int) -> ExtractedSpans:
        listed = self._read_list(completion)
        aligner = Aligner(text)
        spans: set[Span] = set()
        absent: list[str] = []
        for surface in dict.fromkeys(listed.surfaces):
            alignment = aligner.align(surface)
            spans.update(alignment.spans)
            if alignment.status == "absent":
                absent.append(surface)
        return ExtractedSpans(
            tuple(sorted(spans)),
            malformed=listed.malformed,
            absent=tuple(absent),
            prompt_tokens=completion.prompt_tokens,
            generated_tokens=completion.generated_tokens,
            truncated=completion.truncated,
            dropped_demonstrations=dropped,
        )

    def _read_list(self, completion: Completion) -> SpanList:
        cut = completion.truncated
        if self.settings.grounded:
            return parse_span_list(completion.text, SEPARATOR, empty=EMPTY, truncated=cut, verbatim=True)
        if self.style == "paper":
            return parse_paper_list(completion.text, truncated=cut)
        return parse_span_list(completion.text, SEPARATOR, empty=EMPTY, truncated=cut)

    # Stage 3

    def classify(
        self, sentences: Sequence[Sentence], demonstrations: Demonstrations, spans: Sequence[Sequence[Span]]
    ) -> list[MemberVotes]:
        """Votes with their cost, by choice scoring or by generation as the settings say."""
        return alone(self.classification(sentences, demonstrations, spans))

    def classification(
        self, sentences: Sequence[Sentence], demonstrations: Demonstrations, spans: Sequence[Sequence[Span]]
    ) -> Conversation[list[MemberVotes]]:
        """`classify` as a conversation, to be held beside those of other members."""
        by = self._by_generation if self.settings.classify_by == "generation" else self._by_choice
        return by(sentences, demonstrations, spans)

    def _by_choice(
        self, sentences: Sequence[Sentence], demonstrations: Demonstrations, spans: Sequence[Sequence[Span]]
    ) -> Conversation[list[MemberVotes]]:
        """Scores all labels and "none" after each distinct surface, and once per sentence after a content-free one."""
        fitted = self._fit(sentences, demonstrations)
        surfaces: list[list[str]] = []
        prompts: list[list[Prompt]] = []
        for sentence, own, fit in zip(sentences, spans, fitted, strict=True):
            distinct = list(dict.fromkeys(sentence.text[span.start : span.end] for span in own)) if fit.fits else []
            asked = [*distinct, CONTENT_FREE] if self.settings.calibrate and distinct else distinct
            shared = self._prefix(sentence.text, fit.demonstrations)
            surfaces.append(distinct)
            prompts.append([(*shared, classification_question(surface, self.variant)) for surface in asked])
        scores, usages = yield from self._score(prompts, self._choices)
        results: list[MemberVotes] = []
        for i, (sentence, own, distinct, rows) in enumerate(zip(sentences, spans, surfaces, scores, strict=True)):
            votes = np.full((len(own), len(self._choices)), np.nan, dtype=np.float32)
            if distinct:
                row_of = dict(zip(distinct, self._distributions(rows, len(distinct)), strict=True))
                for vote, span in zip(votes, own, strict=True):
                    vote[:] = row_of[sentence.text[span.start : span.end]]
            results.append(MemberVotes(votes, usages[i], too_long=bool(own) and not fitted[i].fits))
        return results

    def _distributions(self, rows: FloatArray, n: int) -> FloatArray:
        """Log-probabilities (n or n + 1, L + 1), the content-free row last if calibrating -> (n, L + 1) f32."""
        scores = rows[:n].astype(np.float64)
        if self.settings.calibrate:
            scores = scores - rows[n]
        scores -= scores.max(axis=1, keepdims=True)
        odds = np.exp(scores)
        votes: FloatArray = (odds / odds.sum(axis=1, keepdims=True)).astype(np.float32)
        return votes

    def _by_generation(
        self, sentences: Sequence[Sentence], demonstrations: Demonstrations, spans: Sequence[Sequence[Span]]
    ) -> Conversation[list[MemberVotes]]:
        """One reply labels all spans of a sentence: one-hot rows; a span without a known label abstains (NaN)."""
        fitted = self._fit_paper(sentences, demonstrations, spans)
        asked = [i for i, own in enumerate(spans) if own and fitted[i].fits]
        requests = [
            Generate(
                self._paper_labels(sentences[i].text, fitted[i].demonstrations, spans[i]),
                max_new_tokens=self._reply_limit(len(spans[i])),
            )
            for i in asked
        ]
        silent = [np.full((len(own), len(self.labels) + 1), np.nan, dtype=np.float32) for own in spans]
        results = [MemberVotes(own, too_long=not fit.fits and len(own) > 0)
                   for own, fit in zip(silent, fitted, strict=True)]  # fmt: skip
        completions = yield Batch(self.engine, requests)
        for i, completion in zip(asked, completions, strict=True):
            results[i] = self._one_hot(sentences[i].text, spans[i], completion)
        return results

    def _reply_limit(self, n_spans: int) -> int:
        """Room for one short line per span; 24 tokens cover a name of several words and its label."""
        return max(self.settings.max_new_tokens, 24 * n_spans)

    def _one_hot(self, text: str, spans: Sequence[Span], completion: Completion) -> MemberVotes:
        listed = parse_labels(completion.text, self.labels, truncated=completion.truncated)
        aligner = Aligner(text)
        label_of: dict[Span, str] = {}
        for surface, label in listed.pairs:
            for span in aligner.align(surface).spans:
                label_of.setdefault(span, label)  # the first answer counts where a reply contradicts itself
        votes = np.full((len(spans), len(self.labels) + 1), np.nan, dtype=np.float32)
        for i, span in enumerate(spans):
            if span in label_of:
                votes[i] = 0.0
                votes[i, self.labels.index(label_of[span])] = 1.0
        usage = Usage(completion.prompt_tokens, completion.generated_tokens)
        return MemberVotes(votes, usage, malformed=listed.malformed or bool(listed.unknown))

    # Stage 4

    def judge(
        self, sentences: Sequence[Sentence], demonstrations: Demonstrations, claims: Sequence[Sequence[Claim]]
    ) -> list[MemberVerdicts]:
        """Verdicts with their cost, by choice scoring or by generation as the settings say."""
        return alone(self.verification(sentences, demonstrations, claims))

    def verification(
        self, sentences: Sequence[Sentence], demonstrations: Demonstrations, claims: Sequence[Sequence[Claim]]
    ) -> Conversation[list[MemberVerdicts]]:
        """`judge` as a conversation."""
        if self.settings.verify_by == "generation":
            return self._judge_by_generation(sentences, claims)
        return self._judge_by_choice(sentences, demonstrations, claims)

    def _judge_by_choice(
        self, sentences: Sequence[Sentence], demonstrations: Demonstrations, claims: Sequence[Sequence[Claim]]
    ) -> Conversation[list[MemberVerdicts]]:
        fitted = self._fit(sentences, demonstrations)
        keys: list[list[tuple[str, str]]] = []
        prompts: list[list[Prompt]] = []
        for sentence, own, fit in zip(sentences, claims, fitted, strict=True):
            distinct = list(dict.fromkeys(_claimed(sentence.text, own))) if fit.fits else []
            shared = self._prefix(sentence.text, fit.demonstrations)
            keys.append(distinct)
            prompts.append([(*shared, verification_question(*key, self.variant)) for key in distinct])
        scores, usages = yield from self._score(prompts, VERDICT_CHOICES)
        results: list[MemberVerdicts] = []
        for sentence, own, distinct, rows, usage in zip(sentences, claims, keys, scores, usages, strict=True):
            yes = {key: float(np.exp(row[0] - np.logaddexp(*row))) for key, row in zip(distinct, rows, strict=True)}
            probabilities = tuple(yes.get(key, float("nan")) for key in _claimed(sentence.text, own))
            results.append(MemberVerdicts(probabilities, usage, too_long=bool(own) and not distinct))
        return results

    def _judge_by_generation(
        self, sentences: Sequence[Sentence], claims: Sequence[Sequence[Claim]]
    ) -> Conversation[list[MemberVerdicts]]:
        """One call per distinct claim, without demonstrations: 1.0 for true, 0.0 for false, NaN for neither."""
        asked: list[tuple[int, tuple[str, str], Generate]] = []
        for i, (sentence, own) in enumerate(zip(sentences, claims, strict=True)):
            first = dict(zip(reversed(_claimed(sentence.text, own)), reversed(own), strict=True))
            asked.extend(
                (i, key, Generate(paper_verification_prompt(sentence.text, span, label), max_new_tokens=8))
                for key, (span, label) in first.items()
            )
        asked = self._within_limit(asked)
        verdicts: list[dict[tuple[str, str], bool | None]] = [{} for _ in sentences]
        usages = [Usage()] * len(sentences)
        completions = yield Batch(self.engine, [request for _, _, request in asked])
        for (i, key, _), completion in zip(asked, completions, strict=True):
            verdicts[i][key] = parse_verdict(completion.text)
            usages[i] += Usage(completion.prompt_tokens, completion.generated_tokens)
        results: list[MemberVerdicts] = []
        for i, (sentence, own) in enumerate(zip(sentences, claims, strict=True)):
            found = [verdicts[i].get(key) for key in _claimed(sentence.text, own)]
            probabilities = tuple(float("nan") if verdict is None else float(verdict) for verdict in found)
            malformed = sum(verdict is None for verdict in verdicts[i].values())
            too_long = not verdicts[i].keys() >= {*_claimed(sentence.text, own)}
            results.append(MemberVerdicts(probabilities, usages[i], malformed, too_long))
        return results

    def _within_limit(
        self, asked: list[tuple[int, tuple[str, str], Generate]]
    ) -> list[tuple[int, tuple[str, str], Generate]]:
        """Without the requests that the model cannot read whole."""
        counts = self.engine.count_tokens([request.prompt for _, _, request in asked])
        return [
            item
            for item, count in zip(asked, counts, strict=True)
            if count + item[2].max_new_tokens <= self.engine.max_tokens
        ]

    # Shared

    def _prefix(self, text: str, demonstrations: Sequence[Demonstration]) -> Prompt:
        return prefix(text, demonstrations, self.definitions, self.settings.nearest)

    def _paper_labels(self, text: str, demonstrations: Sequence[Demonstration], spans: Sequence[Span]) -> Prompt:
        settings = self.settings
        return paper_classification_prompt(
            text, demonstrations, spans, self.definitions, list_labels=settings.list_labels, nearest=settings.nearest
        )

    def _score(
        self, prompts: Sequence[Sequence[Prompt]], choices: tuple[str, ...]
    ) -> Conversation[tuple[list[FloatArray], list[Usage]]]:
        """Log-probabilities (n_prompts, n_choices) f32 and usage of every sentence, by one call for all of them."""
        flat = [prompt for own in prompts for prompt in own]
        scored = yield Batch(self.engine, [Choose(prompt, choices, "choices") for prompt in flat])
        counts = self.engine.count_tokens(flat)
        rows: list[FloatArray] = []
        usages: list[Usage] = []
        at = 0
        for own in prompts:
            end = at + len(own)
            rows.append(np.asarray(scored[at:end], dtype=np.float32).reshape(len(own), len(choices)))
            usages.append(Usage(prompt_tokens=sum(counts[at:end])))
            at = end
        return rows, usages

    def _fit(self, sentences: Sequence[Sentence], demonstrations: Demonstrations) -> list[FittedDemonstrations]:
        """The same demonstrations for every stage: room is kept for a question about the longest possible span."""
        texts = [sentence.text for sentence in sentences]
        reserve = max(self.settings.max_new_tokens, QUESTION_RESERVE)
        longest = self.engine.count_tokens([(classification_question(text, self.variant),) for text in texts])
        limits = [self._limit(reserve + question, self._bare_prefix) for question in longest]
        builders = [partial(self._prefix, text) for text in texts]
        return self._fitted(demonstrations, builders, limits)

    @cached_property
    def _bare_prefix(self) -> int:
        """Tokens of a prompt without demonstrations and sentence."""
        return self.engine.count_tokens([self._prefix("", ())])[0]

    def _fit_paper(
        self,
        sentences: Sequence[Sentence],
        demonstrations: Demonstrations,
        spans: Sequence[Sequence[Span]] | None = None,
    ) -> list[FittedDemonstrations]:
        def build(text: str, own: Sequence[Span] | None) -> Callable[[Sequence[Demonstration]], Prompt]:
            if own is None:
                return lambda shown: paper_extraction_prompt(text, shown, nearest=self.settings.nearest)
            return lambda shown: self._paper_labels(text, shown, own)

        builders = [build(sentence.text, None if spans is None else spans[i]) for i, sentence in enumerate(sentences)]
        bare = self.engine.count_tokens([build("", None if spans is None else ())(())])[0]
        limits = [
            self._limit(self._reply_limit(0 if spans is None else len(spans[i])), bare) for i in range(len(sentences))
        ]
        return self._fitted(demonstrations, builders, limits)

    def _limit(self, reserve: int, bare: int) -> int:
        """Most tokens of a prompt beside `reserve`; bare: those that it has without demonstrations and sentence."""
        room = self.engine.max_tokens - reserve
        own = self.settings.max_prompt_tokens
        return room if own is None else min(room, own + bare)

    def _fitted(
        self,
        demonstrations: Demonstrations,
        builders: Sequence[Callable[[Sequence[Demonstration]], Prompt]],
        limits: Sequence[int],
    ) -> list[FittedDemonstrations]:
        """One count for all prompts; only those over the limit are counted again with fewer demonstrations."""
        counts = self.engine.count_tokens([build(own) for build, own in zip(builders, demonstrations, strict=True)])
        return [
            FittedDemonstrations(tuple(own), 0, fits=True)
            if count <= limit
            else fit_demonstrations(own, build, lambda prompt: self.engine.count_tokens([prompt])[0], limit)
            for build, own, count, limit in zip(builders, demonstrations, counts, limits, strict=True)
        ]


def _claimed(text: str, claims: Sequence[Claim]) -> list[tuple[str, str]]:
    return [(text[span.start : span.end], label) for span, label in claims]
