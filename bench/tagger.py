"""A causal language model trained to tag words with B, I and O: model, training, reading tags as entities."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from el4ner.conversion import quiet_transformers
from el4ner.corpora import tags_to_spans
from el4ner.engines.base import FloatArray
from el4ner.engines.loading import choose_device, choose_dtype, load_errors
from el4ner.engines.tokens import TextTokens
from el4ner.errors import EngineError
from el4ner.hub import loading_options
from el4ner.models import local_folder, resolve
from el4ner.records import Demonstration, LabelledSpan, Span
from el4ner.text import words

OUTSIDE = "O"


def tag_names(labels: Sequence[str]) -> tuple[str, ...]:
    """O, then B- and I- of every label."""
    return (OUTSIDE, *(f"{prefix}-{label}" for label in labels for prefix in ("B", "I")))


def outermost(demonstration: Demonstration) -> list[LabelledSpan]:
    """Entities without overlap: longer ones first, of equal length the earlier ones."""
    kept: list[LabelledSpan] = []
    for entity in sorted(demonstration.entities, key=lambda e: (e.start - e.end, e.start)):
        if all(entity.end <= other.start or other.end <= entity.start for other in kept):
            kept.append(entity)
    return sorted(kept)


def word_tags(demonstration: Demonstration, units: Sequence[Span]) -> list[str]:
    """The tag of every word: an entity tags the words that it touches."""
    tags = [OUTSIDE] * len(units)
    for entity in outermost(demonstration):
        begun = False
        for i, unit in enumerate(units):
            if unit.start < entity.end and entity.start < unit.end and tags[i] == OUTSIDE:
                tags[i] = f"{'I' if begun else 'B'}-{entity.label}"
                begun = True
    return tags


@dataclass(frozen=True, slots=True)
class Tagged:
    """The entities of one text with their mean probability, and up to which character it was read if not whole."""

    entities: tuple[tuple[LabelledSpan, float], ...]
    read_up_to: int | None


@dataclass(frozen=True, slots=True)
class Row:
    """A text as the model reads it: token ids, and for each word that was read the position of its last token."""

    ids: tuple[int, ...]
    units: tuple[Span, ...]
    last: tuple[int, ...]
    read_up_to: int | None


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """See `baseline_fine_tuned.FineTunedSettings`. steps: 0 for no other bound than epochs."""

    epochs: int
    steps: int
    patience: int
    rate: float
    warm_up: float
    decay: float
    rows: int
    seed: int


class Tagger:
    """A model body with a linear head over tags, weights in float32. dtype: of its matrix products."""

    def __init__(self, body: Any, tokenizer: Any, source: str, device: torch.device, dtype: torch.dtype) -> None:
        self.body = body
        self.source = source
        self.device = device
        self.dtype = dtype
        self.tags: tuple[str, ...] = ()
        self._tokens = TextTokens(tokenizer)
        self._head: Any = None
        self._twice = False
        self._max_tokens = 0

    @classmethod
    def load(cls, source: str, device: str = "auto", dtype: str = "float32") -> Tagger:
        """The body of a causal model, without its head. Raises EngineError for what cannot be loaded or trained.

        dtype: with bfloat16 (or auto, where that is faster) the body's matrix products are taken in it, by autocast;
        float16 would lose small gradients, so it means float32.
        """
        import transformers

        resolved = resolve(source)
        if resolved.kind == "server":
            raise EngineError(f"model {source!r} is a server and cannot be trained; name a folder or hub id")
        chosen = choose_device(device)
        products = torch.bfloat16 if choose_dtype(dtype, chosen) == torch.bfloat16 else torch.float32
        options = loading_options(resolved)
        with load_errors(resolved), quiet_transformers():
            folder = local_folder(resolved)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
            body: Any = transformers.AutoModel.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, **options
            )
        revision = resolved.identity or getattr(body.config, "_commit_hash", None)
        name = f"{resolved.name}@{revision[:16]}" if revision else resolved.name
        numbers = "float32" if products == torch.float32 else "float32, products in bfloat16"
        return cls(body.to(chosen), tokenizer, f"{name} ({chosen.type}, {numbers})", chosen, products)

    def begin(self, tags: Sequence[str], seed: int, *, twice: bool, max_tokens: int) -> None:
        """A fresh head for tags."""
        generator = torch.Generator().manual_seed(seed)
        width = int(self.body.config.get_text_config().hidden_size)
        head = torch.nn.Linear(width, len(tags))
        with torch.no_grad():
            head.weight.copy_(torch.randn(len(tags), width, generator=generator) * 0.02)
            head.bias.zero_()
        self.tags = tuple(tags)
        self._head = head.to(self.device)
        self._twice = twice
        self._max_tokens = max_tokens

    def parameters(self) -> list[Any]:
        """All weights."""
        return [*self.body.parameters(), *self._head.parameters()]

    def state(self) -> list[Any]:
        """A copy of all weights."""
        return [parameter.detach().clone() for parameter in self.parameters()]

    def restore(self, state: Sequence[Any]) -> None:
        """The inverse of `state`."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters(), state, strict=True):
                parameter.copy_(value)

    def rows(self, texts: Sequence[str]) -> list[Row]:
        """Texts as token ids; with `twice`, the second copy's positions."""
        found = []
        limit = self._max_tokens // 2 if self._twice else self._max_tokens
        for text, (ids, offsets) in zip(texts, self._tokens.with_offsets(texts), strict=True):
            units = words(text)
            cut = None
            if len(ids) > limit:
                cut = int(offsets[limit - 1][1])
                units = [unit for unit in units if unit.end <= cut]
                ids, offsets = ids[:limit], offsets[:limit]
            ends = np.array([end for _, end in offsets], dtype=np.int64)
            last = [int(np.searchsorted(ends, unit.end, side="left")) for unit in units]
            last = [min(position, max(len(ids) - 1, 0)) for position in last]
            if self._twice:
                (middle, _), *_ = self._tokens.with_offsets(["\n"])
                shift = len(ids) + len(middle)
                ids, last = [*ids, *middle, *ids], [position + shift for position in last]
            found.append(Row(tuple(ids), tuple(units), tuple(last), cut))
        return found

    def scores(self, rows: Sequence[Row]) -> list[Any]:
        """Tag scores (words, tags) of each row, as tensors, gradients included."""
        longest = max((len(row.ids) for row in rows), default=0)
        ids = torch.zeros((len(rows), max(longest, 1)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row.ids)] = torch.tensor(row.ids, dtype=torch.long)
            mask[i, : max(len(row.ids), 1)] = 1
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            states = self.body(
                input_ids=ids.to(self.device), attention_mask=mask.to(self.device), use_cache=False
            ).last_hidden_state
        return [self._head(states[i, list(row.last)].float()) for i, row in enumerate(rows)]

    def tag(self, texts: Sequence[str], batch: int = 16) -> list[Tagged]:
        """The entities of every text, each text in a batch with others of its length."""
        rows = self.rows(texts)
        results: list[Tagged | None] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
        self.body.eval()
        with torch.inference_mode():
            for begin in range(0, len(order), batch):
                chosen = order[begin : begin + batch]
                for i, scores in zip(chosen, self.scores([rows[i] for i in chosen]), strict=True):
                    shares = torch.softmax(scores, dim=-1).cpu().numpy()
                    results[i] = read_tags(rows[i], shares, self.tags)
        return [result for result in results if result is not None]


def read_tags(row: Row, shares: FloatArray, tags: Sequence[str]) -> Tagged:
    """The likeliest tag of each word as entities; an I- that continues nothing begins an entity.

    shares: (words, tags).
    """
    best = shares.argmax(axis=1) if len(shares) else np.zeros(0, dtype=np.int64)
    spans = tags_to_spans([tags[int(i)] for i in best], "iob2", "begin")
    entities = []
    for span in spans:
        start, end = row.units[span.first].start, row.units[span.stop - 1].end
        p = float(np.mean([shares[i, best[i]] for i in range(span.first, span.stop)]))
        entities.append((LabelledSpan(start, end, span.label), p))
    return Tagged(tuple(entities), row.read_up_to)


def train(
    tagger: Tagger,
    training: Sequence[Demonstration],
    checked: Sequence[Demonstration],
    settings: TrainingSettings,
    progress: Callable[[str], None],
) -> list[float]:
    """Trains all weights; leaves the tagger as it was after the epoch with the best F1 on `checked`.

    Returns that F1 after each epoch (empty without `checked`: then all epochs are run). Deterministic for the same
    material, settings and machine.
    """
    rows = tagger.rows([d.text for d in training])
    index = {tag: i for i, tag in enumerate(tagger.tags)}
    targets = [torch.tensor([index[t] for t in word_tags(d, row.units)]) for d, row in zip(training, rows, strict=True)]
    usable = [i for i, row in enumerate(rows) if row.units]
    per_epoch = math.ceil(len(usable) / settings.rows)
    n_steps = settings.epochs * per_epoch
    n_steps = min(n_steps, settings.steps) if settings.steps else n_steps
    for parameter in tagger.parameters():
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(tagger.parameters(), lr=settings.rate, weight_decay=settings.decay)
    rises = max(1, round(settings.warm_up * n_steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / rises, max(0.0, (n_steps - step) / max(1, n_steps - rises)))
    )
    rng = np.random.default_rng(settings.seed)
    history: list[float] = []
    best: list[Any] | None = None
    done = 0
    while usable and done < n_steps:
        order = _order(rng, usable, rows, settings.rows)
        tagger.body.train()
        for chosen in order[: n_steps - done]:
            optimiser.zero_grad()
            scores = torch.cat(tagger.scores([rows[i] for i in chosen]))
            target = torch.cat([targets[i] for i in chosen]).to(tagger.device)
            cross_entropy(scores, target).backward()
            torch.nn.utils.clip_grad_norm_(tagger.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            done += 1
            progress(f"training: {done:,} of at most {n_steps:,} updates")
        if not checked:
            continue
        history.append(strict_f1(tagger, checked))
        progress(f"training: F1 {history[-1]:.3f} on {len(checked)} held-out pool sentences")
        if history[-1] >= max(history):
            best = tagger.state()
        elif len(history) - 1 - int(np.argmax(history)) >= settings.patience:
            break
    if best is not None:
        tagger.restore(best)
    return history


def _order(rng: np.random.Generator, usable: Sequence[int], rows: Sequence[Row], size: int) -> list[list[int]]:
    """Batches of an epoch: shuffled, but with texts of like length together, so that little is padding."""
    shuffled = [usable[i] for i in rng.permutation(len(usable))]
    batches: list[list[int]] = []
    for begin in range(0, len(shuffled), size * 16):
        block = sorted(shuffled[begin : begin + size * 16], key=lambda i: len(rows[i].ids))
        batches += [block[at : at + size] for at in range(0, len(block), size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def strict_f1(tagger: Tagger, checked: Sequence[Demonstration]) -> float:
    """Strict micro F1 on labelled sentences, nested entities included."""
    gold = [set(d.entities) for d in checked]
    found = [{entity for entity, _ in tagged.entities} for tagged in tagger.tag([d.text for d in checked])]
    correct = sum(len(a & b) for a, b in zip(gold, found, strict=True))
    total = sum(map(len, gold)) + sum(map(len, found))
    return 2 * correct / total if total else 0.0
