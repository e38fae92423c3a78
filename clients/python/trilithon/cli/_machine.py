"""What this machine is: for `doctor`, and beside every measurement."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One machine, as far as it can be told without tools. Sizes in bytes; None where the system does not say."""

    cpu: str
    cpu_flags: frozenset[str]
    num_cpus: int
    memory_bytes: int | None
    available_bytes: int | None
    system: str
    arch: str


@cache
def describe() -> Machine:
    """Look once."""
    cpuinfo = _pairs("/proc/cpuinfo")
    meminfo = _pairs("/proc/meminfo")
    return Machine(
        cpu=cpuinfo.get("model name") or platform.processor() or "unknown",
        cpu_flags=frozenset(cpuinfo.get("flags", cpuinfo.get("Features", "")).split()),
        num_cpus=num_cpus(),
        memory_bytes=_kib(meminfo.get("MemTotal")),
        available_bytes=_kib(meminfo.get("MemAvailable")),
        system=f"{platform.system()} {platform.release()}",
        arch=platform.machine(),
    )


def num_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shared_memory_bytes() -> int | None:
    """Size of /dev/shm, where there is one."""
    try:
        status = os.statvfs("/dev/shm")
    except OSError:
        return None
    return status.f_blocks * status.f_frsize


def _pairs(path: str) -> dict[str, str]:
    """`name: value` lines; the first of a name wins."""
    found: dict[str, str] = {}
    try:
        lines = Path(path).read_text("utf-8", "replace").splitlines()
    except OSError:
        return found
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            found.setdefault(name.strip(), value.strip())
    return found


def _kib(text: str | None) -> int | None:
    return int(text.split()[0]) * 1024 if text else None
