"""SpanPool: pool sentences as span vectors, in memory or mapped from a file, and their packed copies.

The file is plain numbers, no pickle: a header of 128 bytes, then offsets (N+1,) i64, then vectors (S, D) f32, each part
at a multiple of 64 bytes, little-endian. The header holds a version, the sizes and checksums of all parts.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from el4ner.errors import InputError, ShapeError
from el4ner.kernels import _dispatch, _span_native
from el4ner.kernels._dispatch import Array
from el4ner.kernels._threads import thread_count

Floats: TypeAlias = NDArray[np.float32]
Ints: TypeAlias = NDArray[np.int64]

_MAGIC = b"EL4NSPAN"
_VERSION = 1
# magic, version, zero, N, S, D, largest norm, checksum of offsets, checksum of vectors; then the header's own checksum
_HEADER = struct.Struct("<8sIIQQQdII")
_HEADER_BYTES = 128
_ALIGN = 64


def largest_norm(vectors: Floats) -> float:
    """Length of the longest vector, in float64; 0 where there is none, no finite number where a number is none."""
    if _dispatch._native_reason() is None:
        from el4ner import _native

        return _native.span_topk_largest_norm(vectors, thread_count())
    return float(np.sqrt(np.einsum("sd,sd->s", vectors, vectors, dtype=np.float64).max(initial=0.0)))


@dataclass(frozen=True, slots=True, eq=False)
class SpanPool:
    """Pool sentences as span vectors. Make one with `pack`, which checks it once, or `load`.

    vectors (S, D) f32, contiguous; offsets (N+1,) i64: sentence n owns rows offsets[n] to offsets[n+1];
    largest_norm: the longest vector's length, for error bounds. Neither array may be changed afterwards.
    """

    vectors: Floats
    offsets: Ints
    largest_norm: float
    _packed: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def pack(cls, vectors: Array, offsets: Array) -> SpanPool:
        """Check and lay out a pool. vectors (S, D) f32, of length 1 for cosines; offsets (N+1,) i64, from 0 to S.

        Raises ShapeError (a ValueError) on other shapes, offsets that fall, NaN or infinity.
        """
        vectors_ = _dispatch.to_numpy("vectors", vectors, 2, np.float32)
        offsets_ = _dispatch.to_numpy("offsets", offsets, 1, np.int64)
        _dispatch.check_offsets("offsets", offsets_, len(vectors_))
        norm = largest_norm(vectors_)
        if not np.isfinite(norm):
            _dispatch.check_finite("vectors", vectors_)
        return cls(vectors_, offsets_, norm)

    @property
    def sentences(self) -> int:
        """N, the number of sentences, those without spans included."""
        return len(self.offsets) - 1

    @property
    def width(self) -> int:
        """D, the length of a vector."""
        return int(self.vectors.shape[1])

    def packed(self, precision: str, threads: int, isa: str | None = None, *, share: bool = True) -> Any:
        """The copy that the native backend screens ("fp32", "bf16", "int8"), made on first use and kept.

        isa: for which instruction set; by default the one that this precision runs on. AVX2's int8 layout is its own.
        share: lay out vectors once that sentences have in common, if there are enough of them; a query's products with
        these take memory by its spans.
        """
        isa = _span_native.choose_path(precision)[1] if isa is None else isa
        layout = "int8 avx2" if (precision, isa) == ("int8", "avx2") else precision
        found = self._packed.get(layout)
        if not share and (found is None or found.shared):
            layout += ", each by itself"
        if layout not in self._packed:
            from el4ner import _native

            self._packed[layout] = _native.span_topk_pack(
                self.vectors, self.offsets, self.largest_norm, precision, isa, threads, share
            )
        return self._packed[layout]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles leave the packed copies behind; they are made anew where they are needed."""
        return SpanPool, (self.vectors, self.offsets, self.largest_norm)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the pool to a file that `load` maps. The file appears at once or not at all. Raises OSError.

        A link is followed: the file that it names is replaced. What is there and is no file is left alone.
        """
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            raise OSError(errno.EINVAL, "not a file, so it is not replaced", str(target))
        offsets, vectors = self.offsets.astype("<i8", copy=False), self.vectors.astype("<f4", copy=False)
        header = _HEADER.pack(
            _MAGIC, _VERSION, 0, self.sentences, len(vectors), self.width, self.largest_norm,
            _checksum(offsets), _checksum(vectors),
        )  # fmt: skip
        header += struct.pack("<I", zlib.crc32(header))
        # tempfile's files are for their owner's eyes alone; this one is for whoever the user's umask lets read.
        temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(8)}.tmp")
        with temporary.open("xb") as file:
            try:
                for part in (header.ljust(_HEADER_BYTES, b"\0"), offsets.tobytes()):
                    file.write(part + b"\0" * (-len(part) % _ALIGN))
                file.write(_bytes(vectors))
                file.close()
                temporary.replace(target)
            except BaseException:
                file.close()
                temporary.unlink(missing_ok=True)
                raise

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, verify: bool = True) -> SpanPool:
        """Map a pool that `save` wrote; vectors are read from disk as they are used, and cannot be written to.

        verify: read everything once and compare its checksum (about a second a gigabyte); header, sizes and offsets
        are checked in any case. Raises InputError where the file is missing, cut, damaged or of another version.
        """
        try:
            if not stat.S_ISREG(Path(os.fsdecode(path)).stat().st_mode):  # a pipe would be waited for
                raise InputError(f"{path}: cannot be mapped, it is not a file; SpanPool.save writes such files")
            data = np.memmap(path, dtype=np.uint8, mode="r")
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; SpanPool.save writes one") from None
        except (OSError, ValueError) as error:  # numpy refuses empty files with ValueError
            raise InputError(f"{path}: cannot be mapped ({error}); SpanPool.save writes such files") from None
        sentences, spans, width, norm, offsets_sum, vectors_sum = _read_header(path, data)
        begin = _HEADER_BYTES + -(-8 * (sentences + 1) // _ALIGN) * _ALIGN
        expected = begin + 4 * spans * width
        if len(data) != expected:
            raise InputError(f"{path}: {len(data):,} bytes where its header says {expected:,}; write it again")
        if max(spans, width) >= 1 << 48:  # of nothing; numpy makes no such shape
            raise InputError(f"{path}: damaged, {spans:,} spans of {width:,} numbers; write it again")
        offsets = np.asarray(data[_HEADER_BYTES : _HEADER_BYTES + 8 * (sentences + 1)]).view("<i8")
        vectors = np.asarray(data[begin:]).view("<f4").reshape(spans, width)
        wrong = _checksum(offsets) != offsets_sum
        if wrong or (verify and _checksum(vectors) != vectors_sum):
            raise InputError(f"{path}: damaged, {'offsets' if wrong else 'vectors'} differ from their checksum")
        try:
            _dispatch.check_offsets("offsets", offsets, spans)
            if verify:
                _dispatch.check_finite("vectors", vectors)
        except ShapeError as error:
            raise InputError(f"{path}: {error}") from None
        if verify and abs((longest := largest_norm(vectors)) - norm) > 1e-9 * longest:  # error bounds rest on it
            raise InputError(f"{path}: damaged, a largest norm of {norm} where vectors have {longest}; write it again")
        return cls(vectors, offsets.astype(np.int64), norm)


def check_pool(pool: Any) -> None:
    """Raise ShapeError on anything but a SpanPool: its vectors alone, say."""
    if not isinstance(pool, SpanPool):
        raise ShapeError(f"pool is a {type(pool).__name__}; make one with SpanPool.pack(vectors, offsets)")


def _bytes(array: NDArray[Any]) -> memoryview:
    """The memory of a contiguous array; memoryview itself refuses to cast arrays without elements."""
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # numpy's arrays are buffers


def _checksum(array: NDArray[Any]) -> int:
    return zlib.crc32(_bytes(array))


def _read_header(path: str | os.PathLike[str], data: NDArray[np.uint8]) -> tuple[int, int, int, float, int, int]:
    """N, S, D, largest norm, checksums of offsets and vectors. Raises InputError if this is not such a header."""
    header = data[:_HEADER_BYTES].tobytes()
    if header[:8] != _MAGIC[: len(header)] or not header:
        raise InputError(f"{path}: not a span pool; SpanPool.save writes such files")
    if len(header) < _HEADER_BYTES:
        raise InputError(f"{path}: {len(header)} bytes, a header has {_HEADER_BYTES}; the file was cut, write it again")
    _, version, _, sentences, spans, width, norm, offsets_sum, vectors_sum = _HEADER.unpack_from(header)
    if version != _VERSION:
        raise InputError(
            f"{path}: version {version}; this el4ner reads version {_VERSION}: write the file again with it"
        )
    if struct.unpack_from("<I", header, _HEADER.size)[0] != zlib.crc32(header[: _HEADER.size]):
        raise InputError(f"{path}: damaged, the header differs from its checksum; write the file again")
    if not (0 <= norm < float("inf")):
        raise InputError(f"{path}: damaged, a largest norm of {norm}; write the file again")
    return sentences, spans, width, norm, offsets_sum, vectors_sum
