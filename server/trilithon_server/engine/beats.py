"""
Heartbeats that prove progress: one small shared file per engine, one slot of 64 bytes per rank.

A rank's stepping thread publishes a deadline before each step and bumps its counter after it; a watcher calls a rank
hung when a published deadline has passed. A long prefill publishes a long deadline, so it is never called dead; a
hung collective never bumps the counter, so it is. Nothing is written by a background thread: that would beat for a
rank that is stuck.

    slot (little-endian u64): [0] steps finished  [1] deadline, CLOCK_MONOTONIC ns, 0 = idle  [2] phase  [3..7] unused
"""

from __future__ import annotations

import mmap
import os
import sys
import time
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import TracebackType

SLOT_BYTES = 64
_WORDS = SLOT_BYTES // 8
_STEP, _DEADLINE, _PHASE = 0, 1, 2

# Slots are moved by native 8-byte loads and stores, which are whole; struct's "<Q" would go byte by byte.
if sys.byteorder != "little":
    raise ImportError("trilithon_server.engine.beats: only little-endian machines are supported.")


class Phase(IntEnum):
    """What a rank was doing when it last wrote its slot."""

    STARTING = 0
    IDLE = 1
    STEPPING = 2
    DRAINED = 3


@dataclass(frozen=True, slots=True)
class Beat:
    """One rank's slot, as read: steps finished, deadline (monotonic ns, 0 = idle) and phase."""

    step: int
    deadline_ns: int
    phase: Phase

    def overdue(self, now_ns: int) -> bool:
        """Whether a published deadline has passed."""
        return 0 < self.deadline_ns < now_ns


def beats_path(run_dir: Path, engine: str) -> Path:
    """Where an engine's heartbeat file lies."""
    return run_dir / f"{engine}.beats"


class _Slots:
    """The mapped file. Created at full size by whoever comes first, so ranks and watcher may start in any order."""

    def __init__(self, path: Path, *, num_ranks: int) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(fd).st_size < num_ranks * SLOT_BYTES:
                os.ftruncate(fd, num_ranks * SLOT_BYTES)
            self._map = mmap.mmap(fd, num_ranks * SLOT_BYTES)
        finally:
            os.close(fd)
        self._bytes = memoryview(self._map)
        self.words = self._bytes.cast("Q")

    def close(self) -> None:
        self.words.release()
        self._bytes.release()
        self._map.close()


class BeatWriter:
    """
    One rank's side. Call `begin` before each step and `end` after it, from the thread that steps.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "main.beats"
    >>> writer, reader = BeatWriter(path, rank=1, num_ranks=2), BeatReader(path, num_ranks=2)
    >>> writer.begin(deadline_s=5.0); writer.end()
    >>> reader.read()[1].step
    1
    """

    def __init__(self, path: Path, *, rank: int, num_ranks: int) -> None:
        self._slots = _Slots(path, num_ranks=num_ranks)
        self._base = rank * _WORDS
        self._write(_STEP, 0)
        self._write(_DEADLINE, 0)
        self._write(_PHASE, Phase.STARTING)

    def begin(self, *, deadline_s: float) -> None:
        """A step starts now and must end within `deadline_s` seconds."""
        self._write(_DEADLINE, time.monotonic_ns() + int(deadline_s * 1e9))
        self._write(_PHASE, Phase.STEPPING)

    def end(self) -> None:
        """The step has ended: count it and be idle until the next `begin`."""
        self._write(_STEP, self._slots.words[self._base + _STEP] + 1)
        self.idle()

    def idle(self) -> None:
        """Nothing to do: no deadline holds."""
        self._write(_DEADLINE, 0)
        self._write(_PHASE, Phase.IDLE)

    def drained(self) -> None:
        """The rank has finished its work and is about to exit."""
        self._write(_DEADLINE, 0)
        self._write(_PHASE, Phase.DRAINED)

    def close(self) -> None:
        self._slots.close()

    def _write(self, word: int, value: int) -> None:
        self._slots.words[self._base + word] = value


class BeatReader:
    """The watcher's side: reads every rank's slot."""

    def __init__(self, path: Path, *, num_ranks: int) -> None:
        self._slots = _Slots(path, num_ranks=num_ranks)
        self._num_ranks = num_ranks

    def read(self) -> list[Beat]:
        """Every rank's beat, by rank."""
        words = self._slots.words
        beats = []
        for base in range(0, self._num_ranks * _WORDS, _WORDS):
            phase = words[base + _PHASE]
            known = Phase(phase) if phase in Phase._value2member_map_ else Phase.STARTING
            beats.append(Beat(step=words[base + _STEP], deadline_ns=words[base + _DEADLINE], phase=known))
        return beats

    def close(self) -> None:
        self._slots.close()

    def __enter__(self) -> BeatReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
