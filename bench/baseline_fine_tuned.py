"""The supervised reference: the members' own small model, fine-tuned on the pool as a tagger.

All weights are trained, with a linear head over B, I and O for every label, read at the last token of each word
(a causal model has then seen the whole word; with `twice` the text is written twice and the second copy is tagged, so
that every word is read with the whole sentence before it). AdamW, linear warm-up and decay; a part of the pool is held
out to end the training and to choose the epoch, so nothing of the evaluated sentences is seen. The standard recipe of
Devlin et al. 2019 (arXiv:1810.04805, section 5.3) on a decoder. Tags hold flat entities: of nested ones the outermost.
This is the one system whose models are trained; the others leave every weight of a language model as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from el4ner.bench.system import BaselineSettings, Found, Kind, Workbench, prediction_of, with_options
from el4ner.bench.tagger import Tagger, TrainingSettings, tag_names, train
from el4ner.pool import Pool
from el4ner.records import Prediction, Sentence


class FineTunedSettings(BaselineSettings):
    """epochs: at most so many passes over the pool; steps: at most so many updates in all, 0 for as many as there are.
    patience: passes without a better F1 on the held-out part that end the training. held_out: its share of the pool.
    rate, warm_up: learning rate and the share of updates it rises over. rows: sentences of an update. twice: write the
    text twice. max_tokens: longer texts are cut. source: which model, empty for the first member's."""

    epochs: int = Field(default=20, ge=1)
    steps: int = Field(default=0, ge=0)
    patience: int = Field(default=3, ge=1)
    held_out: float = Field(default=0.1, gt=0, lt=1)
    rate: float = Field(default=1e-4, gt=0)
    warm_up: float = Field(default=0.1, ge=0, lt=1)
    decay: float = Field(default=0.01, ge=0)
    rows: int = Field(default=16, ge=1)
    twice: bool = True
    max_tokens: int = Field(default=512, ge=8)
    source: str = ""


class FineTuned:
    """A tagger trained on the pool (implements `System`)."""

    name = "fine-tuned"
    kind: Kind = "baseline"

    def __init__(self, bench: Workbench, options: Mapping[str, Any]) -> None:
        self._own = with_options(FineTunedSettings, options, self.name)
        self._bench = bench
        self._source = self._own.source or bench.config.members[0].source
        self._fresh: Tagger | None = None
        self._tagger: Tagger | None = None
        self._history: list[float] = []

    @property
    def settings(self) -> Mapping[str, Any]:
        """Options, model, device and seed."""
        config = self._bench.config
        own = {"source": self._source, "device": config.device, "dtype": config.dtype, "seed": self._bench.seed}
        return {**self._own.model_dump(), **own}

    def load(self) -> None:
        """Loads the model in float32; it is trained on a copy."""
        if self._fresh is None:
            self._fresh = Tagger.load(self._source, self._bench.config.device, self._bench.config.dtype)

    def prepare(self, pool: Pool, progress: Callable[[str], None]) -> None:
        """Trains on the pool. The same pool, seed and machine give the same tagger."""
        assert self._fresh is not None, "load first"
        own = self._own
        self._tagger = None  # two trained copies in memory would be one too many
        tagger = copy.deepcopy(self._fresh)
        tagger.begin(tag_names(pool.label_names), self._bench.seed, twice=own.twice, max_tokens=own.max_tokens)
        n_held_out = max(1, round(own.held_out * len(pool.sentences)))
        held_out = set(pool.sample(n_held_out)) if len(pool.sentences) > 1 else set()
        training = [d for i, d in enumerate(pool.sentences) if i not in held_out]
        checked = [d for i, d in enumerate(pool.sentences) if i in held_out]
        settings = TrainingSettings(
            own.epochs, own.steps, own.patience, own.rate, own.warm_up, own.decay, own.rows, self._bench.seed
        )
        self._history = train(tagger, training, checked, settings, progress)
        self._tagger = tagger

    def predict(self, sentences: Sequence[Sentence]) -> list[Prediction]:
        """One prediction per sentence; an entity's score is the mean probability of its words' tags."""
        assert self._tagger is not None, "prepare first"
        tagged = self._tagger.tag([s.text for s in sentences])
        predictions = []
        for sentence, found in zip(sentences, tagged, strict=True):
            entities = [Found(e.span, e.label, float(np.clip(p, 0.0, 1.0))) for e, p in found.entities]
            cut = None if found.read_up_to is None else (
                f"read only the first {found.read_up_to} of {len(sentence.text)} characters: too long"
            )  # fmt: skip
            overlap = self._bench.config.overlap
            predictions.append(prediction_of(sentence, entities, overlap, self.name, error=cut))
        return predictions

    def stages(self) -> None:
        """No stages."""

    def parameters(self) -> int:
        """Of the trained tagger."""
        assert self._tagger is not None, "prepare first"
        return sum(int(p.numel()) for p in self._tagger.parameters())

    def report(self) -> dict[str, Any]:
        """F1 on the held-out part of the pool after each epoch."""
        return {"held-out F1 by epoch": [round(f1, 4) for f1 in self._history]}

    def models(self) -> dict[str, str]:
        """The model that is trained."""
        assert self._fresh is not None, "load first"
        return {self._source: self._fresh.source}
