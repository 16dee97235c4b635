"""The systems of an evaluation by name: el4ner's settings, its voters alone, and the baselines.

All get the same pool, the same demonstrations budget and the same models; what a baseline may be tuned by are its
options (`--option NAME.SETTING=VALUE`), to be chosen on dev. `paper`, a configuration file and the rest of el4ner's own
take settings through `--set`. `NAME@P` is one of el4ner's own at the operating point of a target precision P, as
`el4ner predict --target-precision P` runs it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from el4ner.bench.own_system import OwnSystem
from el4ner.bench.system import System, Workbench
from el4ner.config import load_config, make_config, merge
from el4ner.errors import ConfigError

Maker = Callable[[Workbench, Mapping[str, Any]], System]

OWN: Mapping[str, Mapping[str, Any]] = {
    "default": {"voters": "auto"},
    "all": {"voters": "all"},
    "paper": {"preset": "paper"},
    "reading-voter": {"voters": ["reading"]},
    "tagging-voter": {"voters": ["tagging"]},
    "probing-voter": {"voters": ["probing"]},
    "retrieval-voter": {"voters": ["retrieval"]},
}
"""default: whoever the pool says is worth asking. all: everybody. The voters alone choose their threshold on the pool
as the default does. Beside these, `members` asks the prompted members together and nobody else, `member:NAME` one."""


def _baseline(module: str, name: str) -> Maker:
    """Makes a baseline of `el4ner.bench.baseline_MODULE`, which is imported when it is asked for."""

    def make(bench: Workbench, options: Mapping[str, Any]) -> System:
        system: System = getattr(import_module(f"el4ner.bench.baseline_{module}"), name)(bench, options)
        return system

    return make


BASELINES: Mapping[str, Maker] = {
    "zero-shot": _baseline("one_prompt", "ZeroShot"),
    "kate": _baseline("one_prompt", "Kate"),
    "gpt-ner": _baseline("gpt_ner", "GptNer"),
    "deer": _baseline("deer", "Deer"),
    "dictionary": _baseline("dictionary", "Dictionary"),
    "fine-tuned": _baseline("fine_tuned", "FineTuned"),
}

MEMBERS = "members"
MEMBER = "member:"
_AT = re.compile(r"(.+)@(\d*\.?\d+)")


def system_names() -> str:
    """What may be named, for messages."""
    return (
        f"{', '.join((*OWN, MEMBERS, *BASELINES))}, {MEMBER}NAME, or a configuration file (.yaml, .yml, .json); "
        "NAME@P for a target precision P"
    )


def is_file(name: str) -> bool:
    """Whether a system is named by its configuration file."""
    return name.endswith((".yaml", ".yml", ".json"))


def operating_point(name: str) -> tuple[str, float | None]:
    """A name without its target precision, and that: "default@0.9" is ("default", 0.9)."""
    found = _AT.fullmatch(name)
    return (found[1], float(found[2])) if found else (name, None)


def short_name(name: str) -> str:
    """What a system is called in a run: the stem of a configuration file, else its name."""
    base, _ = operating_point(name)
    return Path(base).stem + name.removeprefix(base) if is_file(base) else name


def make_system(
    name: str, bench: Workbench, settings: Mapping[str, Any], options: Mapping[str, Mapping[str, Any]]
) -> System:
    """The system of a name.

    settings: for all of el4ner's own. options: system -> its own options. All systems show as many demonstrations, and
    draw by one seed, whatever their settings say. Raises ConfigError for an unknown name, setting or option,
    InputError for a file that cannot be read.
    """
    if name in BASELINES:
        return BASELINES[name](bench, options.get(name, {}))
    base, precision = operating_point(name)
    if base in BASELINES:
        raise ConfigError(f"system {name}: {base} has no calibrated scores; a target precision is for el4ner's own")
    if name in options:
        raise ConfigError(f"--option {name}...: {name} is a setting of el4ner; use --set")
    fixed: dict[str, Any] = {"retrieve": {"k": bench.k}, "seed": bench.seed}
    if precision is not None:
        fixed["target_precision"] = precision
    if is_file(base):
        return OwnSystem(short_name(name), load_config(base, merge(settings, fixed)), bench)
    if base.startswith(MEMBER):
        own: Mapping[str, Any] = {"voters": [base.removeprefix(MEMBER)]}
    elif base == MEMBERS:
        own = {"voters": [member.name for member in bench.config.members]}
    elif base in OWN:
        own = OWN[base]
    else:
        raise ConfigError(f"system {name!r}; choose from {system_names()}")
    return OwnSystem(name, make_config(merge(merge(settings, own), fixed), f"system {name}"), bench)
