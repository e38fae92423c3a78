"""What every stage of every family has: embeddings at its start, blocks, rotary tables, preparation for serving."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from trilithon_parallel.attention import AttentionView
from trilithon_parallel.backend import Backend
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.dropout import Dropout
from trilithon_parallel.grid import Grid
from trilithon_parallel.layers import VocabParallelEmbedding, empty_parameter, lookup
from trilithon_parallel.placement import local_sizes
from trilithon_parallel.recompute import Recompute, run_layers
from trilithon_parallel.transformer import Block, Rotary


class Table(nn.Module):
    """A replicated lookup table (positions, token types) [rows, H]."""

    def __init__(self, rows: int, hidden: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = empty_parameter(rows, hidden, dtype=dtype, device=device)

    def forward(self, index_T: Tensor) -> Tensor:
        """int64 [T] -> [T, H]."""
        return lookup(self.weight, index_T)


class Trunk(nn.Module):
    """The part named `model.` in files: this stage's layers in a dict keyed by global id, so that names never move."""

    embed_tokens: VocabParallelEmbedding

    def __init__(self, config: ModelConfig, *, grid: Grid, backend: Backend, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.grid = config, grid
        hidden, device = config.hidden_size, grid.device
        if grid.is_first_stage:
            vocab = local_sizes(config, grid.tp.size).vocab
            self.embed_tokens = VocabParallelEmbedding(vocab, hidden, grid=grid, dtype=dtype)
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
        self.recompute = Recompute()
        self.rotary = Rotary(config, dtype=dtype, device=device) if config.position == "rope" else None

    def embed(
        self, tokens_T: Tensor, positions_T: Tensor, types_T: Tensor | None, dropout: Dropout | None = None
    ) -> Tensor:
        """Tokens -> [T, H] on the first stage; with sequence parallelism this rank's tokens of it, [T / tp, H]."""
        x_TH: Tensor = self.embed_tokens(tokens_T)
        if self.config.token_types:
            types_T = torch.zeros_like(tokens_T) if types_T is None else types_T
            x_TH = x_TH + self.embed_types(self._own(types_T))
        if self.config.position == "learned":
            x_TH = x_TH + self.embed_positions(self._own(positions_T))
        if self.config.norm_order == "post":
            x_TH = self.embed_norm(x_TH)
        return x_TH if dropout is None else dropout.hidden(x_TH, layer=0, site="embedding")

    def run(self, x_TH: Tensor, positions_T: Tensor, view: AttentionView) -> Tensor:
        """The residual stream [T, H] through this stage's layers, and the final norm where it stands."""
        rope = self.rotary.tables(positions_T) if self.rotary is not None else None
        layers = [
            functools.partial(block, layer=layer, rope=rope, view=view)
            for layer, block in enumerate(self.layers.values())
        ]
        x_TH = run_layers(layers, x_TH, self.recompute)
        if self.grid.is_last_stage and self.config.norm_order == "pre":
            x_TH = self.norm(x_TH)
        return x_TH

    def _own(self, x_T: Tensor) -> Tensor:
        """This rank's tokens under sequence parallelism, else all."""
        return x_T.chunk(self.grid.tp.size)[self.grid.tp.rank] if self.grid.sequence_parallel else x_T

    def prepare(self) -> None:
        """Pack the layers' products."""
        for block in self.layers.values():
            assert isinstance(block, Block)
            block.prepare()
