"""
The parent of all: starts the front and every engine's ranks, watches them, and says what happened in words.

    supervisor --control pipe--> front      {"event": "engine", "name", "state", "kind", "cause", "rank"}
                                            {"event": "drain" | "abort"}
               <--status pipe---            {"event": "listening", "connected", "alive", "stalled", "drain_requested",
                                             "drained", "fatal", "engine_start", "engine_stop"}
               <--status pipe--- each rank  {"event": "phase", "memory", "kernels", "ready" or "fatal"}

One thread, one loop, no torch. Loss of a rank: the front hears of it at once (readiness off, requests failed), the
rank's own cause is logged first, the group is killed, and started again after 1, 2, 4 s, at most 3 times in 10
minutes; then, or with `on_rank_loss: exit`, the server ends with exit code 6.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trilithon_server.config import ServeConfig, write_config
from trilithon_server.engine.children import Child, describe_exit
from trilithon_server.engine.companions import Companions, python_module
from trilithon_server.engine.group import EXIT_INVALID, STOPPED_S, EngineGroup, Loss
from trilithon_server.engine.hosted import HostedEngines
from trilithon_server.engine.restarts import Restarts
from trilithon_server.engine.spec import EngineSpec
from trilithon_server.engine.watch import ExternalEngine
from trilithon_server.extension import FRONT_MODULE, Companion

EXIT_OK, EXIT_BUG, EXIT_USAGE, EXIT_ENGINE_LOST, EXIT_INTERRUPTED = 0, 1, 2, 6, 130
TICK_S = 0.1
HOLD_S = 0.15  # children's lines wait this long, so that a dead rank's cause is told before its peers' complaints
FRONT_SILENCE_S = 15.0  # the front says it lives every second; its loop is stuck when it is silent this long
FRONT_START_S = 60.0
ABORT_S = 5.0  # for the front to tell every client, once it may not wait any longer
RANK_GRACE_S = 3.0

_log = logging.getLogger(__name__)


class Supervisor:
    """
    Runs a server until it is told to stop or cannot go on.

    Args:
        config: the resolved configuration.
        specs: one per engine, in the order of `config.engines`.
        run_dir: directory for sockets, 0700; made and removed by the caller.
        external: the ranks are started by someone else (torchrun); only attach to them and watch.
        on_ready: called once, when the front listens and every engine is ready for the first time.
        write_line: takes (process, line) of everything that the children print.
        front_module: run as the front process.
        companions: further processes, which live as long as the server.
    """

    def __init__(
        self,
        config: ServeConfig,
        specs: Sequence[EngineSpec],
        *,
        run_dir: Path,
        external: bool = False,
        on_ready: Callable[[], None] = lambda: None,
        write_line: Callable[[str, str], None],
        front_module: str = FRONT_MODULE,
        companions: Sequence[Companion] = (),
    ) -> None:
        self._config = config
        self._front_module = front_module
        self._server = config.server
        self._run_dir = run_dir
        self._on_ready = on_ready
        self._write_line = write_line
        self._held: deque[tuple[float, str, str]] = deque()  # (arrival, process, line), not yet passed on
        self._selector = selectors.DefaultSelector()
        self._external = [ExternalEngine(spec, run_dir=run_dir) for spec in specs] if external else []
        self._groups = [] if external else [self._make_group(spec) for spec in specs]
        self._companions = Companions(companions, selector=self._selector, on_output=self._hold)
        self._front: Child | None = None
        self._front_listening = False
        self._front_heard_at = 0.0
        self._front_fatal: dict[str, Any] | None = None
        self._restarts = Restarts()
        self._hosted = HostedEngines(
            make_group=self._make_group,
            tell=self._tell_engine,
            may_restart=lambda: self._stop_deadline is None and self._server.on_rank_loss == "restart",
            refusal=_NO_HOSTING if external else "",
        )
        self._restart_at: dict[str, float] = {}
        self._front_restart_at: float | None = None
        self._announced = False
        self._connected: set[str] = set()  # engines that the front has heard from at least once
        self._stop_deadline: float | None = None
        self._aborting = False
        self._killed = False
        self._exit_code: int | None = None
        self._signals: list[int] = []

    def run(self) -> int:
        """Serve until stopped; the exit code of the command."""
        wakeup_read, wakeup_write = os.pipe()
        os.set_blocking(wakeup_read, False)
        os.set_blocking(wakeup_write, False)
        old_wakeup = signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
        old = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        self._selector.register(wakeup_read, selectors.EVENT_READ, lambda: _drain_pipe(wakeup_read))
        try:
            write_config(self._config, self._run_dir / "config.json")
            self._start_front()
            for group in self._groups:
                group.start()
            self._companions.start()
            while not self._finished():
                for key, _ in self._selector.select(timeout=TICK_S):
                    key.data()
                self._tick()
            return self._exit_code or EXIT_OK
        finally:
            for number in old:
                signal.signal(number, signal.SIG_IGN)  # a third signal must not cut the cleaning short
            self._clean_up()
            self._selector.close()
            signal.set_wakeup_fd(old_wakeup)
            for number, handler in old.items():
                signal.signal(number, handler)
            os.close(wakeup_read)
            os.close(wakeup_write)

    # -- the loop -------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        while self._signals:
            self._on_stop_signal(self._signals.pop(0))
        self._check_front()
        self._check_engines()
        self._companions.check()
        self._pass_on(older_than_s=HOLD_S)
        for engine in self._external:
            for state, cause in engine.check():
                self._tell_engine(engine.name, state, kind="hung" if state == "lost" else "", cause=cause)
        self._announce()
        if self._stop_deadline is not None and time.monotonic() > self._stop_deadline:
            self._abort_or_kill()

    def _check_engines(self) -> None:
        now = time.monotonic()
        for group in self._groups:
            loss = group.check()
            if loss is not None:
                self._on_loss(group, loss)
            elif group.take_peer_lost():
                self._tell_engine(group.spec.name, "lost", kind="exited", cause="a rank lost its peer")
            due = self._restart_at.get(group.spec.name)
            if due is not None and now >= due and self._stop_deadline is None:
                del self._restart_at[group.spec.name]
                group.start()
                self._tell_engine(group.spec.name, "loading")
        self._hosted.check()

    def _finished(self) -> bool:
        return self._exit_code is not None and self._front is None and (self._killed or not self._companions.running)

    def _announce(self) -> None:
        ready = self._front_listening and self._connected == {engine.name for engine in self._config.engines}
        if not self._announced and ready and self._stop_deadline is None:
            self._announced = True
            self._on_ready()

    def _hold(self, process: str, line: str) -> None:
        self._held.append((time.monotonic(), process, line))

    def _pass_on(self, *, older_than_s: float) -> None:
        """Write the children's lines that have waited long enough; none while a culprit is still being looked for."""
        if older_than_s and any(group.peer_lost for group in (*self._groups, *self._hosted.groups)):
            return
        horizon = time.monotonic() - older_than_s
        while self._held and self._held[0][0] <= horizon:
            _, process, line = self._held.popleft()
            self._write_line(process, line)

    # -- engines --------------------------------------------------------------------------------------------

    def _make_group(self, spec: EngineSpec) -> EngineGroup:
        return EngineGroup(
            spec,
            run_dir=self._run_dir,
            selector=self._selector,
            startup_s=self._server.startup_seconds,
            on_output=lambda rank, line: self._hold(f"{spec.name}.{rank}", line),
            on_ready=lambda: self._tell_engine(spec.name, "ready"),
        )

    def _on_loss(self, group: EngineGroup, loss: Loss) -> None:
        name = group.spec.name
        group.log_loss(loss)
        may_restart = self._stop_deadline is None and loss.exit_code != EXIT_INVALID
        may_restart = may_restart and self._server.on_rank_loss == "restart" and self._restarts.left > 0
        state = "lost" if may_restart else "failed"
        self._tell_engine(name, state, kind=loss.kind, cause=loss.cause, rank=loss.rank)
        group.kill()
        if may_restart:
            delay_s = self._restarts.count()
            self._restart_at[name] = time.monotonic() + delay_s
            _log.warning("engine_restarts", extra={"engine": name, "in_s": delay_s, "left": self._restarts.left})
        elif self._stop_deadline is None:
            reason = f"engine {name} rank {loss.rank}: {loss.cause}" + (f" {loss.hint}" if loss.hint else "")
            self._give_up(EXIT_INVALID if loss.exit_code == EXIT_INVALID else EXIT_ENGINE_LOST, reason)

    def _tell_engine(self, name: str, state: str, *, kind: str = "", cause: str = "", rank: int = -1) -> None:
        self._tell_front(event="engine", name=name, state=state, kind=kind, cause=cause, rank=rank)

    # -- front ----------------------------------------------------------------------------------------------

    def _start_front(self) -> None:
        argv = [*python_module(self._front_module, "--config", str(self._run_dir / "config.json"))]
        argv += ["--run-dir", str(self._run_dir), "--control-fd", "{control}", "--status-fd", "{status}"]
        argv += ["--colour"] if sys.stderr.isatty() else []
        self._front_listening = False
        self._front_fatal = None
        self._front_heard_at = time.monotonic()
        self._front = Child(
            argv,
            name="front",
            env={**os.environ, **_FRONT_ENV},
            on_output=lambda line: self._hold("front", line),
            on_status=self._on_front_status,
            control=True,
        )
        self._front.register(self._selector)
        for group in self._groups:  # a front that starts again must know what came before it
            if group.state == "ready":
                self._tell_engine(group.spec.name, "ready")

    def _on_front_status(self, line: str) -> None:
        try:
            event = json.loads(line)
            kind = event["event"]
        except (ValueError, KeyError, TypeError):
            _log.warning("bad_status_line", extra={"process": "front", "line": line[:200]})
            return
        self._front_heard_at = time.monotonic()
        if kind == "listening":
            self._front_listening = True
            _log.info("listening", extra={name: value for name, value in event.items() if name != "event"})
        elif kind == "fatal":
            self._front_fatal = event
        elif kind == "connected":
            self._connected.add(str(event.get("name", "")))
        elif kind == "drain_requested" and self._stop_deadline is None:
            seconds = event.get("seconds")
            self._begin_drain("an administrator", self._server.drain_seconds if seconds is None else float(seconds))
        elif kind in ("engine_start", "engine_stop"):
            self._hosted.on_event(event)
        elif kind == "stalled":
            self._hosted.stalled(str(event.get("name", "")), float(event.get("seconds", 0.0)))
            for group in self._groups:
                if group.spec.name == event.get("name") and group.state == "ready":
                    self._on_loss(group, group.stalled(float(event.get("seconds", 0.0))))

    def _check_front(self) -> None:
        front = self._front
        now = time.monotonic()
        if front is None:
            if self._front_restart_at is not None and now >= self._front_restart_at:
                self._front_restart_at = None
                if self._stop_deadline is None:
                    self._start_front()
            return
        code = front.exit_code()
        silent_s = now - self._front_heard_at
        stopped = code is None and silent_s > 2 * STOPPED_S and front.stopped()
        if code is None and not stopped and silent_s <= (FRONT_SILENCE_S if self._front_listening else FRONT_START_S):
            return
        front.wait(timeout_s=0.5)
        if code is not None:
            cause = describe_exit(code)
        else:
            cause = "stopped by a signal (state T)" if stopped else f"its loop has not answered for {silent_s:.0f} s"
        lines, fatal = tuple(front.tail), self._front_fatal
        front.close()
        self._front = None
        if self._stop_deadline is not None:
            self._exit_code = EXIT_OK if self._exit_code is None else self._exit_code
            return
        self._hosted.kill()  # the next front knows nothing of them
        _log.error("front_lost", extra={"cause": cause, "last_lines": lines})
        if fatal is not None:
            self._give_up(int(fatal.get("exit_code", EXIT_BUG)), str(fatal.get("message", cause)))
        elif self._server.on_rank_loss == "restart" and self._restarts.left > 0:
            self._front_restart_at = now + self._restarts.count()
        else:
            self._give_up(EXIT_ENGINE_LOST, f"front: {cause}")

    def _tell_front(self, **event: Any) -> None:
        if self._front is not None:
            self._front.send(json.dumps(event))

    # -- the end --------------------------------------------------------------------------------------------

    def _on_signal(self, number: int, frame: object) -> None:
        self._signals.append(number)

    def _on_stop_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_OK
        if self._stop_deadline is None:
            self._exit_code = code
            self._begin_drain(name, self._server.drain_seconds)
        else:
            _log.warning("aborting", extra={"signal": name})
            self._begin_abort()

    def _begin_drain(self, who: str, drain_s: float) -> None:
        _log.info("draining", extra={"asked_by": who, "at_most_s": drain_s})
        self._exit_code = EXIT_OK if self._exit_code is None else self._exit_code
        self._stop_deadline = time.monotonic() + drain_s + 1.0
        self._tell_front(event="drain", seconds=drain_s)
        self._companions.terminate()

    def _give_up(self, code: int, reason: str) -> None:
        _log.error("server_ends", extra={"exit_code": code, "reason": reason})
        self._exit_code = code
        self._begin_abort()

    def _begin_abort(self) -> None:
        self._aborting = True
        self._stop_deadline = time.monotonic() + ABORT_S
        self._tell_front(event="abort")
        self._companions.terminate()

    def _abort_or_kill(self) -> None:
        if not self._aborting:
            self._begin_abort()
            return
        self._killed = True
        if self._front is not None:
            _log.warning("front_killed", extra={"cause": f"it did not end within {ABORT_S:g} s"})
            self._front.signal(signal.SIGKILL)
            self._stop_deadline = time.monotonic() + ABORT_S

    def _clean_up(self) -> None:
        if self._front is not None:
            self._front.close()
            self._front = None
        self._companions.close()
        grace_s = RANK_GRACE_S if self._exit_code in (EXIT_OK, EXIT_INTERRUPTED) else 0.0
        self._hosted.stop(grace_s=grace_s)
        for group in self._groups:
            group.stop(grace_s=grace_s)
        self._pass_on(older_than_s=0.0)
        for name in ("config.json", *(f"{group.spec.name}.json" for group in self._groups)):
            with contextlib.suppress(FileNotFoundError):
                (self._run_dir / name).unlink()
        if self._server.uds is not None:
            with contextlib.suppress(FileNotFoundError):
                Path(self._server.uds).unlink()


# gRPC's fork handlers complain when the front starts its constraint workers, which use no gRPC.
_FRONT_ENV = {"PYTHONUNBUFFERED": "1", "GRPC_ENABLE_FORK_SUPPORT": "0", "GRPC_VERBOSITY": "ERROR"}

_NO_HOSTING = (
    "this server's ranks are started by someone else (--launch external), so it starts none at run time. "
    "Serve the model as an engine of its own."
)


def _drain_pipe(fd: int) -> None:
    with contextlib.suppress(BlockingIOError):
        os.read(fd, 512)
