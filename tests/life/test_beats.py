"""The heartbeat file: what a rank writes is what the watcher reads, from another process too."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from trilithon_server.engine.beats import SLOT_BYTES, Beat, BeatReader, BeatWriter, Phase


def test_R3_a_long_step_is_not_overdue_and_a_late_one_is(tmp_path: Path) -> None:
    """
    A rank inside a step is judged by the deadline it published, not by the time since its last beat.

    Inverse seen: with a fixed deadline instead of the published one the long step is called overdue.
    """
    path = tmp_path / "main.beats"
    writer, other = BeatWriter(path, rank=1, num_ranks=2), BeatWriter(path, rank=0, num_ranks=2)
    with BeatReader(path, num_ranks=2) as reader:
        writer.begin(deadline_s=60.0)
        now_ns = time.monotonic_ns()
        assert [beat.overdue(now_ns + 50 * 10**9) for beat in reader.read()] == [False, False]
        assert [beat.overdue(now_ns + 61 * 10**9) for beat in reader.read()] == [False, True]
        writer.end()

        assert Beat(step=1, deadline_ns=0, phase=Phase.IDLE) == reader.read()[1]
        assert Beat(step=0, deadline_ns=0, phase=Phase.STARTING) == reader.read()[0]
    assert path.stat().st_size == 2 * SLOT_BYTES
    writer.close()
    other.close()


def test_beats_cross_processes(tmp_path: Path) -> None:
    """A writer in another process is seen through the file alone."""
    path = tmp_path / "main.beats"
    program = (
        "import sys; from pathlib import Path; from trilithon_server.engine.beats import BeatWriter\n"
        "w = BeatWriter(Path(sys.argv[1]), rank=2, num_ranks=3)\n"
        "for _ in range(5): w.begin(deadline_s=1.0); w.end()\n"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=True, timeout=60)
    with BeatReader(path, num_ranks=3) as reader:
        assert [beat.step for beat in reader.read()] == [0, 0, 5]
