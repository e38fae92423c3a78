"""Start a script as ranks of one world and read what each rank reports; for every test that needs several processes."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

# How long all ranks of one start may take together.
LIMIT_S = 240
HERE = Path(__file__).parent


def load_script(path: Path) -> ModuleType:
    """A script of cases as a module, for the test file that lists them."""
    name = f"{path.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start_ranks(
    script: Path, world_size: int, *arguments: object, environment: dict[str, str] | None = None
) -> list[subprocess.Popen[bytes]]:
    """`world_size` processes of `script`, one thread each, that `rendezvous.join` brings together on loopback."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-W", "error::FutureWarning", str(script), *map(str, arguments)],
            env=os.environ
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
            }
            | (environment or {}),
        )
        for rank in range(world_size)
    ]


def run_ranks(
    script: Path, world_size: int, work_dir: Path, *arguments: object, limit_s: float = LIMIT_S
) -> list[dict[str, Any]]:
    """
    Run `script WORK_DIR ARGUMENTS...` on every rank to its end and read `rank<N>.json`, which each rank writes there.

    No process outlives the call. A rank that wrote nothing reports {}.
    """
    processes = start_ranks(script, world_size, work_dir, *arguments)
    try:
        for process in processes:
            process.wait(limit_s)
    finally:
        end(processes)
    paths = [work_dir / f"rank{rank}.json" for rank in range(world_size)]
    return [json.loads(path.read_text()) if path.exists() else {} for path in paths]


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill what still runs, and reap it."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
    for process in processes:
        process.wait(10)
