"""The array cache: what goes in comes out, damage is noticed, names cannot escape."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

import numpy as np
import pytest

from el4ner.cache import ArrayCache, CacheWarning, cache_root, content_key


def test_round_trip_keeps_dtype_shape_and_names(tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path)
    key = content_key("model", 3)
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "empty": np.zeros((0, 4), dtype=np.int64),
        "names": np.array(["x", "yy"]),
        "file": np.ones(1),
    }
    assert cache.get(key) is None
    cache.put(key, arrays)
    back = cache.get(key)
    assert back is not None
    assert set(back) == set(arrays)
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)


@pytest.mark.parametrize("damage", ["truncate", "garbage", "empty", "flip", "lock", "method"])
def test_damaged_file_is_missing_and_can_be_written_again(tmp_path: Path, damage: str) -> None:
    cache, key = ArrayCache(tmp_path), content_key("x")
    cache.put(key, {"a": np.arange(1000.0)})
    path = cache.path(key)
    data = path.read_bytes()
    entry = data.rfind(b"PK\x01\x02")  # of the directory
    changed = {
        "truncate": data[: len(data) // 2],
        "garbage": b"not an archive",
        "empty": b"",
        "flip": data[:400] + bytes([data[400] ^ 0xFF]) + data[401:],
        "lock": data[: entry + 8] + b"\x01" + data[entry + 9 :],  # as if it were encrypted
        "method": data[: entry + 10] + b"\x63" + data[entry + 11 :],  # a way of packing that is unknown
    }[damage]
    path.write_bytes(changed)
    with pytest.warns(UserWarning, match="damaged"):
        assert cache.get(key) is None
    cache.put(key, {"a": np.arange(1000.0)})
    back = cache.get(key)
    assert back is not None
    assert back["a"].sum() == 499500


@pytest.mark.parametrize("place", ["file", "below a file", "/proc/nocache"])
def test_an_unusable_folder_is_warned_about_once(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    root = {"file": tmp_path / "file", "below a file": tmp_path / "file" / "pools"}.get(place, Path(place))
    cache, key = ArrayCache(root), content_key("x")
    assert cache.get(key) is None
    with pytest.warns(CacheWarning, match="set EL4NER_CACHE to a writable folder") as caught:
        cache.put(key, {"a": np.zeros(1)})
    assert str(root) in str(caught[0].message)
    cache.put(content_key("y"), {"a": np.zeros(1)})  # a second warning would be an error here
    assert cache.get(key) is None


def test_a_full_disk_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", full)
    with pytest.warns(CacheWarning, match=r"cannot be written \(No space left on device\)"):
        ArrayCache(tmp_path).put(content_key("x"), {"a": np.zeros(1)})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_objects_are_refused_so_nothing_needs_pickle(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Python objects"):
        ArrayCache(tmp_path).put(content_key("x"), {"a": np.array([{}], dtype=object)})
    assert not list(tmp_path.rglob("*.npz"))


def test_keys_separate_what_differs() -> None:
    keys = [
        content_key("ab", "c"),
        content_key("a", "bc"),
        content_key(b"ab", "c"),
        content_key(["ab", "c"]),
        content_key(np.zeros(2, dtype=np.float32)),
        content_key(np.zeros(1, dtype=np.float64)),
        content_key(np.zeros((1, 2), dtype=np.float32)),
    ]
    assert len(set(keys)) == len(keys)
    assert content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1})
    with pytest.raises(TypeError):
        content_key(np.array([{}], dtype=object))
    with pytest.raises(TypeError):
        content_key({1, 2})


@pytest.mark.parametrize("key", ["", "../../etc/passwd", "ABCDEF0123", "short"])
def test_a_key_cannot_leave_the_folder(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="hexadecimal"):
        ArrayCache(tmp_path).path(key)


def test_concurrent_writers_and_readers_see_whole_files(tmp_path: Path) -> None:
    cache, key = ArrayCache(tmp_path), content_key("shared")
    arrays = {"a": np.arange(20_000.0)}
    problems: list[str] = []

    def work() -> None:
        for _ in range(15):
            cache.put(key, arrays)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                back = cache.get(key)
            if back is None or not np.array_equal(back["a"], arrays["a"]):
                problems.append("a reader saw something else than the whole array")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert not list(tmp_path.rglob("*.tmp"))


def test_root_follows_the_environment_at_call_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EL4NER_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.setenv("EL4NER_CACHE", "~nobody-of-that-name/cache")  # nothing to expand, and no reason to end
    assert cache_root().name == "cache"
    monkeypatch.delenv("EL4NER_CACHE")
    assert cache_root().name == "el4ner"
