"""The probing voter: asks a model what a span is, and reads the state where the answer would begin.

    TEXT
    "SPAN" is a

A small probe (`voters.probe`), fitted on the pool, turns that state into a distribution over the labels and "none".
What the model would write there is not asked for: a model of 135 million parameters seldom names the label, but its
state says more than the name would. The reading voter sees the words of a span in their sentence and nothing of what
the question brings up, so the two err differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from el4ner.cache import ArrayCache, content_key
from el4ner.config import ProbingConfig
from el4ner.engines.base import REPLY_VERSION, Engine, FloatArray, Prompt
from el4ner.pool import Pool
from el4ner.records import Sentence, Span
from el4ner.voters.probe import Probe, ProbeSettings, fit_probes, mean_distribution
from el4ner.voters.projection import Projection, fit_projection

PROBE_VERSION = 1
"""Part of every cache key; raised whenever the same pool would be fitted otherwise."""

_AROUND = 700
"""Characters on either side of a span that are shown of a longer text; fewer to a model that takes few tokens."""
_LONGEST = 200
"""Characters of the longest span that is asked about."""
_CHUNK = 64
"""Sentences whose spans are asked about at once."""

Progress = Callable[[str], None]


def question(text: str, span: Span, around: int = _AROUND) -> Prompt:
    """What is read about a span: the text, or the part of a long one around the span, and the question."""
    shown = text
    if len(text) > 2 * around:
        # the same part for neighbours, whose computation is shared then
        begin = max(0, span.start // around - 1) * around
        shown = text[begin : max(begin + 3 * around, span.end)]
    return (f"{shown}\n", f'"{text[span.start : span.end]}" is a')


class ProbingVoter:
    """Votes with states of one model behind a question about each span (implements `Voter`)."""

    def __init__(
        self, name: str, engine: Engine, labels: Sequence[str], config: ProbingConfig, cache: ArrayCache, seed: int = 0
    ) -> None:
        self.name = name
        self.labels = tuple(labels)
        self._engine = engine
        self._config = config
        self._cache = cache
        self._seed = seed
        self._around = max(1, min(_AROUND, engine.max_tokens // 6))
        self._layers = sorted({max(1, round(share * engine.n_layers)) for share in config.depths})
        self._projection: Projection | None = None
        self._scale = 1.0
        self._probes: tuple[Probe, ...] = ()
        self._left_out: dict[int, tuple[Probe, ...]] = {}

    def fit(
        self, pool: Pool, chosen: Sequence[int], spans: Sequence[Sequence[Span]], progress: Progress
    ) -> list[FloatArray]:
        """Fits on the spans that are proposed in some pool sentences; returns the votes on them (n_spans, L + 1), each
        by probes that saw no sentence of its fold; NaN where nothing is asked. What was fitted is cached by content."""
        sentences = [pool.sentences[s] for s in chosen]
        folds = [pool.folds[s] for s in chosen]
        truth = [pool.truth(s, own) for s, own in zip(chosen, spans, strict=True)]
        key = content_key("probing", PROBE_VERSION, REPLY_VERSION, self._engine.source, self._layers, pool.content,
                          pool.n_folds, self._seed, self._config.model_dump(mode="json", exclude={"sample"}),
                          list(chosen), [[tuple(span) for span in own] for own in spans])  # fmt: skip
        stored = self._cache.get(key)
        if stored is None:
            values = self._values([sentence.text for sentence in sentences], spans, progress)
            stored = self._fit(values, np.concatenate([np.zeros(0, np.int64), *truth]), folds, spans, progress)
            self._cache.put(key, stored)
        self.restore(stored)
        for fold in set(folds):
            own = {k.removeprefix(f"without {fold} "): v for k, v in stored.items() if k.startswith(f"without {fold} ")}
            self._left_out[fold] = _unpack(own)
        borders = np.cumsum([0, *map(len, spans)])
        return [stored["out_of_fold"][a:b] for a, b in pairwise(borders)]

    def _values(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span]], progress: Progress | None = None
    ) -> FloatArray:
        """Features (n, D) f32 of all spans, text by text; NaN for those that are not asked about."""
        rows: list[FloatArray | None] = []
        for begin in range(0, len(texts), _CHUNK):
            if progress is not None:
                progress(f"{self.name}: asking about the pool, {begin:,} of {len(texts):,} sentences")
            chunk = texts[begin : begin + _CHUNK]
            prompts = [
                [self._question(text, span) for span in own]
                for text, own in zip(chunk, spans[begin : begin + _CHUNK], strict=True)
            ]
            states = self._states(chunk, prompts)
            for text, own in zip(chunk, prompts, strict=True):
                rows += [None if prompt is None else states[text, prompt] for prompt in own]
        width = next((len(row) for row in rows if row is not None), 1)
        values = np.full((len(rows), width), np.nan, dtype=np.float32)
        for value, row in zip(values, rows, strict=True):
            if row is not None:
                value[:] = row
        return values

    def _states(
        self, texts: Sequence[str], prompts: Sequence[Sequence[Prompt | None]]
    ) -> dict[tuple[str, Prompt], FloatArray]:
        """Features (D,) behind every prompt of a text.

        The engine reads as one what begins alike. Two long texts may show the same part of themselves; the second is
        then read in another call, so that what is read as one does not depend on the neighbours.
        """
        calls: list[tuple[dict[str, str], dict[tuple[str, Prompt], None]]] = []
        for text, own in zip(texts, prompts, strict=True):
            asked = [prompt for prompt in own if prompt is not None]
            free = (call for call in calls if all(call[0].get(prompt[0], text) == text for prompt in asked))
            shown, keys = next(free, ({}, {}))
            if asked and not shown:
                calls.append((shown, keys))
            shown.update(dict.fromkeys((prompt[0] for prompt in asked), text))
            keys.update(dict.fromkeys((text, prompt) for prompt in asked))
        states: dict[tuple[str, Prompt], FloatArray] = {}
        for _, keys in calls:
            found = self._engine.read_ends([prompt for _, prompt in keys], self._layers)
            states |= {key: array.reshape(-1) for key, array in zip(keys, found, strict=True)}
        return states

    def _question(self, text: str, span: Span) -> Prompt | None:
        """None for what is too long to be a name, or for the model: no token has less than a byte."""
        if span.end - span.start > _LONGEST:
            return None
        prompt = question(text, span, self._around)
        return prompt if len("".join(prompt).encode()) <= self._engine.max_tokens else None

    def _fit(
        self, values: FloatArray, truth: np.ndarray, folds: Sequence[int], spans: Sequence[Sequence[Span]],
        progress: Progress,
    ) -> dict[str, np.ndarray]:  # fmt: skip
        width = values.shape[1] // len(self._layers)
        asked = ~np.isnan(values).any(axis=1)
        projection = fit_projection(values[asked], [width] * len(self._layers), self._config.directions)
        turned = projection(values)
        scale = float(turned[asked].std()) or 1.0
        turned /= scale
        settings = ProbeSettings(self._config.hidden, self._config.decay, self._config.dropout)
        fold_of = np.repeat(np.asarray(folds, dtype=np.int64), [len(own) for own in spans])
        out_of_fold = np.full((len(values), len(self.labels) + 1), np.nan, dtype=np.float32)
        arrays: dict[str, np.ndarray] = {}
        progress(f"{self.name}: fitting on {asked.sum():,} spans")
        for fold in sorted(set(folds)):
            seen = asked & (fold_of != fold)
            probes = self._probes_of(turned[seen], truth[seen], settings)
            arrays |= {f"without {fold} {name}": array for name, array in _pack(probes).items()}
            for row in np.flatnonzero(asked & (fold_of == fold)):
                out_of_fold[row] = mean_distribution(probes, turned[row])
        probes = self._probes_of(turned[asked], truth[asked], settings)
        return {
            **projection.to_arrays(), "scale of all": np.array(scale), **_pack(probes), "out_of_fold": out_of_fold,
            **arrays,
        }  # fmt: skip

    def _probes_of(self, values: FloatArray, truth: np.ndarray, settings: ProbeSettings) -> tuple[Probe, ...]:
        return fit_probes(values, truth, len(self.labels) + 1, settings, self._seed, self._config.heads)

    def state(self) -> dict[str, np.ndarray]:
        """What a fitted voter needs to vote, as named arrays."""
        if self._projection is None:
            raise RuntimeError("ProbingVoter.state before fit()")
        return {**self._projection.to_arrays(), "scale of all": np.array(self._scale), **_pack(self._probes)}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """The inverse of `state`. Folds can no longer be left out."""
        self._projection = Projection.from_arrays(arrays)
        self._scale = float(arrays["scale of all"])
        self._probes = _unpack(arrays)
        self._left_out = {}

    def vote(
        self, sentences: Sequence[Sentence], spans: Sequence[Sequence[Span]], exclude_folds: Sequence[int] | None = None
    ) -> list[FloatArray]:
        """Label distributions (n_spans, L + 1), "none" last; NaN for a span that is too long to be asked about.

        exclude_folds (N): of pool sentences as input, whose fold's probes vote, which did not see it.
        """
        if self._projection is None:
            raise RuntimeError("ProbingVoter.vote before fit()")
        values = self._values([sentence.text for sentence in sentences], spans)
        votes: list[FloatArray] = []
        at = 0
        for i, own in enumerate(spans):
            # of a fold that no drawn sentence is in, those fitted on all of them have seen nothing
            probes = self._probes if exclude_folds is None else self._left_out.get(exclude_folds[i], self._probes)
            rows = np.full((len(own), len(self.labels) + 1), np.nan, dtype=np.float32)
            for row in rows:
                if not np.isnan(values[at, 0]):  # one by one: a product may depend on how many rows it has
                    row[:] = mean_distribution(probes, self._projection(values[at : at + 1])[0] / self._scale)
                at += 1
            votes.append(rows)
        return votes


def _pack(probes: Sequence[Probe]) -> dict[str, np.ndarray]:
    return {f"{i} {name}": array for i, probe in enumerate(probes) for name, array in probe.to_arrays().items()}


def _unpack(arrays: Mapping[str, np.ndarray]) -> tuple[Probe, ...]:
    """The inverse of `_pack`; other arrays are passed over."""
    n_probes = 1 + max(int(name.split()[0]) for name in arrays if name.partition(" ")[0].isdigit())
    return tuple(
        Probe.from_arrays({k.removeprefix(f"{i} "): v for k, v in arrays.items() if k.startswith(f"{i} ")})
        for i in range(n_probes)
    )
