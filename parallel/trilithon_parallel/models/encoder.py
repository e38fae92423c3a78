"""Encoders (BERT): tokens in, one vector a token out, and a vector a text by pooling."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilithon_parallel.attention import AttentionView
from trilithon_parallel.backend import Backend
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.grid import Grid
from trilithon_parallel.models.stage import Trunk


class EncoderStage(nn.Module):
    """One rank's part of an encoder. Use it with `PackedView(cu_seqlens, causal=False)`."""

    def __init__(self, config: ModelConfig, *, grid: Grid, backend: Backend, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.grid, self.backend, self.dtype = config, grid, backend, dtype
        self.model = Trunk(config, grid=grid, backend=backend, dtype=dtype)

    def forward(self, x: Tensor, *, positions_T: Tensor, view: AttentionView, types_T: Tensor | None = None) -> Tensor:
        """
        Args:
            x: int64 tokens [T] on the first stage, hidden [T, H] on the others.
            positions_T: int64 [T]; `types_T`: int64 [T] token types, zeros where None.
        Returns:
            Hidden [T, H].
        """
        x_TH = self.model.embed(x, positions_T, types_T) if self.grid.is_first_stage else x
        return self.model.run(x_TH, positions_T, view)

    def pool(self, hidden_TH: Tensor, cu_seqlens: Sequence[int]) -> Tensor:
        """One fp32 vector a sequence [B, H]: its tokens' mean or its first token, normalised if the model says so."""
        parts = [hidden_TH[start:stop].float() for start, stop in pairwise(cu_seqlens)]
        rows = [part.mean(0) if self.config.pooling == "mean" else part[0] for part in parts]
        pooled_BH = torch.stack(rows)
        return F.normalize(pooled_BH, dim=-1) if self.config.normalize else pooled_BH

    def prepare(self) -> None:
        """Pack every product for serving; the parameters are gone afterwards."""
        self.model.prepare()
