"""Choices scored by the transformers engine and by hand: the same answers first, then times in blocks, and memory.

Sides: `loop`, a plain transformers loop with one full prompt and choice at a time; `batch`, batches of full prompts
with logits of the last positions; `engine`, ours. All answer the same token ids; ours begins every block without any
prefix of an earlier one. A row whose answers differ is not timed.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from el4ner.bench._harness import Timing, interleave, machine, slower, where
from el4ner.bench.ceilings import Ceilings, measure_ceilings
from el4ner.bench.engine_requests import Asked
from el4ner.bench.rivals_engine import Tokenised, Work, score_in_batches, score_one_by_one
from el4ner.engines.base import Choose
from el4ner.plan import resident_bytes

Scores = Sequence[NDArray[Any]]

SIDES = ("loop", "batch", "engine")

TOLERANCES = {"float32": 2e-3, "bfloat16": 0.5, "float16": 0.25}
"""Largest difference of a choice's log-probability. Sums of a few hundred numbers in another order, over up to six
tokens, in float32; in half precision sharing moves a token's log-probability by a few hundredths, and random weights
make it worse."""


@dataclass(slots=True)
class Memory:
    """Peak memory of a run beyond what was in use when it began, in MiB; None where it cannot be measured."""

    extra_mib: float | None = None


class _Watch:
    """Samples the resident memory of this process (Linux), or asks CUDA for its peak."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self._stop = threading.Event()
        self._peak = 0
        self.memory = Memory()

    def __enter__(self) -> Memory:
        gc.collect()
        if self._cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._before = self._peak = resident_bytes()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self.memory

    def _sample(self) -> None:
        while not self._stop.wait(0.01):
            self._peak = max(self._peak, resident_bytes())

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            import torch

            self._peak = torch.cuda.max_memory_allocated()
        else:
            self._stop.set()
            self._thread.join()
        if self._peak:
            self.memory.extra_mib = round((self._peak - self._before) / (1 << 20), 1)


def tokenised(engine: Any, requests: Sequence[Choose]) -> list[Tokenised]:
    """The requests as token ids."""
    return [
        Tokenised(engine.prompt_ids(request.prompt), tuple(engine.choice_ids(choice) for choice in request.choices))
        for request in requests
    ]


def distinct_tokens(questions: Sequence[Tokenised]) -> int:
    """Nodes of the trie over all prompts with all choices, without the choices' last tokens: the least to compute."""
    nodes: dict[tuple[int, int], int] = {}
    for question in questions:
        for choice in question.choices:
            node = 0
            for token in question.prompt + choice[:-1]:
                node = nodes.setdefault((node, token), len(nodes) + 1)
    return len(nodes)


def plain_tokens(questions: Sequence[Tokenised]) -> int:
    """Tokens of full prompts, one row for each distinct prompt and choice without its last token."""
    return sum(len(ids) for ids in {q.prompt + choice[:-1] for q in questions for choice in q.choices})


class _Side:
    """One way of answering, and what it did last: tokens run, memory."""

    def __init__(self, name: str, run: Callable[[Work], Scores], questions: int) -> None:
        self.name = name
        self.questions = questions
        self.work = Work()
        self._run = run

    def __call__(self) -> Scores:
        self.work = Work()
        return self._run(self.work)


def _sides(
    engine: Any,
    asked: Asked,
    questions: Sequence[Tokenised],
    names: Sequence[str],
    rows: int,
    loop_requests: int | None,
) -> list[_Side]:
    few = questions if loop_requests is None else questions[:loop_requests]

    def ours(work: Work) -> Scores:
        engine.forget_prefixes()
        before = engine.counts.run
        scores: Scores = engine.choose(list(asked.requests))
        work.tokens = engine.counts.run - before
        return scores

    known = {
        "loop": _Side("loop", lambda work: score_one_by_one(engine.model, few, work), len(few)),
        "batch": _Side("batch", lambda work: score_in_batches(engine.model, questions, work, rows), len(questions)),
        "engine": _Side("engine", ours, len(questions)),
    }
    return [known[name] for name in names]


def _difference(scores: Scores, reference: Scores) -> float:
    """Largest difference over the questions that both answered; infinite for NaN."""
    largest = max(
        (float(np.abs(np.asarray(a, np.float64) - b).max()) for a, b in zip(scores, reference, strict=False) if len(a)),
        default=0.0,
    )
    return largest if largest == largest else float("inf")


def measure_engine(
    engine: Any,
    asked: Asked,
    *,
    sides: Sequence[str] = SIDES,
    blocks: int = 3,
    rows: int = 8,
    loop_requests: int | None = None,
    say: Callable[[str], None] = lambda _: None,
    ceilings: Ceilings | None = None,
) -> Iterator[dict[str, Any]]:
    """A row per side, `engine` last: status, largest difference from any other side, times, tokens, memory, ratio.

    status "wrong": the answers differ by more than the tolerance, so nothing was timed. rows: prompts in a batch of
    the rival. loop_requests: the loop answers only so many questions, and its ratio is then per question. speedup: how
    many times as long a side takes as ours, for as many questions: median, least, most over blocks. cpu_speedup: the
    same by the medians of the process's own CPU time, which other work on the machine disturbs less.
    """
    requests = tuple(replace(request, normalise="vocab") for request in asked.requests)
    asked = replace(asked, requests=requests)
    questions = tokenised(engine, requests)
    _ = engine.packing  # found out once per model, not in a timed block
    answers: dict[str, Scores] = {}
    memory: dict[str, Memory] = {}
    ways = _sides(engine, asked, questions, sides, rows, loop_requests)
    for side in sorted(ways, key=lambda way: way.name != "engine"):  # ours first: what is freed may be kept for others
        say(f"checking {side.name}: {side.questions} questions")
        with _Watch(engine.device.type) as used:
            answers[side.name] = side()
        memory[side.name] = used
    dtype = str(engine.dtype).rpartition(".")[2]
    gaps = {
        name: max((_difference(own, other) for them, other in answers.items() if them != name), default=0.0)
        for name, own in answers.items()
    }
    right = [side for side in ways if gaps[side.name] <= TOLERANCES[dtype]]
    timings: dict[str, Timing] = {}
    if len(right) == len(ways):
        say(f"timing {', '.join(side.name for side in ways)} in {blocks} blocks")
        timings = interleave({side.name: _finished(side, engine) for side in ways}, blocks, warmup=0)
    facts = machine()
    ceilings = ceilings or measure_ceilings(engine.device.type)
    least, full = distinct_tokens(questions), plain_tokens(questions)
    common = {
        "what": "choose", "model": engine.source, "sentences": asked.sentences, "origin": asked.origin,
        "questions": len(questions), "choices": sum(len(q.choices) for q in questions),
        "prompt_tokens": sum(len(q.prompt) for q in questions), "distinct_tokens": least, "full_tokens": full,
        "token_ratio": round(full / max(least, 1), 2), "parameters": parameters(engine.model), "blocks": blocks,
        "tolerance": TOLERANCES[dtype], "ceilings": ceilings.to_dict(), "machine": facts,
    }  # fmt: skip
    for side in ways:
        timing = timings.get(side.name)
        yield common | {
            "side": side.name, "status": "ok" if side in right else "wrong", "difference": gaps[side.name],
            "answered": side.questions, "tokens_run": side.work.tokens,
            "tokens_over_distinct": round(side.work.tokens / max(least, 1), 4) if side.name == "engine" else None,
            "peak_extra_mib": memory[side.name].extra_mib,
            "rows": rows if side.name == "batch" else None,
            **_times(side, timing, timings.get("engine"), engine, questions, ceilings),
        }  # fmt: skip


def _finished(side: _Side, engine: Any) -> Callable[[], object]:
    """The side, done when it returns, also on a GPU."""
    if engine.device.type != "cuda":
        return side
    import torch

    def run() -> object:
        scores = side()
        torch.cuda.synchronize()
        return scores

    return run


def parameters(model: Any) -> dict[str, int]:
    """Weights in all, and those that every token is multiplied with: without the embedding and the head."""
    total = sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is None or head.weight is embedding
    return {"total": total, "per_token": total - embedding.numel() - (0 if tied else head.weight.numel())}


def _times(
    side: _Side, timing: Timing | None, ours: Timing | None, engine: Any, questions: Sequence[Tokenised],
    ceilings: Ceilings,
) -> dict[str, Any]:  # fmt: skip
    if timing is None:
        empty = ("timing", "questions_per_s", "tokens_per_s", "speedup", "cpu_speedup", "roofline")
        return dict.fromkeys(empty)
    ratio: dict[str, Any] = {"speedup": None, "cpu_speedup": None}
    if ours is not None and side.name != "engine":
        ratio = slower(timing, ours, len(questions) / max(side.questions, 1))
    return {
        "timing": timing.to_dict(),
        "questions_per_s": round(side.questions / timing.median_s, 3),
        "tokens_per_s": round(side.work.tokens / timing.median_s, 1),
        **ratio,
        "roofline": _roofline(side.work.tokens, timing.median_s, engine, ceilings),
    }


def _roofline(tokens: int, seconds: float, engine: Any, ceilings: Ceilings) -> dict[str, Any]:
    """Multiplications by the blocks' weights alone (attention and head left out), and their share of the ceiling."""
    reached = 2.0 * parameters(engine.model)["per_token"] * tokens / seconds
    ceiling = ceilings.flops_s.get("f32" if engine.dtype.itemsize == 4 else "bf16")
    return {
        "gflop_s": round(reached / 1e9, 1),
        "share": round(reached / ceiling, 3) if ceiling else None,
    }


def engine_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of one measurement as lines for reading."""
    first = rows[0]
    lines = [
        f"{first['model']}: {first['questions']} questions with {first['choices']} choices about {first['sentences']} "
        f"sentences ({first['origin']})",
        f"  prompts {first['prompt_tokens']} tokens, distinct {first['distinct_tokens']}, token ratio "
        f"{first['token_ratio']}; tolerance {first['tolerance']}",
        f"  {'':<8}{'median s':>10}{'min':>9}{'max':>9}{'questions/s':>13}{'tokens/s':>10}{'MiB':>8}{'slower':>8}"
        "  spread",
    ]
    for row in rows:
        if row["timing"] is None:
            lines.append(f"  {row['side']:<8}{row['status']}: differs by {row['difference']:.3g}; nothing was timed")
            continue
        t = row["timing"]
        line = f"  {row['side']:<8}{t['median_s']:>10.3f}{t['min_s']:>9.3f}{t['max_s']:>9.3f}"
        line += f"{row['questions_per_s']:>13.2f}{row['tokens_per_s']:>10.0f}{row['peak_extra_mib'] or 0:>8.0f}"
        if row["speedup"]:
            line += f"{row['speedup']['median']:>8.2f}  {row['speedup']['min']:.2f}..{row['speedup']['max']:.2f}"
            line += f", CPU time {row['cpu_speedup']:.2f}"
        if row["answered"] != row["questions"]:
            line += f"  ({row['answered']} of {row['questions']} questions, per question)"
        lines.append(line)
    ours = next((row for row in rows if row["side"] == "engine"), None)
    if ours is not None:
        lines.append(f"  engine: tokens processed over distinct {ours['tokens_over_distinct']}")
    lines.append(f"  {where(first['machine'])}")
    return "\n".join(lines)
