"""
The front's end of an engine: one Unix socket to the leader, many requests over it.

    submit() --> bounded queue (counted here) --> leader --> one StepResult a step --> each request's EngineStream

A request is *queued* from `submit` until the leader says it has started. When the engine is lost, every stream ends
with `Unavailable(engine_lost)` at once and the client connects again as soon as a new leader listens.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from google.protobuf.message import DecodeError

from trilithon.errors import FailedPrecondition, Overloaded, TrilithonError, Unavailable
from trilithon_server.config import LimitsConfig
from trilithon_server.engine import wire_pb2 as wire
from trilithon_server.engine.framing import MAX_FRAME_BYTES, frame
from trilithon_server.engine_stream import EngineStream

__all__ = ["EngineClient", "EngineState", "EngineStream"]

EngineState = Literal["loading", "ready", "draining", "lost", "failed"]

RETRY_AFTER_S = (1.0, 30.0)  # bounds of every Retry-After
_RATE_WINDOW_S = 10.0
_CONNECT_INTERVAL_S = 0.05

_log = logging.getLogger(__name__)


class EngineClient:
    """
    One engine as the service sees it. All methods belong to one asyncio loop.

    Args:
        name: the engine's name in the configuration.
        socket_path: where its leader listens; may appear later and again after a restart.
        limits: bounds of the queue and of unread streams.
        restarts: whether a lost engine is started again, so that a request that it failed can be sent again.
    """

    def __init__(self, *, name: str, socket_path: Path, limits: LimitsConfig, restarts: bool = True) -> None:
        self.name = name
        self.state: EngineState = "loading"
        self.cause = ""
        """Why the engine was lost or failed, for logs and the admin page; never for clients."""
        self.hello: wire.Hello | None = None
        self.stats: wire.Stats | None = None
        self.steps = 0
        """Steps that the present leader has reported."""
        self.queued_requests = 0
        self.queued_tokens = 0
        self.losses: dict[str, int] = {}
        """Engine losses by kind of cause (killed, exited, hung, stalled, connection)."""
        self._loss_kind = ""
        self.step_listeners: list[Callable[[wire.StepResult], None]] = []
        self.hello_listeners: list[Callable[[], None]] = []
        """Called each time a leader has said hello."""
        self.last_progress_s = time.monotonic()
        """When the last step's result came, or the first request after a quiet time went."""
        self._path = socket_path
        self._limits = limits
        self._restarts = restarts
        self._streams: dict[int, EngineStream] = {}
        self._next_handle = 1
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None
        self.adapters: set[str] = set()
        """Digests of the adapters that are loaded."""
        self._adapter_waits: dict[tuple[str, bool], list[asyncio.Future[None]]] = {}  # by digest, and whether to load
        self._draining = False
        self._shut = False
        self._held_down = False  # lost by the supervisor's word: no reconnect to a dying leader
        self._steps: deque[tuple[float, int]] = deque()
        self._step_tokens = 0
        self._startup_seconds = 5.0  # until a leader has told
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self) -> None:
        """Begin to connect; returns at once. `state` becomes `ready` when the leader has said hello."""
        self._task = asyncio.create_task(self._run(), name=f"engine-{self.name}")

    async def stop(self) -> None:
        """Disconnect and end every stream; idempotent."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        self._fail_streams(lambda stream: self._shutting_down(stream))

    @property
    def in_flight(self) -> int:
        """Requests that the engine holds, queued ones included."""
        return len(self._streams)

    def submit(self, submit: wire.Submit) -> EngineStream:
        """
        Put a request into the bounded queue; assigns `submit.handle`.

        Raises:
            Overloaded: `queue_full`, with the time after which a retry can succeed.
            Unavailable: `loading`, `engine_lost` or `server_shutting_down`.
        """
        self._admit(len(submit.prompt) + len(submit.source_tokens), submit.request_id)
        submit.handle = self._next_handle
        message = frame(wire.ToEngine(submit=submit).SerializeToString())
        self._next_handle += 1
        stream = EngineStream(submit, limits=self._limits, send_abort=self._send_abort)
        if not self._streams:
            self.last_progress_s = time.monotonic()
        self._streams[stream.handle] = stream
        self._idle.clear()
        self.queued_requests += 1
        self.queued_tokens += stream.prompt_tokens
        assert self._writer is not None  # `ready` implies a connection
        self._writer.write(message)
        return stream

    def check_admission(self, prompt_tokens: int, *, requests: int = 1) -> None:
        """Raise what `submit` would for `requests` requests of `prompt_tokens` together; 0 asks for readiness alone."""
        self._admit(prompt_tokens, "", requests=requests)

    def retry_after_s(self) -> float:
        """Seconds after which the queue should have room: queued tokens / recent token rate, from 1 to 30."""
        self._forget_old_steps()
        low, high = RETRY_AFTER_S
        rate = self._step_tokens / _RATE_WINDOW_S
        return high if rate == 0 else min(high, max(low, self.queued_tokens / rate))

    def send_control(self, kind: wire.Control.Kind.ValueType) -> None:
        """Send a control message to the leader, if there is one."""
        self._write(wire.ToEngine(control=wire.Control(kind=kind)))

    def load_adapter(self, adapter: wire.Adapter) -> asyncio.Future[None]:
        """Have an adapter loaded; done when it is, or with `adapter_load_failed`."""
        return self._adapter_control(wire.AdapterControl.LOAD, adapter)

    def unload_adapter(self, adapter: wire.Adapter) -> asyncio.Future[None]:
        """Have an adapter dropped once its requests have ended; done when it is."""
        wait = self._adapter_control(wire.AdapterControl.UNLOAD, adapter)
        if adapter.digest not in self.adapters and not wait.done():
            wait.set_result(None)  # it is not there
        return wait

    def adapter_requests(self, digest: str) -> int:
        """Requests in flight that stand on an adapter."""
        return sum(stream.adapter_digest == digest for stream in self._streams.values())

    def _adapter_control(self, kind: wire.AdapterControl.Kind.ValueType, adapter: wire.Adapter) -> asyncio.Future[None]:
        wait: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._adapter_waits.setdefault((adapter.digest, kind == wire.AdapterControl.LOAD), []).append(wait)
        self._write(wire.ToEngine(adapter=wire.AdapterControl(kind=kind, adapter=adapter)))
        return wait

    def _on_adapter(self, event: wire.AdapterEvent) -> None:
        """An adapter came, went, or could not come."""
        (self.adapters.add if event.loaded else self.adapters.discard)(event.digest)
        failed = event.HasField("error")
        for wait in self._adapter_waits.pop((event.digest, event.loaded or failed), []):
            if wait.done():
                continue
            if failed:
                wait.set_exception(FailedPrecondition(event.error.message, code=event.error.code))
            else:
                wait.set_result(None)

    @property
    def takes_requests(self) -> bool:
        """Whether there is an engine that answers; while the server drains it does, for the calls that go on."""
        return self.state in ("ready", "draining") and not self._shut

    def drain(self) -> None:
        """Show that the server is on its way down. Which calls may still ask is for the service to say."""
        self._draining = True
        if self.state == "ready":
            self.state = "draining"

    async def wait_idle(self) -> None:
        """Return once no request is in flight."""
        await self._idle.wait()

    def shut(self) -> None:
        """Refuse everything from now on, and have the engine end what it holds as SHUTDOWN."""
        self._shut = True
        self.abort_all("shutdown")

    def abort_all(self, cause: str) -> None:
        """Ask the engine to drop every request; with cause `shutdown` they finish as SHUTDOWN."""
        for stream in list(self._streams.values()):
            stream.abort(cause)

    def fail_all_shutdown(self) -> None:
        """End every stream now with `server_shutting_down`, without waiting for the engine."""
        self._fail_streams(lambda stream: self._shutting_down(stream))

    def engine_event(self, state: EngineState, *, cause: str = "", kind: str = "") -> None:
        """The supervisor's word on this engine: `loading`, `ready`, `lost` or `failed`."""
        if state in ("lost", "failed"):
            self._held_down = True
            self._lose(state, cause, kind)
            if self._writer is not None:
                self._writer.transport.abort()
        elif state == "loading":
            self._held_down = False
            if self.state in ("lost", "failed"):
                self.state = "loading"

    # -- connection -----------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            if not self._held_down:
                try:
                    reader, self._writer = await asyncio.open_unix_connection(str(self._path))
                except OSError:
                    pass  # not listening yet, or not any more: the supervisor knows why
                else:
                    await self._serve_connection(reader)
            await asyncio.sleep(_CONNECT_INTERVAL_S)

    async def _serve_connection(self, reader: asyncio.StreamReader) -> None:
        assert self._writer is not None
        try:
            while True:
                self._dispatch(await _read_message(reader))
        except asyncio.IncompleteReadError:
            reason = "the leader closed the connection"
        except (OSError, ValueError) as error:
            reason = f"the connection to the leader failed: {error}"
        finally:
            self._writer.transport.abort()
            self._writer = None
            known, self.hello = self.hello, None
        if known is not None and self.state not in ("lost", "failed"):
            self._lose("lost", reason, "connection")

    def _dispatch(self, message: wire.FromEngine) -> None:
        if message.HasField("hello"):
            self.hello = message.hello
            self.cause = ""
            self.steps = 0
            self.adapters.clear()
            self._startup_seconds = sum(message.hello.startup_seconds.values())
            self.state = "draining" if self._draining else "ready"
            for listener in self.hello_listeners:
                listener()
            return
        step = message.step
        now = time.monotonic()
        self.last_progress_s = now
        self.steps = step.step
        self.stats = step.stats
        self._steps.append((now, step.stats.step_tokens))
        self._step_tokens += step.stats.step_tokens
        for delta in step.deltas:
            stream = self._streams.get(delta.handle)
            if stream is None:
                continue  # failed here meanwhile, for example as a slow reader
            stream.push(delta)
            if stream.queued and (delta.HasField("started") or stream.finished):
                self._dequeue(stream)
            if stream.finished:
                self._forget(stream)
        for event in step.adapters:
            self._on_adapter(event)
        self._forget_old_steps()
        for on_step in self.step_listeners:
            on_step(step)

    def _forget_old_steps(self) -> None:
        horizon = time.monotonic() - _RATE_WINDOW_S
        while self._steps and self._steps[0][0] < horizon:
            self._step_tokens -= self._steps.popleft()[1]

    def _send_abort(self, handle: int, index: int, cause: str) -> None:
        self._write(wire.ToEngine(abort=wire.Abort(handle=handle, index=index, cause=cause)))

    def _write(self, message: wire.ToEngine) -> None:
        if self._writer is not None:
            self._writer.write(frame(message.SerializeToString()))

    # -- admission and loss ---------------------------------------------------------------------------------

    def _admit(self, tokens: int, request_id: str, *, requests: int = 1) -> None:
        if not self.takes_requests:
            raise self._not_ready(request_id)
        limits = self._limits
        if requests == 0:
            return
        if self.queued_requests + requests > limits.max_queue_requests:
            limit = f"{limits.max_queue_requests} requests"
        elif self.queued_requests and self.queued_tokens + tokens > limits.max_queue_tokens:
            limit = f"{limits.max_queue_tokens} tokens"
        else:
            return
        wait_s = self.retry_after_s()
        message = (
            f"the queue must hold at most {limit}. Given: {self.queued_requests} requests with {self.queued_tokens} "
            f"tokens waiting. Retry in {wait_s:.0f} s."
        )
        raise Overloaded(message, code="queue_full", request_id=request_id, retry_after_s=wait_s)

    def _not_ready(self, request_id: str) -> Unavailable:
        if self._shut:
            return _shutting_down(request_id, retry_after_s=5.0)
        if self.state == "loading":
            wait_s = self._restart_estimate_s()
            return Unavailable("the model is loading.", code="loading", request_id=request_id, retry_after_s=wait_s)
        return self._engine_lost(request_id, may_retry=self._comes_back(self.state))

    def _engine_lost(self, request_id: str, *, may_retry: bool) -> Unavailable:
        return Unavailable(
            "the engine lost one of its ranks and cannot answer.",
            code="engine_lost",
            hint="The same request can be sent again." if may_retry else "",
            request_id=request_id,
            retry_after_s=self._restart_estimate_s() if may_retry else None,
        )

    def _shutting_down(self, stream: EngineStream) -> Unavailable:
        return _shutting_down(stream.request_id, retry_after_s=None if stream.streamed else 5.0)

    def _restart_estimate_s(self) -> float:
        """What the last start took, from 1 to 30 s."""
        return min(RETRY_AFTER_S[1], max(RETRY_AFTER_S[0], self._startup_seconds))

    def _lose(self, state: EngineState, cause: str, kind: str) -> None:
        if self.state in ("lost", "failed"):
            if kind and self._loss_kind == "connection":  # the socket's end came before the supervisor's word
                self.losses["connection"] -= 1
                self._loss_kind = kind
                self.losses[kind] = self.losses.get(kind, 0) + 1
        else:
            self._loss_kind = kind
            self.losses[kind] = self.losses.get(kind, 0) + 1
            level = logging.INFO if kind == "connection" else logging.WARNING  # the cause is the supervisor's to tell
            _log.log(level, "engine_lost", extra={"engine": self.name, "cause": cause, "in_flight": self.in_flight})
        self.state = state
        self.adapters.clear()
        for wait in [wait for waits in self._adapter_waits.values() for wait in waits if not wait.done()]:
            wait.set_exception(self._engine_lost("", may_retry=self._comes_back(state)))
        self._adapter_waits.clear()
        self.cause = cause or self.cause
        self.stats = None
        self._fail_streams(
            lambda stream: self._engine_lost(
                stream.request_id, may_retry=self._comes_back(state) and not stream.streamed
            )
        )

    def _comes_back(self, state: EngineState) -> bool:
        """Whether an engine that was lost in `state` will answer again; its socket's end may come before the word."""
        return self._restarts and state != "failed"

    def _fail_streams(self, make: Callable[[EngineStream], TrilithonError]) -> None:
        for stream in list(self._streams.values()):
            stream.fail(make(stream))
            self._forget(stream)

    def _forget(self, stream: EngineStream) -> None:
        self._dequeue(stream)
        self._streams.pop(stream.handle, None)
        if not self._streams:
            self._idle.set()

    def _dequeue(self, stream: EngineStream) -> None:
        if stream.queued:
            stream.queued = False
            self.queued_requests -= 1
            self.queued_tokens -= stream.prompt_tokens


async def _read_message(reader: asyncio.StreamReader) -> wire.FromEngine:
    """One message; IncompleteReadError when the leader closed, ValueError for bytes that are no message."""
    length = int.from_bytes(await reader.readexactly(4), "big")
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame must have at most {MAX_FRAME_BYTES} bytes. Given: {length}.")
    body = await reader.readexactly(length)
    try:
        return wire.FromEngine.FromString(body)
    except DecodeError as error:
        raise ValueError(f"not a message of the engine: {error}") from None


def _shutting_down(request_id: str, *, retry_after_s: float | None) -> Unavailable:
    message = "the server is shutting down."
    return Unavailable(message, code="server_shutting_down", request_id=request_id, retry_after_s=retry_after_s)
