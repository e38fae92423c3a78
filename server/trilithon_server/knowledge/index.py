"""
Indexes on disk, in versions.

    ROOT/
      .locks/NAME/        held by the one that writes NAME
      NAME/current        the number of the version that is served
      NAME/v00000007/     one version; see `stored`

A version is written aside, brought to the disk and renamed, and only then `current` is replaced. So whoever opens an
index gets a whole version, whatever happened to the one that was being written; versions that are in use stay readable
until they are closed, because their files are mapped.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trilithon.errors import DataLoss, InvalidArgument, NotFound
from trilithon_parallel.data.publish import locked, publish_folder, sync, temporary_path
from trilithon_server.knowledge.manifest import Encoder, Manifest, corrupt, read_manifest
from trilithon_server.knowledge.passages import Passage
from trilithon_server.knowledge.stored import Settings, write_version
from trilithon_server.knowledge.version import IndexVersion, open_version
from trilithon_server.validation import shown

KEPT_VERSIONS = 2
"""The current one, and the one before: somebody may just have read that it is current."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_VERSION = re.compile(r"v(\d{8,})")
_CURRENT = "current"


class IndexStore:
    """
    The indexes in `root`, which is made when it is first written to.

    Several processes and threads may use it at once: writers of one index take turns, readers never wait.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        """The indexes that there are, in order."""
        # Locks lie in folders named for indexes, and one may be called `current`; what is half removed has one, too.
        found = (path.parent.name for path in self.root.glob(f"*/{_CURRENT}"))
        return sorted(name for name in found if _NAME.fullmatch(name))

    def holds(self, name: str) -> bool:
        """Whether there is an index of that name. Raises InvalidArgument: `index_invalid`, it can be no name."""
        return (self._folder(name) / _CURRENT).exists()

    def current(self, name: str) -> int:
        """
        The version that is served.

        Raises:
            NotFound: `index_not_found`.
            DataLoss: `index_corrupt`.
        """
        try:
            content = (self._folder(name) / _CURRENT).read_text(errors="replace")
        except FileNotFoundError:
            raise not_found(name) from None
        if not re.fullmatch(r"[1-9][0-9]{0,17}\n", content):
            raise corrupt(f"index {shown(name)} {_CURRENT} must hold a version. Given: {shown(content)}.")
        return int(content)

    def manifest(self, name: str) -> Manifest:
        """
        The facts of the current version; its files are not looked at.

        Raises:
            NotFound, DataLoss, FailedPrecondition: as `open` has them.
        """
        version = self.current(name)
        return read_manifest(self._version(name, version), where=f"index {shown(name)} version {version}")

    def open(self, name: str, *, model_digest: str) -> IndexVersion:
        """
        Open the current version after reading all of it once.

        Args:
            model_digest: of the encoder that will make the queries' vectors.
        Raises:
            NotFound: `index_not_found`.
            DataLoss: `index_corrupt`, a file is missing, changed, or not what the manifest says.
            FailedPrecondition: `index_unsupported`; `index_encoder`, another encoder made the vectors.
        """
        version = self.current(name)
        while True:
            try:
                return open_version(
                    self._version(name, version), index=name, version=version, model_digest=model_digest
                )
            except DataLoss:
                # Two newer versions were published meanwhile, and this one is gone.
                newer = self.current(name)
                if newer == version:
                    raise
                version = newer

    def publish(
        self,
        name: str,
        passages: Sequence[Passage],
        vectors_MH: NDArray[np.float32],
        *,
        encoder: Encoder,
        created: int,
        settings: Settings | None = None,
    ) -> int:
        """
        Write the next version of an index, the first one of a new name, and make it the current one.

        Whatever fails or is killed on the way, the current version is a whole one: the one before until all of the new
        one is on the disk, the new one from then on.

        Args:
            name: 1 to 64 letters, digits, `_` and `-`, the first a letter or a digit.
            passages: at least one.
            vectors_MH: float32[M, H], one for each passage.
            encoder: that made the vectors.
            created: Unix seconds.
        Returns:
            The number of the version.
        Raises:
            InvalidArgument: `index_invalid`, `passages_invalid`, `vectors_invalid`.
            OSError: a file cannot be written.
        """
        folder = self._folder(name)
        with self._writing(name):
            _remove_leftovers(folder)
            version = max(_versions(folder), default=0) + 1

            def fill(aside: Path) -> None:
                write_version(
                    aside,
                    passages,
                    vectors_MH,
                    index=name,
                    version=version,
                    encoder=encoder,
                    settings=settings or Settings(),
                    created=created,
                )

            ours = publish_folder(self._version(name, version), fill)
            assert ours, "somebody wrote an index without its lock"
            _replace(folder / _CURRENT, f"{version}\n")
            sync(self.root)  # the index's own name, where it is new
            for old in sorted(_versions(folder))[:-KEPT_VERSIONS]:
                _remove(self._version(name, old))
            return version

    def delete(self, name: str) -> None:
        """
        Remove an index, a broken one too; versions that are open stay readable.

        Raises:
            NotFound: `index_not_found`.
        """
        if not self.holds(name):  # whatever state it is in
            raise not_found(name)
        with self._writing(name):
            _remove(self._folder(name))

    def _folder(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            rule = "must have 1 to 64 letters, digits, _ and -, and begin with a letter or a digit"
            raise InvalidArgument(f"an index's name {rule}. Given: {shown(name)}.", code="index_invalid")
        return self.root / name

    def _version(self, name: str, version: int) -> Path:
        return self._folder(name) / f"v{version:08d}"

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        lock = self.root / ".locks" / name
        lock.mkdir(parents=True, exist_ok=True)
        with locked(lock):
            # A deletion that was interrupted; index names hold no dot, so these are of this one.
            for aside in self.root.glob(f".{name}.*.tmp"):
                shutil.rmtree(aside)
            yield


def not_found(name: str) -> NotFound:
    """There is no index of the name."""
    hint = "Build it, or list those that are here: `trilithon index ls`, GET /v1/retrieval/indexes."
    return NotFound(f"index {shown(name)} does not exist.", code="index_not_found", hint=hint)


def _versions(folder: Path) -> list[int]:
    names = (path.name for path in folder.glob("v*"))
    return [int(found[1]) for name in names if (found := _VERSION.fullmatch(name))]


def _remove_leftovers(folder: Path) -> None:
    """What a writer left behind that was killed; nobody else writes, so nobody needs it."""
    for aside in folder.glob(".*.tmp"):
        shutil.rmtree(aside) if aside.is_dir() else aside.unlink()


def _remove(folder: Path) -> None:
    """Take a folder away: first its name, so that half of it is never seen."""
    aside = temporary_path(folder)
    folder.rename(aside)
    sync(folder.parent)
    shutil.rmtree(aside)


def _replace(path: Path, content: str) -> None:
    """Replace a small file: a reader sees the old content or the new one, also after a crash."""
    aside = temporary_path(path)
    try:
        aside.write_text(content)
        sync(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)
