"""A launcher in a process of its own, and whether what it started is gone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

STAND_IN = Path(__file__).with_name("stand_in.py")
LIMIT_S = 180.0

_LAUNCH = """
import ast, sys
from pathlib import Path
from trilithon_parallel.launch.local import local
sys.exit(local(sys.argv[3:], run_dir=Path(sys.argv[2]), **ast.literal_eval(sys.argv[1])))
"""


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
    """Poll until `condition` holds; the test fails with `what` when it never does."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie that nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1] not in ("Z", "X")
    except OSError:
        return False


@dataclass
class Launch:
    """One started launcher: its process, and the directory in which ranks leave their marks."""

    process: subprocess.Popen[bytes]
    directory: Path
    run_dir: Path
    output: str = field(default="")

    def pids(self) -> list[int]:
        """Everything that was started so far, helpers included."""
        return [int(path.read_text()) for path in (self.directory / "pids").glob("*") if path.suffix != ".part"]

    def wait_ready(self, nproc: int) -> None:
        """Until every rank does what its mode says."""
        wait_until(lambda: all((self.directory / f"ready{rank}").exists() for rank in range(nproc)), "ranks are ready")

    def end(self) -> tuple[int, str]:
        """Wait for the launcher's end: its exit code and everything that was printed."""
        output, _ = self.process.communicate(timeout=LIMIT_S)
        self.output = output.decode()
        return self.process.returncode, self.output


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launch]]:
    """A function that starts `local(stand_in.py MODE, **options)`, or any `command`; nothing outlives the test."""
    launches: list[Launch] = []

    def start(mode: str, *, nproc: int, command: list[str] | None = None, **options: object) -> Launch:
        command = command or [sys.executable, "-u", str(STAND_IN), mode, str(tmp_path)]
        process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, repr({"nproc": nproc, **options}), str(tmp_path / "run"), *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        launches.append(Launch(process, tmp_path, tmp_path / "run"))
        return launches[-1]

    yield start
    for item in launches:
        if item.process.poll() is None:
            item.process.kill()
        item.process.communicate(timeout=LIMIT_S)
        for pid in item.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
