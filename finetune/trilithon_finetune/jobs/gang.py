"""
The process that runs the ranks of one phase of one attempt: `python -m trilithon_finetune.jobs.gang ORDER`.

    worker ---SIGTERM, SIGKILL---> gang ---torchrun's environment, signals---> rank 0 .. n-1

It is what makes sure that no two attempts of a job ever run at once. It holds the job's lock, which its ranks inherit:
the lock is free when the last of them is gone. It starts nothing unless the lease file still names its worker's token.
It dies with its worker, and its ranks with it (the kernel sees to both); the next attempt continues from the last
checkpoint. Adopting a running gang would save that little, and need its output and its exit code handed over too.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from trilithon_parallel.launch.local import local
from trilithon_parallel.launch.process import die_with

EXIT_STALE = 90
"""The lease file names another worker, or nobody."""
EXIT_BUSY = 91
"""Processes of the job still run."""

_LOCK_S = 10.0  # an earlier phase's ranks may take a moment to be gone
_KILL_S = 5.0


def main(order: dict[str, Any]) -> int:
    """
    Run the ranks and return their exit code.

    Args:
        order: `parent` pid; `lock`, `lease`, `directory` paths; `token`; `name` of the phase; `command`; `nproc`;
            `environment` of the ranks; `grace_s` after SIGTERM.
    """
    die_with(order["parent"])
    lock = os.open(order["lock"], os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if not _take(lock):
        return EXIT_BUSY
    os.ftruncate(lock, 0)
    os.pwrite(lock, identity(os.getpid()).encode(), 0)
    lease = Path(order["lease"])
    if not lease.exists() or lease.read_text() != str(order["token"]):
        return EXIT_STALE
    directory, name = Path(order["directory"]), order["name"]
    stem = "rank" if name == "train" else name
    return local(
        order["command"],
        nproc=order["nproc"],
        run_dir=directory,
        stop_s=order["grace_s"],
        kill_s=_KILL_S,
        environment=order["environment"],
        log=lambda rank: directory / f"{stem}-{rank}.log",
        pass_fds=(lock,),
    )


def identity(pid: int) -> str:
    """A running process, told apart from later ones of the same pid: host, pid, start time in ticks since boot."""
    stat = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(") ")[2].split()
    return f"{socket.gethostname()} {pid} {stat[19]}"


def _take(lock: int) -> bool:
    end = time.monotonic() + _LOCK_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        else:
            return True


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
