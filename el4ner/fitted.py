"""What was fitted on a pool, kept whole: a later start with the same pool, models and settings takes it from the cache.

Left out of the key: settings that nothing fitted depends on (batch size, device, least score).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from el4ner.cache import content_key
from el4ner.calibration import Calibration
from el4ner.engines.base import REPLY_VERSION, without_numbers
from el4ner.prompts import PROMPT_VERSION
from el4ner.stages.team import Team
from el4ner.voters.features import FEATURE_VERSION
from el4ner.voters.probing import PROBE_VERSION
from el4ner.voters.readout import READOUT_VERSION
from el4ner.voters.stacking import Stack
from el4ner.voters.tagging import TAGGER_VERSION

if TYPE_CHECKING:
    from el4ner.preparation import Preparation

FITTED_VERSION = 18
"""Raised whenever the same pool and settings would be fitted otherwise."""

_UNFITTED = {
    "batch_size", "device", "examples", "labels", "memory_limit_mib", "min_score", "server", "target_precision",
}  # fmt: skip


def fitted_key(preparation: Preparation, team: Team, *, portable: bool = False) -> str:
    """The cache key of everything that is fitted for a team; portable: whatever the device and the precision."""
    config = preparation.config
    settings = {k: v for k, v in config.model_dump(mode="json").items() if k not in _UNFITTED}
    settings["stack"].pop("shipped")
    for member in settings["members"]:
        if member["adapter"] is None:
            member.pop("adapter")
    settings["context_tokens"] = config.server.context_tokens  # what else a server is asked is in its source
    reads = preparation.wants("reading") or preparation.wants_tagging(team.pool)
    named = reads or preparation.wants("probing") or preparation.wanted_members()
    models = sorted({preparation.engine(m.source).source for m in config.members}) if named else []
    models += sorted({preparation.engine(m.source, adapter=m.adapter).source for m in config.members if m.adapter})
    encoder = preparation.encoder().source
    if portable:
        settings.pop("dtype")
        models, encoder = [without_numbers(source) for source in models], without_numbers(encoder)
    others = []  # what the reading and tagging voters are fitted with, besides the pool
    if not preparation.wants_probing(team.pool):
        settings.pop("probing")
    if reads:
        beside = preparation.beside(team.pool)
        starts = [preparation.start(team.pool, voter) for voter in preparation.readers(team.pool)]
        others = [start.key if start else beside.content if beside else "" for start in starts]
    versions: list[object] = [FITTED_VERSION, PROMPT_VERSION, FEATURE_VERSION, READOUT_VERSION, PROBE_VERSION]
    if preparation.wants_tagging(team.pool):
        versions.append(TAGGER_VERSION)
    if not portable:  # what proposes, constrains and tokenises; what ships asks no member
        versions += [
            REPLY_VERSION,
            *(version(name) for name in ("textblob", "llguidance", "tokenizers", "transformers")),
        ]
    return content_key("fitted", versions, team.pool.content, team.pool.n_folds, settings, models,
                       others, encoder)  # fmt: skip


def _pack(data: Any) -> NDArray[np.uint8]:
    return np.frombuffer(json.dumps(data).encode(), dtype=np.uint8)


def _unpack(array: NDArray[np.uint8]) -> Any:
    return json.loads(array.tobytes())


def _behind(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The arrays whose names begin like this, by the rest of their names."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def fitted_arrays(preparation: Preparation, team: Team) -> dict[str, NDArray[Any]]:
    """What `restore` needs, as named arrays."""
    arrays: dict[str, NDArray[Any]] = {}
    for position, voter in enumerate(team.asked_readers):
        arrays |= {f"reader {position} {name}": array for name, array in voter.state().items()}
    for position, prober in enumerate(team.asked_probers):
        arrays |= {f"prober {position} {name}": array for name, array in prober.state().items()}
    if team.asks_retrieval and team.retrieval is not None:
        surfaces, counts, vectors = team.retrieval.state()
        arrays |= {"surfaces": _pack(surfaces), "counts": counts, "vectors": vectors}
    for name, stack in (("stack", team.stack), ("base", team.base)):
        if stack is not None:
            arrays |= {f"{name} weights": stack.weights, f"{name} bias": stack.bias, f"{name} evidence": stack.evidence}
    if preparation.points is not None:
        arrays["points"] = preparation.points
    arrays["rest"] = _pack(
        {
            "asked": team.asked,
            "readers": [voter.name for voter in team.asked_readers],
            "probers": [voter.name for voter in team.asked_probers],
            "base": team.base.voters if team.base is not None else None,
            "threshold": preparation.threshold,
            "calibration": [team.calibration.slope, team.calibration.shift],
            "verifier": None if team.verifier is None else team.verifier.name,
            "verifier weights": team.verifier_weights,
            "facts": preparation.facts,
            "notes": preparation.notes,
        }
    )
    return arrays


def restore(preparation: Preparation, team: Team, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Fills a team from `fitted_arrays`."""
    rest = _unpack(arrays["rest"])
    team.asked = tuple(rest["asked"])
    if rest["readers"]:
        voters = {voter.name: voter for voter in preparation.readers(team.pool)}
        team.readers = tuple(voters[name] for name in rest["readers"])
        for position, voter in enumerate(team.readers):
            voter.restore(_behind(f"reader {position} ", arrays))
    if rest["probers"]:
        named = {voter.name: voter for voter in preparation.probers(team.pool)}
        team.probers = tuple(named[name] for name in rest["probers"])
        for position, prober in enumerate(team.probers):
            prober.restore(_behind(f"prober {position} ", arrays))
    if "counts" in arrays:
        team.retrieval = preparation.retrieval_voter(team.pool)
        team.retrieval.restore(_unpack(arrays["surfaces"]), arrays["counts"], arrays["vectors"])
    wanted = [member for member in preparation.config.members if member.name in team.asked]
    if wanted:
        team.members = preparation.members(team.pool, wanted)
        team.retriever = preparation.retriever(team.pool)
    for name, voters_of in (("stack", team.asked), ("base", rest["base"])):
        if f"{name} weights" in arrays:
            parts = (arrays[f"{name} {part}"] for part in ("weights", "bias", "evidence"))
            setattr(team, name, Stack(tuple(voters_of), *parts))
    preparation.threshold = rest["threshold"]
    team.calibration = Calibration(*rest["calibration"])
    preparation.points = arrays.get("points")
    weights = rest["verifier weights"]
    team.verifier = preparation.verifier(team) if rest["verifier"] is not None else None
    team.verifier_weights = None if weights is None else (weights[0], weights[1], weights[2])
    # a run that reads from the cache reports what fitting found, not what it would find now
    preparation.facts |= rest["facts"]
    preparation.notes[:] = rest["notes"]
