"""
Watching an engine that someone else started (torchrun, Slurm, Kubernetes): its heartbeat file, when this host has it.

Death shows by itself, as the end of the leader's socket; a hang shows here. Whoever started the ranks restarts them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from trilithon_server.engine.beats import BeatReader
from trilithon_server.engine.spec import EngineSpec


class ExternalEngine:
    """The ranks of one engine, seen through the run directory alone."""

    def __init__(self, spec: EngineSpec, *, run_dir: Path) -> None:
        self.name = spec.name
        self._path = spec.beats_path(run_dir)
        self._num_ranks = spec.world_size
        self._hung = False

    def check(self) -> Iterator[tuple[Literal["lost", "loading"], str]]:
        """What changed since the last look: `lost` when a rank's deadline has passed, `loading` when it moves again."""
        if not self._path.exists():
            return
        with BeatReader(self._path, num_ranks=self._num_ranks) as reader:
            beats = reader.read()
        now_ns = time.monotonic_ns()
        late = [rank for rank, beat in enumerate(beats) if beat.overdue(now_ns)]
        if late and not self._hung:
            slowest = min(range(len(beats)), key=lambda rank: beats[rank].step)
            self._hung = True
            yield "lost", f"step {beats[slowest].step + 1} of rank {slowest} did not finish before its deadline"
        elif not late and self._hung:
            self._hung = False
            yield "loading", ""
