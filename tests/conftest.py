"""What all tests share: fixed seeds, no network, and fixtures for real data and the embedded models."""

from __future__ import annotations

import os
import random
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings as hypothesis_settings

hypothesis_settings.register_profile("el4ner", deadline=None)  # that a machine is busy is no failure
hypothesis_settings.load_profile("el4ner")

ROOT = Path(__file__).resolve().parent.parent

# The whole run works offline, whatever the libraries under it would like to look up.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # a worker for every core: more threads would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Every test starts from the same random state; torch only where it is loaded anyway."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


class NetworkError(RuntimeError):
    """A test tried to reach the network."""


def _is_local(family: int, address: Any) -> bool:
    if family == getattr(socket, "AF_UNIX", None):
        return True
    host = address[0] if isinstance(address, tuple) and address else address
    return host in ("localhost", "::1", "") or str(host).startswith("127.")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections are refused unless they stay on this machine; names are not looked up."""
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def guard(self: socket.socket, address: Any) -> None:
        if not _is_local(self.family, address):
            raise NetworkError(f"a test tried to connect to {address!r}; tests run offline")

    def guarded_connect(self: socket.socket, address: Any) -> None:
        guard(self, address)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        guard(self, address)
        return connect_ex(self, address)

    def guarded_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_local(-1, (host or "",)):
            raise NetworkError(f"a test tried to look up {host!r}; tests run offline")
        return getaddrinfo(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)


@pytest.fixture(scope="session")
def root() -> Path:
    """The top folder of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real benchmarks, from EL4NER_DATA; the test is skipped, saying so, where it is not set."""
    value = os.environ.get("EL4NER_DATA")
    if not value:
        pytest.skip("EL4NER_DATA is not set; point it to a folder of benchmarks to run this test")
    folder = Path(value)
    if not folder.is_dir():
        pytest.fail(f"EL4NER_DATA={value} is no folder")
    return folder


@pytest.fixture(scope="session")
def embedded() -> None:
    """The embedded models, which `make setup` installs; the test is skipped, saying why, where they are not there."""
    from el4ner.models import installed

    usable = ("ok", "original")  # "ok, not converted yet" too: the first use converts
    missing = [f"{model.name}: {model.status}" for model in installed() if not model.status.startswith(usable)]
    if missing:
        pytest.skip(f"embedded models are not installed ({'; '.join(missing)}); run `el4ner download embedded`")


@pytest.fixture(autouse=True)
def _embedded_marker(request: pytest.FixtureRequest) -> None:
    """Tests marked `embedded` need the fixture of that name."""
    if request.node.get_closest_marker("embedded"):
        request.getfixturevalue("embedded")


@pytest.fixture(scope="module")
def embedded_engine(embedded: None) -> Any:
    """The embedded language model on the CPU in float32."""
    from el4ner.engines import load_engine

    return load_engine("embedded:smollm2", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a small random Llama."""
    from tiny_models import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny") / "llama", "llama")


@pytest.fixture(scope="module")
def tiny(tiny_folder: str) -> Any:
    """Its engine."""
    from el4ner.engines import load_engine

    return load_engine(tiny_folder, name="tiny", device="cpu", dtype="float32")


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Starts `fake_server.FakeServer`s by script and list of models; pauses between tries are short, no key is set."""
    from fake_server import FakeServer

    from el4ner.engines import server as server_module

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr(server_module, "BACKOFF_S", 0.01)
    servers: list[FakeServer] = []

    def start(script: Any, models: Any = None) -> FakeServer:
        servers.append(FakeServer(script, ["m"] if models is None else models))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Pipelines of scripted members, by source, over a small pool and an empty cache (`scripted_members`)."""
    from scripted_members import POOL, LetterEncoder, settings

    from el4ner.config import make_config
    from el4ner.pipeline import El4ner

    monkeypatch.setenv("EL4NER_CACHE", str(tmp_path))

    def build(engines: dict[str, Any], pool: Any = POOL, **over: Any) -> El4ner:
        config = make_config(settings(list(engines), **over))
        return El4ner(config, engines=engines, encoder=LetterEncoder(), pool=pool)

    return build
