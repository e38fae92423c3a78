"""What the tests of model families share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trilithon_parallel.backend import select
from trilithon_parallel.config import load_config
from trilithon_parallel.grid import Grid
from trilithon_parallel.models import build_seq2seq, build_stage
from trilithon_parallel.weights.loader import load_stage


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def load_model() -> Callable[[Path], Any]:
    """A function from a model directory to its one-rank stage in fp32."""

    def load(model_dir: Path) -> Any:
        config, grid = load_config(model_dir), Grid.single()
        build = build_seq2seq if config.is_seq2seq else build_stage
        stage = build(config, grid=grid, backend=select("torch"), dtype=torch.float32)
        load_stage(stage, model_dir, config=config, grid=grid)
        return stage

    return load
