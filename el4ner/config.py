"""Settings: one frozen class per part, checked when made; unknown keys are errors.

Precedence: command line > configuration file > preset. `preset: paper` changes only what `PAPER` below names.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

from el4ner.config_errors import Lines, explain, shown
from el4ner.errors import ConfigError, InputError
from el4ner.lines import display_name, kind, read_text

Variant = Literal["list", "ask", "define"]

WORDLESS = ("reading", "tagging", "probing", "retrieval")
"""Voters that write nothing."""
_TAKEN = ("auto", "all", *WORDLESS, "noun-phrases", "pool-strings")
"""Names that mean something else among voters and proposers; "reading.NAME" and the like: those of one model."""


class _Settings(BaseModel):
    # strict: "8" and true are no numbers; an integer may stand where a number is asked for
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _frozen_lists(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


def _without_secrets(value: str | None) -> str | None:
    """A source or URL as it is; what it says is written into reports, so it must not hold a key."""
    if value is not None and re.search(r"://(?:[^/]*@|[^?#]*[?#])", value):
        raise ValueError("a URL with a user name, a password or a query is not taken; give the key by OPENAI_API_KEY")
    return value


class MemberConfig(_Settings):
    """A member: a model and the wording of its questions.

    name: lower-case, its own among the members; votes and reports are under it. source: hub id, folder, GGUF file,
    embedded:NAME or openai:MODEL[@URL]. variant: how it is asked for labels; "list" goes on in the form of the
    demonstrations, "ask" puts the question in plain words, "define" writes the labels' definitions above.

    chat: ask within the model's chat template, or let the model continue the plain text. "auto" takes the template
    where a model has one, but for the embedded model, which follows demonstrations far better without: it named 74%
    of the labels of 86 gold spans of WNUT17 dev (60 sentences, wording "list", 4 demonstrations), with it 22%, where
    always saying "person" would name 48%.

    quantization: load the weights in 8 or 4 bits, by bitsandbytes. adapter: the folder of a PEFT adapter; members of
    one source share its weights whatever their adapters.
    """

    name: str = Field(pattern=r"^[a-z0-9._-]+$")
    source: str = Field(min_length=1)
    variant: Variant = "list"
    chat: Literal["auto"] | bool = "auto"
    quantization: Literal["none", "8bit", "4bit"] = "none"
    adapter: str | None = Field(default=None, min_length=1)

    @field_validator("source")
    @classmethod
    def _plain_url(cls, value: str) -> str:
        return _without_secrets(value) or value

    @property
    def model(self) -> str:
        """The source with its adapter, as NAME=SOURCE+ADAPTER has it."""
        return self.source if self.adapter is None else f"{self.source}+{self.adapter}"


class RetrieveConfig(_Settings):
    """Stage 1, demonstrations.

    by: "spans" is the method's own, by span similarity; the others are there to be compared with: "sentence" (cosine of
    sentence embeddings), "bm25" (shared words) and "random".
    spans: whose spans of the input are compared: "members" asks every member zero-shot, as published; "proposers"
    takes noun phrases and pool strings, which costs no generation. On the pool side the spans are the gold entities,
    as in the public re-implementation. pos_of: the word whose part of speech weighs a span. k: demonstrations of a
    sentence. approximate: in pools of 200,000 entities and more, FAISS proposes the sentences that are compared, which
    is faster where many entities are alike, and may overlook a better one; else all are compared.
    """

    k: int = Field(default=4, ge=0, le=64)
    by: Literal["spans", "sentence", "bm25", "random"] = "spans"
    spans: Literal["members", "proposers"] = "proposers"
    pos_of: Literal["first", "max", "last"] = "max"
    approximate: bool = False


class ExtractConfig(_Settings):
    """Stage 2, candidate spans. Every switch is one proposer; `grounded` keeps members to substrings of the text.

    reading_floor: the reading and the tagging voter propose spans whose probability of being an entity is at least
    this. phrase_floor: where one of them is asked, noun phrases that all that are give less than this are not pursued;
    string_floor: the same for pool strings, which are also common words that were a name once.
    """

    members: bool = True
    grounded: bool = True
    noun_phrases: bool = True
    pool_strings: bool = True
    reading: bool = True
    reading_floor: float = Field(default=0.02, gt=0, lt=1)
    phrase_floor: float = Field(default=0.02, ge=0, lt=1)
    string_floor: float = Field(default=0.005, ge=0, lt=1)
    max_new_tokens: int = Field(default=64, ge=1)


class ClassifyConfig(_Settings):
    """Stage 3. by: score the labels as choices, or generate them.

    calibrate: contextual calibration of choices. Off: on dev it lowered the share of gold spans that the embedded
    members label rightly, from 0.74, 0.69, 0.66 to 0.53, 0.58, 0.37 on WNUT17 (86 spans; wordings list, ask, define)
    and from 0.65 to 0.55 on CrossNER AI (190 spans; list; 0.53 to 0.54 for ask), and the stack weighs labels anyway.

    combine: "stack" fits on the pool how much each voter counts; "equal" averages; "majority" counts first choices.
    list_labels: write the label set into a prompt that generates labels.
    """

    by: Literal["choice", "generation"] = "choice"
    calibrate: bool = False
    combine: Literal["stack", "equal", "majority"] = "stack"
    list_labels: bool = True


class VerifyConfig(_Settings):
    """Stage 4. by "choice": the verifier's yes/no odds; what to reject is fitted on the pool where one is stacked.

    by "generation": true or false is written, false is dropped. member: who verifies; the first unless named, and then
    only where its verdicts bring something on the pool, or voters are not chosen there.
    """

    enabled: bool = True
    by: Literal["choice", "generation"] = "choice"
    member: str | None = None


class ReadingConfig(_Settings):
    """The reading voter, and the tagging voter: small heads over frozen hidden states, fitted on the pool.

    `context` and `negatives` are of the reading voter alone.

    depths: layers read, as shares of the model's depth. twice: the text is written twice and the second copy is read.
    encoder_depths: layers of the sentence encoder read beside the model; empty leaves the encoder out. shapes:
    capitals, digits and the like as features. context: the words beside a span count too. hidden: units of the hidden
    layers, 0 for linear heads. On dev, strict F1 of a linear read-out of one layer, of one hidden layer over it, and of
    one read-out with these layers and depths: CrossNER AI (100 pool sentences) 0.56, 0.57, 0.64; WNUT17 0.58, 0.59,
    0.63. decay: weight decay of the fit. dropout, feature_dropout: shares of hidden units and of feature values left
    out of a fitting step (of the features as noise of that size). directions: principal directions kept of each layer
    that is read, 0 for all features as they are. 128 of them fit about twice as fast and lose nothing (dev, three
    heads, two seeds, best threshold: 0.636 for 0.625 on 200 sentences of CrossNER AI, 0.608 for 0.600 on 400 of WNUT17
    with 1,000 pool sentences). negatives: share of the non-entities that a fitting step looks at. builtin: a fit on a
    small pool begins at the read-outs of the built-in pool, or that pool is fitted beside it under its own labels (see
    `stack.shipped`): what an entity looks like carries over (beside, dev, two heads: 0.644 to 0.657 on WNUT17, 0.619 to
    0.638 on CrossNER AI). heads: read-outs, or chains of tags, fitted from different starts, whose probabilities are
    averaged (WNUT17 dev, all features: 0.643 with three, 0.650 with five). swaps: copies with mentions swapped
    (`voters.swapping`) that a small pool gets to be fitted on too, 2 to 4 a sentence; a pool with more sentences with
    entities than half of it gets none. Dev, three heads, best threshold, with 0, 2, 4 and 8 copies a sentence: 0.639,
    0.648, 0.654, 0.656 on CrossNER AI (three seeds); 0.596, 0.608, 0.594 on WNUT17 from 1,000 pool sentences with 0, 2
    and 4; 0.640, 0.643, 0.643 on WNUT17 from all with 0, 1 and 2. max_words: longest span, None for what the pool needs
    (to 12). max_text_tokens: a text is read up to there.
    """

    depths: tuple[float, ...] = (0.2, 0.3, 0.4, 0.53)
    twice: bool = True
    encoder_depths: tuple[float, ...] = (0.34, 0.67, 1.0)
    shapes: bool = True
    context: bool = True
    hidden: int = Field(default=128, ge=0, le=4096)
    directions: int = Field(default=128, ge=0, le=8192)
    decay: float = Field(default=0.05, ge=0)
    dropout: float = Field(default=0.2, ge=0, lt=1)
    feature_dropout: float = Field(default=0.3, ge=0, lt=1)
    negatives: float = Field(default=0.3, gt=0, le=1)
    heads: int = Field(default=5, ge=1, le=16)
    builtin: bool = True
    swaps: int = Field(default=800, ge=0)
    max_words: int | None = Field(default=None, ge=1, le=32)
    max_text_tokens: int = Field(default=510, ge=16)

    @field_validator("depths", "encoder_depths")
    @classmethod
    def _shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 <= share <= 1 for share in value):
            raise ValueError("every depth is a share between 0 and 1")
        return value

    @field_validator("depths")
    @classmethod
    def _some(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value:
            raise ValueError("no layer is read; name one depth, or leave the voters `reading` and `tagging` out")
        return value


class RetrievalConfig(_Settings):
    """The retrieval voter: labels of the nearest pool strings, weighted exp(sharpness * cosine).

    neighbours: how many of them count.
    """

    neighbours: int = Field(default=20, ge=1)
    sharpness: float = Field(default=20.0, gt=0)


class ProbingConfig(_Settings):
    """The probing voter: the model's state behind a question about a span, read by a small probe fitted on the pool.

    depths: layers read, as shares of the model's depth. directions: principal directions kept of each layer. hidden:
    units of the probe's hidden layer. decay, dropout: weight decay and the share of units left out, in its fit.
    heads: probes fitted from different starts. sample: about how many candidates of the pool are asked about, in
    sentences drawn from it; on the same ones the stack of everybody is fitted then.
    """

    depths: tuple[float, ...] = (0.6, 0.8)
    directions: int = Field(default=128, ge=0, le=8192)
    hidden: int = Field(default=128, ge=1, le=4096)
    decay: float = Field(default=0.1, ge=0)
    dropout: float = Field(default=0.3, ge=0, lt=1)
    heads: int = Field(default=5, ge=1, le=16)
    sample: int = Field(default=8000, ge=20)


class StackConfig(_Settings):
    """What is estimated on the pool. Below `min_sentences` nothing is fitted and all voters count alike.

    folds: parts of the pool that are left out in turn; a pool of 300 sentences or more gets at most 3, of 4,000 or
    more 2, since fits are dear there and a part of it is plenty to fit on. With 2 the probing voter is fitted only
    where `voters` names it or says all.
    audition: pool sentences on which prompted voters are tried first; those that do not help there, or on the first
    third of them, are not asked.
    sample: pool sentences on which prompted voters are stacked once they are asked.
    shipped: for the built-in pool and the default settings, take the fit that comes with the package; on other pools
    begin the fits of reading and tagging voters there, instead of fitting the built-in pool beside them.
    """

    min_sentences: int = Field(default=20, ge=1)
    folds: int = Field(default=5, ge=2, le=20)
    audition: int = Field(default=24, ge=4)
    sample: int = Field(default=100, ge=4)
    shipped: bool = True


class ServerConfig(_Settings):
    """How members behind a server (`openai:MODEL`, `openai:MODEL@URL`) are asked.

    base_url, api_key: else OPENAI_BASE_URL and OPENAI_API_KEY. The key is written into no report, cache or message.
    timeout_s: for one request. retries: further tries, with pauses that double, or as long as the server asks.
    concurrency: requests under way at once. max_requests, max_tokens: the budget of a run, the preparation included;
    what comes after it fails. context_tokens: longest prompt with reply where the server does not say.
    choices: how choices are scored; "auto" for the first of echo, listed, schema, answer that the server offers
    (el4ner/engines/openai.py says what they are). extra: fields added to every request, for instance
    {chat_template_kwargs: {enable_thinking: false}} for a model that would think first.
    """

    base_url: str | None = None
    api_key: SecretStr | None = None
    timeout_s: float = Field(default=120.0, gt=0, le=3600)
    retries: int = Field(default=5, ge=0, le=20)
    concurrency: int = Field(default=8, ge=1, le=256)
    max_requests: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    context_tokens: int | None = Field(default=None, ge=256)
    choices: Literal["auto", "echo", "listed", "schema", "answer"] = "auto"
    extra: dict[str, Any] = Field(default_factory=dict)

    @field_validator("base_url")
    @classmethod
    def _plain_url(cls, value: str | None) -> str | None:
        if value and not re.match(r"https?://[^/\s]", value):  # not quoted: it may hold a key
            raise ValueError("give a URL that begins with http:// or https://, as http://localhost:8000/v1 does")
        return _without_secrets(value)


class Config(_Settings):
    """All settings of a run. Members that share a source share one set of weights.

    preset: what the settings start from. voters: "auto" for those that help on the pool, "all", or names. encoder: the
    sentence encoder, for demonstrations, retrieval, reading and tagging voter. examples, labels, and folders of models:
    relative to where the command runs, in a settings file too. device: "auto", "cpu", "mps", "cuda" or "cuda:N". dtype:
    "auto" takes what the device is fastest in. memory_limit_mib: most memory on the device; models that do not fit
    together within it take turns. None: what is free there. batch_size: texts taken in at a time. seed: of samples and
    fits. min_score: least score that is kept; None for what was best on the pool. target_precision: the share of what
    is kept that is to be right, instead. overlap: "flat" for the best entities without overlaps, or "nested".
    max_prompt_tokens: most tokens of demonstrations and sentence; the least similar that do not fit are left out.
    """

    preset: Literal["default", "paper"] = "default"
    members: tuple[MemberConfig, ...] = (
        MemberConfig(name="smollm2-list", source="embedded:smollm2", variant="list"),
        MemberConfig(name="smollm2-ask", source="embedded:smollm2", variant="ask"),
        MemberConfig(name="smollm2-define", source="embedded:smollm2", variant="define"),
    )
    voters: Literal["auto", "all"] | tuple[str, ...] = "auto"
    encoder: str = Field(default="embedded:minilm", min_length=1)
    examples: str | None = Field(default=None, min_length=1)
    labels: str | None = Field(default=None, min_length=1)
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    memory_limit_mib: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=128, ge=1, le=4096)
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    min_score: float | None = Field(default=None, ge=0, le=1)
    target_precision: float | None = Field(default=None, gt=0, lt=1)
    overlap: Literal["flat", "nested"] = "flat"
    max_prompt_tokens: int = Field(default=900, ge=64)
    retrieve: RetrieveConfig = RetrieveConfig()
    extract: ExtractConfig = ExtractConfig()
    classify: ClassifyConfig = ClassifyConfig()
    verify: VerifyConfig = VerifyConfig()
    reading: ReadingConfig = ReadingConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    probing: ProbingConfig = ProbingConfig()
    stack: StackConfig = StackConfig()
    server: ServerConfig = ServerConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        names = [member.name for member in self.members]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"members: {', '.join(repeated)} named twice; every member needs its own name")
        taken = [name for name in names if name in _TAKEN or name.startswith(("reading.", "tagging.", "probing."))]
        if taken:
            raise ValueError(f"members: {taken[0]!r} is the name of a voter or proposer; choose another")
        known = [*WORDLESS, *names]
        if isinstance(self.voters, tuple):
            if not any(self.voters):
                raise ValueError("voters: none named; choose auto, all or a list of names")
            if "" in self.voters:
                raise ValueError("voters: a name is empty; write names only, with one comma between two of them")
            for voter in self.voters:
                if voter not in known:
                    raise ValueError(f"voters: {voter!r} is unknown; choose auto, all or from {', '.join(known)}")
            twice = [voter for voter in known if self.voters.count(voter) > 1]
            if twice:
                raise ValueError(f"voters: {', '.join(twice)} named twice; name every voter once")
        if self.min_score is not None and self.target_precision is not None:
            raise ValueError("min_score and target_precision both say what is left out; give one of them")
        who = self.extract
        if not (who.members or who.noun_phrases or who.pool_strings or who.reading):
            raise ValueError("extract: nobody proposes spans; leave members, noun_phrases, pool_strings or reading on")
        if self.verify.member is not None and self.verify.member not in names:
            raise ValueError(f"verify.member: {self.verify.member!r} is no member; choose from {', '.join(names)}")
        if self.preset == "paper":
            self._only_prompts()
        return self

    def _only_prompts(self) -> None:
        if not self.members:
            raise ValueError("members: the paper preset needs at least one")
        others = [v for v in self.voters if v in WORDLESS] if isinstance(self.voters, tuple) else []
        if others:
            raise ValueError(f"voters: the paper preset has prompted members only, not {', '.join(others)}")
        if self.classify.combine == "stack":
            raise ValueError(
                "classify.combine: the paper preset fits nothing, so there is no stack; choose majority or equal, "
                "or preset default"
            )
        if self.extract.reading:
            raise ValueError(
                "extract.reading: the paper preset has no reading voter; leave it out, or choose preset default"
            )


PAPER: Mapping[str, Any] = {
    "voters": "all",
    "retrieve": {"k": 5, "spans": "members", "pos_of": "first"},
    "extract": {"grounded": False, "noun_phrases": False, "pool_strings": False, "reading": False},
    "classify": {"by": "generation", "calibrate": False, "combine": "majority", "list_labels": False},
    "verify": {"by": "generation"},
}
"""What the paper preset changes. Free generation, majority vote, ties to the earlier member, true/false verification
and span-level retrieval are published. k=5, the first word's part of speech, gold spans on the pool side and prompts
that do not list the labels follow a public re-implementation (https://github.com/qing10101/el4ner_scu) and were not
checked against the paper."""


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, mapping by mapping; anything else is replaced whole."""
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged


def settings_of(config: Config, preset: str) -> dict[str, Any]:
    """What was set in a Config, as plain data; without what came from its own preset where another is wanted."""
    data = config.model_dump(exclude_unset=True)
    return data if preset == config.preset or config.preset != "paper" else _less(data, PAPER)


def _less(data: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """`data` without the values that are those of `base`, mapping by mapping."""
    left = {}
    for key, value in data.items():
        given = base.get(key)
        if isinstance(value, Mapping) and isinstance(given, Mapping):
            left[key] = _less(value, given)
        elif key not in base or value != given:
            left[key] = value
    return left


def parse_members(values: Sequence[str]) -> list[dict[str, str]]:
    """`NAME=SOURCE` or `NAME=SOURCE+ADAPTER` strings -> member settings. Raises ConfigError for anything else.

    A plus sign belongs to the source where that is a path that exists, or a server.
    """
    members = []
    for value in values:
        name, equals, source = value.partition("=")
        if not equals or not name or not source:
            raise ConfigError(f"member {value!r}: write NAME=SOURCE, for example qwen=Qwen/Qwen2.5-1.5B-Instruct")
        model, plus, adapter = source.rpartition("+")
        server = source.startswith(("openai:", "http:", "https:"))
        # not pathlib's, which raises for a name that is too long
        whole = not plus or not model or server or os.path.exists(source)  # noqa: PTH110
        members.append({"name": name, "source": source} if whole else _adapted(name, model, adapter))
    return members


def _adapted(name: str, source: str, adapter: str) -> dict[str, str]:
    if not adapter:
        raise ConfigError(f"member {name!r}: no adapter behind the plus sign; write NAME=SOURCE+FOLDER")
    return {"name": name, "source": source, "adapter": adapter}


def _read_file(path: str) -> tuple[dict[str, Any], Lines]:
    from el4ner.documents import DocumentError, lines_of, read_json, read_yaml

    if not path:
        raise ConfigError("config: the name of the settings file is empty; name a file, or - for stdin")
    name = display_name(path)
    try:
        text = read_text(path)
        data, node = read_json(text) if path.endswith(".json") else read_yaml(text)
    except InputError as error:
        raise ConfigError(str(error)) from None
    except DocumentError as error:
        raise ConfigError(error.at(name)) from None
    if not isinstance(data, dict):
        came = "nothing" if data is None else kind(data)
        raise ConfigError(f"{name}: holds {came}, not a mapping of settings; write lines such as `batch_size: 64`")
    return data, lines_of(node)


def make_config(data: Mapping[str, Any], origin: str = "settings", lines: Lines | None = None) -> Config:
    """Settings from plain data over their preset. Raises ConfigError, naming `origin`, the setting and the remedy.

    lines: where in `origin` a setting stands.
    """
    data = dict(data)
    keys: list[Any] = list(data)  # YAML reads 5 and true as keys too
    for key in keys:
        if not isinstance(key, str):
            raise ConfigError(f"{origin}: setting {shown(key)} is {kind(key)}; settings have names")
    if isinstance(data.get("voters"), str) and data["voters"] not in ("auto", "all"):
        data["voters"] = [name.strip() for name in data["voters"].split(",")]
    base = PAPER if data.get("preset") == "paper" else {}
    try:
        return Config.model_validate(merge(base, data))
    except ValidationError as error:
        raise explain(error, Config, origin, lines) from error


def load_config(path: str | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Settings from a YAML or JSON file (or none) under `overrides`, the values given on the command line.

    `members` among the overrides may be NAME=SOURCE strings. Raises ConfigError.
    """
    data, lines = _read_file(path) if path is not None else ({}, None)
    over = dict(overrides or {})
    members = over.get("members")
    if isinstance(members, list | tuple) and all(isinstance(member, str) for member in members):
        over["members"] = parse_members(members)
    if members is None:
        over.pop("members", None)

    def own_line(location: Sequence[int | str]) -> int | None:
        """Not for a setting that the command line overrode."""
        return None if lines is None or (location and location[0] in over) else lines(location)

    return make_config(merge(data, over), "settings" if path is None else display_name(path), own_line)


def fingerprint(config: Config, *parts: str) -> str:
    """Canonical JSON of the named parts of the settings, for cache keys."""
    data = config.model_dump(mode="json")
    return json.dumps({part: data[part] for part in parts}, sort_keys=True)
