"""
What a server keeps for itself on the host that it shares with workers: a small file in the store, while it runs.

    STORE/serving/HOST-PID.json    {"holder": HOST PID START, "memory_bytes": N, "cores": N}

A worker reads it before it starts a job's ranks, and waits where they would not fit beside: serving comes first. A file
whose process is gone counts for nothing.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trilithon_finetune.jobs.gang import identity
from trilithon_finetune.paths import StorePaths
from trilithon_finetune.phases.outcome import write_json
from trilithon_finetune.train.threads import cores


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """What the process `holder` (`gang.identity`) keeps: memory in all, also what it has taken already, and cores."""

    holder: str
    memory_bytes: int
    cores: int


def reserve(paths: StorePaths, *, memory_bytes: int, cores: int) -> Path:
    """Reserve for this process, in the place of servers of this host that are gone; the file, to be removed after."""
    for path, other in _found(paths):
        if not _is_alive(other):
            path.unlink(missing_ok=True)
    mine = Reservation(holder=identity(os.getpid()), memory_bytes=memory_bytes, cores=cores)
    path = paths.serving / f"{socket.gethostname()}-{os.getpid()}.json"
    write_json(path, asdict(mine))
    return path


def lack(paths: StorePaths, config: Mapping[str, Any], estimate: Mapping[str, Any] | None) -> str | None:
    """
    Why a job's ranks must not start on this host now, as a sentence; None where they may, or no server is here.

    Args:
        config: of the job. estimate: of its validation.
    """
    held = [item for _, item in _found(paths) if _is_alive(item)]
    if not held:
        return None
    sizes = config["parallel"]
    ranks = sizes["tp"] * sizes["pp"] * sizes["dp"]
    on_host = sizes.get("device", "cpu") == "cpu"  # an estimate for CUDA is of the device
    memory = ranks * int((estimate or {}).get("peak_bytes_per_rank", 0)) if on_host else 0
    total, available = _memory()
    free = min(available, total - sum(item.memory_bytes for item in held))
    left = max(1, cores() - sum(item.cores for item in held))
    if memory <= free and ranks <= left:
        return None
    return (
        f"The job waits: its ranks take {memory / 2**30:.2f} GiB and {ranks} cores at least, and a server on this host "
        f"leaves {max(0, free) / 2**30:.2f} GiB and {left} cores."
    )


def _found(paths: StorePaths) -> Iterator[tuple[Path, Reservation]]:
    """Those of this host."""
    for path in sorted(paths.serving.glob("*.json")) if paths.serving.is_dir() else []:
        try:
            found = Reservation(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):  # being replaced or removed
            continue
        if found.holder.partition(" ")[0] == socket.gethostname():
            yield path, found


def _is_alive(reservation: Reservation) -> bool:
    try:
        return identity(int(reservation.holder.split(" ")[1])) == reservation.holder
    except (OSError, ValueError, IndexError):
        return False


def _memory() -> tuple[int, int]:
    """Bytes of this host, and those that programs may take now."""
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
        found = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        return found["MemTotal"], found["MemAvailable"]
    except (OSError, KeyError):
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return whole, whole
