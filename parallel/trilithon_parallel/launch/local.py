"""
Start the ranks of one host as plain processes, watch them as one thing, and say in words why they ended.

    start --all exit 0--> done
      ^   --a rank dies or hangs--> first cause told --SIGTERM, grace, SIGKILL to all--+--> exit code of the cause
      |                                                                                |
      +------------------------ 1, 2, 4 ... s of back-off, at most max_restarts -------+

The contract with the ranks is torchrun's environment; under a real `torchrun` none of this runs. A rank's exit codes:
0 done; 2 or 3 its input is invalid, so another try would find the same; 6 it gave up on a peer, so look for that peer;
128 + n it stopped in good order because of signal n.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from io import RawIOBase
from pathlib import Path
from typing import BinaryIO

from trilithon_parallel.launch import LaunchError
from trilithon_parallel.launch.process import Keeper, Rank, describe_exit
from trilithon_parallel.launch.screen import Screen

EXIT_PEER_LOST = 6
EXITS_INVALID = (2, 3)
MAX_BACKOFF_S = 60.0
FAILURES_FILE = "failures.jsonl"
_TICK_S = 0.2
_PEER_GRACE_S = 3.0  # a rank that gave up on a peer is not the cause: wait this long for the one that is
# Set by a surrounding torchrun: a rank that saw them would look for torchrun's store.
_NOT_FOR_RANKS = ("TORCHELASTIC_RUN_ID", "GROUP_RANK", "ROLE_RANK")


@dataclass(frozen=True)
class Failure:
    """Why the ranks can't go on: the one to blame, how it ended, and what it wrote last."""

    rank: int
    cause: str
    exit_code: int
    last_lines: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = "".join(f"\n    | {line}" for line in self.last_lines)
        return f"rank {self.rank} {self.cause}." + (f" It wrote last:{lines}" if lines else " It wrote nothing.")


def local(
    command: Sequence[str],
    *,
    nproc: int,
    run_dir: Path,
    max_restarts: int = 0,
    backoff_s: float = 1.0,
    stop_s: float = 300.0,
    kill_s: float = 5.0,
    num_threads: int | None = None,
    environment: Mapping[str, str] | None = None,
    output: BinaryIO | None = None,
    log: Callable[[int], Path] | None = None,
    pass_fds: Sequence[int] = (),
) -> int:
    """
    Run `nproc` ranks of `command` on this host until they are done, and return the exit code.

    Call it from the main thread: it takes SIGTERM and SIGINT. The first is handed to every rank once, and their clean
    exit is awaited; the second kills them. Rank 0's output passes as it is, that of others with a prefix. Every
    failure is also appended to `failures.jsonl` in the run directory.

    Args:
        command: program and arguments of a rank.
        nproc: number of ranks, from 1.
        run_dir: directory of the run; made where missing.
        max_restarts: how often all ranks are started again after a failure, from 0.
        backoff_s: pause before the first restart; it doubles with each, up to 60 s.
        stop_s: how long ranks may take to end by themselves after SIGTERM or SIGINT (they write a checkpoint).
        kill_s: how long they may take after a failure.
        num_threads: threads of each rank (OMP_NUM_THREADS); by default that of the environment, else the host's
            cores shared out.
        environment: variables for the ranks, over those of this process.
        output: where lines go, standard output by default.
        log: the file of each rank, by its number, to which its output is appended instead.
        pass_fds: descriptors that the ranks hold too.

    Returns:
        0 when every rank ended with 0; otherwise the code of the first cause (128 + n for signal n).

    Raises:
        LaunchError: nothing was started, since the arguments cannot be.
    """
    if nproc < 1:
        raise LaunchError(f"launch nproc must be at least 1. Given: {nproc}.")
    if max_restarts < 0:
        raise LaunchError(f"launch max_restarts must be at least 0. Given: {max_restarts}.")
    if not command:
        raise LaunchError("launch command must name a program. Given: nothing.")
    run_dir.mkdir(parents=True, exist_ok=True)
    screen = Screen(output or sys.stdout.buffer, live=output is None and log is None and sys.stdout.isatty())
    env = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_RANKS}
    env |= {"OMP_NUM_THREADS": str(num_threads or env.get("OMP_NUM_THREADS") or max(1, _num_cores() // nproc))}
    env |= {"TORCHELASTIC_MAX_RESTARTS": str(max_restarts), "PYTHONUNBUFFERED": "1", **(environment or {})}
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_Stop())
        files = [] if log is None else [stack.enter_context(log(rank).open("ab", buffering=0)) for rank in range(nproc)]
        for attempt in itertools.count():
            sinks = [functools.partial(_append, file) for file in files] or [
                functools.partial(screen.take, rank) for rank in range(nproc)
            ]
            group = _Group(command, sinks=sinks, env=env, attempt=attempt, screen=screen, pass_fds=pass_fds)
            result = group.run(stop, stop_s=stop_s, kill_s=kill_s)
            if isinstance(result, int):
                return result
            screen.say(str(result))
            with contextlib.suppress(OSError):  # a full disk: the cause was said
                _record(run_dir, result, attempt)
            if stop.signals or result.exit_code in EXITS_INVALID or attempt == max_restarts:
                return result.exit_code
            pause_s = min(backoff_s * 2**attempt, MAX_BACKOFF_S)
            screen.say(f"all {nproc} ranks start again in {pause_s:g} s (restart {attempt + 1} of {max_restarts}).")
            if stop.wait(pause_s):
                return 128 + stop.signals[0]
    raise AssertionError("unreachable: the loop above only returns")


class _Group:
    """The ranks of one attempt, which live and die together."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        sinks: Sequence[Callable[[bytes], None]],
        env: Mapping[str, str],
        attempt: int,
        screen: Screen,
        pass_fds: Sequence[int],
    ) -> None:
        self._command, self._screen, self._sinks, self._pass_fds = command, screen, sinks, pass_fds
        nproc = len(sinks)
        self._env = {**env, "WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc), "MASTER_ADDR": "127.0.0.1"}
        self._env |= {"MASTER_PORT": str(_free_port()), "TORCHELASTIC_RESTART_COUNT": str(attempt)}
        self._ranks: list[Rank] = []
        self._exits: list[tuple[int, int]] = []  # (rank, code) that are no clean end, in the order they were noticed
        self._gone: list[int] = []  # ranks in the order in which the kernel told of their ends
        self._peer_lost_at: float | None = None
        self._selector = selectors.DefaultSelector()
        self._keeper = Keeper()

    def run(self, stop: _Stop, *, stop_s: float, kill_s: float) -> int | Failure:
        """Until all have ended or one has failed; afterwards none is left."""
        grace_s = 0.0
        try:
            self._selector.register(stop.fd, selectors.EVENT_READ, stop.drain)
            self._start()
            asked_at: float | None = None
            while True:
                for key, _ in self._selector.select(timeout=_TICK_S):
                    key.data()
                if len(stop.signals) > 1:
                    self._screen.say(f"second {signal.Signals(stop.signals[1]).name}: killing all ranks.")
                    return 128 + stop.signals[0]
                if stop.signals and asked_at is None:
                    asked_at = time.monotonic()
                    self._ask(stop.signals[0], stop_s)
                failure = self._check(stop.signals[0] if stop.signals else None)
                if failure is not None:
                    grace_s = kill_s
                    return failure
                if all(rank.exit_code is not None for rank in self._ranks):
                    codes = [rank.exit_code or 0 for rank in self._ranks]
                    return next((_exit_code(code) for code in codes if code), 0)
                if asked_at is not None and time.monotonic() - asked_at > stop_s:
                    left = [rank.rank for rank in self._ranks if rank.exit_code is None]
                    self._screen.say(f"ranks {left} did not end within {stop_s:g} s: killing them.")
                    return 128 + signal.SIGKILL
        finally:
            self._end(grace_s)

    def _start(self) -> None:
        for number, sink in enumerate(self._sinks):
            env = {**self._env, "RANK": str(number), "LOCAL_RANK": str(number)}
            env |= self._screen.terminal_env() if number == 0 else {}
            try:
                rank = Rank(number, self._command, env=env, on_output=sink, pass_fds=self._pass_fds)
            except OSError as error:
                raise LaunchError(
                    f"launch command {self._command[0]!r} cannot be started: {error.strerror or error}."
                ) from None
            self._ranks.append(rank)
            self._keeper.watch(rank.pid)
            rank.register(self._selector, on_exit=functools.partial(self._gone.append, number))

    def _ask(self, signum: int, stop_s: float) -> None:
        name = signal.Signals(signum).name
        self._screen.say(f"{name}: waiting up to {stop_s:g} s for the ranks to end by themselves; again kills them.")
        for rank in self._ranks:
            rank.signal(signum)

    def _check(self, asked: int | None) -> Failure | None:
        clean = (0,) if asked is None else (0, -asked, 128 + asked)
        new: list[tuple[int, int]] = []
        for rank in self._ranks:
            if rank.exit_code is None and rank.poll() is not None:
                assert rank.exit_code is not None
                new += [(rank.rank, rank.exit_code)] if rank.exit_code not in clean else []
        self._exits += sorted(new, key=self._place)
        if not self._exits:
            return None
        cause = next((exit for exit in self._exits if exit[1] != EXIT_PEER_LOST), None)
        if cause is not None:
            number, code = cause
            return Failure(number, describe_exit(code), _exit_code(code), self._ranks[number].tail)
        return self._look_for_peer()

    def _place(self, exit: tuple[int, int]) -> tuple[int, bool]:
        """
        Where an end comes among those noticed at one look: as the kernel told of them, which a busy host may hear of
        together; without its word, a signal's victim before who failed by itself.
        """
        rank, code = exit
        told = self._gone.index(rank) if rank in self._gone else len(self._gone)
        return told, code >= 0 or code == -signal.SIGABRT

    def _look_for_peer(self) -> Failure | None:
        """Ranks gave up on a peer: a stopped one is it; otherwise wait a while for the one that fails differently."""
        now = time.monotonic()
        self._peer_lost_at = self._peer_lost_at or now
        first = self._exits[0][0]
        stopped = [rank for rank in self._ranks if rank.exit_code is None and rank.stopped()]
        if stopped:
            cause = f"is stopped by a signal (state T); rank {first} gave up waiting first"
            return Failure(stopped[0].rank, cause, EXIT_PEER_LOST, self._ranks[first].tail)
        running = any(rank.exit_code is None for rank in self._ranks)
        if running and now - self._peer_lost_at < _PEER_GRACE_S:
            return None
        cause = f"gave up on a peer (code {EXIT_PEER_LOST}), and no rank has another cause"
        return Failure(first, cause, EXIT_PEER_LOST, self._ranks[first].tail)

    def _end(self, grace_s: float) -> None:
        if grace_s > 0:
            for rank in self._ranks:
                rank.signal(signal.SIGTERM)
            end = time.monotonic() + grace_s
            for rank in self._ranks:
                rank.wait(timeout_s=max(0.0, end - time.monotonic()))
        for rank in self._ranks:
            rank.signal_group(signal.SIGKILL)
        for rank in self._ranks:
            rank.close(self._selector)
        self._screen.flush()
        self._keeper.close()
        self._selector.close()


class _Stop:
    """SIGTERM and SIGINT as a list of what came, and a descriptor that wakes a selector."""

    def __init__(self) -> None:
        self.signals: list[int] = []

    def __enter__(self) -> _Stop:
        self.fd, self._write_fd = os.pipe()
        for fd in (self.fd, self._write_fd):
            os.set_blocking(fd, False)
        self._old_wakeup = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self.fd)
        os.close(self._write_fd)

    def drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 512)

    def wait(self, seconds: float) -> bool:
        """Up to `seconds`; True as soon as a signal has come."""
        end = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self.fd, selectors.EVENT_READ)
            while not self.signals and (left := end - time.monotonic()) > 0:
                selector.select(left)
                self.drain()
        return bool(self.signals)

    def _on_signal(self, number: int, frame: object) -> None:
        self.signals.append(number)


def _append(file: RawIOBase, piece: bytes) -> None:
    with contextlib.suppress(OSError):  # a full disk: training goes on without its log
        file.write(piece)


def _exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code


def _record(run_dir: Path, failure: Failure, attempt: int) -> None:
    entry = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "attempt": attempt, **asdict(failure)}
    with (run_dir / FAILURES_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
