"""The whole pipeline against a plain script of the same method: the same entities first, then times in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from el4ner.bench._harness import Timing, interleave, machine, slower, where
from el4ner.bench.evaluation_data import sample_sentences, smaller, split_file
from el4ner.bench.peak_memory import peak_mib, reset_peak
from el4ner.bench.plain_pipeline import PlainModel
from el4ner.bench.random_models import bench_engine
from el4ner.config import Config, make_config
from el4ner.engines import Choose, Completion, FloatArray, Generate, load_encoder
from el4ner.errors import EngineError
from el4ner.models import prefers_chat
from el4ner.pipeline import El4ner
from el4ner.plan import mib, resident_bytes
from el4ner.pool import Pool, folds_for, load_pool
from el4ner.records import Prediction, Sentence

SCORE_TOLERANCE = 2e-3
"""Largest difference of a score or vote between the sides: float32 sums in another order, behind read-outs and stacks.
An entity whose score lies within it of the threshold may be missing on one side."""
ANSWER_TOLERANCE = 2e-3
"""Largest difference of a choice's log-probability in float32."""


Answers: TypeAlias = dict[str, dict[Any, Any]]
"""What was answered, by source of the model and request."""
Found: TypeAlias = tuple[list[Prediction], Answers]


class Heard:
    """An engine whose answers are kept while `answers` is a dictionary: few of them end in an entity."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.answers: dict[Generate | Choose, Any] | None = None

    def generate(self, requests: Sequence[Generate]) -> list[Completion]:
        """As the engine's."""
        return self._hear(requests, self.inner.generate(requests))

    def choose(self, requests: Sequence[Choose]) -> list[FloatArray]:
        """As the engine's."""
        return self._hear(requests, self.inner.choose(requests))

    def _hear(self, requests: Sequence[Any], answers: list[Any]) -> list[Any]:
        if self.answers is not None:
            self.answers.update(zip(requests, answers, strict=True))
        return answers

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def compare_answers(plain: Mapping[Any, Any], ours: Mapping[Any, Any]) -> tuple[int, float]:
    """(requests that only one side asked and replies that differ, largest difference of a choice's score)."""
    different, largest = len(plain.keys() ^ ours.keys()), 0.0
    for request in plain.keys() & ours.keys():
        if isinstance(request, Generate):
            different += plain[request] != ours[request]
        else:
            largest = max(largest, float(np.abs(plain[request] - ours[request]).max(initial=0.0)))
    return different, largest


@dataclass(frozen=True, slots=True)
class Comparison:
    """entities: of the plain side. different: entities that only one side has, or with another label. largest: the
    largest difference of a score or vote of those that both have."""

    entities: int
    different: int
    largest: float


def compare(plain: Sequence[Prediction], ours: Sequence[Prediction], threshold: float) -> Comparison:
    """How far two lists of predictions agree; what is within the tolerance of the threshold may be on one side only."""
    different, largest, count = 0, 0.0, 0
    for one, other in zip(plain, ours, strict=True):
        left = {(e.start, e.end, e.label): e for e in one.entities}
        right = {(e.start, e.end, e.label): e for e in other.entities}
        count += len(left)
        for key in left.keys() ^ right.keys():
            entity = left.get(key) or right[key]
            different += abs(entity.score - threshold) > SCORE_TOLERANCE
        for key in left.keys() & right.keys():
            a, b = left[key], right[key]
            gaps = [abs(a.score - b.score)]
            gaps += [abs(p - b.votes[v].get(label, np.inf)) for v, own in a.votes.items() for label, p in own.items()]
            largest = max(largest, *gaps)
        different += one.status != other.status
    return Comparison(count, different, largest)


class Side:
    """The pipeline with one kind of engines, by source. tokens: what its last run put through the models."""

    def __init__(self, model: El4ner, engines: Mapping[str, Heard], run_tokens: Callable[[Any], int]) -> None:
        self.model = model
        self.engines = engines
        self.tokens = 0
        self._run_tokens = run_tokens

    def _so_far(self) -> int:
        return sum(self._run_tokens(engine) for engine in self.engines.values())

    def predict(self, sentences: Sequence[Sentence]) -> list[Prediction]:
        """One prediction per sentence, without any prefix of an earlier run."""
        for engine in self.engines.values():
            if hasattr(engine, "forget_prefixes"):
                engine.forget_prefixes()
        before = self._so_far()
        predicted = self.model.predict(sentences)
        self.tokens = self._so_far() - before
        return predicted

    def heard(self, sentences: Sequence[Sentence]) -> Found:
        """Predictions, and what the models answered on the way, by source."""
        answers: Answers = {}
        for engine in self.engines.values():
            engine.answers = answers.setdefault(engine.source, {})
        predicted = self.predict(sentences)
        for engine in self.engines.values():
            engine.answers = None
        return predicted, answers


def heard_in_parts(
    ways: Mapping[str, Side], sentences: Sequence[Sentence], parts: int, say: Callable[[str], None]
) -> tuple[dict[str, Found], dict[str, Timing]]:
    """Every side's predictions and answers, and the times they took, in parts of the sentences, the sides in turns.

    Nothing is predicted twice: what is checked is what was timed. A side's `tokens` are those of all parts.
    """
    found: dict[str, Found] = {name: ([], {}) for name in ways}
    tokens = dict.fromkeys(ways, 0)
    size = -(-len(sentences) // parts)
    cut = [sentences[begin : begin + size] for begin in range(0, len(sentences), size)]
    waiting = {name: iter(cut) for name in ways}

    def turn(name: str) -> None:
        part = next(waiting[name])
        say(f"{name}: {len(found[name][0])} of {len(sentences)} sentences")
        predicted, answers = ways[name].heard(part)
        found[name][0].extend(predicted)
        for source, own in answers.items():
            found[name][1].setdefault(source, {}).update(own)
        tokens[name] += ways[name].tokens

    timings = interleave({name: partial(turn, name) for name in ways}, len(cut), warmup=0)
    for name, way in ways.items():
        way.tokens = tokens[name]
    return found, timings


def sides(config: Config, pool: Pool, say: Callable[[str], None]) -> dict[str, Side]:
    """`engine` and `plain`: the pipeline with el4ner's engines and with plain ones, on the same weights and encoder."""
    engines: dict[str, Heard] = {}
    plain: dict[str, Heard] = {}
    for member in config.members:
        if member.adapter is not None or member.quantization != "none":
            raise EngineError(f"member {member.name!r}: the plain script has no adapters and no quantised weights")
        if member.source in engines:
            continue
        say(f"loading {member.source}")
        if prefers_chat(member.source) and not member.source.startswith("random:"):
            raise EngineError(f"model {member.source!r}: the plain script has no chat templates; set chat: false")
        engine = bench_engine(member.source, device=config.device, dtype=config.dtype, chat=False)
        engines[member.source] = Heard(engine)
        plain[member.source] = Heard(PlainModel(engine.model, engine.tokenizer, engine.source))
    encoder = load_encoder(config.encoder, device=config.device, dtype=config.dtype)

    def side(name: str, own: dict[str, Heard], run_tokens: Callable[[Any], int]) -> Side:
        given: Any = dict(own)
        model = El4ner(config, engines=given, encoder=encoder, pool=pool)
        say(f"preparing {name}")
        model.prepare(say)  # the second finds what the first has fitted in the cache
        return Side(model, own, run_tokens)

    return {
        "engine": side("engine", engines, lambda one: int(one.counts.run)),
        "plain": side("plain", plain, lambda one: int(one.run_tokens)),
    }


def _material(
    folder: Path | None, split: str, count: int, seed: int, settings: Mapping[str, Any], pool_limit: int | None
) -> tuple[Config, Pool, list[Sentence]]:
    """Settings, pool and sentences; without a folder the built-in pool is both."""
    train = None if folder is None else str(split_file(folder, "train"))
    pool = smaller(load_pool(train, settings.get("labels")), pool_limit)
    base: dict[str, Any] = {"voters": "all"} if train is None else {"voters": "all", "examples": train}
    config = make_config({**base, **settings})
    pool = replace(pool, n_folds=folds_for(len(pool.sentences), config.stack.folds))
    if folder is None:
        sentences = pool.as_sentences(pool.sample(count))
    else:
        sentences = sample_sentences(split_file(folder, split), count, seed)
    return config, pool, sentences


def _agreement(found: Mapping[str, Any], threshold: float) -> tuple[bool, dict[str, Any]]:
    """Whether both sides found and answered the same, and how far they differ. found: what `Side.heard` gave."""
    (ours, our_answers), (by_hand, plain_answers) = found["engine"], found["plain"]
    result = compare(by_hand, ours, threshold)
    gaps = [compare_answers(own, our_answers[source]) for source, own in plain_answers.items()]
    replies, scores = sum(gap for gap, _ in gaps), max((gap for _, gap in gaps), default=0.0)
    right = result.different + replies == 0 and result.largest <= SCORE_TOLERANCE and scores <= ANSWER_TOLERANCE
    return right, {
        "entities": result.entities, "different": result.different, "difference": result.largest,
        "tolerance": SCORE_TOLERANCE, "answers": sum(len(own) for own in plain_answers.values()),
        "different_replies": replies, "answers_difference": scores,
    }  # fmt: skip


def measure_pipeline(
    folder: Path | None, *, split: str, count: int, seed: int, settings: Mapping[str, Any], blocks: int,
    pool_limit: int | None = None, check: bool = True, once: bool = False, say: Callable[[str], None] = lambda _: None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A row a side, `engine` and `plain`. Raises EngineError for models that need a chat template.

    status "wrong": the entities differ, so no time is given, unless `check` is false: then the row says so and has
    its times. speedup: of the plain side's time over ours, by blocks. once: each block predicts sentences of its own,
    and what is checked is what was timed; else all sentences are checked first and then predicted again in every block.
    """
    config, pool, sentences = _material(folder, split, count, seed, settings, pool_limit)
    ways = sides(config, pool, say)
    memory: dict[str, int | None] = dict.fromkeys(ways)
    if once:  # both sides share the process and its peak
        found, timings = heard_in_parts(ways, sentences, blocks, say)
    else:
        found, timings = {}, {}
        for name, way in ways.items():
            say(f"checking {name}: {len(sentences)} sentences")
            reset_peak()
            found[name] = way.heard(sentences)
            memory[name] = peak_mib()
    report = ways["engine"].model.report()
    right, agreement = _agreement(found, report["threshold"])
    if check and not right:
        timings = {}
    elif not once:
        say(f"timing both in {blocks} blocks")
        timings = interleave({name: partial(way.predict, sentences) for name, way in ways.items()}, blocks, warmup=0)
    facts = machine()
    for name, way in ways.items():
        yield {
            "what": "pipeline", "side": name, "status": "ok" if right else "wrong", "sentences": len(sentences),
            "data": "built-in pool" if folder is None else f"{folder.name} {split}", "settings": dict(settings),
            "pool_sentences": len(pool.sentences), "asked": report["asked"], "notes": report["notes"], **agreement,
            "tokens_run": way.tokens, "blocks": blocks, "once": once, "tokens_by_stage": report["tokens by stage"],
            "peak_memory_mib": memory[name], "process_mib": mib(resident_bytes()),
            **_times(timings, name, len(sentences), once), "machine": facts,
        }  # fmt: skip


def _times(timings: Mapping[str, Timing], name: str, count: int, once: bool) -> dict[str, Any]:
    timing = timings.get(name)
    if timing is None:
        return {"timing": None, "sentences_per_s": None, "speedup": None, "cpu_speedup": None}
    rate = count / (sum(timing.samples_s) if once else timing.median_s)
    own = {"timing": timing.to_dict(), "sentences_per_s": round(rate, 4)}
    if name == "engine":
        return own | {"speedup": None, "cpu_speedup": None}
    return own | slower(timing, timings["engine"])


def pipeline_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The two rows as lines for reading."""
    first = rows[0]
    lines = [f"{first['sentences']} sentences ({first['data']}), asked: {', '.join(first['asked'])}"]
    lines.append(
        f"  {first['entities']} entities, {first['different']} differ, scores by at most {first['difference']:.2g} "
        f"(allowed {first['tolerance']}); {first['answers']} answers of models, {first['different_replies']} replies "
        f"differ, choices by at most {first['answers_difference']:.2g} (allowed {ANSWER_TOLERANCE})"
    )
    for row in rows:
        if row["timing"] is None:
            lines.append(f"  {row['side']:<8}{row['status']}: nothing was timed")
            continue
        t = row["timing"]
        line = f"  {row['side']:<8}{t['median_s']:>10.2f} s ({t['min_s']:.2f}..{t['max_s']:.2f})"
        line += f"{row['sentences_per_s']:>9.3f} sentences/s{row['tokens_run']:>10} tokens"
        if row["speedup"]:
            line += f"{row['speedup']['median']:>8.2f}x ({row['speedup']['min']:.2f}..{row['speedup']['max']:.2f})"
            line += f", CPU time {row['cpu_speedup']:.2f}x"
        lines.append(line)
    lines.append(f"  {where(first['machine'])}")
    return "\n".join(lines)
