"""Encoders (BERT): tokens in, one vector a token out; a vector a text by pooling, or logits of masked tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilithon_parallel.activations import activation
from trilithon_parallel.attention import AttentionView
from trilithon_parallel.backend import Backend
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.grid import Grid
from trilithon_parallel.models.head import HeadStage
from trilithon_parallel.models.stage import Trunk


class Transform(nn.Module):
    """What BERT's masked-LM head does before the product with the vocabulary: norm(act(X W^T + b)), on every rank."""

    def __init__(self, config: ModelConfig, *, grid: Grid, backend: Backend, dtype: torch.dtype) -> None:
        super().__init__()
        size = {"in_features": config.hidden_size, "out_features": config.hidden_size}
        self.dense = nn.utils.skip_init(nn.Linear, **size, dtype=dtype, device=grid.device)  # type: ignore[no-untyped-call]  # torch's helper is untyped
        self.norm = backend.norm(config, grid=grid, dtype=dtype)
        self.activate = activation(config.activation, invariant=backend.batch_invariant)

    def forward(self, x_RH: Tensor) -> Tensor:
        """[R, H] -> [R, H]."""
        result: Tensor = self.norm(self.activate(self.dense(x_RH)))
        return result


class EncoderStage(HeadStage):
    """
    One rank's part of an encoder. Use it with `PackedView(cu_seqlens, causal=False)`.

    With a masked-LM head `logits` is there too, on the last stage: give it the hidden states of the masked tokens.
    """

    def __init__(self, config: ModelConfig, *, grid: Grid, backend: Backend, dtype: torch.dtype) -> None:
        super().__init__(config, grid=grid, dtype=dtype)
        self.backend = backend
        self.model = Trunk(config, grid=grid, backend=backend, dtype=dtype)
        if config.mlm_head and grid.is_last_stage:
            self.lm_transform = Transform(config, grid=grid, backend=backend, dtype=dtype)
            self.add_head(self.model.embed_tokens if grid.is_first_stage else None, bias=True)

    def forward(self, x: Tensor, *, positions_T: Tensor, view: AttentionView, types_T: Tensor | None = None) -> Tensor:
        """
        Args:
            x: int64 tokens [T] on the first stage, hidden [T, H] on the others.
            positions_T: int64 [T]; `types_T`: int64 [T] token types, zeros where None.
        Returns:
            Hidden [T, H].
        """
        x_TH = self.model.embed(x, positions_T, types_T, view.dropout) if self.grid.is_first_stage else x
        return self.model.run(x_TH, positions_T, view)

    def head_input(self, hidden_RH: Tensor) -> Tensor:
        """The head's transformation [R, H] -> [R, H]."""
        result: Tensor = self.lm_transform(hidden_RH)
        return result

    def pool(self, hidden_TH: Tensor, cu_seqlens: Sequence[int]) -> Tensor:
        """One fp32 vector a sequence [B, H]: its tokens' mean or its first token, normalised if the model says so."""
        parts = [hidden_TH[start:stop].float() for start, stop in pairwise(cu_seqlens)]
        rows = [part.mean(0) if self.config.pooling == "mean" else part[0] for part in parts]
        pooled_BH = torch.stack(rows)
        return F.normalize(pooled_BH, dim=-1) if self.config.normalize else pooled_BH

    def prepare(self) -> None:
        """Pack every product for serving; the parameters are gone afterwards."""
        self.model.prepare()
