"""The front's client of an engine, against a scripted leader on a real Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from trilithon.errors import Cancelled, Overloaded, Unavailable
from trilithon_server.config import LimitsConfig
from trilithon_server.engine import wire_pb2 as wire
from trilithon_server.engine.framing import frame
from trilithon_server.engine_client import EngineClient, EngineStream


class ScriptedLeader:
    """Says hello, keeps what it is told, and sends the steps that a test dictates."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.received: asyncio.Queue[wire.ToEngine] = asyncio.Queue()
        self._writer: asyncio.StreamWriter | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._step = 0

    async def listen(self) -> None:
        self.path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, str(self.path))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        self._writer = writer
        hello = wire.FromEngine(hello=wire.Hello(vocab_size=7, startup_seconds={"weights": 2.0}))
        writer.write(frame(hello.SerializeToString()))
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                size = int.from_bytes(await reader.readexactly(4), "big")
                self.received.put_nowait(wire.ToEngine.FromString(await reader.readexactly(size)))
        writer.close()

    def step(self, *deltas: wire.SequenceDelta, tokens: int = 1) -> None:
        assert self._writer is not None
        self._step += 1
        result = wire.StepResult(step=self._step, deltas=deltas, stats=wire.Stats(step_tokens=tokens))
        self._writer.write(frame(wire.FromEngine(step=result).SerializeToString()))

    async def die(self) -> None:
        assert self._server is not None
        self._server.close()
        if self._writer is not None:
            self._writer.transport.abort()
        await asyncio.gather(*self._connections)
        self._connections.clear()
        self.path.unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def engine(
    tmp_path: Path, *, restarts: bool = True, **limits: object
) -> AsyncIterator[tuple[EngineClient, ScriptedLeader]]:
    leader = ScriptedLeader(tmp_path / "main.sock")
    await leader.listen()
    bounds = LimitsConfig.model_validate(limits)
    client = EngineClient(name="main", socket_path=leader.path, limits=bounds, restarts=restarts)
    await client.start()
    try:
        await until(lambda: client.state == "ready")
        yield client, leader
    finally:
        await client.stop()
        await leader.die()


async def until(condition: Callable[[], bool], *, seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # the client has no event for it, and needs none but here
            await asyncio.sleep(0.002)


def request(tokens: int = 3, n: int = 1) -> wire.Submit:
    return wire.Submit(request_id="req_x", prompt=range(tokens), sampling=wire.Sampling(num_sequences=n, max_tokens=9))


def delta(
    stream: EngineStream,
    *tokens: int,
    index: int = 0,
    finish: wire.Finish.ValueType = wire.NOT_FINISHED,
    started: bool = False,
) -> wire.SequenceDelta:
    out = wire.SequenceDelta(handle=stream.handle, index=index, finish=finish)
    out.tokens.extend(wire.Token(id=token) for token in tokens)
    if started:
        out.started.SetInParent()
    return out


async def collect(stream: EngineStream) -> list[int]:
    return [token.id async for part in stream for token in part.tokens]


async def test_a_request_streams_to_its_end(tmp_path: Path) -> None:
    """Deltas of all sequences arrive in order, and the stream ends when the last sequence has finished."""
    async with engine(tmp_path) as (client, leader):
        stream = client.submit(request(n=2))
        sent = (await leader.received.get()).submit
        assert (stream.handle, [0, 1, 2]) == (sent.handle, list(sent.prompt))
        leader.step(delta(stream, 1, started=True), delta(stream, 2, index=1))
        leader.step(delta(stream, 3, finish=wire.MAX_TOKENS), delta(stream, 4, index=1, finish=wire.EOS_TOKEN))

        assert await collect(stream) == [1, 2, 3, 4]
        assert (client.in_flight, client.queued_requests, client.queued_tokens) == (0, 0, 0)


async def test_R4_the_queue_is_bounded_by_requests_and_by_tokens(tmp_path: Path) -> None:
    """
    A full queue is refused before the engine hears of it, with a time to retry; a started request frees its place.

    Inverse seen: without the check in `_admit` the third submit is accepted.
    """
    async with engine(tmp_path, max_queue_requests=2, max_queue_tokens=10) as (client, leader):
        first = client.submit(request(6))
        with pytest.raises(Overloaded, match="at most 10 tokens") as by_tokens:
            client.submit(request(6))
        client.submit(request(2))
        with pytest.raises(Overloaded, match="at most 2 requests") as by_requests:
            client.submit(request(1))
        leader.step(delta(first, 1, started=True), tokens=80)
        await until(lambda: client.queued_requests == 1)
        client.submit(request(8))

        assert {"queue_full"} == {by_tokens.value.code, by_requests.value.code}
        assert by_requests.value.retry_after_s == 30.0
        assert client.retry_after_s() == 1.25  # 10 tokens wait, 80 were done in the last 10 s


async def test_a_request_larger_than_the_queue_passes_when_it_is_alone(tmp_path: Path) -> None:
    """A prompt above the token bound would otherwise never be served at all."""
    async with engine(tmp_path, max_queue_tokens=4) as (client, _):
        client.submit(request(50))

        assert client.queued_tokens == 50


async def test_R1_a_lost_engine_fails_every_stream_and_is_found_again(tmp_path: Path) -> None:
    """
    The end of the leader's socket fails all requests at once with `engine_lost`; a retry is advised only where nothing
    was streamed; the client is ready again when a new leader listens.

    Inverse seen: without `_fail_streams` in `_lose` the two waits time out.
    """
    async with engine(tmp_path) as (client, leader):
        fresh, begun = client.submit(request()), client.submit(request())
        leader.step(delta(begun, 1, started=True))
        await until(lambda: client.queued_requests == 1)
        begun.streamed = True
        await leader.die()
        errors = []
        for stream in (fresh, begun):
            with pytest.raises(Unavailable) as caught:
                await asyncio.wait_for(collect(stream), 2.0)
            errors.append(caught.value)
        with pytest.raises(Unavailable, match="lost one of its ranks"):
            client.submit(request())

        assert [error.code for error in errors] == ["engine_lost"] * 2
        assert [error.retry_after_s for error in errors] == [2.0, None]
        assert client.losses == {"connection": 1}
        await leader.listen()
        await until(lambda: client.state == "ready")


async def test_R1_no_retry_is_advised_where_the_server_ends_with_its_engine(tmp_path: Path) -> None:
    """
    The socket's end may come before the supervisor's word `failed`: nobody is told to send again even then.

    Inverse seen: with `restarts` left out of `_comes_back` both errors advise a retry.
    """
    async with engine(tmp_path, restarts=False) as (client, leader):
        stream = client.submit(request())
        await leader.die()
        with pytest.raises(Unavailable) as failed:
            await asyncio.wait_for(collect(stream), 2.0)
        with pytest.raises(Unavailable) as refused:
            client.submit(request())

        assert [error.value.code for error in (failed, refused)] == ["engine_lost"] * 2
        assert [error.value.retry_after_s for error in (failed, refused)] == [None, None]


async def test_R1_the_supervisors_word_is_enough(tmp_path: Path) -> None:
    """A hung leader's socket stays open: the word `lost` fails the streams, and `loading` allows to reconnect."""
    async with engine(tmp_path) as (client, _):
        stream = client.submit(request())
        client.engine_event("lost", cause="rank 1 hung", kind="hung")
        with pytest.raises(Unavailable):
            await asyncio.wait_for(collect(stream), 1.0)
        assert (client.state, client.losses) == ("lost", {"hung": 1})
        client.engine_event("loading")
        assert client.state == "loading"

        await until(lambda: client.hello is not None)
        client.engine_event("failed", cause="no restarts left", kind="killed")
        with pytest.raises(Unavailable) as caught:
            client.submit(request())
        assert caught.value.retry_after_s is None


async def test_R5_shut_refuses_everything_and_ends_the_rest(tmp_path: Path) -> None:
    """
    After `drain` a call that goes on may still submit, and `wait_idle` ends with the last request; after `shut` nothing
    is taken, and the engine is asked to end what it has.
    """
    async with engine(tmp_path) as (client, leader):
        client.drain()
        stream = client.submit(request())
        client.shut()
        with pytest.raises(Unavailable) as caught:
            client.submit(request())
        idle = asyncio.ensure_future(client.wait_idle())
        leader.step(delta(stream, 1, started=True))
        await until(lambda: client.queued_requests == 0)
        assert not idle.done()
        leader.step(delta(stream, 2, finish=wire.MAX_TOKENS))

        assert await collect(stream) == [1, 2]
        await asyncio.wait_for(idle, 1.0)
        assert caught.value.code == "server_shutting_down"
        kinds = [await leader.received.get() for _ in range(2)]
        assert [message.WhichOneof("kind") for message in kinds] == ["submit", "abort"]


async def test_an_abort_is_sent_once(tmp_path: Path) -> None:
    """Aborting twice, or after the end, tells the engine once."""
    async with engine(tmp_path) as (client, leader):
        stream = client.submit(request(n=2))
        stream.abort_sequence(1)
        stream.abort("disconnect")
        stream.abort("disconnect")
        leader.step(delta(stream, finish=wire.CANCELLED), delta(stream, index=1, finish=wire.CANCELLED))
        await collect(stream)
        stream.abort("disconnect")
        client.submit(request())
        kinds = [(await leader.received.get()) for _ in range(4)]

        assert [message.WhichOneof("kind") for message in kinds] == ["submit", "abort", "abort", "submit"]
        assert [(m.abort.index, m.abort.cause) for m in kinds[1:3]] == [(1, "stop_string"), (-1, "disconnect")]


async def test_a_slow_reader_gets_merged_deltas_and_is_aborted_in_the_end(tmp_path: Path) -> None:
    """
    Beyond the bound unread deltas merge, with no token lost; a stream that nobody reads at all is aborted.

    Inverse seen: without the merge the buffer holds 100 deltas.
    """
    async with engine(tmp_path, max_stream_events=4, slow_reader_s=0.2) as (client, leader):
        stream = client.submit(request())
        leader.step(delta(stream, 0, started=True))
        for token in range(1, 100):
            leader.step(delta(stream, token))
        await until(
            lambda: client.stats is not None and len(stream._buffer) == 4 and stream._buffer[-1].tokens[-1].id == 99
        )
        parts = [await anext(stream) for _ in range(4)]
        assert list(range(100)) == [token.id for part in parts for token in part.tokens]

        async def never_read() -> bool:
            for _ in range(5):
                leader.step(delta(stream, 1))
            await asyncio.sleep(0.05)
            return stream.finished

        async with asyncio.timeout(5.0):
            while not await never_read():
                pass
        with pytest.raises(Cancelled) as caught:
            await collect(stream)
        assert caught.value.code == "slow_reader"


async def test_bytes_that_are_no_message_end_the_connection_only(tmp_path: Path) -> None:
    """A leader that talks nonsense is lost, typed, and the client goes on to reconnect."""
    async with engine(tmp_path) as (client, leader):
        stream = client.submit(request())
        assert leader._writer is not None
        leader._writer.write(b"\xff\xff\xff\xff")
        with pytest.raises(Unavailable):
            await asyncio.wait_for(collect(stream), 2.0)

        await until(lambda: client.state == "ready")
