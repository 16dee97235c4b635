"""Baselines that ask one model once a sentence: without demonstrations, and with those most like the sentence.

kate: demonstrations by the cosine of sentence embeddings, the most similar next to the question. Liu et al. 2022,
"What Makes Good In-Context Examples for GPT-3?" (arXiv:2101.06804); as a baseline of NER in DEER (see
`baseline_deer`). The whole pool serves, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import Field

from el4ner.bench.baseline_prompts import Build, Wording, align_pairs, one_prompt, read_entities
from el4ner.bench.system import (
    BaselineSettings,
    Found,
    Kind,
    Workbench,
    count_parameters,
    prediction_of,
    with_options,
)
from el4ner.cache import ArrayCache, cache_root
from el4ner.engines.base import Engine, Generate, Prompt
from el4ner.pool import Pool
from el4ner.prompts import fit_demonstrations
from el4ner.records import Demonstration, Label, Prediction, Sentence, Usage
from el4ner.stages.ranking import SentenceRanking


class OnePromptSettings(BaselineSettings):
    """wording: how entities and types are written. max_new_tokens: longest reply."""

    wording: Wording = "pairs"
    max_new_tokens: int = Field(default=160, ge=1)


class KateSettings(OnePromptSettings):
    """k: demonstrations shown, None for the run's budget. only_with_entities: leave out pool sentences without any."""

    k: int | None = Field(default=None, ge=0)
    only_with_entities: bool = False


class Asking:
    """What the prompting baselines share: the model, the labels, and a token budget that drops demonstrations."""

    kind: Kind = "baseline"
    encodes = True
    """Whether the sentence encoder is used."""

    def __init__(self, name: str, bench: Workbench) -> None:
        self.name = name
        self.bench = bench
        self.labels: tuple[Label, ...] = ()
        self._engine: Engine | None = None

    @property
    def shared_settings(self) -> dict[str, Any]:
        """What the run's settings say about every prompting baseline."""
        config = self.bench.config
        member = config.members[0].model_dump(mode="json", include={"source", "chat"}) if config.members else {}
        encoder = {"encoder": config.encoder} if self.encodes else {}
        return {**member, **encoder, "overlap": config.overlap, "dtype": config.dtype,
                "max_prompt_tokens": config.max_prompt_tokens}  # fmt: skip

    @property
    def engine(self) -> Engine:
        """The model that is asked."""
        if self._engine is None:
            self._engine = self.bench.engine
        return self._engine

    def load(self) -> None:
        """Loads the first member's model, and the encoder where it is used."""
        _ = self._loaded

    @property
    def _loaded(self) -> list[Any]:
        return [self.engine, self.bench.encoder] if self.encodes else [self.engine]

    def models(self) -> dict[str, str]:
        """The first member's model, and the encoder where it is used."""
        config = self.bench.config
        return {name: model.source for name, model in zip((config.members[0].source, config.encoder), self._loaded,
                                                          strict=False)}  # fmt: skip

    def parameters(self) -> int | None:
        """Of the same models."""
        return count_parameters(self._loaded)

    def stages(self) -> None:
        """No stages."""

    def report(self) -> None:
        """Nothing is decided on the pool."""

    def fitted(self, build: Build, shown: Sequence[Demonstration], new_tokens: int) -> Prompt | None:
        """The prompt with as many demonstrations as fit the budget of tokens, None if it does not fit without any."""
        limit = min(self.engine.max_tokens - new_tokens, self.bench.config.max_prompt_tokens)
        fit = fit_demonstrations(shown, build, lambda prompt: self.engine.count_tokens([prompt])[0], limit)
        return build(fit.demonstrations) if fit.fits else None


class OnePrompt(Asking):
    """One generation a sentence (implements `System`); `demonstrations` is what tells its kinds apart."""

    def __init__(self, name: str, bench: Workbench, settings: OnePromptSettings) -> None:
        super().__init__(name, bench)
        self.own = settings

    @property
    def settings(self) -> Mapping[str, Any]:
        """Wording, lengths, model and budget."""
        return {**self.shared_settings, **self.own.model_dump()}

    def prepare(self, pool: Pool, progress: Callable[[str], None]) -> None:
        """Takes the labels; no demonstrations."""
        progress("no preparation but the labels")
        self.labels = pool.labels

    def demonstrations(self, sentences: Sequence[Sentence]) -> list[list[Demonstration]]:
        """Demonstrations of every sentence, most similar first."""
        return [[] for _ in sentences]

    def predict(self, sentences: Sequence[Sentence]) -> list[Prediction]:
        """One prediction per sentence; one that the model cannot read whole is `truncated`, and says so."""
        found, usage, errors = self.ask(sentences, self.demonstrations(sentences))
        overlap = self.bench.config.overlap
        return [
            prediction_of(sentence, own, overlap, self.name, cost, error)
            for sentence, own, cost, error in zip(sentences, found, usage, errors, strict=True)
        ]

    def ask(
        self, sentences: Sequence[Sentence], shown: Sequence[Sequence[Demonstration]]
    ) -> tuple[list[list[Found]], list[Usage], list[str | None]]:
        """What the model finds in every sentence, what that cost, and why a sentence could not be asked."""

        def builder(text: str) -> Build:
            return lambda demonstrations: one_prompt(text, demonstrations, self.labels, self.own.wording)

        new = self.own.max_new_tokens
        prompts = [self.fitted(builder(s.text), own, new) for s, own in zip(sentences, shown, strict=True)]
        asked = [i for i, prompt in enumerate(prompts) if prompt is not None and sentences[i].text.strip()]
        replies = self.engine.generate([Generate(p, None, new) for i in asked if (p := prompts[i]) is not None])
        found: list[list[Found]] = [[] for _ in sentences]
        usage = [Usage()] * len(sentences)
        errors = ["the text does not fit the model" if prompt is None else None for prompt in prompts]
        for i, reply in zip(asked, replies, strict=True):
            pairs = read_entities(reply.text, self.labels, self.own.wording, truncated=reply.truncated)
            found[i] = align_pairs(sentences[i], pairs)
            usage[i] = Usage(reply.prompt_tokens, reply.generated_tokens)
        return found, usage, errors


class ZeroShot(OnePrompt):
    """One prompt: label names, definitions where there are some, the form of the answer; no demonstrations."""

    encodes = False

    def __init__(self, bench: Workbench, options: Mapping[str, Any]) -> None:
        super().__init__("zero-shot", bench, with_options(OnePromptSettings, options, "zero-shot"))


class Kate(OnePrompt):
    """One prompt with the pool sentences most like the input."""

    def __init__(self, bench: Workbench, options: Mapping[str, Any]) -> None:
        self._kate = with_options(KateSettings, options, "kate")
        super().__init__("kate", bench, self._kate)
        self._k = bench.demonstrations(self._kate.k, "kate")
        self._pool: list[Demonstration] = []
        self._ranking: SentenceRanking | None = None

    @property
    def settings(self) -> Mapping[str, Any]:
        """As of the others, with k as it is used."""
        return {**super().settings, "k": self._k}

    def prepare(self, pool: Pool, progress: Callable[[str], None]) -> None:
        """Encodes the pool's sentences, or takes them from the cache."""
        super().prepare(pool, progress)
        self._pool = [d for d in pool.sentences if d.entities or not self._kate.only_with_entities]
        progress("encoding the pool's sentences")
        cache = ArrayCache(cache_root() / "pools")
        self._ranking = SentenceRanking([d.text for d in self._pool], self.bench.encoder, cache)

    def demonstrations(self, sentences: Sequence[Sentence]) -> list[list[Demonstration]]:
        """The nearest pool sentences; copies of a tested sentence are in no pool."""
        assert self._ranking is not None, "prepare first"
        ranked = self._ranking.top([s.text for s in sentences], self._k, [()] * len(sentences))
        return [[self._pool[p] for p in positions] for positions in ranked]
