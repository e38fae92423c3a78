"""
A thread that ends a rank in words when nothing moves any more.

It listens to the collectives (`collectives.observing`) and is told of steps and phases. When nothing has happened for
the limit, the rank writes `rank<N>.hang.txt` into the run directory: step, phase, what it waits for, what it completed
last, the stacks of its threads. Every rank does so, so each can read whom its peers wait for in turn and name the one
that is to blame: a rank that writes nothing (stopped, dead, unreachable) or one that waits for nobody. Then it exits
with code 6. Nothing is written or read while the run is healthy.

On GPUs a collective returns once it is enqueued: the label is then that of the last one enqueued.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from trilithon_parallel.collectives import observing
from trilithon_parallel.grid import Axis

EXIT_HANG = 6  # the launcher takes it for "gave up on a peer" and looks for that peer
SETTLE_S = 2.0  # how long peers may take to write their states
_TICK_S = 0.25
_BLIND_S = 5.0  # when this thread itself was held up this long (machine asleep, rank stopped), its suspicion is void
_MARKER = "hang"  # tells ranks whose own limit comes a little later to write their states too


@dataclass(frozen=True)
class RankState:
    """What a rank was doing when nothing moved: `waiting` is empty where it waits for nobody."""

    rank: int
    step: int
    phase: str
    calls: int
    waiting: str = ""
    waits_for: tuple[int, ...] = ()
    completed: str = ""

    def to_text(self) -> str:
        """Lines of `name: value`, for people and for `from_text`."""
        return (
            f"rank: {self.rank}\nstep: {self.step}\nphase: {self.phase}\ncalls completed: {self.calls}\n"
            f"waiting: {self.waiting}\nwaits for: {' '.join(map(str, self.waits_for))}\n"
            f"last completed: {self.completed}\n"
        )

    @classmethod
    def from_text(cls, text: str) -> RankState:
        """The state that `to_text` wrote; what follows an empty line is ignored."""
        head = text.partition("\n\n")[0]
        named = {name: value.strip() for name, _, value in (line.partition(":") for line in head.splitlines())}
        return cls(
            rank=int(named["rank"]),
            step=int(named["step"]),
            phase=named["phase"],
            calls=int(named["calls completed"]),
            waiting=named["waiting"],
            waits_for=tuple(map(int, named["waits for"].split())),
            completed=named["last completed"],
        )


class Watchdog:
    """
    Watch this process' progress inside a `with` block.

    Args:
        rank: this process' global rank; `world_size`: how many there are.
        run_dir: directory of the run, the same for all ranks (a shared file system where they are on several hosts).
        timeout_s: seconds without progress that are a hang: no collective begins or ends, no pass of a micro-batch is
            done, no step or phase begins.
        first_timeout_s: the same until the second step begins: kernels and connections are made in the first.
        on_hang: called with the verdict in place of ending the process (tests).
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        run_dir: Path,
        timeout_s: float = 120.0,
        first_timeout_s: float = 600.0,
        on_hang: Callable[[str], None] | None = None,
    ) -> None:
        if min(timeout_s, first_timeout_s) <= 0:
            raise ValueError(f"watchdog limits must be above 0 s. Given: {timeout_s:g} and {first_timeout_s:g}.")
        self._rank, self._world_size, self._run_dir = rank, world_size, run_dir
        self._timeout_s, self._first_timeout_s = timeout_s, max(timeout_s, first_timeout_s)
        self._on_hang = on_hang or _exit
        self._steps_begun = self._step = self._calls = 0
        self._phase, self._phase_limit_s = "start", self._first_timeout_s
        self._pending: tuple[str, str, Axis] | None = None
        self._completed: tuple[str, str, Axis] | None = None
        self._moved_at = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._main = threading.current_thread()
        self._stack = ExitStack()

    def __enter__(self) -> Watchdog:
        self._run_dir.mkdir(parents=True, exist_ok=True)
        path = state_path(self._run_dir, self._rank)
        if path.exists():  # of an attempt before this one: keep what it said, but out of the way
            path.replace(path.with_suffix(".before.txt"))
        (self._run_dir / _MARKER).unlink(missing_ok=True)
        self._moved_at = time.monotonic()
        self._stack.enter_context(observing(self))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._stack.close()
        self._thread.join()

    # -- what is told; each is a few assignments ---------------------------------------------------------------

    def step(self, number: int) -> None:
        """Step `number` begins."""
        self._step = number
        self._steps_begun += 1
        self.enter("step")

    def enter(self, phase: str, *, timeout_s: float | None = None) -> None:
        """A phase begins (forward, optimizer, checkpoint); `timeout_s` is its own limit, where it has one."""
        usual_s = self._timeout_s if self._steps_begun > 1 else self._first_timeout_s
        self._phase, self._phase_limit_s = phase, usual_s if timeout_s is None else timeout_s
        self._moved_at = time.monotonic()

    def begin(self, op: str, label: str, axis: Axis) -> None:
        """A wait for peers begins (`collectives.Observer`)."""
        self._pending = (op, label, axis)
        self._moved_at = time.monotonic()

    def end(self) -> None:
        """The wait that began last is over (`collectives.Observer`)."""
        self._completed, self._pending = self._pending, None
        self._calls += 1
        self.moved()

    def moved(self) -> None:
        """Work of this process alone is done (`collectives.Observer`)."""
        self._moved_at = time.monotonic()

    def state(self) -> RankState:
        """What this rank is doing now."""
        pending, completed = self._pending, self._completed
        return RankState(
            rank=self._rank,
            step=self._step,
            phase=self._phase,
            calls=self._calls,
            waiting=_describe(pending),
            waits_for=tuple(rank for rank in pending[2].ranks if rank != self._rank) if pending else (),
            completed=_describe(completed),
        )

    # -- the thread ------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        looked_at = time.monotonic()
        while not self._end.wait(min(_TICK_S, self._timeout_s / 8)):
            now = time.monotonic()
            if now - looked_at > _BLIND_S:
                self._moved_at = now
            looked_at = now
            idle_s, limit_s = now - self._moved_at, self._phase_limit_s
            if idle_s > limit_s or (idle_s > limit_s / 2 and (self._run_dir / _MARKER).exists()):
                self._on_hang(self._report(idle_s))
                return

    def _report(self, idle_s: float) -> str:
        """Write this rank's state, see who else wrote one, and say who is to blame."""
        state = self.state()
        stacks = f"{state.to_text()}\n{_stacks(self._main)}"
        path = state_path(self._run_dir, self._rank)
        _write(path, stacks)
        (self._run_dir / _MARKER).touch()
        end = time.monotonic() + SETTLE_S
        while (states := reachable(state, self._read)) and None in states.values() and time.monotonic() < end:
            time.sleep(_TICK_S / 5)
        verdict = (
            f"watchdog: rank {self._rank} of {self._world_size} has made no progress for {idle_s:.1f} s at step "
            f"{state.step}, phase {state.phase!r}: {_doing(state)}. Last completed: {state.completed or 'nothing'}. "
            f"{blame(states)} State and stacks are in {path}."
        )
        _write(path, f"{stacks}\n{verdict}\n")
        return verdict

    def _read(self, rank: int) -> RankState | None:
        try:
            return RankState.from_text(state_path(self._run_dir, rank).read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError):  # not there yet, or not ours
            return None


def state_path(run_dir: Path, rank: int) -> Path:
    """Where a rank writes what it was doing when nothing moved."""
    return run_dir / f"rank{rank}.hang.txt"


def reachable(start: RankState, read: Callable[[int], RankState | None]) -> dict[int, RankState | None]:
    """The states of all ranks that `start` waits for, directly or through others; None where there is none. Pure."""
    states: dict[int, RankState | None] = {start.rank: start}
    queue = [*start.waits_for]
    while queue:
        rank = queue.pop(0)
        if rank not in states:
            states[rank] = state = read(rank)
            queue += state.waits_for if state is not None else ()
    return states


def blame(states: dict[int, RankState | None]) -> str:
    """
    Who is to blame, in one sentence: silent ranks first, then those that wait for nobody, then a mismatch.

    >>> here = RankState(0, step=3, phase="forward", calls=7, waiting="recv 'x'", waits_for=(1,))
    >>> blame({0: here, 1: None})
    'To blame: rank 1, which wrote no state: its process is stopped, dead or unreachable.'
    """
    silent = [rank for rank, state in sorted(states.items()) if state is None]
    if silent:
        return f"To blame: {_ranks(silent)}, which wrote no state: its process is stopped, dead or unreachable."
    known = [state for _, state in sorted(states.items()) if state is not None]
    busy = [state for state in known if not state.waiting]
    if busy:
        places = "; ".join(f"rank {state.rank} in phase {state.phase!r} of step {state.step}" for state in busy)
        return f"To blame: {_ranks([state.rank for state in busy])}, which waits for nobody ({places})."
    places = "; ".join(f"rank {state.rank} in {state.waiting} of step {state.step}" for state in known)
    return f"The ranks wait for each other in different places ({places})."


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {list(ranks)}"


def _doing(state: RankState) -> str:
    return f"it waits in {state.waiting}" if state.waiting else "it waits for nobody"


def _describe(call: tuple[str, str, Axis] | None) -> str:
    return f"{call[0]} {call[1]!r} over {call[2].name} ranks {list(call[2].ranks)}" if call is not None else ""


def _stacks(main: threading.Thread) -> str:
    """Python stacks of every thread but this one, the main thread first (the others: autograd's, loaders')."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = {ident: frame for ident, frame in sys._current_frames().items() if ident != threading.get_ident()}
    order = sorted(frames, key=lambda ident: ident != main.ident)
    return "".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frames[ident]))}" for ident in order
    )


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _exit(verdict: str) -> None:
    """End the process without any cleaning up, which could hang as well."""
    os.write(2, f"{verdict}\n".encode())
    os._exit(EXIT_HANG)
