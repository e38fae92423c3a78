"""
An index while it is served: searches go on while a newer version takes its place.

Each search holds on to the version that was served when it began, and a version that was replaced is closed when its
last search has ended. A version's number travels with what was found, so that whoever asks again knows what answered.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from trilithon.errors import Conflict, FailedPrecondition, Unavailable
from trilithon_server.knowledge.version import Hit, IndexVersion, Mode, Queries


@dataclass(frozen=True, slots=True)
class Found:
    """
    What a search found.

    Attributes:
        hits: for each query, best first.
        index_version: that was searched.
    """

    hits: tuple[tuple[Hit, ...], ...]
    index_version: int


@dataclass(slots=True, eq=False)
class _Served:
    """A version and the searches that hold it; `readers` and `is_replaced` change under the lock alone."""

    index: IndexVersion
    readers: int = 0
    is_replaced: bool = False


class LiveIndex:
    """
    One index, of which a version is served. Threads may search, swap and close at any time.

    Args:
        index: the first version, open; it is closed here.
    """

    def __init__(self, index: IndexVersion) -> None:
        self._lock = threading.Lock()
        self._served: _Served | None = _Served(index)

    @property
    def version(self) -> int:
        """
        The version that searches get now.

        Raises:
            Unavailable: `index_closed`.
        """
        with self._lock:
            return self._current().index.version

    @contextmanager
    def reading(self, *, min_version: int = 0) -> Iterator[IndexVersion]:
        """
        Hold on to the version that is served now, for searches that belong together: its encoder makes the vectors,
        and what they find is of one version.

        Args:
            min_version: the oldest version that will do; 0 for any.
        Raises:
            FailedPrecondition: `index_version`, an older one is served; names it.
            Unavailable: `index_closed`.
        """
        with self._lock:
            served = self._current()
            manifest = served.index.manifest
            if manifest.version < min_version:
                raise FailedPrecondition(
                    f'index "{manifest.index}" must be served in version {min_version} or a newer one. '
                    f"Given: version {manifest.version} is served.",
                    code="index_version",
                    hint="Ask again when the newer version is served, or ask for an older one.",
                )
            served.readers += 1
        try:
            yield served.index
        finally:
            with self._lock:
                served.readers -= 1
                is_last = served.is_replaced and not served.readers
            if is_last:
                served.index.close()

    def search(self, queries: Queries, top_k: int, *, mode: Mode, min_version: int = 0) -> Found:
        """
        Search the version that is served now; see `IndexVersion.search`.

        Raises:
            InvalidArgument: `search_invalid`, `vectors_invalid`.
            FailedPrecondition: `index_encoder`, `index_version`.
            Unavailable: `index_closed`.
        """
        with self.reading(min_version=min_version) as index:
            return Found(tuple(index.search(queries, top_k, mode=mode)), index.version)

    def swap(self, index: IndexVersion) -> None:
        """
        Serve a newer version from now on. Searches that have begun end on the one that they began with.

        Args:
            index: open; it is closed here, unless this raises.
        Raises:
            Conflict: `index_version`, a version as new is served already.
            Unavailable: `index_closed`.
        """
        with self._lock:
            old = self._current()
            before, after = old.index.manifest, index.manifest
            if before.index != after.index or after.version <= before.version:
                raise Conflict(
                    f'index "{before.index}" version {before.version} is served, and only a newer one may take its '
                    f'place. Given: "{after.index}" version {after.version}.',
                    code="index_version",
                )
            self._served = _Served(index)
        self._retire(old)

    def close(self) -> None:
        """Serve nothing any more; the version is closed when its last search has ended. Again is no change."""
        with self._lock:
            old, self._served = self._served, None
        if old is not None:
            self._retire(old)

    def _current(self) -> _Served:
        if self._served is None:
            raise Unavailable("the index is not served any more.", code="index_closed")
        return self._served

    def _retire(self, old: _Served) -> None:
        with self._lock:
            old.is_replaced = True
            is_unused = not old.readers
        if is_unused:
            old.index.close()
