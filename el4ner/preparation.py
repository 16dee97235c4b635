"""From settings to a team: load what is needed, fit on the pool what is fitted, decide who is asked.

    pool -> reading and tagging voter (cross-fitted) -> candidates of the pool sentences -> retrieval voter (fold left
         out) -> their stack, threshold -> audition of the prompted members -> stack of everybody, verifier's weights

Everything said about a pool sentence comes from models of the other folds. What is slow is cached by content.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from el4ner.cache import ArrayCache, cache_root
from el4ner.config import WORDLESS, Config, MemberConfig
from el4ner.engines import Encoder, Engine, load_encoder, load_engine
from el4ner.engines.residency import Residency
from el4ner.engines.server import Budget, ServerSettings
from el4ner.errors import ConfigError
from el4ner.models import known_names, prefers_chat, resolve
from el4ner.operating import Decided, best_threshold, threshold_for
from el4ner.plan import Plan, check_fits, instruction_tokens, make_plan, mib, process_bytes
from el4ner.pool import Pool, load_pool
from el4ner.shipped import shipped_fit, shipped_start
from el4ner.stages.extract import free_proposals, unite
from el4ner.stages.retrieve import Retriever
from el4ner.stages.team import Team
from el4ner.voters.features import FeatureReader
from el4ner.voters.probing import ProbingVoter
from el4ner.voters.prompting import PAPER_SETTINGS, MemberSettings, PromptedMember, Style
from el4ner.voters.reading import Kind, ReadingVoter, Start
from el4ner.voters.retrieval import RetrievalVoter

Progress = Callable[[str], None]


_BESIDE = 600
"""Sentences of the built-in pool for every so many of another one, rounded up."""

_TAGGED = 600
"""Sentences of the largest pool that does without a tagging voter: it helped on 3,394 and more, not on 100 and 200;
between them nothing was measured."""

TIE_TOLERANCE = {"bfloat16": 0.02, "float16": 0.005}
"""How far the neighbours in a batch may move a probability, by rounding in reduced precision."""


def style_of(config: Config) -> MemberSettings:
    """How the settings ask their members."""
    base = PAPER_SETTINGS if config.preset == "paper" else MemberSettings()
    return replace(
        base, grounded=config.extract.grounded, classify_by=config.classify.by, verify_by=config.verify.by,
        calibrate=config.classify.calibrate, list_labels=config.classify.list_labels,
        max_new_tokens=config.extract.max_new_tokens, max_prompt_tokens=config.max_prompt_tokens,
    )  # fmt: skip


class Preparation:
    """Builds a `Team` for settings. Models load when the first step needs them.

    engines, encoder: what to use instead of loading, by source; for tests and for callers who hold models already.
    """

    def __init__(
        self, config: Config, *, engines: dict[str, Engine] | None = None, encoder: Encoder | None = None,
        pool: Pool | None = None, progress: Progress | None = None,
    ) -> None:  # fmt: skip
        self.config = config
        self.progress: Progress = progress or (lambda _: None)
        self.cache = ArrayCache(cache_root() / "pools")
        self.notes: list[str] = []
        self._memory_notes: list[str] = []
        self.facts: dict[str, object] = {}
        self.threshold = 0.0
        self.points: NDArray[np.float64] | None = None
        self._engines = engines or {}
        self._loaded: dict[tuple[str, bool, str, str | None], Engine] = {}
        self._encoder = encoder
        self._pool = pool
        self._process: int | None = None

    def engine(
        self, source: str, chat: Literal["auto"] | bool = "auto", *, quantization: str | None = None,
        adapter: str | None = None,
    ) -> Engine:  # fmt: skip
        """The engine of a source, loaded once; engines with and without chat template or adapter share their weights.

        quantization: None for what the first member of that source has. Raises ConfigError for an adapter of a server.
        """
        named = source if adapter is None else f"{source}+{adapter}"
        if named in self._engines:
            return self._engines[named]
        templated = prefers_chat(source) if chat == "auto" else chat
        if quantization is None:
            quantization = next((m.quantization for m in self.config.members if m.source == source), "none")
        key = (source, templated, quantization, adapter)
        if key not in self._loaded:
            self.progress(f"loading {named}")
            options: dict[str, Any] = {}
            if resolve(source).kind != "server":
                self._process = self._process or process_bytes()
                options = {"quantization": quantization, "residency": self.residency, "adapter": adapter}
                if self.plan is not None:
                    options["prefix_cache_bytes"] = self.plan.cache_limit
                    options["forward_tokens"] = self.plan.forward_tokens
            elif adapter is not None:
                raise ConfigError(f"model {source!r} is a server: it has no weights here that adapter {adapter!r} fits")
            else:
                options = self.server_options
            self._loaded[key] = load_engine(
                source, device=self.config.device, dtype=self.config.dtype, chat=templated, **options
            )
        return self._loaded[key]

    @cached_property
    def server_options(self) -> dict[str, Any]:
        """How members behind servers are asked, and the budget that they share."""
        server = self.config.server
        values = {name: getattr(server, name) for name in type(server).model_fields}
        values["api_key"] = server.api_key.get_secret_value() if server.api_key is not None else None
        settings = ServerSettings(**values)
        return {"settings": settings, "budget": Budget(settings.max_requests, settings.max_tokens)}

    @cached_property
    def residency(self) -> Residency:
        """Who is in memory: all models where they fit by prediction, else they take turns."""
        plan = self.plan
        return Residency() if plan is None else Residency(plan.models_limit, plan.largest_cache)

    @cached_property
    def plan(self) -> Plan | None:
        """The memory plan, made where there is something to decide: several models, or a limit.

        Raises ConfigError where one alone does not fit the memory limit of the settings.
        """
        config = self.config
        members = [member for member in config.members if member.model not in self._engines]
        weights = {(m.source, m.quantization) for m in members if resolve(m.source).kind != "server"}
        if config.memory_limit_mib is None and len(weights) < 2:
            return None
        plan = make_plan(config, members, self._process)
        check_fits(plan)
        if plan.mode != "resident":
            self._memory_notes.append(
                f"the models take about {mib(plan.resident)} MiB together, {mib(plan.available or 0)} MiB are there: "
                "they take turns"
            )
        return plan

    def predicted(self) -> Plan | None:
        """The memory plan of the models that were loaded; None where none was."""
        loaded = {(source, quantization, adapter) for source, _, quantization, adapter in self._loaded}
        members = [m for m in self.config.members if (m.source, m.quantization, m.adapter) in loaded]
        return make_plan(self.config, members, self._process) if members else None

    def at_once(self, team: Team) -> int:
        """Sentences that go through the stages together: those whose prefixes the engines of the members asked keep.

        A later stage then finds them computed. Where models take turns they lose them anyway, and larger chunks mean
        fewer turns.
        """
        config = self.config
        engines = [member.engine for member in team.asked_members]
        room = [int(engine.prefix_tokens) for engine in engines if hasattr(engine, "prefix_tokens")]
        if not room or self.residency.limit_bytes is not None:
            return config.batch_size
        # the instruction for each of them: a prefix may hold its columns too
        longest = config.max_prompt_tokens + instruction_tokens(config)
        return max(1, min(config.batch_size, min(room) // longest))

    def engine_notes(self) -> list[str]:
        """How models and engines run here, whatever was fitted when; each note once."""
        engines = [*self._engines.values(), *self._loaded.values()]
        own = [note for engine in engines for note in getattr(engine, "notes", ())]
        return list(dict.fromkeys(self._memory_notes + own))

    def encoder(self) -> Encoder:
        """The sentence encoder, loaded once."""
        if self._encoder is None:
            self.progress(f"loading {self.config.encoder}")
            self._process = self._process or process_bytes()
            self._encoder = load_encoder(self.config.encoder, device=self.config.device, dtype=self.config.dtype)
        return self._encoder

    def team(self) -> Team:
        """The whole preparation. Raises InputError for a bad pool, EngineError for a model that does not load."""
        config = self.config
        self._check_members()
        pool = self._pool or load_pool(config.examples, config.labels, config.stack.folds)
        self._check_classes(pool)
        team = Team(config, pool)
        # what is fitted is judged on other folds, so there must be two; copies of one text share a fold
        enough = len(pool.sentences) >= config.stack.min_sentences and len(set(pool.folds)) > 1
        stacked = config.classify.combine == "stack" and enough
        if stacked:
            self._fitted(team)
        else:
            self._unfitted(team)
        if pool.second_labels:
            self.notes.append(f"{pool.second_labels} pool spans have a second label, which does not count")
        models = [*self._engines.values(), *self._loaded.values(), self._encoder]
        dtypes = (str(getattr(model, "dtype", "")).rpartition(".")[2] for model in models)
        team.tie_tolerance = max((TIE_TOLERANCE.get(dtype, 0.0) for dtype in dtypes), default=0.0)
        return team

    def _fitted(self, team: Team) -> None:
        """What is estimated on the pool, now or in an earlier run."""
        from el4ner.choosing import choose
        from el4ner.examining import examine
        from el4ner.fitted import fitted_arrays, fitted_key, restore

        key = fitted_key(self, team)
        stored = self.cache.get(key) or shipped_fit(self, team)
        if stored is not None:
            restore(self, team, stored)
        else:
            examined = choose(self, team, examine(self, team))
            if self.wanted_members():
                from el4ner.audition import audition

                audition(self, team, examined)
            if not team.asked:
                raise ConfigError(
                    f"voters={self._voters} leaves nobody to ask: no model among the members can be read; name "
                    "other voters, or a local model as a member"
                )
            verify = self.config.verify
            if verify.enabled and verify.member is not None and team.verifier is None:
                self.notes.append(f"{verify.member} is not asked to verify: no prompted member is asked")
            self.cache.put(key, fitted_arrays(self, team))
        self._cut(team)

    def _cut(self, team: Team) -> None:
        """The threshold: what the settings say, or ask for, else what was best on the pool."""
        config = self.config
        if team.stack is not None:
            team.reference = self.threshold
        team.threshold = self.threshold if config.min_score is None else config.min_score
        if config.target_precision is not None:
            team.threshold, self.facts["operating point"] = threshold_for(self.points, config.target_precision)

    def _check_members(self) -> None:
        """A model that is not there is said before work begins, though nobody may ask it; what is installed by name is
        looked for when it is needed."""
        for member in self.config.members:
            if member.source not in known_names() and not {member.source, member.model} & {*self._engines}:
                resolve(member.source)

    def _check_classes(self, pool: Pool) -> None:
        if not pool.labels:
            raise ConfigError("no labels: the pool has no entities and no labels file is given; give --labels FILE")

    # Who may be asked

    def wants(self, name: str) -> bool:
        """Whether the settings allow a voter to be asked; the paper preset has prompted members only."""
        voters = self.config.voters
        if self.config.preset == "paper" and name in WORDLESS:
            return False
        return voters in ("auto", "all") or name in voters

    def wants_tagging(self, pool: Pool) -> bool:
        """Whether tagging voters are fitted on a pool: not on a small one, unless the settings ask for them.

        Its tags agree with one another where the read-out judges span by span, so the two err differently. Strict F1
        on dev, one fit each, best threshold, spans, tags and both averaged: 0.660, 0.668 and 0.671 on WNUT17 (3,394 in
        the pool), 0.876, 0.878 and 0.882 on MIT movie (4,995; 1,500 others of its train set), 0.755, 0.744 and 0.760
        on GENIA (5,000, nested), but 0.641, 0.630 and 0.640 on CrossNER AI (100), 0.738, 0.727 and 0.741 on politics
        (200; bench/TRIALS.md).
        """
        return self.wants("tagging") and (self.config.voters != "auto" or len(pool.sentences) > _TAGGED)

    def wants_probing(self, pool: Pool) -> bool:
        """Whether probing voters are fitted on a pool: not in two folds, unless the settings ask for them.

        There the reading voter that others are weighed against has learned from half of the pool, which flatters a
        voter that learns from a drawn part anyway. GENIA, 5,000 sentences: on the pool +0.006 in F1, on 1,000 dev
        sentences -0.005, where the retrieval voter, whose strings are halved too, brings +0.007 (bench/TRIALS.md).
        """
        return self.wants("probing") and (self.config.voters != "auto" or pool.n_folds > 2)

    def wanted_members(self) -> list[MemberConfig]:
        """Prompted members that the settings allow to be asked."""
        return [member for member in self.config.members if self.wants(member.name)]

    def members(self, pool: Pool, wanted: Sequence[MemberConfig]) -> tuple[PromptedMember, ...]:
        """Prompted members for settings; members of one source and adapter share an engine."""
        style = style_of(self.config)
        kind: Style = "paper" if self.config.preset == "paper" else "default"
        made = []
        for m in wanted:
            engine = self.engine(m.source, m.chat, quantization=m.quantization, adapter=m.adapter)
            made.append(PromptedMember(m.name, engine, m.variant, pool.labels, kind, style))
        return tuple(made)

    def retrieval_voter(self, pool: Pool) -> RetrievalVoter:
        """The retrieval voter, not fitted yet."""
        return RetrievalVoter(self.encoder(), pool.label_names, self.config.retrieval, self.cache)

    def retriever(self, pool: Pool) -> Retriever | None:
        """Finds demonstrations; None for a pool without sentences."""
        if not pool.sentences:
            return None
        return Retriever(pool, self.encoder(), self.config.retrieve, self.cache, self.config.seed)

    def verifier(self, team: Team) -> PromptedMember | None:
        """Who verifies: the named member, else the first that is asked; None where prompting nobody."""
        config = self.config
        if not config.verify.enabled or (config.verify.member is None and not team.asked_members):
            return None
        name = config.verify.member or team.asked_members[0].name
        known = {member.name: member for member in team.members}
        if name not in known:
            known |= {m.name: m for m in self.members(team.pool, [c for c in config.members if c.name == name])}
        return known[name]

    # Without a fit

    def _unfitted(self, team: Team) -> None:
        """All voters count alike: the paper preset, a small pool, or no pool at all."""
        config, pool = self.config, team.pool
        team.members = self.members(pool, self.wanted_members())
        team.retriever = self.retriever(pool) if team.members else None
        asked = [member.name for member in team.members]
        if pool.sentences and self.wants("retrieval"):
            team.retrieval = self.retrieval_voter(pool)
            proposed = [
                [c.span for c in unite(free_proposals(s, team, fold))]
                for s, fold in zip(pool.as_sentences(range(len(pool.sentences))), pool.folds, strict=True)
            ]
            team.retrieval.fit(pool, proposed)
            asked.append(team.retrieval.name)
        if not asked:
            raise ConfigError(
                f"voters={self._voters} with {len(pool.sentences)} pool sentences{self._too_few(pool)} leaves nobody "
                f"to ask: the reading, tagging and probing voters need {config.stack.min_sentences} and "
                "classify.combine: stack, the retrieval voter 1; name members or give more examples"
            )
        team.asked = tuple(asked)
        self._cut(team)
        team.verifier = self.verifier(team)
        named = config.voters if isinstance(config.voters, tuple) else ()
        silent = [name for name in ("reading", "tagging", "probing") if name in named]
        self.facts |= {
            "calibrated": False, "why nothing was fitted": self._too_few(pool), "named, but not asked": silent,
        }  # fmt: skip
        self.notes += [f"the {name} voter is named, but not asked: there is none without a fit" for name in silent]
        if config.preset != "paper":
            self.notes.append(
                f"{len(pool.sentences)} pool sentences{self._too_few(pool)}: nothing was fitted, voters count alike, "
                "scores are uncalibrated"
            )

    @property
    def _voters(self) -> str:
        """The setting as the command line has it."""
        voters = self.config.voters
        return voters if isinstance(voters, str) else ",".join(voters)

    def _too_few(self, pool: Pool) -> str:
        """Why nothing is fitted, where it is not that they are few."""
        enough = len(pool.sentences) >= self.config.stack.min_sentences
        return ", all in one fold" if enough and len(set(pool.folds)) == 1 else ""

    # With a fit

    @cached_property
    def _builtin(self) -> Pool:
        return load_pool(None, None, self.config.stack.folds)

    def beside(self, pool: Pool) -> Pool | None:
        """The built-in pool to fit beside another one, without the texts they share: those would give folds away.

        Beside a small pool a part of it, `_BESIDE` sentences for every `_BESIDE` of the pool, rounded up: it has to be
        read and fitted too, and little is gained. In single fits beside 100 sentences of CrossNER AI, 1,880 gave 0.651
        and 0.653 on dev (two seeds), 541 gave 0.650 twice; beside 3,394 of WNUT17, 0.656 and 0.660 against 0.642 and
        0.650.
        """
        if not self.config.reading.builtin:
            return None
        builtin = self._builtin
        most = max(1, -(-len(pool.sentences) // _BESIDE)) * _BESIDE
        known = {d.text for d in pool.sentences}
        others = tuple(d for d in (builtin.sentences[i] for i in builtin.sample(most)) if d.text not in known)
        return replace(builtin, sentences=others) if others else None

    def start(self, pool: Pool, voter: ReadingVoter) -> Start | None:
        """The read-outs of the built-in pool to begin at, instead of fitting that pool beside a small one; None where
        they do not fit, for a pool that has sentences of it, and for a large one.

        A fit takes half the time then, the built-in pool need not be read, and read-outs are no worse: strict F1 on dev
        (two seeds, best threshold), begun there 0.648 and 0.653 on CrossNER AI (350 sentences), 0.719 and 0.716 on
        politics (300, half as many steps); beside 0.649 and 0.641, 0.710 and 0.715. Of a large pool, 5,000 sentences
        of GENIA, 0.734 and beside 0.736 (400, one seed).
        """
        if len(pool.sentences) > _BESIDE or not self.config.stack.shipped or self.beside(pool) is None:
            return None
        builtin = {d.text for d in self._builtin.sentences}
        return None if any(d.text in builtin for d in pool.sentences) else shipped_start(voter)

    def readers(self, pool: Pool) -> tuple[ReadingVoter, ...]:
        """The reading and the tagging voter of each distinct model among the members, without their adapters.

        Those that the settings allow; the two of a model read a text once.
        """
        own, labels = self.config.reading, pool.label_names
        kinds: list[tuple[str, Kind]] = [("reading", "spans")] if self.wants("reading") else []
        kinds += [("tagging", "tags")] if self.wants_tagging(pool) else []
        voters: list[ReadingVoter] = []
        first: dict[int, ReadingVoter] = {}
        for kind, heads in kinds:
            for name, engine in self._readable(kind):
                other = first.get(id(engine))
                encoder = self.encoder() if own.encoder_depths else None
                reader = other.reader if other else FeatureReader(engine, encoder, own)
                voter = ReadingVoter(name, reader, labels, own, self.cache, self.config.seed, heads, other)
                first.setdefault(id(engine), voter)
                voters.append(voter)
        return tuple(voters)

    def probers(self, pool: Pool) -> tuple[ProbingVoter, ...]:
        """One probing voter per distinct model among the members, without their adapters."""
        own, labels = self.config.probing, pool.label_names
        return tuple(
            ProbingVoter(name, engine, labels, own, self.cache, self.config.seed)
            for name, engine in self._readable("probing")
        )

    def _readable(self, kind: str) -> Iterator[tuple[str, Engine]]:
        """The members' distinct models whose states can be read, and what a voter of this kind is called there."""
        sources = list(dict.fromkeys(member.source for member in self.config.members))
        for source in sources:
            first = next(member.name for member in self.config.members if member.source == source)
            engine = self.engine(source)
            if engine.n_layers:
                yield kind if len(sources) == 1 else f"{kind}.{first}", engine
                continue
            note = f"{source}: hidden states cannot be read there, so it has no reading, tagging or probing voter"
            self.notes += [note] if note not in self.notes else []

    def calibrate(self, team: Team, decided: Decided) -> Decided:
        """Fits the calibration of scores, and the threshold, to what a stack decides; that with calibrated scores."""
        decided = decided.calibrated()
        own = team.calibration = decided.calibration
        _, self.threshold = best_threshold(decided)
        team.threshold = self.threshold
        self.facts |= {
            "calibrated": True, "threshold": self.threshold,
            "calibration": {"slope": round(own.slope, 4), "shift": round(own.shift, 4)},
        }  # fmt: skip
        return decided
