"""How much memory there is, how much a phase took, and whether the engine fits: asked at start, so never mid-flight."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from trilithon_parallel.config import ModelError

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class MemorySum:
    """Bytes of one rank: weights + adapters + activations (both at worst) + kv + overhead must not exceed available."""

    weights: int
    activations: int
    kv: int
    overhead: int
    available: int
    adapters: int = 0

    def as_dict(self) -> dict[str, int]:
        """By name, for events and the hello message."""
        return asdict(self)


def available_bytes(device: torch.device) -> int:
    """What this process may still allocate: free device memory, or MemAvailable within the control group's limit."""
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        return free
    return min(_mem_available(), _cgroup_room())


def used_bytes(device: torch.device) -> int:
    """What this process holds now."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return _status_bytes("VmRSS")


@dataclass(slots=True)
class Peak:
    """What a piece of work held at its most, beyond what was held before it."""

    num_bytes: int = 0


@contextlib.contextmanager
def watch(device: torch.device) -> Iterator[Peak]:
    """Measure the peak of the memory that the block takes."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # without the right to reset it the peak since start stands: never too low
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = used_bytes(device)
    yield peak
    most = int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else _status_bytes("VmHWM")
    peak.num_bytes = max(0, most - before)


def kv_bytes(
    *,
    weights: int,
    activations: int,
    overhead: int,
    available: int,
    asked: int | None,
    fraction: float,
    bytes_per_block: int,
    min_blocks: int,
    max_blocks: int,
    adapters: int = 0,
) -> int:
    """
    Bytes of this rank's KV cache.

    Args:
        asked: the size that the user set, or None for `fraction` of what the rest leaves.
        min_blocks: fewer can't serve anything.
        max_blocks: more would never be used; bounds the automatic size only.
        adapters: what full slots of adapters take.
    Raises:
        ModelError: `memory_insufficient`, the sum does not fit.

    >>> kv_bytes(weights=10, activations=10, overhead=10, available=100, asked=None, fraction=0.5, bytes_per_block=10,
    ...          min_blocks=1, max_blocks=100)
    30
    """
    room = available - weights - adapters - activations - overhead
    wanted = asked if asked is not None else min(int(max(0, room) * fraction), max_blocks * bytes_per_block)
    blocks = wanted // bytes_per_block
    if wanted <= room and blocks >= min_blocks:
        return blocks * bytes_per_block
    needed = max(wanted, min_blocks * bytes_per_block)
    slots = f"adapters {_mib(adapters)} + " if adapters else ""
    message = (
        f"memory must hold weights {_mib(weights)} + {slots}activations {_mib(activations)} + KV cache {_mib(needed)} "
        f"+ overhead {_mib(overhead)} = {_mib(weights + adapters + activations + needed + overhead)} on each rank. "
        f"Given: {_mib(available)}."
    )
    if asked is not None and wanted < min_blocks * bytes_per_block:
        message = (
            f"the KV cache must hold at least {min_blocks} blocks, {_mib(min_blocks * bytes_per_block)}. "
            f"Given: {_mib(asked)}."
        )
    raise ModelError(
        message,
        code="memory_insufficient",
        hint="Lower --max-batch-tokens, --max-context or --kv-cache-bytes, use more ranks, or a smaller dtype."
        + (" Or lower max_adapters or max_adapter_rank." if adapters else ""),
    )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:.1f} MiB"


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _mem_available() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return int(os.sysconf("SC_AVPHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))


def _cgroup_room() -> int:
    """The tightest limit of this process' control groups (versions 2 and 1) less what is used there for good."""
    room = 1 << 62
    for directory, limit_name, usage_name in _cgroup_files():
        try:
            limit = (directory / limit_name).read_text(encoding="ascii").strip()
            if limit == "max":
                continue
            used = int((directory / usage_name).read_text(encoding="ascii"))
            stat = dict(line.split() for line in (directory / "memory.stat").read_text(encoding="ascii").splitlines())
        except (OSError, ValueError):
            continue  # not mounted here, or an ancestor that we may not read
        reclaimable = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
        room = min(room, int(limit) - used + reclaimable)
    return max(0, room)


def _cgroup_files() -> list[tuple[Path, str, str]]:
    root = Path("/sys/fs/cgroup")
    places = [(root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes")]
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _number, controllers, path = line.split(":", 2)
        if not controllers:
            own = root / path.lstrip("/")
            places += [
                (place, "memory.max", "memory.current")
                for place in (own, *own.parents)
                if root in (place, *place.parents)
            ]
        elif "memory" in controllers.split(","):
            places.append((root / "memory" / path.lstrip("/"), "memory.limit_in_bytes", "memory.usage_in_bytes"))
    return places
