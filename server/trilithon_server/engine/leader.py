"""
Rank 0's loop: read what fronts want, land what came back, plan, run this rank's part, answer. And the others' loop.

Every wait has an end: sockets and outputs wake the loop, and a sign of life goes round at least once a second.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

from google.protobuf.message import DecodeError

from trilithon_server.engine.beats import BeatWriter
from trilithon_server.engine.channel import Channel, OutputInbox
from trilithon_server.engine.connections import Connections
from trilithon_server.engine.core import EngineCore
from trilithon_server.engine.plan import Kind, StepOutput, StepPlan
from trilithon_server.engine.runner import Runner
from trilithon_server.engine.wire_pb2 import Control, Stats, ToEngine

TICK_S = 1.0
EXPIRY_S = 0.02  # how late a time limit may be noticed while nothing else happens


class Leader:
    """
    Args:
        core: decides.
        runner: executes this rank's part.
        channel: to the other ranks; None when there are none.
        connections: to the fronts.
        beats: this rank's heartbeat.
    """

    def __init__(
        self, core: EngineCore, runner: Runner, *, channel: Channel | None, connections: Connections, beats: BeatWriter
    ) -> None:
        self._core = core
        self._runner = runner
        self._channel = channel
        self._connections = connections
        self._beats = beats
        self._landed_stats: Stats | None = None
        self._step = 0
        self._last_plan_s = time.monotonic()
        self._inbox: OutputInbox | None = None
        if channel is not None and channel.sampling_rank != 0:
            self._inbox = OutputInbox(channel)
            connections.watch(self._inbox.wake_fd)
        self._wake_read, self._wake_write = os.pipe()
        for fd in (self._wake_read, self._wake_write):
            os.set_blocking(fd, False)
        connections.watch(self._wake_read)

    def serve(self) -> None:
        """
        Serve until drained.

        Raises:
            CollectiveError: another rank is gone.
        """
        signal.signal(signal.SIGTERM, self._on_sigterm)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self._core.on_compiled(self._wake_write)
        self._beats.idle()
        is_busy = False
        while not (self._core.draining and not self._core.has_work and self._connections.all_sent):
            timeout_s = 0.0 if is_busy else EXPIRY_S if self._core.has_work else TICK_S
            self._receive(timeout_s)
            if self._inbox is not None:
                for output in self._inbox.take():
                    self._land(output)
            now_s = time.monotonic()
            self._core.expire(now_s)
            is_busy = False
            while (plan := self._core.plan(now_s)) is not None:
                is_busy = self._inbox is None
                self._run(plan)
                if is_busy:
                    break  # its tokens go out before the next plan
            if not is_busy and (errand := self._core.errand()) is not None:
                self._run(errand)
            self._answer()
            if not is_busy and now_s - self._last_plan_s >= TICK_S:
                self._idle_tick()
        self._run(self._core.signal(Kind.STOP))
        if self._channel is not None:
            self._channel.flush()
        self._beats.drained()
        self._connections.close()

    def _receive(self, timeout_s: float) -> None:
        now_s = None
        for connection, message in self._connections.poll(timeout_s):
            now_s = now_s or time.monotonic()
            if message is None:
                self._core.disconnect(connection, now_s)
                continue
            try:
                self._handle(connection, ToEngine.FromString(message), now_s)
            except DecodeError:
                self._core.disconnect(connection, now_s)
        try:
            os.read(self._wake_read, 4096)
        except BlockingIOError:
            return

    def _handle(self, connection: int, message: ToEngine, now_s: float) -> None:
        kind = message.WhichOneof("kind")
        if kind == "submit":
            self._core.submit(connection, message.submit, now_s)
        elif kind == "abort":
            abort = message.abort
            self._core.abort(connection, abort.handle, abort.index, abort.cause, now_s)
        elif kind == "adapter":
            self._core.adapters.control(message.adapter)
        elif kind == "control":
            if message.control.kind == Control.RESET_PREFIX_CACHE:
                self._core.scheduler.reset_prefix_cache()
            elif message.control.kind == Control.DRAIN:
                self._core.draining = True
            else:
                self._core.shut_down(now_s)

    def _run(self, plan: StepPlan) -> None:
        """Send a plan round and do this rank's part of it."""
        self._last_plan_s = time.monotonic()
        self._beats.begin(deadline_s=plan.deadline_s)
        if self._channel is not None:
            self._channel.send_plan(plan, max_pending=self._core.max_in_flight + 1)
        output = self._runner.execute(plan)
        if output is not None:
            self._land(output)

    def _land(self, output: StepOutput) -> None:
        stats = self._core.land(output, time.monotonic())
        self._beats.end()
        if self._core.num_in_flight:
            self._beats.begin(deadline_s=self._core.pace.deadline_s(0))
        if stats is not None:
            self._step += 1
            self._landed_stats = stats

    def _answer(self) -> None:
        """One result a step to every front; between steps only to those that something happened to."""
        landed, self._landed_stats = self._landed_stats, None
        if landed is None and self._core.outbox.is_empty:
            return
        messages = self._core.outbox.take(
            step=self._step,
            stats=landed or self._core.stats(),
            connections=self._connections.numbers,
            everyone=landed is not None,
        )
        for connection, message in messages.items():
            if not self._connections.send(connection, message):
                self._core.disconnect(connection, time.monotonic())

    def _idle_tick(self) -> None:
        if not self._core.has_work:
            self._core.verify_idle()
        if self._channel is not None and not self._core.num_in_flight:
            self._run(self._core.signal(Kind.TICK))
        self._last_plan_s = time.monotonic()

    def _on_sigterm(self, _signum: int, _frame: FrameType | None) -> None:
        # Whoever sends this wants the engine gone once it is idle; the supervisor has had its requests finished.
        self._core.draining = True


def follow(runner: Runner, channel: Channel, *, beats: BeatWriter, answers: bool) -> None:
    """
    Every other rank's loop: take the next plan, do this rank's part, and answer it where this rank samples.

    Raises:
        CollectiveError: another rank is gone.
    """
    while True:
        beats.idle()
        plan = channel.receive_plan()
        if plan.kind is Kind.STOP:  # not answered: the leader may be gone already
            beats.drained()
            return
        beats.begin(deadline_s=plan.deadline_s)
        output = runner.execute(plan)
        if answers and output is not None:
            channel.send_output(output)
        beats.end()
