"""
A reader of retrieved passages while it is trained: an encoder-decoder, and beside it the encoder that chooses what it
reads and the strength by which its attention follows that choice (arXiv 2101.00408).

All of it is one module, so one optimizer moves it and one checkpoint holds it. Served, they are models of their own.
"""

from __future__ import annotations

import torch
from torch import nn

from trilithon_parallel.backend import Backend
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.grid import Grid
from trilithon_parallel.layers import empty_parameter
from trilithon_parallel.models.encoder import EncoderStage
from trilithon_parallel.models.seq2seq import Seq2SeqStage
from trilithon_parallel.models.twin import TwinStage


class ReaderStage(Seq2SeqStage):
    """
    One rank's part of `config` with what `config.reads` says; there is one pipeline stage.

    Attributes:
        retriever: None where the passages' probabilities are given.
        passage_strength: [1]; None where attention is not biased.
    """

    def __init__(self, config: ModelConfig, *, grid: Grid, backend: Backend, dtype: torch.dtype) -> None:
        super().__init__(config, grid=grid, backend=backend, dtype=dtype)
        reads = config.reads
        assert reads is not None
        self.retriever: EncoderStage | None = None
        if reads.retriever is not None:
            kind = TwinStage if reads.retriever.has_twin else EncoderStage
            self.retriever = kind(reads.retriever, grid=grid, backend=backend, dtype=dtype)
        self.passage_strength: nn.Parameter | None = None
        if reads.has_strength:
            self.passage_strength = empty_parameter(1, dtype=dtype, device=grid.device)
