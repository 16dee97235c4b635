"""The Hugging Face hub: asked at once whether it answers, so that a machine without a network does not wait for it.

The hub's client tries every file of a model several times, with pauses; without a network that is minutes before what
is in the cache gets used, or an error is raised.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from el4ner.models import ResolvedModel

_PATIENCE_S = 10.0
"""The hub's own client waits as long for an answer by default."""


@cache
def hub_answers() -> bool:
    """Whether the hub answers, whatever it says. False under HF_HUB_OFFLINE.

    Asked once: a process that starts without a network uses what is in the cache until it ends.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE_S)
    except Exception:  # noqa: BLE001 the client's HTTP library has its own kinds, and those differ by its version
        return False
    return True


def loading_options(model: ResolvedModel) -> dict[str, Any]:
    """Keywords of `from_pretrained` for a model: no remote code, its revision, and no waiting for a silent hub."""
    options: dict[str, Any] = {"trust_remote_code": False}
    if model.kind == "hub":
        if model.identity:
            options["revision"] = model.identity
        if not hub_answers():
            options["local_files_only"] = True
    return options
