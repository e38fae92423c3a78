"""Engines on tiny models, driven through the same messages that the front sends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import Driver
from tiny import tiny_bert, tiny_llama

from trilithon_server.engine.inprocess import InProcessEngine
from trilithon_server.engine.local import LocalEngine
from trilithon_server.engine.spec import EngineSpec

# Bytes of KV cache that hold plenty for tiny models.
KV_BYTES = 4 << 20


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights: 9 heads in 3 groups, as SmolLM2 has."""
    return tiny_llama(tmp_path_factory.mktemp("llama"), hidden=72, heads=9, groups=3)


@pytest.fixture(scope="session")
def long_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose window takes seconds to fill on the fastest machine: for requests that run out of time."""
    return tiny_llama(tmp_path_factory.mktemp("long"), context=16384)


@pytest.fixture(scope="session")
def tiny_bert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of random weights."""
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Engines in this process set the number of threads for all of it: put it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def start(tiny_dir: Path) -> Iterator[Callable[..., Driver]]:
    """Start an engine: in this process when it has one rank, else as processes. Ended with the test."""
    engines: list[InProcessEngine | LocalEngine] = []

    def launch(model_dir: Path = tiny_dir, **changes: Any) -> Driver:
        values: dict[str, Any] = {"name": "test", "model_dir": str(model_dir), "num_threads": 1}
        spec = EngineSpec(**(values | {"kv_cache_bytes": KV_BYTES} | changes))
        engine = InProcessEngine(spec, check_blocks=True) if spec.world_size == 1 else LocalEngine(spec)
        engines.append(engine)
        return Driver(engine)

    yield launch
    for engine in engines:
        engine.close()
