"""
Models of a Hugging Face hub, over plain HTTPS: safetensors, JSON and tokenizer files at one commit, digest-checked.

The hub lists each file with its SHA-256 (large files) or its git blob id (small ones), and either is recomputed here.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from trilithon_parallel.weights.sources import Fetched, Progress, PullError, Report, default_name, model_files

DEFAULT_HUB = "https://huggingface.co"

_REPOSITORY = re.compile(
    r"([A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{0,99}))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

_TIMEOUT = httpx.Timeout(30.0)  # seconds without a byte, not of a whole download
_CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class _HubFile:
    path: str
    num_bytes: int
    sha256: str | None
    blob_id: str | None


@dataclass(frozen=True, slots=True)
class HubOrigin:
    """A repository at a revision. `HF_ENDPOINT` names another hub, `HF_TOKEN` opens repositories that ask for one."""

    repository: str
    revision: str

    @classmethod
    def parse(cls, rest: str) -> HubOrigin:
        """`rest` is ORG/NAME or ORG/NAME@REVISION (branch, tag or commit; default main)."""
        match = _REPOSITORY.fullmatch(rest)
        if match is None or ".." in rest:
            raise PullError(
                f"hf: must be followed by ORG/NAME or ORG/NAME@REVISION. Given: {rest!r:.200}.",
                code="source_invalid",
                hint="For example hf:HuggingFaceTB/SmolLM2-135M-Instruct@main.",
            )
        return cls(match.group(1), match.group(2) or "main")

    @property
    def text(self) -> str:
        return f"hf:{self.repository}@{self.revision}"

    @property
    def default_name(self) -> str:
        return default_name(self.repository.split("/")[1])

    def identity(self) -> str:
        with _client() as client:
            return self._listing(client)[0]

    def fetch(self, scratch: Path, report: Report) -> Fetched:
        with _client() as client:
            commit, listed, licence = self._listing(client)
            wanted = [listed[path] for path in model_files(list(listed), where=self.text)]
            total, done = sum(item.num_bytes for item in wanted), 0
            files: dict[str, Path] = {}
            for number, item in enumerate(wanted):
                files[item.path] = scratch / f"file-{number}"
                for received in self._download(client, commit, item, files[item.path]):
                    report(Progress("download", done + received, total))
                done += item.num_bytes
        return Fetched(commit, files=files, owned=True, licence=licence)

    def _listing(self, client: httpx.Client) -> tuple[str, dict[str, _HubFile], str | None]:
        """The commit behind the revision, its files, and the licence on its card."""
        response = self._get(client, f"/api/models/{self.repository}/revision/{self.revision}", {"blobs": "true"})
        try:
            document = response.json()
            commit = document["sha"]
            files = [_hub_file(item) for item in document["siblings"]]
        except (ValueError, KeyError, TypeError):
            raise self._odd("its list of files was not understood") from None
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise self._odd(f"its commit must be 40 hex digits. Given: {commit!r:.80}")
        card = document.get("cardData")
        licence = card.get("license") if isinstance(card, dict) else None
        return commit, {item.path: item for item in files}, licence if isinstance(licence, str) else None

    def _get(self, client: httpx.Client, path: str, params: Mapping[str, str]) -> httpx.Response:
        try:
            response = client.get(path, params=params)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        self._require_ok(response)
        return response

    def _download(self, client: httpx.Client, commit: str, item: _HubFile, path: Path) -> Iterator[int]:
        """Stream one file to disk, telling the bytes so far, then hold it against the digest that the hub listed."""
        sha256 = hashlib.sha256()
        blob = hashlib.sha1(f"blob {item.num_bytes}\0".encode(), usedforsecurity=False)
        received = 0
        try:
            with (
                client.stream("GET", f"/{self.repository}/resolve/{commit}/{item.path}") as response,
                path.open("wb") as file,
            ):
                self._require_ok(response)
                for chunk in response.iter_bytes(_CHUNK_BYTES):
                    received += len(chunk)
                    if received > item.num_bytes:
                        break
                    file.write(chunk)
                    sha256.update(chunk)
                    blob.update(chunk)
                    yield received
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        expected, given = (item.sha256, sha256.hexdigest()) if item.sha256 else (item.blob_id, blob.hexdigest())
        if received != item.num_bytes or given != expected:
            raise PullError(
                f"{self.text} file {item.path} must be {item.num_bytes} bytes with digest {expected}. "
                f"Given: {received} bytes with {given}.",
                code="digest_mismatch",
                hint="Pull it again; if it happens twice, do not use this source.",
            )

    def _require_ok(self, response: httpx.Response) -> None:
        if response.url.scheme != "https" and response.url.host not in _LOOPBACK:
            raise self._odd(f"it sent us to {response.url.scheme}://{response.url.host}, which is not https")
        if response.status_code in (401, 403):
            raise PullError(
                f"{self.text} is not open to us: the hub answered {response.status_code}.",
                code="not_found",
                hint="Check the name; where the repository asks for it, accept its terms and set HF_TOKEN.",
            )
        if response.status_code == 404:
            raise PullError(f"{self.text} does not exist.", code="not_found", hint="Check name and revision.")
        if response.status_code != 200:
            raise PullError(
                f"{self.text} could not be read: the hub answered {response.status_code}.",
                code="unreachable",
                hint="Try again later.",
            )

    def _unreachable(self, error: httpx.HTTPError) -> PullError:
        reason = str(error) or type(error).__name__
        return PullError(
            f"{self.text} could not be reached: {reason.rstrip('.')}.", code="unreachable", hint="Check the network."
        )

    def _odd(self, rule: str) -> PullError:
        return PullError(
            f"{self.text} gave an answer that is not a hub's: {rule}.", code="unreachable", hint="Check HF_ENDPOINT."
        )


def _client() -> httpx.Client:
    """Follows redirects (large files lie elsewhere); httpx drops the token when they leave the hub."""
    hub = os.environ.get("HF_ENDPOINT") or DEFAULT_HUB
    url = httpx.URL(hub)
    if url.scheme != "https" and url.host not in _LOOPBACK:
        raise PullError(f"HF_ENDPOINT must be an https address. Given: {hub!r:.200}.", code="source_invalid")
    token = os.environ.get("HF_TOKEN")
    headers = {"authorization": f"Bearer {token}"} if token else {}
    return httpx.Client(
        base_url=hub,
        headers={"user-agent": "trilithon", **headers},
        timeout=_TIMEOUT,
        follow_redirects=True,
        transport=httpx.HTTPTransport(retries=2),
    )


def _hub_file(item: Mapping[str, Any]) -> _HubFile:
    """One entry of the hub's list; KeyError or TypeError where it lacks what we check by."""
    path, size = item["rfilename"], item["size"]
    lfs, blob_id = item.get("lfs"), item.get("blobId")
    sha256 = lfs["sha256"] if isinstance(lfs, dict) else None
    if not isinstance(path, str) or type(size) is not int or not isinstance(sha256 or blob_id, str):
        raise TypeError(path)
    return _HubFile(path, size, sha256, blob_id)
