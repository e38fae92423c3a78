"""How blocks become a stage of a model; no parallel code inside."""

from __future__ import annotations

import torch

from trilithon_parallel.backend import Backend
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.grid import Grid
from trilithon_parallel.models.causal import CausalStage
from trilithon_parallel.models.encoder import EncoderStage
from trilithon_parallel.placement import check_layout

__all__ = ["CausalStage", "EncoderStage", "build_stage"]


def build_stage(config: ModelConfig, *, grid: Grid, backend: Backend, dtype: torch.dtype) -> CausalStage | EncoderStage:
    """
    This rank's part of the model, with uninitialised parameters: load or initialise them, then (to serve) `prepare()`.

    Raises:
        ModelError: `layout_invalid`, the grid does not fit the model.
    """
    check_layout(config, tp=grid.tp.size, pp=grid.pp.size)
    kind = CausalStage if config.is_causal else EncoderStage
    return kind(config, grid=grid, backend=backend, dtype=dtype)
