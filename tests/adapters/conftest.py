"""A tiny model with random adapters, engines that serve them, and a real server over both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import Driver
from tiny import tiny_llama
from tiny_adapters import tiny_adapter

from trilithon_server.engine.inprocess import InProcessEngine
from trilithon_server.engine.local import LocalEngine
from trilithon_server.engine.spec import EngineSpec
from trilithon_server.engine.wire_pb2 import Adapter


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights: 9 heads in 3 groups, so that tp = 2 pads them."""
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny", hidden=72, heads=9, groups=3)


@pytest.fixture(scope="session")
def adapter_dirs(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> list[Path]:
    """Adapters that differ in weights, rank, targets and scale; the third has its own rank and alpha by product."""
    root = tmp_path_factory.mktemp("adapters")
    return [
        tiny_adapter(root / "plain", model_dir, seed=0),
        tiny_adapter(root / "odd", model_dir, seed=1, rank=5, alpha=3.0),
        tiny_adapter(
            root / "patterns", model_dir, seed=2, rank_pattern=(("q_proj", 20),), alpha_pattern=(("down_proj", 1.0),)
        ),
        tiny_adapter(root / "some", model_dir, seed=3, rank=8, targets=("v_proj", "o_proj", "up_proj")),
        tiny_adapter(root / "shared", model_dir, seed=4, rank=8, layout="fused"),
    ]


@pytest.fixture(scope="session")
def adapters(adapter_dirs: list[Path]) -> list[Adapter]:
    """They as engines are told of them."""
    return [Adapter(digest=f"digest-{path.name}", directory=str(path)) for path in adapter_dirs]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Engines in this process set the number of threads for all of it: put it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def start(model_dir: Path) -> Iterator[Callable[..., Driver]]:
    """Start an engine with slots for adapters: in this process when it has one rank, else as processes."""
    engines: list[InProcessEngine | LocalEngine] = []

    def launch(**changes: Any) -> Driver:
        values: dict[str, Any] = {"model_dir": str(model_dir), "max_adapters": 3, "kv_cache_bytes": 4 << 20}
        spec = EngineSpec(**({"name": "test", "num_threads": 1} | values | changes))
        engine = InProcessEngine(spec, check_blocks=True) if spec.world_size == 1 else LocalEngine(spec)
        engines.append(engine)
        return Driver(engine)

    yield launch
    for engine in engines:
        engine.close()
