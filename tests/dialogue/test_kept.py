"""What is kept for conversations when several callers write at once, and how much of it there may be."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trilithon.errors import NotFound
from trilithon_server import dialogue_store
from trilithon_server.knowledge import shelf
from trilithon_server.knowledge.local import Document
from trilithon_server.tasks.dialogue_format import Turn

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
