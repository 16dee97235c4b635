"""Members by script, a small and a larger pool, an encoder of letters: stages and pipeline without a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from el4ner.engines.base import Choose, FloatArray, Generate, TokenStates
from el4ner.engines.scripted import ScriptedEngine
from el4ner.pool import Pool
from el4ner.prompts import VERDICT_CHOICES
from el4ner.records import Demonstration, Label, LabelledSpan, Prediction

LABELS = (Label("person", "A human."), Label("place", "A spot on a map."))


class LetterEncoder:
    """Unit vectors of letter counts."""

    source = "letters"
    n_layers = 0

    def encode(self, texts: Sequence[str]) -> FloatArray:
        rows = np.zeros((len(texts), 128), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for character in text:
                row[ord(character) % 128] += 1
            row /= max(float(np.linalg.norm(row)), 1e-9)
        return rows

    def read(self, texts: Sequence[str], layers: Sequence[int]) -> list[TokenStates]:
        raise AssertionError("no reading voter is asked here")


def demonstration(text: str, entities: Mapping[str, str]) -> Demonstration:
    found = tuple(LabelledSpan(text.index(s), text.index(s) + len(s), label) for s, label in entities.items())
    return Demonstration(text, text, found)


POOL = Pool(
    (
        demonstration("Ada saw Rome.", {"Ada": "person", "Rome": "place"}),
        demonstration("Bob left Oslo.", {"Bob": "person", "Oslo": "place"}),
        demonstration("Cleo likes Quito.", {"Cleo": "person", "Quito": "place"}),
        demonstration("It rained.", {}),
    ),
    LABELS,
)


def surface_of(request: Choose) -> str:
    """The span that a classification or verification question is about."""
    found = re.findall(r'"([^"\n]*)"', request.prompt[-1])
    assert found, request.prompt
    return str(found[0])


def member(
    names: Sequence[str] = (),
    labels: Mapping[str, str] | None = None,
    sure: float = 0.9,
    rejects: Sequence[str] = (),
) -> ScriptedEngine:
    """Lists those of `names` that are in the text, gives each surface its label with `sure`, rejects some."""

    def generate(request: Generate) -> str:
        assert request.grammar is not None
        return "; ".join(name for name in names if name in request.grammar.text) or "none"

    def choose(request: Choose) -> list[float]:
        if request.choices == VERDICT_CHOICES:
            p = 0.1 if surface_of(request) in rejects else 0.8
            return [float(np.log(p)), float(np.log(1 - p))]
        label = (labels or {}).get(surface_of(request), "none of these")
        rest = (1 - sure) / (len(request.choices) - 1)
        if surface_of(request) == "N/A":
            return [float(np.log(1 / len(request.choices)))] * len(request.choices)
        return [float(np.log(sure if choice.strip() == label else rest)) for choice in request.choices]

    return ScriptedEngine(generate=generate, choose=choose)


QUIET: dict[str, Any] = {"noun_phrases": False, "pool_strings": False}


def settings(names: Sequence[str], **over: Any) -> dict[str, Any]:
    return {"members": [{"name": name, "source": name} for name in names], "voters": list(names), "extract": QUIET,
            **over}  # fmt: skip


GOLD = {"Dora": "person", "Bob": "person", "Lima": "place", "Oslo": "place"}


def surfaces(prediction: Prediction) -> dict[str, str]:
    """Label by surface."""
    return {e.text: e.label for e in prediction.entities}


# With a fit: 25 sentences, retrieval and members


def large_pool() -> Pool:
    names = [f"{a}{b}" for a in ("Dor", "Fil", "Gus") for b in ("a", "e", "i", "o", "u")]
    towns = [f"{a}{b}" for a in ("Dro", "Fli", "Gsu") for b in ("a", "e", "i", "o", "u")]  # the same letters
    rows = [
        demonstration(f"{n} met {t} and zzzz {i}", {n: "person", t: "place"})
        for i, (n, t) in enumerate(zip(names, towns, strict=True))
    ]
    rows += [Demonstration(f"e{i}", f"qqqq {i} went xxxx", ()) for i in range(10)]
    return Pool(tuple(rows), (Label("person"), Label("place")))


def oracle(useful: bool) -> ScriptedEngine:
    """Knows every name by its form, or says the same about everything."""

    def label(surface: str) -> str:
        if surface[:3] in ("Dor", "Fil", "Gus"):
            return "person"
        return "place" if surface[:3] in ("Dro", "Fli", "Gsu") else "none of these"

    def generate(request: Generate) -> str:
        assert request.grammar is not None
        words = request.grammar.text.split()
        return "; ".join(word for word in words if useful and label(word) != "none of these") or "none"

    def choose(request: Choose) -> list[float]:
        surface = surface_of(request)
        if request.choices == VERDICT_CHOICES or surface == "N/A" or not useful:
            return [float(-np.log(len(request.choices)))] * len(request.choices)
        return [float(np.log(0.94 if choice.strip() == label(surface) else 0.03)) for choice in request.choices]

    return ScriptedEngine(generate=generate, choose=choose)


FIT: dict[str, Any] = {"extract": {"reading": False}, "stack": {"audition": 20, "sample": 25}, "voters": "auto"}
