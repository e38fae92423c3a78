"""One server for the tests of the front: a tiny decoder and a tiny encoder behind keys, started once per folder."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
from served import Server, serving
from tiny import tiny_bert, tiny_llama

ACME, OTHER, ADMIN = "sk-acme-0123456789", "sk-other-0123456789", "sk-admin-0123456789"
KEYS = f"{ACME} tenant=acme\n{OTHER} tenant=other priority=0\n{ADMIN} tenant=ops scopes=user+admin\n"
MODEL, ENCODER = "tiny", "tiny-encoder"
CONTEXT = 16384  # a request that fills it takes seconds on the fastest machine, whatever time limit a test sets


def bearer(key: str) -> dict[str, str]:
    """The header that a key travels in."""
    return {"authorization": f"Bearer {key}"}


@dataclass
class Front:
    """A running server and clients that hold a key of it."""

    server: Server
    http: httpx.Client
    channel: grpc.Channel
    run_dir: Path
    """Where the engines' sockets are."""
    decoder: Path
    """The decoder's model directory."""

    def post(self, path: str, key: str = ACME, **body: Any) -> httpx.Response:
        """POST JSON with a key."""
        return self.http.post(path, json=body, headers=bearer(key))

    def generate(self, key: str = ACME, **body: Any) -> Any:
        """POST /v1/generate; the JSON of an answer that must be there."""
        response = self.post("/v1/generate", key, **{"model": MODEL, **body})
        assert response.status_code == 200, response.text
        return response.json()

    def engine(self, model: str = MODEL) -> Mapping[str, Any]:
        """One engine of /admin/v1/status."""
        document = self.http.get("/admin/v1/status", headers=bearer(ADMIN)).json()
        return next(item for item in document["engines"] if item["model"] == model)


def write_keys(folder: Path) -> Path:
    """A keys file that only its owner can read."""
    path = folder / "keys"
    path.write_text(KEYS)
    path.chmod(0o600)
    return path


@contextlib.contextmanager
def fronted(folder: Path, *flags: str) -> Iterator[Front]:
    """Serve the tiny models of `folder` with keys."""
    decoder = tiny_llama(folder / MODEL, context=CONTEXT)
    encoder = tiny_bert(folder / ENCODER)
    second = ["--set", "engines.1.name=encoder", "--set", f"engines.1.model={encoder}"]
    second += ["--set", "engines.1.num_threads=1", "--set", "engines.1.memory_fraction=0.1"]
    keys = write_keys(folder)
    flags = ("--api-keys-file", str(keys), "--kv-cache-bytes", "32MiB", *second, *flags)
    with (
        tempfile.TemporaryDirectory(prefix="tri-") as run_dir,  # a socket's path must be short
        serving(decoder, "--run-dir", run_dir, *flags) as server,
        httpx.Client(base_url=server.url, timeout=60, headers={}) as http,
        grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel,
    ):
        yield Front(server, http, channel, Path(run_dir), decoder)
