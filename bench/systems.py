"""The systems of an evaluation by name: el4ner's settings, its voters alone, and the baselines.

All get the same pool, the same demonstrations budget and the same models; what a baseline may be tuned by are its
options (`--option NAME.SETTING=VALUE`), to be chosen on dev. `paper`, a configuration file and the rest of el4ner's own
take settings through `--set`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from el4ner.bench.own_system import OwnSystem
from el4ner.bench.system import System, Workbench
from el4ner.config import load_config, make_config, merge
from el4ner.errors import ConfigError

OWN: Mapping[str, Mapping[str, Any]] = {
    "default": {"voters": "auto"},
    "all": {"voters": "all"},
    "paper": {"preset": "paper"},
    "reading-voter": {"voters": ["reading"]},
    "retrieval-voter": {"voters": ["retrieval"]},
}
"""default: whoever the pool says is worth asking. all: everybody. The voters alone choose their threshold on the pool
as the default does."""


def _dictionary(bench: Workbench, options: Mapping[str, Any]) -> System:
    from el4ner.bench.baseline_dictionary import Dictionary

    return Dictionary(bench, options)


BASELINES: Mapping[str, Callable[[Workbench, Mapping[str, Any]], System]] = {
    "dictionary": _dictionary,
}

MEMBER = "member:"


def system_names() -> str:
    """What may be named, for messages."""
    return f"{', '.join((*OWN, *BASELINES))}, {MEMBER}NAME, or a configuration file (.yaml, .yml, .json)"


def is_file(name: str) -> bool:
    """Whether a system is named by its configuration file."""
    return name.endswith((".yaml", ".yml", ".json"))


def short_name(name: str) -> str:
    """What a system is called in a run: the stem of a configuration file, else its name."""
    return Path(name).stem if is_file(name) else name


def make_system(
    name: str, bench: Workbench, settings: Mapping[str, Any], options: Mapping[str, Mapping[str, Any]]
) -> System:
    """The system of a name.

    settings: for all of el4ner's own. options: system -> its own options. Raises ConfigError for an unknown name,
    setting or option, InputError for a file that cannot be read.
    """
    budget = {"retrieve": {"k": bench.k}, "seed": bench.seed}
    if name in BASELINES:
        return BASELINES[name](bench, options.get(name, {}))
    if name in options:
        raise ConfigError(f"--option {name}...: {name} is a setting of el4ner; use --set")
    if is_file(name):
        return OwnSystem(short_name(name), load_config(name, merge(settings, budget)), bench)
    if name.startswith(MEMBER):
        own: Mapping[str, Any] = {"voters": [name.removeprefix(MEMBER)]}
    elif name in OWN:
        own = OWN[name]
    else:
        raise ConfigError(f"system {name!r}; choose from {system_names()}")
    return OwnSystem(name, make_config(merge(merge(settings, own), budget), f"system {name}"), bench)
