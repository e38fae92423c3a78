"""What the core's tests share: stages loaded from model directories, and one step of serving."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trilithon_parallel.attention import BLOCK_SIZE, PagedBatch, PagedKVCache, PagedView
from trilithon_parallel.backend import native, select
from trilithon_parallel.config import load_config
from trilithon_parallel.grid import Grid
from trilithon_parallel.models import CausalStage, EncoderStage, build_stage
from trilithon_parallel.weights.loader import load_stage

LoadModel = Callable[..., CausalStage | EncoderStage]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def load_model() -> LoadModel:
    """A function from a model directory to its one-rank stage, packed for serving unless `prepare=False`."""

    def load(
        model_dir: Path, *, dtype: torch.dtype = torch.float32, batch_invariant: bool = False, prepare: bool = True
    ) -> CausalStage | EncoderStage:
        config, grid = load_config(model_dir), Grid.single()
        backend = select("torch", batch_invariant=batch_invariant)
        stage = build_stage(config, grid=grid, backend=backend, dtype=dtype)
        load_stage(stage, model_dir, config=config, grid=grid)
        if prepare:
            stage.prepare()
        return stage

    return load


class Server:
    """Sequences in a paged cache, each with blocks of its own in scattered order, stepped in any combination."""

    native: bool

    def __init__(self, stage: CausalStage, *, num_sequences: int, max_len: int) -> None:
        self.stage = stage
        per_sequence = -(-max_len // BLOCK_SIZE)
        num_blocks = per_sequence * num_sequences + 1
        self.cache = PagedKVCache(
            stage.config, stage.grid, num_blocks=num_blocks, dtype=stage.dtype, native=self.native
        )
        order = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(1)).add(1).tolist()
        self.tables = [order[i * per_sequence : (i + 1) * per_sequence] for i in range(num_sequences)]
        self.lens = [0] * num_sequences

    def step(self, new: dict[int, Tensor]) -> dict[int, Tensor]:
        """Feed new tokens to some sequences at once; the logits [T_i, V] of each."""
        lens = [len(tokens) for tokens in new.values()]
        bounds = [0]
        for length in lens:
            bounds.append(bounds[-1] + length)
        context = [self.lens[i] for i in new]
        used = [-(-(at + length) // BLOCK_SIZE) for at, length in zip(context, lens, strict=True)]
        tables = [self.tables[i][:num] for i, num in zip(new, used, strict=True)]
        batch = PagedBatch(bounds, context, tables, PagedBatch.slots(tables, context, lens))
        positions_T = torch.cat([torch.arange(at, at + n) for at, n in zip(context, lens, strict=True)])
        with torch.inference_mode():
            view = PagedView(self.cache, batch, batch_invariant=self.stage.backend.batch_invariant)
            hidden_TH = self.stage(torch.cat(list(new.values())), positions_T=positions_T, view=view)
            logits_TV = self.stage.gather_logits(hidden_TH)
        for i, length in zip(new, lens, strict=True):
            self.lens[i] += length
        return {i: logits_TV[bounds[k] : bounds[k + 1]] for k, i in enumerate(new)}


@pytest.fixture(params=[False, True], ids=["torch", "native"])
def server(request: pytest.FixtureRequest) -> type[Server]:
    """The `Server` class, with attention in torch alone and with the compiled kernel."""
    if request.param and native.unavailable_reason():
        pytest.skip(native.unavailable_reason())
    return type("Server", (Server,), {"native": request.param})
