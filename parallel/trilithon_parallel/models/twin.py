"""
Two encoders that are trained together, one of passages and one of questions (arXiv 2101.00408, section 2.1): their
vectors are compared, their weights are their own.

Served, they are two models.
"""

from __future__ import annotations

import torch

from trilithon_parallel.backend import Backend
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.grid import Grid
from trilithon_parallel.models.encoder import EncoderStage


class TwinStage(EncoderStage):
    """
    One rank's part of the encoder of passages, and beside it as much of the one of questions, of the same shape.

    Attributes:
        query: the encoder of questions.
    """

    def __init__(self, config: ModelConfig, *, grid: Grid, backend: Backend, dtype: torch.dtype) -> None:
        super().__init__(config, grid=grid, backend=backend, dtype=dtype)
        self.query = EncoderStage(config.alone(), grid=grid, backend=backend, dtype=dtype)
