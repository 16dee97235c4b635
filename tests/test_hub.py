"""Hub models where no hub answers: what is in the cache is used, and nothing waits."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from el4ner.models import local_folder, resolve

FEW = 5
"""Connections at most: whoever tries again makes six for every file."""
REVISION = "0123456789abcdef0123456789abcdef01234567"


class SilentHub:
    """Takes connections, counts them, and closes each without a word."""

    def __init__(self) -> None:
        self.connections = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            connection.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # not every system can shut a listening socket down
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(timeout=5)


@pytest.fixture
def silent_hub() -> Iterator[SilentHub]:
    hub = SilentHub()
    yield hub
    hub.close()


def run(code: str, hub: SilentHub, home: Path) -> str:
    """What the code prints in a process of its own: the hub's client reads its settings when it is imported."""
    own = {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    hidden = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=kept | own)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def put_in_cache(home: Path, hub_id: str, folder: Path) -> None:
    """Lays a model folder out as the hub's client does after fetching it."""
    entry = home / "hub" / f"models--{hub_id.replace('/', '--')}"
    shutil.copytree(folder, entry / "snapshots" / REVISION)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(REVISION)


def test_a_model_that_nobody_has_is_an_error_at_once(silent_hub: SilentHub, tmp_path: Path) -> None:
    code = """
from el4ner.engines import load_engine
from el4ner.errors import ModelNotFoundError
try:
    load_engine("nobody/nothing")
except ModelNotFoundError as error:
    print(error)
"""
    said = run(code, silent_hub, tmp_path)
    assert said.startswith("model 'nobody/nothing': not in the local cache and not fetched from the hub")
    assert "check the name, the network" in said
    assert 1 <= silent_hub.connections <= FEW


def test_models_in_the_cache_load_though_the_hub_is_silent(silent_hub: SilentHub, tmp_path: Path) -> None:
    put_in_cache(tmp_path, "owner/causal", Path(local_folder(resolve("embedded:smollm2"))))
    put_in_cache(tmp_path, "owner/encoder", Path(local_folder(resolve("embedded:minilm"))))
    code = """
from el4ner.engines import load_encoder, load_engine
from el4ner.engines.sizes import model_config
from el4ner.models import resolve
print(load_engine("owner/causal").source)
print(load_encoder("owner/encoder").source)
print(model_config(resolve("owner/causal")).num_hidden_layers)
"""
    causal, encoder, layers = run(code, silent_hub, tmp_path).splitlines()
    assert causal.startswith(f"owner/causal@{REVISION[:16]}")
    assert encoder.startswith(f"owner/encoder@{REVISION[:16]}")
    assert layers == "30"
    assert 1 <= silent_hub.connections <= FEW


def test_the_hub_is_not_asked_offline(silent_hub: SilentHub, tmp_path: Path) -> None:
    code = """
import os
os.environ["HF_HUB_OFFLINE"] = "1"
from el4ner.hub import hub_answers
print(hub_answers())
"""
    assert run(code, silent_hub, tmp_path) == "False"
    assert silent_hub.connections == 0
