"""Decoders (Llama family, GPT-2): tokens in, next-token logits out."""

from __future__ import annotations

import torch
from torch import Tensor

from trilithon_parallel.attention import AttentionView
from trilithon_parallel.backend import Backend
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.grid import Grid
from trilithon_parallel.layers import Product
from trilithon_parallel.models.head import HeadStage
from trilithon_parallel.models.stage import Trunk


class CausalStage(HeadStage):
    """
    One rank's part of a decoder: `forward` on every stage, `logits` on the last.

    Parameters carry the canonical names of `placement.py` and start uninitialised.
    """

    def __init__(self, config: ModelConfig, *, grid: Grid, backend: Backend, dtype: torch.dtype) -> None:
        super().__init__(config, grid=grid, dtype=dtype)
        self.backend = backend
        self.model = Trunk(config, grid=grid, backend=backend, dtype=dtype)
        self._head: Product | None = None
        if grid.is_last_stage:
            self.add_head(self.model.embed_tokens if grid.is_first_stage else None, bias=False)

    def forward(self, x: Tensor, *, positions_T: Tensor, view: AttentionView, types_T: Tensor | None = None) -> Tensor:
        """
        Args:
            x: int64 tokens [T] on the first stage, hidden [T, H] (the stage's dtype) on the others.
            positions_T: int64 [T], each token's place in its own sequence.
            view: the step's keys and values.
            types_T: int64 [T] token types of a model that has them, zeros where None.
        Returns:
            Hidden [T, H]; on the last stage after the final norm.
        """
        x_TH = self.model.embed(x, positions_T, types_T, view.dropout) if self.grid.is_first_stage else x
        return self.model.run(x_TH, positions_T, view)

    def local_logits(self, hidden_RH: Tensor) -> Tensor:
        """This rank's slice of the vocabulary, [R, V / tp], at least fp32; columns that are padding mean nothing."""
        return super().local_logits(hidden_RH) if self._head is None else self._head(hidden_RH).float()

    def prepare(self) -> None:
        """
        Pack every product for serving; the parameters are gone afterwards.

        A tied embedding alone stays twice on a one-stage rank: as rows to look up and as the packed head.
        """
        self.model.prepare()
        if self.grid.is_last_stage:
            self._head = self.backend.pack_columns([self.lm_head])
