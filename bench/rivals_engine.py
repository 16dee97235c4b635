"""How choices are scored by hand with transformers: one full prompt at a time, and batches of full prompts.

Both take token ids, so that all sides answer exactly the same questions, and use nothing of el4ner. `Tokenised` is one
question: the ids of its prompt, and of each choice behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Tokenised:
    """A prompt and its choices as token ids."""

    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]


@dataclass(slots=True)
class Work:
    """Tokens that went through the model, padding included."""

    tokens: int = 0


def score_one_by_one(model: Any, questions: Sequence[Tokenised], work: Work) -> list[NDArray[np.float64]]:
    """A plain loop: for every prompt and choice one forward pass over both, logits of every position."""
    device = next(model.parameters()).device
    scores = []
    for question in questions:
        row = []
        for choice in question.choices:
            ids = torch.tensor([question.prompt + choice], device=device)
            work.tokens += ids.numel()
            with torch.inference_mode():
                logits = model(input_ids=ids, use_cache=False).logits[0, -len(choice) - 1 : -1].float()
            known = logits.log_softmax(-1)
            row.append(float(known[torch.arange(len(choice)), list(choice)].double().sum()))
        scores.append(np.array(row))
    return scores


def score_in_batches(
    model: Any, questions: Sequence[Tokenised], work: Work, rows: int, pad_id: int = 0
) -> list[NDArray[np.float64]]:
    """Batches of full prompts, longest first, padded on the left, logits of the last positions only.

    Each distinct prompt-and-choice without the choice's last token is one row, so that choices of one token cost one
    row for all of them. rows: most rows of a batch.
    """
    device = next(model.parameters()).device
    wanted: dict[tuple[int, ...], dict[tuple[int, int], None]] = {}
    owners: list[list[tuple[tuple[int, ...], int]]] = []
    for question in questions:
        owners.append([(question.prompt + choice[:-1], len(choice)) for choice in question.choices])
        for choice, (ids, length) in zip(question.choices, owners[-1], strict=True):
            for back, token in enumerate(reversed(choice)):
                wanted.setdefault(ids, {})[(back, token)] = None
            assert length == len(choice)
    order = sorted(wanted, key=len, reverse=True)
    known: dict[tuple[tuple[int, ...], int, int], float] = {}
    for start in range(0, len(order), rows):
        batch = order[start : start + rows]
        width = max(map(len, batch))
        keep = 1 + max(back for ids in batch for back, _ in wanted[ids])
        padded = torch.full((len(batch), width), pad_id)
        mask = torch.zeros((len(batch), width), dtype=torch.long)
        for i, own in enumerate(batch):
            padded[i, width - len(own) :] = torch.tensor(own)
            mask[i, width - len(own) :] = 1
        work.tokens += padded.numel()
        with torch.inference_mode():
            logits = model(
                input_ids=padded.to(device), attention_mask=mask.to(device),
                position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(device), use_cache=False, logits_to_keep=keep,
            ).logits  # fmt: skip
        logp = logits.float().log_softmax(-1)
        for i, own in enumerate(batch):
            for back, token in wanted[own]:
                known[(own, back, token)] = float(logp[i, keep - 1 - back, token])
    return [
        np.array([
            sum(known[(ids, back, token)] for back, token in enumerate(reversed(choice)))
            for choice, (ids, _) in zip(question.choices, own, strict=True)
        ])
        for question, own in zip(questions, owners, strict=True)
    ]  # fmt: skip
