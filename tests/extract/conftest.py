"""Tiny task models, and engines on them that are driven through the front's messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from engine_driver import Driver
from extracting import Served, serving_tasks
from tiny_tasks import Task, tiny_task

from trilithon_server.engine.inprocess import InProcessEngine
from trilithon_server.engine.local import LocalEngine
from trilithon_server.engine.spec import EngineSpec

Start = Callable[..., Driver]


@pytest.fixture(scope="session")
def task_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[Task, Path]:
    """One model for each task, with heads that tp 3 divides too."""
    folder = tmp_path_factory.mktemp("tasks")
    return {task: tiny_task(folder / task, task, hidden=96, heads=6) for task in get_args(Task)}


@pytest.fixture
def start() -> Iterator[Start]:
    """Start an engine: in this process when it has one rank, else as processes. Ended with the test."""
    engines: list[InProcessEngine | LocalEngine] = []
    threads = torch.get_num_threads()

    def launch(model_dir: Path, **changes: Any) -> Driver:
        values: dict[str, Any] = {"name": "test", "model_dir": str(model_dir), "num_threads": 1}
        spec = EngineSpec(**(values | changes))
        engine = InProcessEngine(spec, check_blocks=True) if spec.world_size == 1 else LocalEngine(spec)
        engines.append(engine)
        return Driver(engine)

    yield launch
    for engine in engines:
        engine.close()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def served(task_dirs: dict[Task, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for the tests of this folder that change nothing in it."""
    with serving_tasks(task_dirs, tmp_path_factory.mktemp("served")) as running:
        yield running
