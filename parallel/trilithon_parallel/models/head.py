"""The head over the vocabulary: its columns are cut by tp, so every rank makes the logits of its own tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trilithon_parallel.collectives import all_gather, enter_columns
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.grid import Grid
from trilithon_parallel.layers import ColumnParallelLinear
from trilithon_parallel.placement import local_sizes


class HeadStage(nn.Module):
    """A stage that ends in logits. `lm_head` is there on the last stage alone, once `add_head` has made it."""

    lm_head: ColumnParallelLinear

    def __init__(self, config: ModelConfig, *, grid: Grid, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.grid, self.dtype = config, grid, dtype
        self.vocab_local = local_sizes(config, grid.tp.size).vocab

    def add_head(self, embedding: nn.Module | None, *, bias: bool) -> None:
        """Make the head; where it is tied, its weight is that of the `embedding` of this stage, if there is one."""
        self.lm_head = ColumnParallelLinear(
            self.config.hidden_size, self.vocab_local, bias=bias, dtype=self.dtype, device=self.grid.device
        )
        if self.config.tied_embeddings and embedding is not None:
            assert isinstance(embedding.weight, nn.Parameter)
            self.lm_head.weight = embedding.weight

    def head_input(self, hidden_RH: Tensor) -> Tensor:
        """What stands between the last norm and the head: nothing, if a family doesn't say otherwise."""
        return hidden_RH

    def local_logits(self, hidden_RH: Tensor) -> Tensor:
        """This rank's slice of the vocabulary, [R, V / tp], at least fp32; columns that are padding mean nothing."""
        logits_RV: Tensor = self.lm_head(enter_columns(self.head_input(hidden_RH), self.grid))
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
        """All logits on every rank of the tp axis: [R, V], at least fp32, padding columns removed."""
        gathered_RV = all_gather(self.logits(hidden_RH), self.grid.tp, dim=-1, label="logits")
        return gathered_RV[:, : self.config.vocab_size]
