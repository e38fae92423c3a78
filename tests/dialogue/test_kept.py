"""What is kept for conversations when several callers write at once, and how much of it there may be."""

from __future__ import annotations

import asyncio
import gc
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trilithon.errors import FailedPrecondition, NotFound
from trilithon_server import dialogue_requests, dialogue_store
from trilithon_server.knowledge import shelf
from trilithon_server.knowledge.local import Document
from trilithon_server.tasks.dialogue_format import Turn
from trilithon_server.validation import Violations

CALL: Any = SimpleNamespace(principal=SimpleNamespace(tenant="alice"))
WORDS = "The mill has {} wheels and {} doors today."


@pytest.fixture
def service(tmp_path: Path) -> Any:
    """All that the store needs of one."""
    limits = SimpleNamespace(max_messages=1024, max_message_bytes=1 << 20)
    return SimpleNamespace(store=tmp_path, limits=limits)


async def append(service: Any, name: str, *ids: str) -> dialogue_store.KnowledgeFacts:
    documents = [Document(id=id, text=WORDS.format(id, id)) for id in ids]
    return await dialogue_store.put_knowledge(service, CALL, name, documents, replace=False)


async def test_appends_at_once_are_all_kept(service: Any) -> None:
    """
    Each answer tells of a version of its own, the last one of all documents; nothing is held once all have ended.
    Inverse seen: without the lock most of them are lost.
    """
    facts = await asyncio.gather(*(append(service, "base", str(i)) for i in range(24)))
    kept = await dialogue_store.get_knowledge(service, CALL, "base")
    gc.collect()

    assert sorted(one.version for one in facts) == list(range(1, 25))
    assert (kept.documents, kept.sentences, kept.version) == (24, 24, 24)
    assert not shelf._LOCKS


async def test_replacements_at_once_have_versions_of_their_own(service: Any) -> None:
    """A version counts the replacements of an actor, too."""
    talk = [[Turn("target", "I never leave the mill.")]]
    facts = await asyncio.gather(*(dialogue_store.put_actor(service, CALL, "a", talk) for _ in range(24)))

    assert sorted(one.version for one in facts) == list(range(1, 25))


async def test_a_refusal_lets_the_next_one_write(service: Any) -> None:
    """The lock goes with an error, too; another name has its own."""
    with pytest.raises(NotFound):
        await dialogue_store.delete_knowledge(service, CALL, "base")
    assert (await append(service, "base", "1")).version == 1
    with shelf.Shelf(service.store, "knowledge").writing("alice", "base"):
        assert (await append(service, "other", "1")).version == 1


@pytest.mark.parametrize(
    ("name", "most", "says"),
    [
        ("MAX_BASE_DOCUMENTS", 3, "at most 3 documents. Given: 4, with what it holds"),
        ("MAX_BASE_SENTENCES", 3, "at most 3 sentences. Given: 4, with what it holds"),
        ("MAX_BASE_BYTES", 120, "at most 120 bytes of sentences"),
    ],
)
async def test_R11_a_base_has_an_end(
    service: Any, monkeypatch: pytest.MonkeyPatch, name: str, most: int, says: str
) -> None:
    """An append that goes beyond it is refused, and what was kept stays; it can be replaced, and grow to its end."""
    monkeypatch.setattr(dialogue_store, name, most)
    before = await append(service, "base", "1", "2")
    with pytest.raises(FailedPrecondition, match=says) as caught:
        await append(service, "base", "3", "4")

    assert caught.value.code == "store_full"
    assert await dialogue_store.get_knowledge(service, CALL, "base") == before
    assert (await append(service, "base", "2")).sentences == 2


async def test_what_is_kept_is_read_beside_the_loop(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large base must not hold up who else is served. Inverse seen: read by the loop's own thread."""
    await append(service, "base", "1")
    await dialogue_store.put_actor(service, CALL, "a", [[Turn("target", "I never leave the mill.")]])
    read, get = list[threading.Thread](), shelf.Shelf.get

    def noted(self: shelf.Shelf, tenant: str, name: str) -> shelf.Kept | None:
        read.append(threading.current_thread())
        return get(self, tenant, name)

    monkeypatch.setattr(shelf.Shelf, "get", noted)
    await dialogue_store.get_knowledge(service, CALL, "base")
    await dialogue_store.sentences_of(service, CALL, "base")
    await dialogue_store.get_actor(service, CALL, "a")
    await dialogue_store.conversations_of(service, CALL, "a")

    assert len(read) == 4
    assert threading.current_thread() not in read


@pytest.mark.parametrize("letter", ["a", "\u00e9", "\u6c34", "\ud800"])
def test_R11_documents_are_counted_in_bytes(letter: str) -> None:
    """As they come over the wire, whatever they are written in. Inverse seen: characters are counted."""
    most = dialogue_requests.MAX_DOCUMENT_BYTES // len(letter.encode("utf-8", "surrogatepass"))
    for count, is_refused in ((most, False), (most + 1, True)):
        found = Violations()
        dialogue_requests.check_documents("documents", [Document(id="a", text=letter * count)], found)
        assert bool(found) is is_refused
