"""The fit of the built-in pool under the default settings comes with the package, so that a first run takes seconds.

Fits on other pools begin at its read-outs (`shipped_start`), where the same features are read.

`make builtin` (`python -m el4ner.shipped`) fits anew, as any run with `stack.shipped: false` does, and writes the file.
What is in it was fitted in float32 on a CPU and is used for other devices and precisions too: states differ there in
the third digit, far less than the noise under which a read-out is fitted. Where the pool, a setting, a model or the
code that fits is another one, the file is passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from el4ner.cache import content_key, read_arrays, write_arrays
from el4ner.pool import BUILTIN
from el4ner.voters.reading import ReadingVoter, Start, unpack
from el4ner.voters.readout import Readout

if TYPE_CHECKING:
    from el4ner.preparation import Preparation
    from el4ner.stages.team import Team

NAME = "builtin.npz"
_KEY = "key"
_OVERLAPS = ("flat", "nested")
"""For which of them something was fitted; before the names of arrays that are not of both."""
_LAYOUT = "layout"
_READERS = "reader "
"""Before the names of the arrays of every voter that reads hidden states: they are those of both overlaps."""
_READER = f"{_READERS}0 "
"""Before the names of the arrays of the reading voter."""


def _stored() -> dict[str, NDArray[Any]] | None:
    with resources.as_file(resources.files("el4ner.data") / NAME) as path:
        return read_arrays(path) if path.is_file() else None


def shipped_start(voter: ReadingVoter) -> Start | None:
    """The shipped read-outs of the built-in pool to begin a fit at; None where the voter reads something else."""
    stored = _stored()
    if stored is None or _LAYOUT not in stored or _text(stored[_LAYOUT]) != voter.layout:
        return None
    own = {name.removeprefix(_READER): array for name, array in stored.items() if name.startswith(_READER)}
    return Start(*unpack(own, Readout), content_key("start", *(own[name] for name in sorted(own))))


def shipped_fit(preparation: Preparation, team: Team) -> dict[str, NDArray[Any]] | None:
    """The arrays of `fitted.fitted_arrays` for this team, or None where what was shipped is for something else."""
    from el4ner.fitted import fitted_key

    if preparation.config.examples not in (None, BUILTIN) or not preparation.config.stack.shipped:
        return None
    stored = _stored()
    if stored is None:
        return None
    wanted = fitted_key(preparation, team, portable=True)
    for overlap in _OVERLAPS:
        if _text(stored[f"{overlap} {_KEY}"]) == wanted:
            preparation.facts["shipped"] = True
            own = {n.removeprefix(f"{overlap} "): array for n, array in stored.items() if n.startswith(overlap)}
            return {n: array for n, array in stored.items() if not n.startswith(_OVERLAPS)} | own
    return None


def write_shipped(path: Path, say: Callable[[str], None] = print) -> None:
    """Fits the built-in pool under the default settings, for entities that may overlap and for those that may not.

    Writes what a run needs of it, weights in half precision. What reads hidden states is the same for both.
    """
    from el4ner.config import make_config
    from el4ner.fitted import fitted_arrays, fitted_key
    from el4ner.preparation import Preparation

    arrays: dict[str, NDArray[Any]] = {}
    for overlap in _OVERLAPS:
        config = make_config({"device": "cpu", "dtype": "float32", "overlap": overlap, "stack": {"shipped": False}})
        preparation = Preparation(config, progress=say)
        team = preparation.team()
        for name, array in fitted_arrays(preparation, team).items():
            half = array.astype(np.float16) if array.dtype == np.float32 else array
            arrays[name if name.startswith(_READERS) else f"{overlap} {name}"] = half
        arrays[f"{overlap} {_KEY}"] = _bytes(fitted_key(preparation, team, portable=True))
        if team.asked_readers[0].kind != "spans":
            raise RuntimeError("the reading voter is not asked on the built-in pool: no fit could begin there")
        arrays[_LAYOUT] = _bytes(team.asked_readers[0].layout)
    write_arrays(path, arrays)
    path.chmod(0o644)  # written for its owner alone, like what is cached


def _bytes(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def _text(array: NDArray[Any]) -> str:
    return array.tobytes().decode()


if __name__ == "__main__":
    write_shipped(Path(__file__).parent / "data" / NAME)
