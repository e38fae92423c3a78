"""
What a checkpoint says about itself: `manifest.json`, written last, so that it lists every file and its checksum.

A directory without a manifest, or with files that differ from it, is no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from trilithon_parallel.checkpoint.errors import CheckpointError, together
from trilithon_parallel.grid import Axis

MANIFEST_FILE = "manifest.json"

SCHEMA_VERSION: Final = 1

_BLOCK_BYTES = 8 * 1024 * 1024  # of one read when a file is hashed

_USE_EARLIER = "Use an earlier checkpoint, or copy this one again."

Count = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class FileEntry(_Strict):
    """One file: its size in bytes and the SHA-256 of its bytes, in hex."""

    bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Vocabulary(_Strict):
    """Rows of the embedding: in the files (`true_size`), and as the training layout pads them in memory."""

    true_size: Count
    padded_size: Count


class SavedLayout(_Strict):
    """The layout that wrote the checkpoint; it may be loaded at any other."""

    tp: Annotated[int, Field(ge=1)]
    pp: Annotated[int, Field(ge=1)]
    dp: Annotated[int, Field(ge=1)]
    virtual: Annotated[int, Field(ge=1)]


class Manifest(_Strict):
    """
    The facts of one checkpoint.

    Attributes:
        schema_version: of this document; a newer one is refused.
        step: optimizer steps done, from 0.
        consumed_samples, consumed_tokens: since the run began, whatever the layout was.
        layout: that wrote it.
        vocab: true and padded rows.
        rope_layout: how rotary pairs lie in q and k (`half_split`, as Hugging Face has it), None without rotary.
        dtypes: of `weights` and `optimizer`.
        tied_embeddings: whether the head is the embedding, which is then stored once.
        seed: of the run.
        data_hash: of the data mix; a resume with another one is the trainer's to refuse.
        state: whatever else the trainer needs to continue: RNG, loss scale, ramps.
        base_digest: of the model beneath an adapter; None where all weights are trained, and in the files.
        files: every file but this one, by its path within the directory.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    step: Count
    consumed_samples: Count
    consumed_tokens: Count
    layout: SavedLayout
    vocab: Vocabulary
    rope_layout: Literal["half_split"] | None
    dtypes: dict[str, str]
    tied_embeddings: bool
    seed: int
    data_hash: str
    state: dict[str, JsonValue]
    base_digest: str | None = None
    files: dict[str, FileEntry]


def encode_manifest(manifest: Manifest) -> bytes:
    """The document with its own checksum, so that a flipped byte in it is found as well."""
    body = manifest.model_dump(mode="json")
    return (json.dumps({"sha256": _sum_of(body), **body}, indent=2, allow_nan=False) + "\n").encode()


def read_manifest(directory: Path) -> Manifest:
    """
    The manifest of a checkpoint directory; the files it lists are not looked at.

    Raises:
        CheckpointError: `checkpoint_missing`, `checkpoint_incomplete`, `checkpoint_corrupt`, `checkpoint_unsupported`.
    """
    where = f"{directory.name}/{MANIFEST_FILE}"
    if not directory.is_dir():
        raise CheckpointError(
            f"checkpoint {str(directory)!r} does not exist.",
            code="checkpoint_missing",
            hint="Give a directory that a training run wrote: RUN/step_00000123.",
        )
    try:
        document: Any = json.loads((directory / MANIFEST_FILE).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{where} is missing: the directory is no complete checkpoint.",
            code="checkpoint_incomplete",
            hint="Give a directory that a training run wrote, or import the weights of a model directory.",
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{where} is not readable JSON: {error}.", code="checkpoint_corrupt", hint=_USE_EARLIER
        ) from None
    if not isinstance(document, dict):
        raise CheckpointError(
            f"{where} must hold one JSON object. Given: {type(document).__name__}.",
            code="checkpoint_corrupt",
            hint=_USE_EARLIER,
        )
    version = document.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{where} schema_version must be at most {SCHEMA_VERSION}. Given: {version}.",
            code="checkpoint_unsupported",
            hint="The checkpoint was written by a newer version: use that one.",
        )
    if document.pop("sha256", None) != _sum_of(document):
        raise CheckpointError(
            f"{where} does not fit its own checksum: a byte of it was changed.",
            code="checkpoint_corrupt",
            hint=_USE_EARLIER,
        )
    try:
        manifest = Manifest.model_validate_json(json.dumps(document))
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:3])
        raise CheckpointError(
            f"{where} is not a manifest: {found}.", code="checkpoint_corrupt", hint=_USE_EARLIER
        ) from None
    for name in manifest.files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise CheckpointError(
                f"{where} files must lie inside the directory. Given: {name!r}.",
                code="checkpoint_corrupt",
                hint="Do not trust this checkpoint.",
            )
    return manifest


def check_sizes(directory: Path, manifest: Manifest) -> None:
    """
    Check that every listed file is there in full length.

    Raises:
        CheckpointError: `checkpoint_incomplete`, naming the file and both sizes.
    """
    for name, entry in manifest.files.items():
        try:
            size = (directory / name).stat().st_size
        except FileNotFoundError:
            raise CheckpointError(
                f"{directory.name}/{name} is missing.", code="checkpoint_incomplete", hint=_USE_EARLIER
            ) from None
        if size != entry.bytes:
            raise CheckpointError(
                f"{directory.name}/{name} must have {entry.bytes} bytes. Given: {size}.",
                code="checkpoint_incomplete",
                hint=_USE_EARLIER,
            )


def check_sums(directory: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """
    Read some files whole and compare their checksums.

    Raises:
        CheckpointError: `checkpoint_corrupt`, naming the file.
    """
    for name in names:
        if file_sum(directory / name) != manifest.files[name].sha256:
            raise CheckpointError(
                f"{directory.name}/{name} does not fit its checksum: bytes of it were changed.",
                code="checkpoint_corrupt",
                hint=_USE_EARLIER,
            )


def verify(directory: Path, *, axis: Axis) -> Manifest:
    """
    Check a checkpoint whole: manifest, listing, sizes and checksums, each file read by one rank. Collective.

    Args:
        directory: of the checkpoint, on a file system that all ranks see.
        axis: the ranks that share the reading (`grid.world`; that of `Grid.single()` alone).
    Returns:
        The manifest.
    Raises:
        CheckpointError: on all ranks alike, naming the file.
    """
    found: list[Manifest] = []

    def run() -> None:
        manifest = read_manifest(directory)
        check_sizes(directory, manifest)
        found.append(manifest)
        check_sums(directory, manifest, list(manifest.files)[axis.rank :: axis.size])

    together(run, axis, label="checkpoint.verify")
    return found[0]


def file_sum(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def file_entry(path: Path) -> FileEntry:
    """Size and checksum of a file as it lies on the disk."""
    return FileEntry(bytes=os.stat(path).st_size, sha256=file_sum(path))


def _sum_of(body: Mapping[str, Any]) -> str:
    encoded = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(encoded.encode()).hexdigest()


def check_state(state: Mapping[str, JsonValue]) -> None:
    """
    Refuse a trainer's state that JSON would not give back as it is.

    Raises:
        CheckpointError: `checkpoint_state`.
    """
    try:
        same = json.loads(json.dumps(dict(state), allow_nan=False)) == state
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint state must be JSON: {error}.",
            code="checkpoint_state",
            hint="Give finite numbers, strings, lists and objects with string keys.",
        ) from None
    if not same:
        raise CheckpointError(
            "checkpoint state must be the same when it is read back from JSON.",
            code="checkpoint_state",
            hint="Give lists instead of tuples, and string keys.",
        )
