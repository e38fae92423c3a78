"""Files of tenants: what comes in, what is kept, what goes."""

from __future__ import annotations

import hashlib
import io
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from trilithon.errors import BodyTooLarge, Conflict, InvalidArgument, NotFound, Overloaded, TrilithonError
from trilithon_finetune.jobs.database import Database
from trilithon_finetune.jobs.service import Jobs, StoreLimits
from trilithon_finetune.paths import StorePaths

from .conftest import TENANT, Store


def _put(store: Store, content: bytes, **changes: Any) -> Any:
    fields: dict[str, Any] = {"tenant": TENANT, "filename": "rows.jsonl", "purpose": "fine-tune", **changes}
    return store.jobs.put_file(io.BytesIO(content), **fields)


def _contents(store: Store) -> set[str]:
    return {path.name for path in (store.jobs.paths.root / "files").iterdir() if path.name != ".lock"}


def test_file_is_stored_by_its_content(store: Store) -> None:
    """The same bytes twice are two files and one content; each has its own name and owner."""
    first, second = _put(store, b"one"), _put(store, b"one", tenant="other", filename="mine.jsonl")
    digest = hashlib.sha256(b"one").hexdigest()

    assert (first.bytes, first.sha256, first.filename) == (3, digest, "rows.jsonl")
    assert first.id != second.id
    assert store.jobs.file_path(first.id, tenant=TENANT) == store.jobs.file_path(second.id, tenant="other")
    assert store.jobs.file_path(first.id, tenant=TENANT).read_bytes() == b"one"
    assert digest in _contents(store)


async def test_file_comes_from_an_event_loop(make_store: Callable[..., Store]) -> None:
    """Pieces as they arrive make the same file."""
    store = make_store(None)

    async def pieces() -> AsyncIterator[bytes]:
        for piece in (b"on", b"", b"e"):
            yield piece

    file = await store.jobs.receive_file(pieces(), tenant=TENANT, filename="a.jsonl", purpose="evidence")
    assert (file.bytes, file.sha256) == (3, hashlib.sha256(b"one").hexdigest())


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "", "x" * 129, "a\0b", "a\nb", "\u00e4.jsonl", "a\\b"],
    ids=["parent", "slash", "empty", "long", "nul", "newline", "umlaut", "backslash"],
)  # fmt: skip
def test_S10_names_of_files_are_validated(make_store: Callable[..., Store], name: str) -> None:
    """A name is a label of plain characters; nothing is written for a bad one."""
    store = make_store(None)
    before = _contents(store)
    with pytest.raises(InvalidArgument, match=r"^filename must be 1 to 128 of letters"):
        _put(store, b"x", filename=name)

    assert _contents(store) == before


@pytest.mark.parametrize(
    ("content", "changes", "error", "message"),
    [
        (b"", {}, InvalidArgument, "a file must have at least 1 byte"),
        (b"x" * 101, {}, BodyTooLarge, "at most 100 bytes"),
        (b"x", {"purpose": "assistants"}, InvalidArgument, "purpose must be one of fine-tune, "),
        (b"x", {"sha256": "0" * 64}, InvalidArgument, "sha256 must be that of the bytes"),
        (b"x", {"sha256": "zz"}, InvalidArgument, "sha256 must be 64 hexadecimal digits"),
        (b"x" * 98, {}, Overloaded, "at most 100 bytes may be stored. Stored: 3, to add: 98"),
    ],
    ids=["empty", "large", "purpose", "digest", "no digest", "quota"],
)
def test_S10_bad_uploads_leave_nothing(
    make_store: Callable[..., Store],
    database_url: str | None,
    content: bytes,
    changes: dict[str, str],
    error: type[TrilithonError],
    message: str,
) -> None:
    """Every refusal says what rule was broken, and no byte of the file stays."""
    store = make_store(database_url, StoreLimits(file_bytes=100, tenant_bytes=100))
    before = _contents(store)
    with pytest.raises(error, match=message.replace(".", r"\.")):
        _put(store, content, **changes)

    assert _contents(store) == before
    assert len(store.jobs.list_files(tenant=TENANT).data) == 1


def test_number_of_files_is_limited(make_store: Callable[..., Store], database_url: str | None) -> None:
    """Beyond the number nothing is stored; other tenants are not concerned."""
    store = make_store(database_url, StoreLimits(tenant_files=1))
    with pytest.raises(Overloaded, match="at most 1 files may be stored"):
        _put(store, b"two")

    assert _put(store, b"two", tenant="other").bytes == 3


def test_broken_stream_leaves_nothing(make_store: Callable[..., Store]) -> None:
    """An upload that is cut off is forgotten."""
    store = make_store(None)
    before = _contents(store)

    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell():
                raise ConnectionResetError("gone")
            return super().read(2)

    broken: BinaryIO = Broken(b"abcdef")
    with pytest.raises(ConnectionResetError):
        store.jobs.put_file(broken, tenant=TENANT, filename="x", purpose="fine-tune")

    assert _contents(store) == before


def test_file_in_use_stays(store: Store) -> None:
    """While a live job reads it a file is not deleted; after its end it goes, with its bytes."""
    job = store.create(validation_file=store.file_id)
    with pytest.raises(Conflict, match=f"is read by the job {job.id}") as caught:
        store.jobs.delete_file(store.file_id, tenant=TENANT)
    store.jobs.cancel(job.id, tenant=TENANT)
    path = store.jobs.file_path(store.file_id, tenant=TENANT)
    store.jobs.delete_file(store.file_id, tenant=TENANT)

    assert caught.value.code == "file_in_use"
    assert not path.exists()
    with pytest.raises(NotFound):
        store.jobs.get_file(store.file_id, tenant=TENANT)


def test_shared_content_goes_with_its_last_file(store: Store) -> None:
    """Deleting one of two files with the same bytes leaves the other's."""
    first, second = _put(store, b"shared"), _put(store, b"shared")
    store.jobs.delete_file(first.id, tenant=TENANT)
    path = store.jobs.file_path(second.id, tenant=TENANT)

    assert path.read_bytes() == b"shared"
    store.jobs.delete_file(second.id, tenant=TENANT)
    assert not path.exists()


def test_files_beyond_their_time_are_swept(database_url: str | None, tmp_path: Path) -> None:
    """An expired file goes unless a live job reads it; bytes that no file means go too."""
    now = [1_700_000_000_000]
    database = Database(database_url, tmp_path / "swept" / "jobs.db", clock=lambda: now[0])
    limits = StoreLimits(file_days=1)
    store = Store(Jobs(None, StorePaths(tmp_path / "swept"), database=database, limits=limits), database_url)
    try:
        old = _put(store, b"old")
        store.create()  # reads the store's first file
        store.jobs.paths.file("f" * 64).write_bytes(b"nobody's")
        now[0] += 86_400_000
        new = _put(store, b"new")
        gone = store.jobs.sweep()
        left = {file.id for file in store.jobs.list_files(tenant=TENANT).data}
        contents = _contents(store)
    finally:
        store.close()

    assert old.expires_at == 1_700_086_400
    assert (gone, left) == (1, {store.file_id, new.id})
    assert "f" * 64 not in contents
    assert len(contents) == 2


def test_files_are_listed_by_purpose(store: Store) -> None:
    """Newest first; only those of the purpose that was asked for."""
    evidence = _put(store, b"e", purpose="evidence")
    page = store.jobs.list_files(tenant=TENANT, limit=1)
    rest = store.jobs.list_files(tenant=TENANT, limit=1, after=page.data[0].id)

    assert [file.id for file in page.data] == [evidence.id]
    assert page.has_more
    assert [file.id for file in rest.data] == [store.file_id]
    assert [file.id for file in store.jobs.list_files(tenant=TENANT, purpose="evidence").data] == [evidence.id]
