"""The indexes of a process: opened once, built one after the other, swapped, deleted and cut off at any moment."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from trilithon.errors import Conflict, DataLoss, FailedPrecondition, InvalidArgument, NotFound
from trilithon_server.knowledge.index import IndexStore
from trilithon_server.knowledge.indexes import Build, Indexes, Work
from trilithon_server.knowledge.manifest import Encoder
from trilithon_server.knowledge.passages import Passage
from trilithon_server.knowledge.stored import Settings
from trilithon_server.knowledge.version import IndexVersion, Queries

TENANT, NAME = "acme", "walks"
ENCODER = Encoder(
    model_digest="d1", pooling="mean", normalize=True, passage_format="{title}. {text}", score_scale=20.0, model="e"
)


def work(text: str, *, after: asyncio.Event | None = None, begun: asyncio.Event | None = None) -> Work:
    """A build of one passage, once it may."""

    async def run(build: Build) -> None:
        if begun is not None:
            begun.set()
        if after is not None:
            await after.wait()
        build.told(1, 1)
        await build.publish([Passage("p", "", text)], np.ones((1, 4), np.float32), encoder=ENCODER, settings=Settings())

    return run


async def ended(indexes: Indexes) -> str:
    """The state of the index when nothing is built of it any more."""
    for _ in range(10_000):
        if (facts := await indexes.facts(TENANT, NAME)).state != "building":
            return facts.state
        await asyncio.sleep(0.005)
    raise AssertionError("the build has no end")


async def texts(indexes: Indexes) -> list[str]:
    """What a search for words finds."""
    live = await indexes.live(TENANT, NAME)
    return [hit.passage.text for hit in live.search(Queries(texts=["stone"]), 3, mode="bm25").hits[0]]


def forget(folder: Path, name: str) -> None:
    """Remove every file of that name."""
    for path in folder.rglob(name):
        path.unlink()


async def test_a_built_index_is_served_and_opened_by_the_next_process(tmp_path: Path) -> None:
    """Built, refreshed, closed; another process finds the last version."""
    indexes = Indexes(tmp_path)
    await indexes.create(TENANT, NAME, work("a stone"))
    assert await ended(indexes) == "ready"
    assert await texts(indexes) == ["a stone"]
    await indexes.refresh(TENANT, NAME, work("another stone"))
    assert await ended(indexes) == "ready"
    assert await texts(indexes) == ["another stone"]
    await indexes.stop()
    await indexes.stop()
    again = Indexes(tmp_path)
    facts = await again.facts(TENANT, NAME)

    assert (facts.state, facts.progress, facts.manifest and facts.manifest.version) == ("ready", 1.0, 2)
    assert await texts(again) == ["another stone"]
    assert await again.names(TENANT) == [NAME]
    assert await again.names("other") == []


async def test_a_version_that_comes_while_the_one_before_is_opened_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A first search opens version 1 while version 2 is published and served: version 2 stays. Inverse seen: what was
    opened put in the place of what is served.
    """
    first = Indexes(tmp_path)
    await first.create(TENANT, NAME, work("a stone"))
    await ended(first)
    await first.stop()
    indexes, loop = Indexes(tmp_path), asyncio.get_running_loop()
    opened, may_end = asyncio.Event(), asyncio.Event()
    plain = IndexStore.open

    def slow(store: IndexStore, name: str, *, model_digest: str) -> IndexVersion:
        version = plain(store, name, model_digest=model_digest)
        if version.version == 1:
            loop.call_soon_threadsafe(opened.set)
            asyncio.run_coroutine_threadsafe(may_end.wait(), loop).result()
        return version

    monkeypatch.setattr(IndexStore, "open", slow)
    searching = asyncio.create_task(texts(indexes))
    await opened.wait()
    await indexes.refresh(TENANT, NAME, work("another stone"))
    await ended(indexes)
    may_end.set()

    assert await searching == ["another stone"]
    assert await texts(indexes) == ["another stone"]
    await indexes.stop()


async def test_one_build_at_a_time(tmp_path: Path) -> None:
    """The second waits for the first; a build of an index that is being built is refused."""
    indexes, may_end, begun = Indexes(tmp_path), asyncio.Event(), asyncio.Event()
    await indexes.create(TENANT, "other", work("x", after=may_end))
    await indexes.create(TENANT, NAME, work("a stone", begun=begun))
    await asyncio.sleep(0.02)
    waits = not begun.is_set()
    with pytest.raises(FailedPrecondition, match="no version of it is there yet"):
        await indexes.live(TENANT, NAME)
    may_end.set()
    assert await ended(indexes) == "ready"

    assert waits
    await indexes.stop()


async def test_a_refresh_that_fails_leaves_what_is_served(tmp_path: Path) -> None:
    """Its error is told beside the version that stays; the next refresh clears it."""
    indexes = Indexes(tmp_path)
    await indexes.create(TENANT, NAME, work("a stone"))
    await ended(indexes)

    async def fails(build: Build) -> None:
        raise InvalidArgument("the encoder is gone.", code="model_not_found")

    async def breaks(build: Build) -> None:
        raise ZeroDivisionError

    for broken, says in ((fails, "the encoder is gone."), (breaks, "its log tells more")):
        await indexes.refresh(TENANT, NAME, broken)
        assert await ended(indexes) == "ready"
        facts = await indexes.facts(TENANT, NAME)
        assert says in facts.error
        assert facts.manifest is not None
        assert facts.manifest.version == 1
    assert await texts(indexes) == ["a stone"]
    await indexes.refresh(TENANT, NAME, work("another stone"))
    await ended(indexes)
    assert (await indexes.facts(TENANT, NAME)).error == ""
    await indexes.stop()


@pytest.mark.parametrize("end", ["delete", "stop"])
async def test_a_build_is_ended_at_any_moment(tmp_path: Path, end: str) -> None:
    """Deleted or stopped while it is built: no task goes on, nothing half-built is seen, the name is free."""
    for steps in range(0, 24, 4):
        indexes = Indexes(tmp_path / str(steps))
        await indexes.create(TENANT, NAME, work("a stone"))
        for _ in range(steps):
            await asyncio.sleep(0.0005)
        if end == "stop":
            await indexes.stop()
        else:
            await indexes.delete(TENANT, NAME)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others
        again = Indexes(tmp_path / str(steps))
        if end == "delete":
            with pytest.raises(NotFound):
                await again.live(TENANT, NAME)
            assert await indexes.names(TENANT) == []
            await indexes.create(TENANT, NAME, work("another stone"))
            assert await ended(indexes) == "ready"
            assert await texts(indexes) == ["another stone"]
            await indexes.stop()
        elif await again.names(TENANT):
            assert await texts(again) == ["a stone"]
            await again.stop()


async def test_R11_a_vanished_file_of_an_index_is_told(tmp_path: Path) -> None:
    """Whoever opens it learns which file is missing; whoever has it open goes on; it can be deleted and built again."""
    indexes = Indexes(tmp_path)
    await indexes.create(TENANT, NAME, work("a stone"))
    await ended(indexes)
    before = await texts(indexes)
    forget(tmp_path, "passages.jsonl")
    after, fresh = await texts(indexes), Indexes(tmp_path)
    with pytest.raises(DataLoss, match=r"passages\.jsonl cannot be read") as told:
        await fresh.live(TENANT, NAME)
    await fresh.delete(TENANT, NAME)
    await fresh.create(TENANT, NAME, work("another stone"))

    assert before == after == ["a stone"]
    assert str(tmp_path) not in str(told.value)
    assert await ended(fresh) == "ready"
    await fresh.stop()
    await indexes.stop()


async def test_a_deletion_that_is_cancelled_comes_to_its_end(tmp_path: Path) -> None:
    """
    Its caller hangs up while another process holds the index, and somebody searches meanwhile: what is deleted is not
    found again, and an index of the same name is served. Inverse seen: the old one was, for ever.
    """
    indexes = Indexes(tmp_path)
    await indexes.create(TENANT, NAME, work("a stone"))
    await ended(indexes)
    await indexes.refresh(TENANT, NAME, work("the same stone"))
    await ended(indexes)
    with indexes.store(TENANT)._writing(NAME):
        deletion = asyncio.create_task(indexes.delete(TENANT, NAME))
        await asyncio.sleep(0)
        deletion.cancel()
        await asyncio.sleep(0)
        with pytest.raises(NotFound):
            await indexes.live(TENANT, NAME)
        with pytest.raises(NotFound):
            await indexes.delete(TENANT, NAME)
    with pytest.raises(asyncio.CancelledError):
        await deletion
    with pytest.raises(NotFound):
        await indexes.live(TENANT, NAME)
    await indexes.create(TENANT, NAME, work("another stone"))
    await ended(indexes)

    assert await texts(indexes) == ["another stone"]
    await indexes.stop()


@pytest.mark.parametrize("content", [b"", b"\xff\n", b"7\n", b"9" * 5000 + b"\n"])
async def test_R11_a_broken_index_is_told_and_makes_room(tmp_path: Path, content: bytes) -> None:
    """Whatever its pointer holds: it failed, and why; it can be deleted and built again, and others are not touched."""
    indexes = Indexes(tmp_path)
    for name in (NAME, "whole"):
        indexes.store(TENANT).publish(
            name, [Passage("p", "", "a stone")], np.ones((1, 4), np.float32), encoder=ENCODER, created=0
        )
    (indexes.store(TENANT).root / NAME / "current").write_bytes(content)
    told = {name: await indexes.facts(TENANT, name) for name in await indexes.names(TENANT)}
    with pytest.raises(DataLoss):
        await indexes.refresh(TENANT, NAME, work("another stone"))
    await indexes.delete(TENANT, NAME)
    with pytest.raises(NotFound):
        await indexes.facts(TENANT, NAME)
    await indexes.create(TENANT, NAME, work("another stone"))

    assert {name: facts.state for name, facts in told.items()} == {NAME: "failed", "whole": "ready"}
    assert 'index "walks"' in told[NAME].error
    assert (told[NAME].manifest, told["whole"].error) == (None, "")
    assert await ended(indexes) == "ready"
    assert await texts(indexes) == ["another stone"]
    await indexes.stop()


async def test_nothing_is_kept_of_names_that_are_not_there(tmp_path: Path) -> None:
    """A hundred questions for indexes that do not exist leave no trace in memory."""
    indexes = Indexes(tmp_path)
    for i in range(100):
        with pytest.raises(NotFound):
            await indexes.live(TENANT, f"n{i}")
    with pytest.raises(NotFound):
        await indexes.delete(TENANT, NAME)
    with pytest.raises(NotFound):
        await indexes.refresh(TENANT, NAME, work("x"))

    assert not indexes._held


async def test_a_second_build_is_a_conflict(tmp_path: Path) -> None:
    """While the first refresh has not ended."""
    indexes, may_end = Indexes(tmp_path), asyncio.Event()
    await indexes.create(TENANT, NAME, work("a stone"))
    await ended(indexes)
    await indexes.refresh(TENANT, NAME, work("another stone", after=may_end))
    with pytest.raises(Conflict, match="is being built"):
        await indexes.refresh(TENANT, NAME, work("a third stone"))
    may_end.set()
    await ended(indexes)

    assert await texts(indexes) == ["another stone"]
    await indexes.stop()
