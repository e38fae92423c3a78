"""
One engine's ranks as one thing that lives and dies together: started, watched, judged, killed.

    idle --start--> loading --ready--> ready --a rank dies or hangs--> lost --kill, back-off, start--> loading ...
                                       ready --begin_stop--> stopping --discard--> idle

The group only judges; what follows from a loss is the supervisor's choice.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trilithon_server.engine.beats import Beat, BeatReader
from trilithon_server.engine.children import Child, describe_exit
from trilithon_server.engine.spec import EngineSpec

GroupState = Literal["idle", "loading", "ready", "lost", "stopping"]
LossKind = Literal["killed", "exited", "hung", "stalled", "startup"]

EXIT_INVALID = 3  # the rank found the model or the configuration invalid: another try would find the same
EXIT_PEER_LOST = 6
STOPPED_S = 1.5  # a rank in state T this long is hung
OVERDUE_S = 0.5  # a passed deadline must stand this long, over several looks
PEER_GRACE_S = 1.5  # a rank that says "lost a peer" is not the cause: wait this long for the one that is
BLIND_S = 2.0  # when the watcher itself was held up this long (machine asleep), its suspicions are void

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loss:
    """Why a group can't go on: the rank that is to blame, and what it said last."""

    kind: LossKind
    rank: int
    cause: str
    exit_code: int | None = None
    message: str = ""
    """What the rank itself gave as the reason; empty where it could not."""
    hint: str = ""
    last_lines: tuple[str, ...] = ()


class EngineGroup:
    """
    Args:
        spec: what the ranks are told.
        run_dir: directory of sockets, 0700; created by the caller.
        selector: woken by the ranks' pipes and exits.
        startup_s: how long the group may take to be ready.
        on_output: called with (rank, line) for everything that ranks print.
        on_ready: called each time the group has become ready.
    """

    def __init__(
        self,
        spec: EngineSpec,
        *,
        run_dir: Path,
        selector: selectors.BaseSelector,
        startup_s: float,
        on_output: Callable[[int, str], None],
        on_ready: Callable[[], None],
    ) -> None:
        self.spec = spec
        self.state: GroupState = "idle"
        self.startup_seconds: dict[str, float] = {}
        self.children: list[Child] = []
        self._run_dir = run_dir
        self._selector = selector
        self._startup_s = startup_s
        self._on_output = on_output
        self._on_ready = on_ready
        self._spec_path = run_dir / f"{spec.name}.json"
        self._beats: BeatReader | None = None
        self._started_at = 0.0
        self._phases: dict[int, str] = {}
        self._fatal: dict[int, dict[str, Any]] = {}
        self._suspects: dict[int, tuple[Beat, float]] = {}
        self._stopped_since: dict[int, float] = {}
        self._peer_lost_at: float | None = None
        self._peer_lost_told = False
        self._last_check = time.monotonic()

    def start(self) -> None:
        """Spawn every rank with torchrun's environment on loopback."""
        self._remove_files()
        self._spec_path.write_text(self.spec.to_json(), encoding="utf-8")
        self._beats = BeatReader(self.spec.beats_path(self._run_dir), num_ranks=self.spec.world_size)
        self._phases.clear()
        self._fatal.clear()
        self._suspects.clear()
        self._stopped_since.clear()
        self._peer_lost_at = None
        self._peer_lost_told = False
        self._started_at = self._last_check = time.monotonic()
        self.state = "loading"
        port = free_port("127.0.0.1")
        for rank in range(self.spec.world_size):
            self.children.append(self._spawn(rank, port))

    def check(self) -> Loss | None:
        """Look at every rank once; the group's loss, if there is one."""
        now = time.monotonic()
        blind = now - self._last_check > BLIND_S
        self._last_check = now
        if self.state not in ("loading", "ready"):
            return None
        loss = self._dead(now)
        if loss is not None:
            return loss
        if blind:
            self._suspects.clear()
            self._stopped_since.clear()
            return None
        return self._hung(now) or self._too_slow(now)

    @property
    def peer_lost(self) -> bool:
        """Whether a rank has given up on another and the culprit is still being looked for."""
        return self._peer_lost_at is not None

    def take_peer_lost(self) -> bool:
        """`peer_lost`, told once per loss."""
        told, self._peer_lost_told = self._peer_lost_told, self.peer_lost
        return self._peer_lost_told and not told

    def stalled(self, seconds: float) -> Loss:
        """The loss that the front reports: work is queued and no step ends."""
        return self._loss("stalled", 0, f"work is queued and no step has finished for {seconds:.0f} s")

    def stop(self, *, grace_s: float) -> None:
        """Ask the ranks to exit, then kill what is left."""
        self.begin_stop()
        self.wait(timeout_s=grace_s)
        self.discard()

    def begin_stop(self) -> None:
        """Ask the ranks to exit; from here on their ends are no loss."""
        for child in self.children:
            child.signal(signal.SIGTERM)
        self.state = "stopping"

    @property
    def running(self) -> bool:
        """Whether any rank is still there."""
        return any(child.exit_code() is None for child in self.children)

    def wait(self, *, timeout_s: float) -> None:
        """Wait until every rank has ended, at most `timeout_s`."""
        end = time.monotonic() + timeout_s
        for child in self.children:
            child.wait(timeout_s=max(0.0, end - time.monotonic()))

    def discard(self) -> None:
        """Kill what is left of it and remove all of its files."""
        self.kill()
        self._spec_path.unlink(missing_ok=True)
        self.state = "idle"

    def log_loss(self, loss: Loss) -> None:
        """Tell whose fault it was before anything that follows from it is told."""
        tp, pp = self.coordinates(loss.rank)
        where = {"engine": self.spec.name, "rank": loss.rank, "tp": tp, "pp": pp}
        _log.error("rank_lost", extra={**where, "kind": loss.kind, "cause": loss.cause, "last_lines": loss.last_lines})

    def kill(self) -> None:
        """Kill every rank and its helpers, reap them, and remove the group's socket and heartbeat file."""
        for child in self.children:
            child.signal(signal.SIGKILL)
        for child in self.children:
            child.close()
        self.children.clear()
        if self._beats is not None:
            self._beats.close()
            self._beats = None
        self._remove_files()
        self._peer_lost_at = None
        self.state = "lost"

    def coordinates(self, rank: int) -> tuple[int, int]:
        """(tp, pp) of a rank: tensor parallelism is the fast axis."""
        return rank % self.spec.tp, rank // self.spec.tp

    # -- judging --------------------------------------------------------------------------------------------

    def _dead(self, now: float) -> Loss | None:
        exits = {rank: code for rank, child in enumerate(self.children) if (code := child.exit_code()) is not None}
        if not exits:
            return None
        # A signal's victim comes first, then whoever failed by itself, and only then those who lost a peer.
        rank, code = min(exits.items(), key=lambda item: (item[1] >= 0, item[1] == EXIT_PEER_LOST, item[0]))
        if code == EXIT_PEER_LOST and len(exits) < len(self.children):
            self._peer_lost_at = self._peer_lost_at or now
            stopped = next((r for r, child in enumerate(self.children) if child.stopped()), None)
            if stopped is not None:
                return self._loss("hung", stopped, "stopped by a signal (state T)")
            if now - self._peer_lost_at < PEER_GRACE_S:
                return None
        self.children[rank].wait(timeout_s=1.0)  # also reads its last words
        fatal = self._fatal.get(rank)
        message = str(fatal.get("message", "")) if fatal else ""
        cause = describe_exit(code) + (f": {message}" if fatal else "")
        hint = str(fatal.get("hint", "")) if fatal else ""
        kind: LossKind = "killed" if code < 0 else "exited"
        return self._loss(kind, rank, cause, exit_code=code, message=message, hint=hint)

    def _hung(self, now: float) -> Loss | None:
        assert self._beats is not None
        for rank, child in enumerate(self.children):
            if not child.stopped():
                self._stopped_since.pop(rank, None)
            elif now - self._stopped_since.setdefault(rank, now) >= STOPPED_S:
                return self._loss("hung", rank, "stopped by a signal (state T)")
        beats = self._beats.read()
        now_ns = time.monotonic_ns()
        for rank, beat in enumerate(beats):
            if not beat.overdue(now_ns):
                self._suspects.pop(rank, None)
                continue
            before, since = self._suspects.setdefault(rank, (beat, now))
            if before != beat:
                self._suspects[rank] = (beat, now)
            elif now - since >= OVERDUE_S:
                return self._blame(beats, rank)
        return None

    def _blame(self, beats: list[Beat], overdue: int) -> Loss:
        stopped = next((rank for rank, child in enumerate(self.children) if child.stopped()), None)
        if stopped is not None:
            return self._loss("hung", stopped, "stopped by a signal (state T)")
        slowest = min(range(len(beats)), key=lambda rank: (beats[rank].step, rank != overdue))
        late_s = (time.monotonic_ns() - beats[overdue].deadline_ns) / 1e9
        cause = f"step {beats[slowest].step + 1} did not finish: rank {overdue} is {late_s:.1f} s over its deadline"
        return self._loss("hung", slowest, cause)

    def _too_slow(self, now: float) -> Loss | None:
        if self.state != "loading" or now - self._started_at <= self._startup_s:
            return None
        rank = min(range(len(self.children)), key=lambda r: (len(self._phases.get(r, "")) > 0, r))
        phases = ", ".join(f"rank {r}: {self._phases.get(r, 'none')}" for r in range(len(self.children)))
        cause = f"not ready after {self._startup_s:g} s (last phase finished: {phases})"
        return self._loss("startup", rank, cause, hint="Raise server.startup_seconds if the model is large.")

    def _loss(
        self,
        kind: LossKind,
        rank: int,
        cause: str,
        *,
        exit_code: int | None = None,
        message: str = "",
        hint: str = "",
    ) -> Loss:
        lines = tuple(self.children[rank].tail)
        return Loss(kind, rank, cause, exit_code=exit_code, message=message, hint=hint, last_lines=lines)

    # -- ranks ----------------------------------------------------------------------------------------------

    def _spawn(self, rank: int, port: int) -> Child:
        world = self.spec.world_size
        env = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_RANKS}
        env |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONUNBUFFERED": "1"}
        if self.spec.num_threads:
            env["OMP_NUM_THREADS"] = str(self.spec.num_threads)
        argv = [sys.executable, "-P", "-m", "trilithon_server.engine.rank"]
        argv += ["--spec", str(self._spec_path), "--run-dir", str(self._run_dir), "--status-fd", "{status}"]
        child = Child(
            argv,
            name=f"{self.spec.name}.{rank}",
            env=env,
            on_output=lambda line: self._on_output(rank, line),
            on_status=lambda line: self._on_status(rank, line),
        )
        child.register(self._selector)
        return child

    def _on_status(self, rank: int, line: str) -> None:
        try:
            event = json.loads(line)
            kind = event["event"]
        except (ValueError, KeyError, TypeError):
            _log.warning("bad_status_line", extra={"engine": self.spec.name, "rank": rank, "line": line[:200]})
            return
        level = logging.INFO if rank == 0 else logging.DEBUG
        if kind == "phase":
            name, seconds = str(event.get("name", "")), float(event.get("seconds", 0.0))
            self._phases[rank] = name
            if rank == 0:
                self.startup_seconds[name] = seconds
            extra = {"engine": self.spec.name, "rank": rank, "phase": name, "seconds": round(seconds, 3)}
            _log.log(level, "startup_phase", extra=extra)
        elif kind == "memory":
            parts = {name: int(value) for name, value in event.items() if name not in ("event", "rank")}
            extra = {"engine": self.spec.name, "rank": rank, "sum": memory_sum(parts), "bytes": parts}
            _log.log(level, "memory", extra=extra)
        elif kind == "kernels" and event["missing"]:
            extra = {"engine": self.spec.name, "rank": rank, "cause": event["missing"]}
            extra["hint"] = "Install gcc: until then products and attention run by torch, which is slower."
            _log.log(logging.WARNING if rank == 0 else logging.DEBUG, "kernels_missing", extra=extra)
        elif kind == "ready":
            if rank == 0:
                self.state = "ready"
                self._on_ready()
        elif kind == "fatal":
            self._fatal[rank] = event

    def _remove_files(self) -> None:
        for path in (self.spec.socket_path(self._run_dir), self.spec.beats_path(self._run_dir)):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


# Set by a surrounding torchrun or meant for the front alone: a rank must not see them.
_NOT_FOR_RANKS = ("TORCHELASTIC_RUN_ID", "TRILITHON_API_KEYS", "GROUP_RANK", "ROLE_RANK")


def memory_sum(parts: dict[str, int]) -> str:
    """
    A rank's memory as one readable sum.

    >>> memory_sum({"weights": 3 << 20, "kv": 1 << 20, "available": 1 << 30})
    'weights 3.0 MiB + kv 1.0 MiB = 4.0 MiB of 1.0 GiB'
    """
    used = {name: size for name, size in parts.items() if name != "available"}
    terms = " + ".join(f"{name} {_readable(size)}" for name, size in used.items())
    return f"{terms} = {_readable(sum(used.values()))} of {_readable(parts.get('available', 0))}"


def _readable(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def free_port(host: str) -> int:
    """A TCP port that nobody listens on at this moment."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
