"""SpanPool.save and load: what comes back is what was written, and a damaged file is a clear error."""

from __future__ import annotations

import os
import stat
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from el4ner.errors import InputError, UsageError
from el4ner.kernels import SpanPool, span_topk


def a_pool(sentences: int = 9, width: int = 5) -> SpanPool:
    random = np.random.default_rng(sentences)
    offsets = np.concatenate([[0], np.cumsum(random.integers(0, 5, sentences))]).astype(np.int64)
    return SpanPool.pack(random.normal(size=(int(offsets[-1]), width)).astype(np.float32), offsets)


@pytest.mark.parametrize("sentences", [0, 1, 31, 33])
@pytest.mark.parametrize("width", [1, 5, 384])
def test_what_was_saved_comes_back(tmp_path: Path, sentences: int, width: int) -> None:
    pool = a_pool(sentences, width)
    pool.save(tmp_path / "a.pool")
    for verify in (True, False):
        loaded = SpanPool.load(tmp_path / "a.pool", verify=verify)
        assert np.array_equal(loaded.vectors, pool.vectors)
        assert np.array_equal(loaded.offsets, pool.offsets)
        assert loaded.vectors.shape == pool.vectors.shape
        assert (loaded.largest_norm, loaded.sentences, loaded.width) == (pool.largest_norm, sentences, width)
    assert [file.name for file in tmp_path.iterdir()] == ["a.pool"]  # no temporary file stays


def test_a_loaded_pool_is_mapped_and_answers_alike(tmp_path: Path) -> None:
    pool = a_pool(200, 16)
    pool.save(str(tmp_path / "a.pool"))
    loaded = SpanPool.load(str(tmp_path / "a.pool"))
    assert isinstance(loaded.vectors.base, np.memmap) or isinstance(
        getattr(loaded.vectors.base, "base", None), np.memmap
    )
    with pytest.raises(ValueError, match="read-only"):
        loaded.vectors[0] = 0
    queries, offsets = np.random.default_rng(0).normal(size=(6, 16)).astype(np.float32), np.array([0, 2, 6])
    expected = span_topk(queries, offsets, np.ones(6), pool, 7)
    got = span_topk(queries, offsets, np.ones(6), loaded, 7)
    assert np.array_equal(got[0], expected[0])
    assert np.array_equal(got[1], expected[1])
    loaded.save(tmp_path / "b.pool")
    assert (tmp_path / "a.pool").read_bytes() == (tmp_path / "b.pool").read_bytes()


def test_the_file_holds_no_pickle(tmp_path: Path) -> None:
    pool = a_pool()
    pool.save(tmp_path / "a.pool")
    data = (tmp_path / "a.pool").read_bytes()
    assert data.startswith(b"EL4NSPAN\x01\x00\x00\x00")
    assert data.endswith(pool.vectors.tobytes())
    assert data[128 : 128 + pool.offsets.nbytes] == pool.offsets.tobytes()


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 60, 127, 128, 150, -1, -4])
def test_a_cut_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.pool"
    a_pool().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"a\.pool"):
        SpanPool.load(path, verify=False)


def test_a_longer_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pool"
    a_pool().save(path)
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(InputError, match="where its header says"):
        SpanPool.load(path)


@settings(max_examples=150, deadline=None)
@given(where=st.floats(0, 0.999999), bit=st.integers(0, 7))
def test_every_flipped_bit_is_noticed(tmp_path_factory: pytest.TempPathFactory, where: float, bit: int) -> None:
    path = tmp_path_factory.mktemp("pools") / "a.pool"
    pool = a_pool()
    pool.save(path)
    data = bytearray(path.read_bytes())
    place = int(where * len(data))
    data[place] ^= 1 << bit
    path.write_bytes(data)
    header, offsets_end, vectors_begin = 60, 128 + pool.offsets.nbytes, len(data) - pool.vectors.nbytes
    if place < header or 128 <= place < offsets_end or place >= vectors_begin:  # all but the padding
        with pytest.raises(InputError, match=r"a\.pool"):
            SpanPool.load(path)


def rewritten(path: Path, place: int, value: bytes) -> None:
    """Change the header and make its checksum right again."""
    data = bytearray(path.read_bytes())
    data[place : place + len(value)] = value
    length = struct.calcsize("<8sIIQQQdII")
    data[length : length + 4] = struct.pack("<I", zlib.crc32(data[:length]))
    path.write_bytes(data)


def test_other_versions_and_other_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.pool"
    a_pool().save(path)
    rewritten(path, 8, struct.pack("<I", 2))
    with pytest.raises(InputError, match="version 2; this el4ner reads version 1: write the file again"):
        SpanPool.load(path)
    path.write_bytes(b"\x80\x04 a pickle, say" * 20)
    with pytest.raises(InputError, match="not a span pool"):
        SpanPool.load(path)
    with pytest.raises(InputError, match="no such file"):
        SpanPool.load(tmp_path / "nothing")
    with pytest.raises(UsageError, match="cannot be mapped"):
        SpanPool.load(tmp_path)


def test_a_header_that_lies_is_refused(tmp_path: Path) -> None:
    for place, value, message in (
        (16, struct.pack("<Q", 8), "differ from their checksum|where its header says"),
        (24, struct.pack("<Q", 2**62), "where its header says"),
        (32, struct.pack("<Q", 2**63), "where its header says"),
        (40, struct.pack("<d", float("nan")), "largest norm of nan"),
        (40, struct.pack("<d", -1.0), "largest norm of -1"),
        (40, struct.pack("<d", 0.5), "largest norm of 0.5 where vectors have"),
    ):
        path = tmp_path / "a.pool"
        a_pool().save(path)
        rewritten(path, place, value)
        with pytest.raises(InputError, match=message):
            SpanPool.load(path)


@pytest.mark.parametrize(("spans", "width"), [(0, 2**63), (0, 2**62), (2**63, 0), (2**40, 0)])
def test_a_header_of_an_empty_pool_that_lies_is_refused(tmp_path: Path, spans: int, width: int) -> None:
    path = tmp_path / "a.pool"
    a_pool(0).save(path)
    rewritten(path, 24, struct.pack("<QQ", spans, width))
    with pytest.raises(InputError, match=r"a\.pool: (damaged|offsets is)"):
        SpanPool.load(path)


def test_numbers_and_offsets_are_checked_though_checksums_fit(tmp_path: Path) -> None:
    pool = a_pool()
    vectors = pool.vectors.copy()
    vectors[1, 2] = np.inf
    SpanPool(vectors, pool.offsets, pool.largest_norm).save(tmp_path / "a.pool")
    with pytest.raises(InputError, match="only finite numbers"):
        SpanPool.load(tmp_path / "a.pool")
    SpanPool(pool.vectors, pool.offsets[::-1].copy(), pool.largest_norm).save(tmp_path / "b.pool")
    with pytest.raises(InputError, match="offsets is"):
        SpanPool.load(tmp_path / "b.pool", verify=False)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        a_pool().save(tmp_path / "nowhere" / "a.pool")
    path = tmp_path / "a.pool"
    a_pool(3).save(path)
    a_pool(4).save(path)
    assert SpanPool.load(path).sentences == 4


@pytest.mark.skipif(os.name != "posix", reason="modes, links and pipes as POSIX has them")
def test_a_saved_file_is_as_readable_as_others(tmp_path: Path) -> None:
    a_pool().save(tmp_path / "a.pool")
    (tmp_path / "other").touch()
    assert (tmp_path / "a.pool").stat().st_mode == (tmp_path / "other").stat().st_mode
    name = "n" * 255  # the longest that there is; the temporary one has to be shorter
    a_pool().save(tmp_path / name)
    assert SpanPool.load(tmp_path / name).sentences == 9


@pytest.mark.skipif(os.name != "posix", reason="modes, links and pipes as POSIX has them")
def test_links_are_followed_and_what_is_no_file_is_left_alone(tmp_path: Path) -> None:
    a_pool(3).save(tmp_path / "a.pool")
    (tmp_path / "link").symlink_to(tmp_path / "a.pool")
    a_pool(4).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert SpanPool.load(tmp_path / "a.pool").sentences == 4
    os.mkfifo(tmp_path / "pipe")
    for other in ("pipe", "."):
        with pytest.raises(OSError, match="not a file, so it is not replaced"):
            a_pool().save(tmp_path / other)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    with pytest.raises(InputError, match="it is not a file"):
        SpanPool.load(tmp_path / "pipe")  # nobody writes to it: opening it would never end
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.pool", "link", "pipe"]
