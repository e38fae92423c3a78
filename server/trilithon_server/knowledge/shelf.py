"""
What callers keep on the server by name: actors, knowledge bases, stories. Each tenant sees its own alone.

    ROOT/KIND/SHA256 of tenant/SHA256 of name.json      one document; replaced whole, never changed

Names may hold any character, so files are called by hashes and no name reaches the file system. A document is written
aside and renamed into place: a reader sees the old one or the new one. Reads and writes take no lock; who makes a
document of the one that is there holds `writing` from the read to the write.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from trilithon.errors import DataLoss, FailedPrecondition, InvalidArgument
from trilithon_parallel.data.publish import sync, temporary_path
from trilithon_server.validation import is_text, shown

MAX_NAME_CHARS = 128
MAX_ITEMS = 1024
"""Of one kind, for each tenant."""

_LOCKS: WeakValueDictionary[Path, threading.Lock] = WeakValueDictionary()
"""Of documents that are being written; a lock that nobody holds or waits for is forgotten."""
_FINDING = threading.Lock()


@dataclass(frozen=True, slots=True)
class Kept:
    """A document under its name; `version` counts from 1 and grows with every replacement."""

    name: str
    version: int
    document: dict[str, Any]


class Shelf:
    """
    Documents of one kind.

    Args:
        root: shared by all kinds; made when something is first put.
        kind: for example `actors`; a folder's name.
    """

    def __init__(self, root: Path, kind: str) -> None:
        self._root = root / kind

    @contextmanager
    def writing(self, tenant: str, name: str) -> Iterator[None]:
        """Keep out who else writes this document in this process; not for the event loop, which must not wait."""
        path = self._path(tenant, name)
        with _FINDING:
            lock = _LOCKS.get(path)
            if lock is None:
                lock = _LOCKS[path] = threading.Lock()
        with lock:
            yield

    def get(self, tenant: str, name: str) -> Kept | None:
        """
        A document, or None where there is none of that name.

        Raises:
            DataLoss: `stored_corrupt`, its file cannot be read.
        """
        path = self._path(tenant, name)
        try:
            found = json.loads(path.read_bytes())
            kept = Kept(str(found["name"]), int(found["version"]), dict(found["document"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            message = f"{shown(name)} cannot be read from the store: {type(error).__name__}."
            raise DataLoss(message, code="stored_corrupt", hint="Put it again.") from None
        return kept

    def put(self, tenant: str, name: str, document: dict[str, Any]) -> Kept:
        """
        Keep a document, in the place of one that was there.

        Raises:
            InvalidArgument: `invalid_value`, the name is empty, too long, or no sound text.
            FailedPrecondition: `store_full`, the tenant keeps as many as it may.
            OSError: the disk does not take it.
        """
        if not 1 <= len(name) <= MAX_NAME_CHARS or not is_text(name) or not name.isprintable():
            rule = f"must have 1 to {MAX_NAME_CHARS} printable characters"
            raise InvalidArgument(f"a stored name {rule}. Given: {shown(name)}.", code="invalid_value")
        before = self.get(tenant, name)
        if before is None and sum(1 for _ in self._files(tenant)) >= MAX_ITEMS:
            message = f"at most {MAX_ITEMS} may be kept. Given: one more, {shown(name)}."
            raise FailedPrecondition(message, code="store_full", hint="Delete some first.")
        kept = Kept(name, 1 if before is None else before.version + 1, document)
        path = self._path(tenant, name)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside = temporary_path(path)
        try:
            text = json.dumps({"name": name, "version": kept.version, "document": document}, ensure_ascii=False)
            aside.write_text(text, encoding="utf-8")
            sync(aside)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        sync(path.parent)
        return kept

    def delete(self, tenant: str, name: str) -> bool:
        """Forget a document; whether there was one."""
        try:
            self._path(tenant, name).unlink()
        except FileNotFoundError:
            return False
        return True

    def _files(self, tenant: str) -> Iterator[Path]:
        return self._folder(tenant).glob("*.json")

    def _folder(self, tenant: str) -> Path:
        return self._root / hashlib.sha256(tenant.encode()).hexdigest()

    def _path(self, tenant: str, name: str) -> Path:
        return self._folder(tenant) / f"{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()}.json"
