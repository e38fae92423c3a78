"""
What a version of an index says about itself: `manifest.json`, written last, so that it lists every file and checksum.

A folder without a manifest, or with files that differ from it, is no version of an index.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trilithon.errors import DataLoss, FailedPrecondition
from trilithon_server.knowledge.dense import BACKENDS, Backend
from trilithon_server.validation import shown

MANIFEST_FILE = "manifest.json"
FORMAT: Final = 1

_REBUILD = "Build the index again."


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class FileEntry(_Strict):
    """One file: its size in bytes and the SHA-256 of its bytes, in hex."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Encoder(_Strict):
    """
    What made the vectors; queries must be encoded by the same.

    Attributes:
        model_digest: of the encoder, as `engine.identity.model_digest` computes it.
        pooling: how the vector of a text is made of those of its tokens.
        normalize: whether vectors have length 1, so that scores are cosines.
        passage_format: how a passage was written for the encoder, with `{title}` and `{text}`.
        score_scale: what a score is multiplied by before a softmax makes it a probability, above 0: 1 / sqrt(width) for
            vectors of the first token (arXiv 2101.00408), 1 / the training's temperature for cosines.
        model: the name under which it was served; where it is looked for first.
    """

    model_digest: Annotated[str, Field(min_length=1)]
    pooling: Literal["mean", "last", "first"]
    normalize: bool
    passage_format: str
    score_scale: Annotated[float, Field(gt=0)]
    model: str = ""


class Manifest(_Strict):
    """
    The facts of one version of an index.

    Attributes:
        format: of this document and of the files; a newer one is refused.
        index: the index's name.
        version: from 1, each one more than the last; an index that was deleted and made again begins at 1 anew.
        encoder: of the vectors.
        backend: how the vectors are searched.
        dim: width of the vectors.
        count: passages, and vectors.
        created: Unix seconds.
        files: every file but this one, by its name.
    """

    format: Literal[1] = FORMAT
    index: str
    version: Annotated[int, Field(ge=1)]
    encoder: Encoder
    backend: Backend
    dim: Annotated[int, Field(ge=1)]
    count: Annotated[int, Field(ge=1)]
    created: Annotated[int, Field(ge=0)]
    files: dict[str, FileEntry]


def encode_manifest(manifest: Manifest) -> bytes:
    """The document with its own checksum, so that a flipped byte in it is found as well."""
    body = manifest.model_dump(mode="json")
    return (json.dumps({"sha256": _sum_of(body), **body}, indent=2, allow_nan=False) + "\n").encode()


def read_manifest(folder: Path, *, where: str) -> Manifest:
    """
    The manifest of a version; the files that it lists are not looked at.

    Args:
        where: begins the messages, e.g. `index "wiki" version 3`.
    Raises:
        DataLoss: `index_corrupt`.
        FailedPrecondition: `index_unsupported`, a newer format or an unknown backend.
    """
    try:
        document: Any = json.loads((folder / MANIFEST_FILE).read_bytes())
    except OSError as error:
        raise corrupt(f"{where} {MANIFEST_FILE} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise corrupt(f"{where} {MANIFEST_FILE} is not readable JSON: {error}.") from None
    if not isinstance(document, dict):
        raise corrupt(f"{where} {MANIFEST_FILE} must hold one JSON object. Given: {shown(document)}.")
    _check_known(document, "format", (FORMAT,), where)  # first: a newer one may count its sum otherwise
    if document.pop("sha256", None) != _sum_of(document):
        raise corrupt(f"{where} {MANIFEST_FILE} does not fit its own checksum: a byte of it was changed.")
    _check_known(document, "backend", BACKENDS, where)
    try:
        return Manifest.model_validate_json(json.dumps(document))
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:3])
        raise corrupt(f"{where} {MANIFEST_FILE} is not a manifest: {found}.") from None


def check_files(folder: Path, manifest: Manifest, expected: Collection[str], *, where: str) -> None:
    """
    Read all files of a version and compare them with its manifest.

    Args:
        expected: the files that it must have.
        where: begins the messages.
    Raises:
        DataLoss: `index_corrupt`, naming the file.
    """
    if manifest.files.keys() != set(expected):
        differ = ", ".join(sorted(manifest.files.keys() ^ set(expected)))
        raise corrupt(
            f"{where} {MANIFEST_FILE} must list the files of a {manifest.backend} index. Differing: {differ}."
        )
    for name, entry in manifest.files.items():
        try:
            found = file_entry(folder / name)
        except OSError as error:
            raise corrupt(f"{where} {name} cannot be read: {error.strerror}.") from None
        if found.bytes != entry.bytes:
            raise corrupt(f"{where} {name} must have {entry.bytes} bytes. Given: {found.bytes}.")
        if found.sha256 != entry.sha256:
            raise corrupt(f"{where} {name} does not fit its checksum: bytes of it were changed.")


def file_entry(path: Path) -> FileEntry:
    """Size and checksum of a file as it lies on the disk."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(bytes=file.tell(), sha256=digest)


def corrupt(message: str) -> DataLoss:
    """The error of files that are not what was written."""
    return DataLoss(message, code="index_corrupt", hint=_REBUILD)


def _check_known(document: dict[str, Any], key: str, known: tuple[int, ...] | tuple[str, ...], where: str) -> None:
    if document.get(key) not in known:
        raise FailedPrecondition(
            f"{where} has a {key} that is not read here. Given: {shown(document.get(key))}. "
            f"Allowed: {', '.join(map(str, known))}.",
            code="index_unsupported",
            hint="Use the version of Trilithon that wrote it, or build the index again.",
        )


def _sum_of(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
