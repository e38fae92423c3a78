"""
The model store on disk: one directory per model below `models/`, each with a manifest, published by rename.

    $TRILITHON_HOME (default ~/.cache/trilithon)/models/
      NAME/                  a model directory, with trilithon.json: where it came from and what its files are
      .lock-NAME             held while NAME is being pulled
      .tmp-NAME-XXXXXXXX/    what a pull is working on; leftovers of killed pulls are removed by the next one
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trilithon_parallel.weights.sources import PullError

MANIFEST_FILE = "trilithon.json"
MANIFEST_FORMAT = 1

LOCK_TIMEOUT_S = 3600.0
"""How long a pull waits for another one of the same name; a giant model takes a while."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")


def home() -> Path:
    """`$TRILITHON_HOME`, by default `~/.cache/trilithon`. `trilithon._store.home` says the same (a test holds it)."""
    configured = os.environ.get("TRILITHON_HOME")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "trilithon"


def check_name(name: str) -> str:
    """
    A name that is also a safe directory name.

    >>> check_name("smollm2-135m-instruct")
    'smollm2-135m-instruct'

    Raises:
        PullError: `source_invalid`.
    """
    if not _NAME.fullmatch(name):
        raise PullError(
            "name must begin with a lower-case letter or digit and hold only those, '.', '_' and '-', at most 100 "
            f"characters. Given: {name!r:.120}.",
            code="source_invalid",
            hint="Choose another one with --name.",
        )
    return name


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size and SHA-256 of one file."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """
    What `trilithon.json` says.

    Attributes:
        source_digest: of what was fetched (a wheel, a file, a commit); tells whether the source has changed.
        dtype: what a GGUF file was converted to; None where nothing was converted.
        created: UTC, ISO 8601.
        files: path below the directory -> record; the manifest itself is not among them.
    """

    name: str
    source: str
    source_digest: str
    digest: str
    licence: str
    dtype: str | None
    created: str
    size_bytes: int
    files: dict[str, FileRecord]

    @classmethod
    def describe(
        cls,
        model_dir: Path,
        *,
        name: str,
        source: str,
        source_digest: str,
        licence: str,
        dtype: str | None,
        created: str,
    ) -> Manifest:
        """The manifest of a finished model directory; reads every file."""
        files = {
            str(path.relative_to(model_dir)): FileRecord(path.stat().st_size, file_sha256(path))
            for path in sorted(model_dir.rglob("*"))
            if path.is_file() and path.name != MANIFEST_FILE
        }
        listing = "".join(f"{record.sha256}  {relative}\n" for relative, record in files.items())
        return cls(
            name=name,
            source=source,
            source_digest=source_digest,
            digest=hashlib.sha256(listing.encode()).hexdigest(),
            licence=licence,
            dtype=dtype,
            created=created,
            size_bytes=sum(record.num_bytes for record in files.values()),
            files=files,
        )

    def to_json(self) -> str:
        """The text of `trilithon.json`."""
        return json.dumps({"format": MANIFEST_FORMAT, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises ValueError, KeyError or TypeError where the text is no manifest."""
        document: dict[str, Any] = json.loads(text)
        if document.pop("format") != MANIFEST_FORMAT:
            raise ValueError("another format")
        document["files"] = {key: FileRecord(**record) for key, record in document["files"].items()}
        return cls(**document)


class ModelStore:
    """The directory of models; made when it is first needed."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def open(cls) -> ModelStore:
        """The user's store; its directory is made."""
        root = home() / "models"
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PullError(
                f"the model store {root} cannot be made: {error.strerror}.",
                code="store_failed",
                hint="Set TRILITHON_HOME to a directory that you may write.",
            ) from None
        return cls(root)

    def path_of(self, name: str) -> Path:
        """Where a model of this name lies or would lie."""
        return self.root / name

    def manifest(self, name: str) -> Manifest | None:
        """The manifest of a model; None where there is none that can be read."""
        try:
            return Manifest.from_json((self.path_of(name) / MANIFEST_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def is_whole(self, name: str, manifest: Manifest) -> bool:
        """Whether every file is there in its size (contents are not read: that is what `verify` is for)."""
        paths = {relative: self.path_of(name) / relative for relative in manifest.files}
        return all(
            path.is_file() and path.stat().st_size == manifest.files[relative].num_bytes
            for relative, path in paths.items()
        )

    def verify(self, name: str, manifest: Manifest) -> list[str]:
        """Files whose contents are not those of the manifest, or that are gone; reads everything."""
        paths = {relative: self.path_of(name) / relative for relative in manifest.files}
        return [
            relative
            for relative, path in paths.items()
            if not path.is_file() or file_sha256(path) != manifest.files[relative].sha256
        ]

    @contextlib.contextmanager
    def locked(self, name: str, *, on_wait: Callable[[], None]) -> Iterator[None]:
        """Hold the name's lock; the kernel frees it when a process dies, so it cannot be left behind."""
        with (self.root / f".lock-{name}").open("w") as file:
            deadline = time.monotonic() + LOCK_TIMEOUT_S
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    on_wait()
                    if time.monotonic() > deadline:
                        raise PullError(
                            f"another pull of {name!r} has been running for over {LOCK_TIMEOUT_S:.0f} s.",
                            code="store_failed",
                            hint="See what it is doing, end it, then pull again.",
                        ) from None
                    time.sleep(0.1)
            yield

    @contextlib.contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """A temporary directory beside the models, with `scratch/` in it; gone afterwards, whatever happens."""
        for leftover in self.root.glob(f".tmp-{name}-????????"):  # we hold the lock, so nobody works there
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            with tempfile.TemporaryDirectory(dir=self.root, prefix=f".tmp-{name}-", ignore_cleanup_errors=True) as path:
                (Path(path) / "scratch").mkdir()
                yield Path(path)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO):
                raise
            raise PullError(
                f"the model store {self.root} cannot be written: {error.strerror}.",
                code="store_failed",
                hint="Free space there, or set TRILITHON_HOME to another disk; nothing was left behind.",
            ) from None

    def publish(self, name: str, model_dir: Path, manifest: Manifest) -> None:
        """Put a finished directory in its place in one rename; a model that is there already makes way."""
        (model_dir / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
        for path in [*model_dir.rglob("*"), model_dir]:
            _sync(path)
        target = self.path_of(name)
        if target.exists():
            target.rename(model_dir.parent / "replaced")  # inside staging, which is removed with all it holds
        model_dir.rename(target)
        _sync(self.root)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's contents, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Bring a file or directory entry to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
