"""
What a rank of this machine computes at most, measured once and kept in the store. No torch, unless it must measure.

    STORE/peaks.json    {"PROCESSOR, 2 threads, float32, torch 2.13.0": FLOP/s, ...}

On CUDA the device's name stands for processor and threads.

A machine that is busy while it is measured looks slow. Every run measures again, and the largest number stays.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import platform
from pathlib import Path

from trilithon_finetune.phases.outcome import write_json

PEAKS_FILE = "peaks.json"


def peak_flops(store: Path, dtype: str, *, num_threads: int, device: str = "cpu") -> float:
    """
    FLOP/s of a rank: those that the store knows, else measured now.

    Args:
        store: its directory.
        dtype: `float32` or `bfloat16`.
        num_threads: of the rank.
        device: `cpu` or `cuda`.
    """
    known = _read(store).get(_key(dtype, num_threads, device))
    if known is not None:
        return known
    import torch  # takes longer than all else that a check does

    from trilithon_parallel.peak import measured_peak

    peak = measured_peak(getattr(torch, dtype), num_threads=num_threads, device=device)
    return remember_peak(store, dtype, peak, num_threads=num_threads, device=device)


def remember_peak(store: Path, dtype: str, peak: float, *, num_threads: int, device: str = "cpu") -> float:
    """Keep a measurement in the store; the largest so far."""
    store.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (store / f".{PEAKS_FILE}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known, key = _read(store), _key(dtype, num_threads, device)
        if peak > known.get(key, 0.0):
            known[key] = peak
            write_json(store / PEAKS_FILE, known)
        return known[key]


def _read(store: Path) -> dict[str, float]:
    """What the store knows; nothing where the file is missing, or is no such file."""
    try:
        found = json.loads((store / PEAKS_FILE).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    items = found.items() if isinstance(found, dict) else ()
    return {name: float(value) for name, value in items if isinstance(value, int | float) and value > 0}


def _key(dtype: str, num_threads: int, device: str) -> str:
    what = f"{_processor()}, {num_threads} threads" if device == "cpu" else _device_name(device)
    return f"{what}, {dtype}, torch {importlib.metadata.version('torch')}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _device_name(device: str) -> str:
    """A CUDA device's model."""
    import torch

    return torch.cuda.get_device_name(device)
