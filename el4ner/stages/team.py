"""Who works on a run: members, voters, what was fitted on the pool, and who of them is asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from el4ner.calibration import Calibration
from el4ner.config import Config
from el4ner.pool import Pool
from el4ner.records import Usage
from el4ner.voters.probing import ProbingVoter
from el4ner.voters.prompting import ExtractedSpans, PromptedMember
from el4ner.voters.reading import ReadingVoter
from el4ner.voters.retrieval import RetrievalVoter
from el4ner.voters.stacking import Stack

if TYPE_CHECKING:
    from el4ner.stages.retrieve import Retriever


Costs: TypeAlias = "tuple[Counter[str], dict[str, dict[str, Counter[str]]]]"


@dataclass
class Team:
    """Everything the stages need; filled by `el4ner.preparation`, afterwards read-only but for `counts` and `tokens`.

    asked: names of the voters that are asked, in the order of the stack. stack: None where voters count alike.
    base: the stack of the voters that cost no prompts, which decides what members are asked about. threshold: least
    score that is kept. reference: the score at which a span is as good as none: the threshold chosen on the pool, or
    0.5. calibration: from what the stack says to scores. verifier_weights: fitted weights of score and verdict, None
    for a plain 0.5.
    tie_tolerance: how far rounding of the models may move a probability: 0 in float32.
    counts: what members' replies were like, tokens: what each stage cost each member; both for the run's report.
    """

    config: Config
    pool: Pool
    members: tuple[PromptedMember, ...] = ()
    readers: tuple[ReadingVoter, ...] = ()
    probers: tuple[ProbingVoter, ...] = ()
    retrieval: RetrievalVoter | None = None
    retriever: Retriever | None = None
    asked: tuple[str, ...] = ()
    stack: Stack | None = None
    base: Stack | None = None
    threshold: float = 0.0
    reference: float = 0.5
    calibration: Calibration = field(default_factory=Calibration)
    ask_floor: float = 0.05
    verifier: PromptedMember | None = None
    verifier_weights: tuple[float, float, float] | None = None
    tie_tolerance: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    tokens: dict[str, dict[str, Counter[str]]] = field(default_factory=dict)

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names in the order of every distribution."""
        return self.pool.label_names

    @property
    def asked_members(self) -> tuple[PromptedMember, ...]:
        """Members that are asked."""
        return tuple(member for member in self.members if member.name in self.asked)

    @property
    def asked_readers(self) -> tuple[ReadingVoter, ...]:
        """Reading and tagging voters that are asked."""
        return tuple(voter for voter in self.readers if voter.name in self.asked)

    @property
    def asked_probers(self) -> tuple[ProbingVoter, ...]:
        """Probing voters that are asked."""
        return tuple(voter for voter in self.probers if voter.name in self.asked)

    @property
    def asks_retrieval(self) -> bool:
        """Whether the retrieval voter is asked."""
        return self.retrieval is not None and self.retrieval.name in self.asked

    def spend(self, stage: str, member: str, usage: Iterable[Usage], computed: int) -> None:
        """Add what a member's part in a stage cost. computed: prompt tokens that were not shared with others."""
        tokens = self.tokens.setdefault(stage, {}).setdefault(member, Counter())
        for own in usage:
            tokens["prompt"] += own.prompt_tokens
            tokens["shared"] += own.prompt_tokens
            tokens["generated"] += own.generated_tokens
        tokens["shared"] -= computed

    def costs(self) -> Costs:
        """Counts and tokens so far, for `restore_costs`."""
        return deepcopy((self.counts, self.tokens))

    def restore_costs(self, costs: Costs) -> None:
        """Forget what was counted since."""
        self.counts, self.tokens = costs

    def count(self, member: str, listed: ExtractedSpans) -> None:
        """Add one reply to the counts."""
        self.counts[f"{member}: replies"] += 1
        self.counts[f"{member}: malformed"] += listed.malformed
        self.counts[f"{member}: cut off at the token limit"] += listed.truncated
        self.counts[f"{member}: surfaces not in the text"] += len(listed.absent)
        self.counts[f"{member}: demonstrations dropped for length"] += listed.dropped_demonstrations
