"""Models from a hub: one commit, digests of its listing, the token for the hub alone."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from tiny import tiny_llama

from trilithon import _store
from trilithon_parallel.config import ModelError
from trilithon_parallel.weights.pull import Progress, PullError, pull


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of this test's own."""
    monkeypatch.setenv("TRILITHON_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def left_in(home: Path) -> list[str]:
    """Everything in the store that is neither a model nor a lock."""
    return [path.name for path in (home / "models").iterdir() if path.name.startswith(".tmp")]


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """A hub on loopback that serves one repository; large files by redirect, as the real one does."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.files = files
        self.listing: dict[str, Any] = {
            "sha": COMMIT,
            "cardData": {"license": "apache-2.0"},
            "siblings": [_sibling(path, data) for path, data in files.items()],
        }
        self.seen: list[tuple[str, str | None]] = []
        self.status = 200
        self.redirect = ""


def _sibling(path: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()
    entry: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": blob}
    if path.endswith(".safetensors"):
        entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    return entry


class _HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.server.seen.append((path, self.headers.get("authorization")))
        prefix = f"/org/Tiny/resolve/{COMMIT}/"
        if path == "/api/models/org/Tiny/revision/main" and self.server.status == 200:
            self._answer(json.dumps(self.server.listing).encode())
        elif path.startswith(prefix) and path.endswith(".safetensors"):
            self.send_response(302)
            self.send_header("location", self.server.redirect or f"/cdn/{path.removeprefix(prefix)}")
            self.end_headers()
        elif path.startswith((prefix, "/cdn/")):
            self._answer(self.server.files[path.removeprefix(prefix).removeprefix("/cdn/")])
        else:
            self.send_error(self.server.status if self.server.status != 200 else 404)

    def _answer(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    model_dir = tiny_llama(tmp_path / "hub", layers=1, shards=2)
    files = {
        path.relative_to(model_dir).as_posix(): path.read_bytes() for path in model_dir.rglob("*") if path.is_file()
    }
    files |= {"modeling.py": b"raise SystemExit", "pytorch_model.bin": b"x", "onnx/model.safetensors": b"x"}
    server = Hub(files)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.shutdown()
    thread.join(timeout=10)
    server.server_close()


def test_hub_repository_is_fetched_at_one_commit(hub: Hub) -> None:
    """Files come by commit, through redirects, each against its digest; code and pickles are not even asked for."""
    seen: list[Progress] = []

    pulled = pull("hf:org/Tiny", progress=seen.append)

    assert (pulled.name, pulled.source, pulled.licence) == ("tiny", "hf:org/Tiny@main", "apache-2.0")
    asked = {path.rsplit("/", 1)[-1] for path, _ in hub.seen if "/resolve/" in path}
    assert asked == {path.name for path in pulled.path.iterdir()} - {"trilithon.json"}
    assert not asked & {"modeling.py", "pytorch_model.bin"}
    downloads = [step for step in seen if step.phase == "download"]
    assert downloads[-1].done == downloads[-1].total
    hub.seen.clear()
    assert not pull("hf:org/Tiny@main").fresh
    assert len(hub.seen) == 1  # only: which commit is it?


def test_S10_token_goes_to_the_hub_alone(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_TOKEN is sent to the hub and not to another host that it redirects to."""
    other = Hub(hub.files)
    thread = threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.listing["siblings"] = [item for item in hub.listing["siblings"] if "00001" not in item["rfilename"]]
    hub.redirect = f"http://localhost:{other.server_address[1]}/cdn/model-00002-of-00002.safetensors"
    monkeypatch.setenv("HF_TOKEN", "secret-token")

    with pytest.raises(ModelError, match="is missing"):  # one of two shards was left out of the list
        pull("hf:org/Tiny")
    other.shutdown()
    thread.join(timeout=10)
    other.server_close()

    assert {token for _, token in hub.seen} == {"Bearer secret-token"}
    assert [token for _, token in other.seen] == [None]


HUB_FAULTS: dict[str, tuple[Callable[[Hub], object], str, str]] = {
    "a large file changed": (
        lambda h: h.files.update({"model-00001-of-00002.safetensors": b"y" * 10}),
        "digest_mismatch",
        "file model-00001-of-00002.safetensors must be",
    ),
    "a small file changed": (
        lambda h: h.files.update({"config.json": h.files["config.json"].replace(b"64", b"65")}),
        "digest_mismatch",
        "file config.json must be",
    ),
    "more bytes than listed": (
        lambda h: h.files.update({"config.json": h.files["config.json"] + b" "}),
        "digest_mismatch",
        "file config.json must be",
    ),
    "no such repository": (lambda h: setattr(h, "status", 404), "not_found", "does not exist"),
    "closed repository": (lambda h: setattr(h, "status", 401), "not_found", "is not open to us"),
    "hub in trouble": (lambda h: setattr(h, "status", 503), "unreachable", "answered 503"),
    "no list": (lambda h: h.listing.pop("siblings"), "unreachable", "list of files was not understood"),
    "a file without digest": (lambda h: h.listing["siblings"][0].pop("blobId"), "unreachable", "was not understood"),
    "commit that is a path": (lambda h: h.listing.update(sha="../../x"), "unreachable", "commit must be 40 hex"),
    "only pickles": (
        lambda h: h.listing.update(siblings=[s for s in h.listing["siblings"] if "model-" not in s["rfilename"]]),
        "source_invalid",
        "only in pickled form",
    ),
}


@pytest.mark.parametrize("case", HUB_FAULTS, ids=list(HUB_FAULTS))
def test_R11_hub_that_errs_is_one_sentence(case: str, hub: Hub, home: Path) -> None:
    """Changed bytes, refusals and nonsense are told apart, and nothing reaches the store."""
    change, code, words = HUB_FAULTS[case]
    change(hub)

    with pytest.raises(PullError) as caught:
        pull("hf:org/Tiny")

    assert code == caught.value.code
    assert words in caught.value.message
    assert _store.list_models() == []
    assert left_in(home) == []


def test_hub_must_be_https(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another host is only asked over TLS; an unreachable one is a sentence."""
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    with pytest.raises(PullError, match="must be an https address"):
        pull("hf:org/Tiny")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PullError, match="could not be reached") as caught:
        pull("hf:org/Tiny")

    assert caught.value.code == "unreachable"
