"""What was computed once is kept: named numpy arrays, addressed by a hash of what they were computed from.

A file that cannot be read back is treated as missing, and a folder that cannot be written to is warned about once: a
damaged or unusable cache costs time, never an answer.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from el4ner.errors import ConfigError

_KEY_CHARACTERS = frozenset("0123456789abcdef")


def cache_root() -> Path:
    """The folder el4ner keeps computed things in: `EL4NER_CACHE` if set, else the user's cache folder.

    Read at every call, so a test or a notebook may change it.
    """
    chosen = os.environ.get("EL4NER_CACHE")
    if chosen:
        # not pathlib's, which raises for a user who is not there
        return Path(os.path.expanduser(chosen))  # noqa: PTH111
    import platformdirs

    return Path(platformdirs.user_cache_dir("el4ner", appauthor=False))


def check_writable() -> None:
    """Raises ConfigError where the cache keeps nothing, for whoever runs only to fill it."""
    root = cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise ConfigError(
            f"cache folder {root} cannot be written ({error.strerror or error}), so nothing would be kept; set "
            "EL4NER_CACHE to a writable folder"
        ) from None


def content_key(*parts: Any) -> str:
    """SHA-256, in hex, of the parts: bytes and arrays as they are, all else as canonical JSON.

    Every part is preceded by its kind and length, so that no two different lists of parts hash alike.
    Raises TypeError for a part that is neither bytes, an array of plain numbers, nor JSON data.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, bytes | bytearray | memoryview):
            kind, data = "bytes", bytes(part)
        elif isinstance(part, np.ndarray):
            if part.dtype.hasobject:
                raise TypeError(f"content_key: an array of {part.dtype} has no fixed content; use plain numbers")
            kind, data = f"array {part.dtype.str} {part.shape}", np.ascontiguousarray(part).tobytes()
        else:
            text = json.dumps(part, sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
            kind, data = "json", text.encode()
        digest.update(f"{kind} {len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()


class CacheWarning(UserWarning):
    """The cache does not work as it should; results are the same."""


class ArrayCache:
    """Named arrays under content keys, one `.npz` file each.

    Files are written beside their place and renamed into it, so that readers never see half a file and the last of
    several writers wins; they all write the same content.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self._refused = False

    def path(self, key: str) -> Path:
        """Where the arrays of `key` live. Raises ValueError unless the key is hexadecimal."""
        if len(key) < 8 or not _KEY_CHARACTERS.issuperset(key):
            raise ValueError(f"cache key {key!r} is not a lower-case hexadecimal hash; make it with content_key()")
        return self.root / key[:2] / f"{key}.npz"

    def get(self, key: str) -> dict[str, NDArray[Any]] | None:
        """The arrays kept under `key`, or None where there are none or the file is damaged (with a warning)."""
        path = self.path(key)
        try:
            return read_arrays(path)
        except (FileNotFoundError, NotADirectoryError):  # the latter: a file stands where a folder should be
            return None
        except PermissionError as error:
            warnings.warn(f"cache file {path} cannot be read ({error.strerror}); computing it again", CacheWarning, 2)
            return None
        # A cut or overwritten archive shows as any of these, depending on where it was hit.
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            warnings.warn(f"cache file {path} is damaged ({reason}); computing it again", CacheWarning, 2)
            return None

    def put(self, key: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep `arrays` under `key`; where that fails, warn once and keep nothing from then on.

        Raises TypeError for arrays of Python objects.
        """
        for name, array in arrays.items():
            if np.asarray(array).dtype.hasobject:
                raise TypeError(f"cache: array {name!r} holds Python objects; convert it to numbers or fixed strings")
        if self._refused:
            return
        try:
            write_arrays(self.path(key), arrays)
        except OSError as error:
            self._refused = True
            warnings.warn(
                f"cache folder {self.root} cannot be written ({error.strerror or error}), so the next run computes "
                "everything again; set EL4NER_CACHE to a writable folder",
                CacheWarning,
                stacklevel=2,
            )


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The named arrays of an `.npz` file; Python objects are refused."""
    # opened here, because numpy leaves a file that it cannot read open
    with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Named arrays as one `.npz` file, written beside its place and renamed into it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.stem[:16]}.", suffix=".tmp", dir=path.parent)
    try:
        # written member by member: numpy.savez would take an array named "file" for its own parameter
        with os.fdopen(descriptor, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
