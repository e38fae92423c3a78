"""Decoders (Llama family, GPT-2): tokens in, next-token logits out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trilithon_parallel.attention import AttentionView
from trilithon_parallel.backend import Backend
from trilithon_parallel.collectives import all_gather, enter_columns
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.grid import Grid
from trilithon_parallel.layers import ColumnParallelLinear, Product
from trilithon_parallel.models.stage import Trunk
from trilithon_parallel.placement import local_sizes


class CausalStage(nn.Module):
    """
    One rank's part of a decoder: `forward` on every stage, `logits` on the last.

    Parameters carry the canonical names of `placement.py` and start uninitialised.
    """

    def __init__(self, config: ModelConfig, *, grid: Grid, backend: Backend, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.grid, self.backend, self.dtype = config, grid, backend, dtype
        self.model = Trunk(config, grid=grid, backend=backend, dtype=dtype)
        self._head: Product | None = None
        self.vocab_local = local_sizes(config, grid.tp.size).vocab
        if grid.is_last_stage:
            self.lm_head = ColumnParallelLinear(
                config.hidden_size, self.vocab_local, bias=False, dtype=dtype, device=grid.device
            )
            if config.tied_embeddings and grid.is_first_stage:
                self.lm_head.weight = self.model.embed_tokens.weight

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
        if self._head is not None:
            return self._head(hidden_RH).float()
        logits_RV: Tensor = self.lm_head(enter_columns(hidden_RH, self.grid))
        return logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()

    @property
    def real_columns(self) -> int:
        """How many columns of `local_logits`, from the first, are tokens and not padding."""
        return max(0, min(self.vocab_local, self.config.vocab_size - self.grid.tp.rank * self.vocab_local))

    def logits(self, hidden_RH: Tensor) -> Tensor:
        """`local_logits` whose columns that are padding are -inf."""
        logits_RV = self.local_logits(hidden_RH)
        if self.real_columns < self.vocab_local:
            is_padding_V = torch.arange(self.vocab_local, device=logits_RV.device) >= self.real_columns
            logits_RV = logits_RV.masked_fill(is_padding_V, -torch.inf)
        return logits_RV

    def gather_logits(self, hidden_RH: Tensor) -> Tensor:
        """All logits on every rank of the tp axis: fp32 [R, V], padding columns removed."""
        gathered_RV = all_gather(self.logits(hidden_RH), self.grid.tp, dim=-1, label="logits")
        return gathered_RV[:, : self.config.vocab_size]

    def prepare(self) -> None:
        """
        Pack every product for serving; the parameters are gone afterwards.

        A tied embedding alone stays twice on a one-stage rank: as rows to look up and as the packed head.
        """
        self.model.prepare()
        if self.grid.is_last_stage:
            self._head = self.backend.pack_columns([self.lm_head])
