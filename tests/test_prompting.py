"""Prompted members: one engine call per stage, honest bookkeeping, and answers that do not depend on the batch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from el4ner.engines import load_engine
from el4ner.engines.base import Choose, Completion, Engine, FloatArray, Generate, Prompt, TokenStates
from el4ner.errors import ConfigError
from el4ner.prompts import CONTENT_FREE, VARIANTS, VERDICT_CHOICES
from el4ner.records import Demonstration, Label, LabelledSpan, Sentence, Span, Usage
from el4ner.voters.prompting import MemberSettings, PromptedMember

LABELS = (Label("person", "A human being."), Label("creative-work", "A work of art."), Label("place"))
CHOICES = (" person", " creative work", " place", " none of these")
SHOWN = Demonstration("d", "Ada saw Rome.", (LabelledSpan(0, 3, "person"), LabelledSpan(8, 12, "place")))


class FakeEngine:
    """Answers from functions of the prompt, counts its calls, and counts characters as tokens."""

    name = "fake"
    source = "fake"
    n_layers = 0

    def __init__(
        self,
        reply: Callable[[str], str] = lambda prompt: "none",
        score: Callable[[str, str], float] = lambda prompt, choice: 0.0,
        max_tokens: int = 100_000,
    ) -> None:
        self.reply, self.score, self.max_tokens = reply, score, max_tokens
        self.generated: list[list[Generate]] = []
        self.chosen: list[list[Choose]] = []

    def generate(self, requests: Sequence[Generate]) -> list[Completion]:
        self.generated.append(list(requests))
        replies = [self.reply("".join(request.prompt)) for request in requests]
        return [
            Completion(reply[: request.max_new_tokens], len("".join(request.prompt)), len(reply),
                       len(reply) > request.max_new_tokens)
            for request, reply in zip(requests, replies, strict=True)
        ]  # fmt: skip

    def choose(self, requests: Sequence[Choose]) -> list[FloatArray]:
        self.chosen.append(list(requests))
        rows = []
        for request in requests:
            scores = np.array([self.score("".join(request.prompt), choice) for choice in request.choices])
            rows.append((scores - np.logaddexp.reduce(scores)).astype(np.float32))
        return rows

    def read(self, texts: Sequence[str], layers: Sequence[int]) -> list[TokenStates]:
        raise AssertionError("a prompted member reads no states")

    def count_tokens(self, prompts: Sequence[Prompt]) -> list[int]:
        return [len("".join(prompt)) for prompt in prompts]


def sentences(*texts: str) -> list[Sentence]:
    return [Sentence(str(i), text) for i, text in enumerate(texts)]


def member(engine: FakeEngine, **settings: Any) -> PromptedMember:
    style = settings.pop("style", "default")
    variant = settings.pop("variant", "list")
    return PromptedMember("m", engine, variant, LABELS, style, MemberSettings(**settings) if settings else None)


def votes_of(asked: PromptedMember, *question: Any) -> list[FloatArray]:
    return [found.votes for found in asked.classify(*question)]


def verdicts_of(asked: PromptedMember, *question: Any) -> list[list[float]]:
    return [list(found.probabilities) for found in asked.judge(*question)]


def answered(**replies: str) -> Callable[[str], str]:
    """Replies by a word of the prompt's last text line."""

    def reply(prompt: str) -> str:
        text = re.findall(r"^(?:Text|Sentence): (.*)$", prompt, re.MULTILINE)[-1]
        return next((value for word, value in replies.items() if word in text), "none")

    return reply


def test_extract_finds_every_occurrence_and_counts_what_is_absent() -> None:
    engine = FakeEngine(answered(Ada="Ada; Zeus; bob", Rome="", long="word " * 40))
    found = member(engine, grounded=False, max_new_tokens=20).extract(
        sentences("Ada met Bob and Ada", "Rome", "long word", "quiet", " "), [[SHOWN]] * 5
    )
    assert found[0].spans == (Span(0, 3), Span(8, 11), Span(16, 19))
    assert found[0].absent == ("Zeus",)
    assert found[0].generated_tokens == len("Ada; Zeus; bob")
    assert not found[0].malformed
    assert found[1].spans == ()
    assert found[1].malformed
    assert found[2].truncated
    assert found[2].malformed
    assert found[3].spans == ()
    assert not found[3].malformed
    assert found[4].usage == Usage()
    assert [len(batch) for batch in engine.generated] == [4]


def test_extract_is_grounded_by_default() -> None:
    engine = FakeEngine(lambda prompt: r"C:\new; Ada")
    [found] = member(engine).extract(sentences(r"Ada opens C:\new"))
    assert found.spans == (Span(0, 3), Span(10, 16))
    [[request]] = engine.generated
    assert request.grammar is not None
    assert request.grammar.text == r"Ada opens C:\new"


def test_zero_shot_extraction_shows_no_demonstration() -> None:
    engine = FakeEngine()
    member(engine).extract(sentences("Ada"))
    assert "Rome" not in "".join(engine.generated[0][0].prompt)
    member(engine).extract(sentences("Ada"), [[SHOWN]])
    assert "Rome" in "".join(engine.generated[1][0].prompt)


@pytest.mark.parametrize("variant", VARIANTS)
def test_stages_share_their_prefix(variant: str) -> None:
    engine = FakeEngine(score=lambda prompt, choice: len(choice))
    asked = member(engine, variant=variant, calibrate=True)
    texts = sentences("Ada met Bob")
    asked.extract(texts, [[SHOWN]])
    votes_of(asked, texts, [[SHOWN]], [[Span(0, 3)]])
    verdicts_of(asked, texts, [[SHOWN]], [[(Span(0, 3), "person")]])
    prompts = [request.prompt for request in engine.generated[0]]
    prompts += [request.prompt for batch in engine.chosen for request in batch]
    assert len(prompts) == 4  # one of them is content-free
    assert len({prompt[:2] for prompt in prompts}) == 1


def test_vote_scores_labels_and_none() -> None:
    def score(prompt: str, choice: str) -> float:
        return float('Type of "Bob":' in prompt and choice == " place")

    engine = FakeEngine(score=score)
    asked = member(engine, calibrate=False)
    spans = [[Span(0, 3), Span(8, 11), Span(16, 19)], [], [Span(0, 3)]]
    votes = votes_of(asked, sentences("Ada met Bob and Ada", "x", "Bob"), [[SHOWN], [], []], spans)
    assert [vote.shape for vote in votes] == [(3, 4), (0, 4), (1, 4)]
    assert all(vote.dtype == np.float32 for vote in votes)
    np.testing.assert_allclose(votes[0][0], 0.25)
    odds = np.exp([0.0, 0.0, 1.0, 0.0])
    np.testing.assert_allclose(votes[0][1], odds / odds.sum(), rtol=1e-6)
    np.testing.assert_array_equal(votes[0][2], votes[0][0])
    np.testing.assert_array_equal(votes[2][0], votes[0][1])
    [requests] = engine.chosen
    assert len(requests) == 3  # a surface that occurs twice is asked about once
    assert {request.choices for request in requests} == {CHOICES}
    assert {request.normalise for request in requests} == {"choices"}


def test_calibration_removes_what_the_prompt_says_about_nothing() -> None:
    def score(prompt: str, choice: str) -> float:
        return 3.0 * (choice == " person") + 0.5 * ('"Up"' in prompt and choice == " creative work")

    texts, spans = sentences("Up"), [[Span(0, 2)]]
    [biased] = votes_of(member(FakeEngine(score=score)), texts, [[]], spans)
    engine = FakeEngine(score=score)
    [calibrated] = votes_of(member(engine, calibrate=True), texts, [[]], spans)
    assert biased.argmax() == 0
    odds = np.exp([0.0, 0.5, 0.0, 0.0])
    np.testing.assert_allclose(calibrated[0], odds / odds.sum(), rtol=1e-5)
    assert CONTENT_FREE in engine.chosen[0][-1].prompt[2]


def test_verify_is_the_probability_of_yes() -> None:
    engine = FakeEngine(score=lambda prompt, choice: 2.0 * (choice == " yes") if "a place" in prompt else 0.0)
    span = Span(0, 4)
    claims = [[(span, "place"), (span, "person")], []]
    probabilities = verdicts_of(member(engine), sentences("Rome", "x"), [[], []], claims)
    assert probabilities[0] == pytest.approx([np.exp(2) / (1 + np.exp(2)), 0.5])
    assert probabilities[1] == []
    assert engine.chosen[0][0].choices == VERDICT_CHOICES


def test_usage_counts_every_question_once() -> None:
    engine = FakeEngine()
    [judged] = member(engine).judge(sentences("Rome Rome"), [[]], [[(Span(0, 4), "place"), (Span(5, 9), "place")]])
    assert judged.usage == Usage(len("".join(engine.chosen[0][0].prompt)), 0)
    [voted] = member(engine).classify(sentences("Rome"), [[]], [[Span(0, 4)]])
    assert voted.usage.prompt_tokens == sum(len("".join(request.prompt)) for request in engine.chosen[1])


def test_paper_style_generates_throughout() -> None:
    def reply(prompt: str) -> str:
        if prompt.endswith("Types:"):
            return " Ada -> person[SEP]Rome -> Place[SEP]Bob -> hero"
        if prompt.endswith("Answer (true or false):"):
            return "true" if '"Ada"' in prompt else "hm" if '"Bob"' in prompt else "false"
        return "[CLS]Ada[SEP]Rome[SEP]"

    engine = FakeEngine(reply)
    asked = member(engine, style="paper")
    texts = sentences("Ada saw Rome with Bob")
    spans = [[Span(0, 3), Span(8, 12), Span(18, 21)]]
    assert asked.extract(texts)[0].spans == (Span(0, 3), Span(8, 12))
    [votes] = asked.classify(texts, [[SHOWN]], spans)
    assert votes.votes[:2].tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]
    assert np.isnan(votes.votes[2]).all()
    assert votes.malformed
    claims = [[(spans[0][0], "person"), (spans[0][1], "place"), (spans[0][2], "person")]]
    [judged] = asked.judge(texts, [[SHOWN]], claims)
    assert judged.probabilities[:2] == (1.0, 0.0)
    assert np.isnan(judged.probabilities[2])
    assert judged.malformed == 1
    assert not engine.chosen
    assert [len(batch) for batch in engine.generated] == [1, 1, 3]
    assert all(request.grammar is None for batch in engine.generated for request in batch)


def test_budget_drops_the_least_similar_demonstrations_alike_in_all_stages() -> None:
    shown = [Demonstration(str(i), f"number {i} " + "x" * 200, ()) for i in range(5)]
    engine = FakeEngine()
    asked = member(engine, max_prompt_tokens=1000)
    texts = sentences("Ada")
    [found] = asked.extract(texts, [shown])
    votes_of(asked, texts, [shown], [[Span(0, 3)]])
    verdicts_of(asked, texts, [shown], [[(Span(0, 3), "person")]])
    assert 0 < found.dropped_demonstrations < 5
    body = engine.generated[0][0].prompt[1]
    kept = [f"number {i} " in body for i in range(5)]
    assert kept == [i < 5 - found.dropped_demonstrations for i in range(5)]
    assert {request.prompt[:2] for batch in engine.chosen for request in batch} == {engine.generated[0][0].prompt[:2]}


def test_long_definitions_leave_room_for_demonstrations_and_text() -> None:
    """The budget is for what is shown; 30 definitions of 100 characters are not."""
    labels = [Label(f"label {i}", "x" * 100) for i in range(30)]
    engine = FakeEngine()
    asked = PromptedMember("m", engine, "list", labels, "default", MemberSettings(max_prompt_tokens=1000))
    shown = [Demonstration(str(i), f"number {i} " + "x" * 50, ()) for i in range(4)]
    text = "Ada " * 60  # with a question about all of it, as long as the budget and more
    short, long = asked.extract(sentences("Ada", text), [shown, shown])
    assert (short.dropped_demonstrations, short.too_long) == (0, False)
    assert (long.too_long, engine.generated[0][1].prompt[1].count(text)) == (False, 1)
    assert np.isfinite(votes_of(asked, sentences(text), [shown], [[Span(0, 3)]])[0]).all()
    assert asked.extract(sentences("Ada " * 300), [shown])[0].too_long


@pytest.mark.parametrize("style", ["default", "paper"])
def test_a_sentence_that_does_not_fit_is_not_asked(style: str) -> None:
    engine = FakeEngine(max_tokens=1500)
    asked = member(engine, style=style)
    texts = sentences("Ada", "x" * 2000)
    short, long = asked.extract(texts, [[SHOWN], [SHOWN]])
    assert not short.too_long
    assert long.too_long
    assert long.spans == ()
    spans = [[Span(0, 1)], [Span(0, 1)]]
    assert np.isnan(votes_of(asked, texts, [[SHOWN], [SHOWN]], spans)[1]).all()
    assert np.isnan(verdicts_of(asked, texts, [[SHOWN], [SHOWN]], [[(Span(0, 1), "person")]] * 2)[1]).all()


@pytest.mark.parametrize("style", ["default", "paper"])
def test_alone_equals_in_a_batch(style: str) -> None:
    def score(prompt: str, choice: str) -> float:
        return (hash((prompt, choice)) % 997) / 100

    texts = sentences("Ada met Bob", "Rome " * 40, "Up in Rome", "")
    shown = [[SHOWN] * i for i in range(4)]
    spans = [[Span(0, 3), Span(8, 11)], [Span(5 * i, 5 * i + 4) for i in range(40)], [Span(0, 2)], []]
    claims = [[(span, "person") for span in own] for own in spans]
    engine = FakeEngine(answered(Ada="[CLS]Ada[SEP]", Rome="Rome -> place"), score, max_tokens=2600)
    asked = member(engine, style=style)
    together = (asked.extract(texts, shown), asked.classify(texts, shown, spans), asked.judge(texts, shown, claims))
    for i in range(4):
        part = slice(i, i + 1)
        assert asked.extract(texts[part], shown[part]) == together[0][part]
        [votes] = asked.classify(texts[part], shown[part], spans[part])
        np.testing.assert_array_equal(votes.votes, together[1][i].votes)
        assert votes.usage == together[1][i].usage
        [verdicts] = asked.judge(texts[part], shown[part], claims[part])
        np.testing.assert_array_equal(verdicts.probabilities, together[2][i].probabilities)


def test_wrong_settings_say_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match="choose one of list, ask, define"):
        PromptedMember("m", FakeEngine(), "shout", LABELS)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="default or paper"):
        PromptedMember("m", FakeEngine(), "list", LABELS, "free")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="classify_by='guess'; choose choice or generation"):
        MemberSettings(classify_by="guess")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_items=0"):
        MemberSettings(max_items=0)


@pytest.fixture(scope="module")
def smollm2(embedded: None) -> Engine:
    return load_engine("embedded:smollm2", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def embedded_member(smollm2: Engine) -> PromptedMember:
    return PromptedMember("real", smollm2, "list", LABELS)


REAL = sentences("Ada Lovelace flew to Paris.", "It rained 😂 in İzmir and Ada saw Up.", "Nothing happened.")
REAL_SHOWN = [[SHOWN], [SHOWN], []]
REAL_SPANS = [[Span(0, 12), Span(21, 26)], [Span(15, 20), Span(25, 28), Span(33, 35)], [Span(0, 7)]]


@pytest.mark.embedded
def test_real_votes_are_distributions_and_do_not_depend_on_the_batch(
    embedded_member: PromptedMember, smollm2: Any
) -> None:
    together = embedded_member.classify(REAL, REAL_SHOWN, REAL_SPANS)
    for voted, spans in zip(together, REAL_SPANS, strict=True):
        assert voted.votes.shape == (len(spans), 4)
        assert (voted.votes >= 0).all()
        np.testing.assert_allclose(voted.votes.sum(axis=1), 1, atol=1e-5)
        assert voted.usage.prompt_tokens > 0
    assert not np.allclose(together[0].votes[0], together[0].votes[1], atol=1e-3)
    for i in range(3):
        part = slice(i, i + 1)
        smollm2.forget_prefixes()
        [alone] = embedded_member.classify(REAL[part], REAL_SHOWN[part], REAL_SPANS[part])
        np.testing.assert_array_equal(alone.votes, together[i].votes)
        assert alone.usage == together[i].usage


@pytest.mark.embedded
def test_real_grounded_extraction_is_verbatim(embedded_member: PromptedMember, smollm2: Any) -> None:
    together = embedded_member.extract(REAL, REAL_SHOWN)
    for found in together:
        assert found.absent == ()
        assert found.prompt_tokens > 0
    assert any(found.spans for found in together)
    smollm2.forget_prefixes()
    assert embedded_member.extract(REAL[1:2], REAL_SHOWN[1:2]) == together[1:2]


@pytest.mark.embedded
def test_real_verdicts_are_probabilities(embedded_member: PromptedMember, smollm2: Any) -> None:
    claims = [[(span, "person") for span in spans] for spans in REAL_SPANS]
    together = verdicts_of(embedded_member, REAL, REAL_SHOWN, claims)
    assert all(0 < probability < 1 for own in together for probability in own)
    smollm2.forget_prefixes()
    [alone] = verdicts_of(embedded_member, REAL[:1], REAL_SHOWN[:1], claims[:1])
    np.testing.assert_array_equal(alone, together[0])


@pytest.mark.embedded
def test_real_paper_style_answers(smollm2: Engine) -> None:
    asked = PromptedMember("real", smollm2, "list", LABELS, "paper")
    for found in asked.extract(REAL[:1], REAL_SHOWN[:1]):
        assert found.generated_tokens > 0
        assert all(REAL[0].text[start:end].strip() for start, end in found.spans)
    [votes] = votes_of(asked, REAL[:1], REAL_SHOWN[:1], REAL_SPANS[:1])
    assert all(np.isnan(row).all() or sorted(row.tolist()) == [0, 0, 0, 1] for row in votes)
    [verdicts] = verdicts_of(asked, REAL[:1], REAL_SHOWN[:1], [[(REAL_SPANS[0][0], "person")]])
    assert np.isnan(verdicts[0]) or verdicts[0] in (0.0, 1.0)
