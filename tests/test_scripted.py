"""The scripted engine: fixed replies, and what it was asked."""

from __future__ import annotations

import numpy as np
import pytest

from el4ner.engines import Choose, Completion, Engine, Generate, TokenStates
from el4ner.engines.scripted import ScriptedEngine
from el4ner.errors import EngineError


def test_scripted_replies_and_what_it_was_asked() -> None:
    engine = ScriptedEngine(
        "s",
        generate={"List: a": "x; y"},
        choose=lambda request: [0.0] * len(request.choices),
        read=lambda text, layers: TokenStates(
            np.zeros((0, 2), np.int64), {n: np.zeros((0, 2), np.float32) for n in layers}
        ),
        n_layers=2,
    )
    assert isinstance(engine, Engine)
    assert engine.generate([Generate(("List: ", "a"))]) == [Completion("x; y", 2, 2)]
    assert engine.choose([Choose(("p",), ("a", "b"))])[0].tolist() == [0, 0]
    assert sorted(engine.read(["t"], [2, 1])[0].states) == [1, 2]
    assert len(engine.requests) == 3
    with pytest.raises(EngineError, match="no scripted reply"):
        engine.generate([Generate(("other",))])
    with pytest.raises(EngineError, match="choose from 0"):
        engine.read(["t"], [3])


def test_scripted_numbers_must_cover_the_choices() -> None:
    engine = ScriptedEngine(choose={"p": {"a": -1.0}, "q": [0.0]})
    assert engine.choose([Choose(("p",), ("a",))])[0].tolist() == [-1]
    with pytest.raises(EngineError, match="no number for choice 'b'"):
        engine.choose([Choose(("p",), ("a", "b"))])
    with pytest.raises(EngineError, match="1 numbers for 2 choices"):
        engine.choose([Choose(("q",), ("a", "b"))])
    with pytest.raises(EngineError, match="no scripted reply"):
        engine.read(["t"], [0])
