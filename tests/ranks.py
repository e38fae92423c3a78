"""Start a script as ranks of one world and read what each rank reports; for every test that needs several processes."""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ports import free_port

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


def start_ranks(
    script: Path, world_size: int, *arguments: object, environment: dict[str, str] | None = None
) -> list[subprocess.Popen[bytes]]:
    """`world_size` processes of `script`, one thread each, that `rendezvous.join` brings together on loopback."""
    command = [sys.executable, "-W", "error::FutureWarning", str(script), *map(str, arguments)]
    return [subprocess.Popen(command, env=each | (environment or {})) for each in environments(world_size)]


def environments(world_size: int) -> list[dict[str, str]]:
    """What each rank of a new world is told, on loopback, with one thread."""
    port = free_port()
    return [
        os.environ
        | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        for rank in range(world_size)
    ]


class Gang:
    """The process that forks the ranks of a test run, started when the first are asked for."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, script: Path, world_size: int, arguments: Sequence[object], *, limit_s: float) -> None:
        """Run a script on every rank to its end; past the limit all are killed and `TimeoutExpired` is raised."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        asked = {
            "script": str(script),
            "arguments": [str(argument) for argument in arguments],
            "environments": environments(world_size),
        }
        answers, requests = self._process.stdout, self._process.stdin
        assert answers is not None
        assert requests is not None
        requests.write(json.dumps(asked) + "\n")
        requests.flush()
        if not select.select([answers], [], [], limit_s)[0]:
            self.stop()
            raise subprocess.TimeoutExpired(str(script), limit_s)
        assert answers.readline() == "done\n", f"{script} could not be run"

    def stop(self) -> None:
        """Kill the process, and with it every rank."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-W", "error::FutureWarning", str(HERE / "gang.py")]
        process = subprocess.Popen(
            command, env=environments(1)[0], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self.stop)
        return process


GANG = Gang()


def run_ranks(
    script: Path, world_size: int, work_dir: Path, *arguments: object, limit_s: float = LIMIT_S
) -> list[dict[str, Any]]:
    """
    Run `script WORK_DIR ARGUMENTS...` on every rank to its end and read `rank<N>.json`, which each rank writes there.

    No rank outlives the call. One that wrote nothing reports {}.
    """
    GANG.run(script, world_size, [work_dir, *arguments], limit_s=limit_s)
    paths = [work_dir / f"rank{rank}.json" for rank in range(world_size)]
    return [json.loads(path.read_text()) if path.exists() else {} for path in paths]


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill what still runs, and reap it."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
    for process in processes:
        process.wait(10)
