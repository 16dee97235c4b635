"""Output files that appear under their names only when they are complete."""

from __future__ import annotations

import gzip
import os
import re
import secrets
import stat
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, cast

from el4ner.errors import UsageError
from el4ner.lines import display_name, visible

_LONGEST_NAME = 255
"""Bytes of a file's name."""


def _descriptor(path: str) -> int | None:
    """The number under which this process has something open, of a path that names it so."""
    named = re.fullmatch(r"/dev/(?:fd/(\d+)|(stdout)|(stderr))|/proc/self/fd/(\d+)", path)
    if named is None:
        return None
    return 1 if named[2] else 2 if named[3] else int(named[1] or named[4])


def _beside(path: Path) -> Path:
    """A new name of a file beside another one, as long as file systems allow."""
    ending = f".{secrets.token_hex(4)}.partial"
    beginning = os.fsencode(path.name)[: _LONGEST_NAME - len(ending)].decode("utf-8", "ignore")
    return path.with_name(beginning + ending)


class OutputFile:
    """A file that appears under its name only when it is complete.

    Written beside its place as NAME.xxxxxxxx.partial and renamed at the end of the `with` block; if the block ends
    with an exception, the part that was written stays under that name (`partial`), or is removed if it is empty.
    A file that is replaced hands on its permissions, and its owner where the system allows that. A name that ends in
    .gz is zipped, without a time stamp, so that equal records give equal bytes. Devices and pipes are written directly,
    and what this process has open by its number (/dev/stdout, /dev/fd/N) where it stands: `>> file` adds to the file.
    Raises UsageError on construction if the place cannot be written to, which is tried.
    """

    def __init__(self, path: str | Path) -> None:
        self._name = display_name(path)
        if not str(path):
            raise UsageError("the name of an output file is empty; name a file")
        self._old = self._status(Path(path))
        if self._old is not None and stat.S_ISDIR(self._old.st_mode):
            raise UsageError(f"{self._name}: is a folder; name a file in it")
        if self._old is not None and stat.S_ISSOCK(self._old.st_mode):
            raise UsageError(f"{self._name}: is a socket, which is no file; name a file or a pipe")
        try:
            self.path = Path(os.path.realpath(path))
        except OSError as error:  # the current folder is gone
            raise UsageError(f"{self._name}: cannot be written ({error.strerror}); choose another place") from None
        self._descriptor = _descriptor(str(path)) if self._old is not None else None
        direct = self._old is not None and (self._descriptor is not None or not self.path.is_file())
        if direct:  # the pipe behind /dev/stdout has no name but this one
            self.path = Path(path)
        if not self.path.parent.is_dir():
            folder = visible(str(self.path.parent))
            raise UsageError(f"{self._name}: the folder {folder} does not exist; create it first")
        self.partial = _beside(self.path)
        self._written_to = self.path if direct else self.partial
        self._file: BinaryIO | None = None
        self._stream: BinaryIO | None = None
        if direct and not os.access(self.path, os.W_OK):
            raise UsageError(f"{self._name}: permission denied; choose another file")
        if not direct:
            self._open().close()
            self.partial.unlink()

    def _status(self, path: Path) -> os.stat_result | None:
        """What is there now, behind links; None if nothing is."""
        try:
            return path.stat()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:  # a name that is too long, a folder that is closed, a null character
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"{self._name}: cannot be written ({reason}); choose another name") from None

    def _open(self) -> BinaryIO:
        try:
            if self._descriptor is not None:
                return os.fdopen(os.dup(self._descriptor), "wb")
            return self._written_to.open("wb") if self._written_to is self.path else self._open_partial()
        except OSError as error:
            raise UsageError(f"{self._name}: cannot be written ({error.strerror}); choose another place") from None

    def _open_partial(self) -> BinaryIO:
        """A new file: as the umask says, or with the permissions of the file it replaces, never wider before."""
        if self._old is None:
            return self.partial.open("xb")
        file = os.fdopen(os.open(self.partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
        if sys.platform != "win32":
            with suppress(OSError):  # only root gives files away, and some file systems know no owners
                os.fchown(file.fileno(), self._old.st_uid, self._old.st_gid)
            with suppress(OSError):
                os.fchmod(file.fileno(), self._old.st_mode & 0o777)
        return file

    def __enter__(self) -> BinaryIO:
        file = self._open()
        self._file = self._stream = file
        if self.path.name.lower().endswith(".gz"):
            self._stream = cast(BinaryIO, gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0))
        return self._stream

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._stream is not None, "left before it was entered"
        assert self._file is not None
        empty = self._written_to is self.partial and self._stream.tell() == 0
        try:
            self._stream.close()  # may find the disk full
        finally:
            self._file.close()
        if self._written_to is self.path:
            return
        if kind is None:
            self.partial.replace(self.path)
        elif empty:
            self.partial.unlink()

    @property
    def left_behind(self) -> bool:
        """Whether a partial file is still there."""
        return self.partial.exists()
