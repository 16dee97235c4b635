"""The run's report: what each stage cost each member, and that later stages find the prefixes of earlier ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from el4ner import El4ner
from el4ner.engines import Choose, Completion, Generate
from el4ner.engines.scripted import ScriptedEngine
from el4ner.voters.conversations import Batch, Conversation, together


def _ask(engine: Any, requests: list[Any]) -> Conversation[int]:
    answers = yield Batch(engine, requests)
    return len(answers)


def test_what_is_computed_is_charged_to_who_asked() -> None:
    engine: Any = ScriptedEngine("s", generate=lambda _: Completion("x", 5, 1), choose=lambda r: [0.0] * len(r.choices))
    talks = [_ask(engine, [Generate(("a b c",))]), _ask(engine, [Generate(("a b",)), Generate(("a",))])]
    computed: list[int] = []
    assert together(talks, computed) == [1, 2]
    assert computed == [3, 3]  # an engine that does not say computes everything
    engine.computed = [3, 1, 0]
    talks = [_ask(engine, [Generate(("a b c",))]), _ask(engine, [Generate(("a b",)), Generate(("a",))])]
    assert together(talks, computed) == [1, 2]
    assert computed == [3, 1]
    assert together([_ask(engine, [])], computed) == [0]
    assert computed == [0]


@pytest.mark.embedded
def test_stages_share_prefixes_and_the_report_says_so(tmp_path: Path) -> None:
    labels = tmp_path / "labels.yaml"
    labels.write_text("- name: person\n  definition: a human being\n- name: place\n  definition: a town or country\n")
    model = El4ner.from_config(
        voters=["smollm2-list", "smollm2-ask"], labels=str(labels), device="cpu", dtype="float32",
        extract={"max_new_tokens": 6},
    )  # fmt: skip
    model.predict(["Ada Lovelace met Charles Babbage in London.", "Nothing here."])
    report = model.report()
    stages = report["tokens by stage"]
    assert set(stages) == {"extract", "classify", "verify"}
    assert set(stages["extract"]) == set(stages["classify"]) == {"smollm2-list", "smollm2-ask"}
    every = [tokens for own in stages.values() for tokens in own.values()]
    assert sum(tokens["prompt"] for tokens in every) == report["tokens"]["prompt"]
    assert sum(tokens["generated"] for tokens in every) == report["tokens"]["generated"] > 0
    assert all(0 <= tokens["shared"] <= tokens["prompt"] for tokens in every)
    second = stages["extract"]["smollm2-ask"]
    assert second["shared"] > 0.5 * second["prompt"]  # the other member has read the instruction and the sentence
    for tokens in stages["classify"].values():  # questions are all that is new
        assert tokens["shared"] > 0.6 * tokens["prompt"]
    memory = model.memory()
    assert memory["measured peak"] > 0
    assert memory["plan"]["models"][0]["members"] == ("smollm2-list", "smollm2-ask", "smollm2-define")
    assert memory["predicted"] == memory["plan"]["predicted_mib"]


@pytest.mark.embedded
def test_chunks_are_no_longer_than_their_prefixes_fit(tmp_path: Path) -> None:
    from el4ner.config import make_config
    from el4ner.engines import load_engine
    from el4ner.plan import instruction_tokens
    from el4ner.pool import Pool
    from el4ner.preparation import Preparation
    from el4ner.records import Label
    from el4ner.stages.team import Team
    from el4ner.voters.prompting import PromptedMember

    engine: Any = load_engine("embedded:smollm2", device="cpu", dtype="float32")
    config = make_config({"device": "cpu"})
    pool = Pool((), (Label("person"),), 2)
    member = PromptedMember("smollm2-list", engine, "list", pool.labels)
    preparation = Preparation(config, engines={"embedded:smollm2": engine})
    team = Team(config, pool, members=(member,), asked=(member.name,))
    longest = config.max_prompt_tokens + instruction_tokens(config)
    assert longest > config.max_prompt_tokens  # each may hold its instruction's columns
    assert 1 < preparation.at_once(team) == engine.prefix_tokens // longest < config.batch_size
    assert preparation.at_once(Team(config, pool)) == config.batch_size
    assert engine.choose([Choose(("a", "b"), (" c",))])[0].shape == (1,)
