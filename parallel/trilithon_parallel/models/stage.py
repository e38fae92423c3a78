"""What every stage of every family has: embeddings at its start, blocks, rotary tables, preparation for serving."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trilithon_parallel.attention import AttentionView
from trilithon_parallel.backend import Backend
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.grid import Grid
from trilithon_parallel.layers import VocabParallelEmbedding, empty_parameter
from trilithon_parallel.placement import local_sizes
from trilithon_parallel.transformer import Block, Rotary


class Table(nn.Module):
    """A replicated lookup table (positions, token types) [rows, H]."""

    def __init__(self, rows: int, hidden: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = empty_parameter(rows, hidden, dtype=dtype, device=device)

    def forward(self, index_T: Tensor) -> Tensor:
        """int64 [T] -> [T, H]."""
        return nn.functional.embedding(index_T, self.weight)


class Trunk(nn.Module):
    """The part named `model.` in files: this stage's layers in a dict keyed by global id, so that names never move."""

    embed_tokens: VocabParallelEmbedding

    def __init__(self, config: ModelConfig, *, grid: Grid, backend: Backend, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.grid = config, grid
        hidden, device = config.hidden_size, grid.device
        if grid.is_first_stage:
            vocab = local_sizes(config, grid.tp.size).vocab
            self.embed_tokens = VocabParallelEmbedding(vocab, hidden, axis=grid.tp, dtype=dtype, device=device)
            if config.position == "learned":
                self.embed_positions = Table(config.max_context, hidden, dtype=dtype, device=device)
            if config.token_types:
                self.embed_types = Table(config.token_types, hidden, dtype=dtype, device=device)
            if config.norm_order == "post":
                self.embed_norm = backend.norm(config, grid=grid, dtype=dtype)
        ids = grid.layers(config.num_layers)
        self.layers = nn.ModuleDict({str(i): Block(config, grid=grid, backend=backend, dtype=dtype) for i in ids})
        if grid.is_last_stage and config.norm_order == "pre":
            self.norm = backend.norm(config, grid=grid, dtype=dtype)
        self.rotary = Rotary(config, dtype=dtype, device=device) if config.position == "rope" else None

    def embed(self, tokens_T: Tensor, positions_T: Tensor, types_T: Tensor | None) -> Tensor:
        """Tokens -> [T, H] on the first stage."""
        x_TH: Tensor = self.embed_tokens(tokens_T)
        if self.config.token_types:
            x_TH = x_TH + self.embed_types(torch.zeros_like(tokens_T) if types_T is None else types_T)
        if self.config.position == "learned":
            x_TH = x_TH + self.embed_positions(positions_T)
        if self.config.norm_order == "post":
            x_TH = self.embed_norm(x_TH)
        return x_TH

    def run(self, x_TH: Tensor, positions_T: Tensor, view: AttentionView) -> Tensor:
        """The residual stream [T, H] through this stage's layers, and the final norm where it stands."""
        rope = self.rotary.tables(positions_T) if self.rotary is not None else None
        for layer, block in enumerate(self.layers.values()):
            x_TH = block(x_TH, layer=layer, rope=rope, view=view)
        if self.grid.is_last_stage and self.config.norm_order == "pre":
            x_TH = self.norm(x_TH)
        return x_TH

    def prepare(self) -> None:
        """Pack the layers' products."""
        for block in self.layers.values():
            assert isinstance(block, Block)
            block.prepare()
