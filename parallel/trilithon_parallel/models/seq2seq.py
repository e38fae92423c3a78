"""
Encoder-decoders (T5): two streams of packed tokens, one pipeline. Stages hold the encoder's layers, then the decoder's.

One tensor crosses between stages. Up to the encoder's end it is the encoder's stream [E, H]; from there on the
encoder's output and the decoder's stream one after the other, [E + T, H], so that the gradient of every decoder layer
finds its way back to the encoder. With sequence parallelism each part is this rank's tokens of it.

Shapes: E tokens of the encoder, T of the decoder, H hidden, A heads (a rank's share), V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from trilithon_parallel.backend import Backend
from trilithon_parallel.collectives import copy_to_tp
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.grid import Grid
from trilithon_parallel.layers import VocabParallelEmbedding
from trilithon_parallel.models.head import HeadStage
from trilithon_parallel.models.t5 import Looking, RelativeBias, T5Block
from trilithon_parallel.placement import local_sizes, stage_layers, stage_names
from trilithon_parallel.recompute import Recompute, run_layers


def boundary_rows(
    config: ModelConfig,
    *,
    pp: int,
    stage: int,
    num_encoder_tokens: int,
    num_decoder_tokens: int,
    counts: Sequence[int] | None = None,
) -> int:
    """
    Rows of the tensor [rows, H] that a stage hands on: both streams' where it decodes, else the encoder's.

    With sequence parallelism give a rank's share of each number. `counts` as for `placement.stage_layers`. The last
    stage hands nothing on: its result is the decoder's hidden states alone.
    """
    stop = stage_layers(config.num_layers, pp, counts)[stage].stop
    return num_encoder_tokens + (num_decoder_tokens if stop > config.num_encoder_layers else 0)


class Stack(nn.Module):
    """The part of one stack that a stage holds: layers in a dict keyed by their id in the stack."""

    def __init__(
        self, name: str, config: ModelConfig, layers: Sequence[int], *, grid: Grid, backend: Backend, dtype: torch.dtype
    ) -> None:
        super().__init__()
        is_decoder = name == "decoder"
        held = stage_names(config, pp=grid.pp.size, pp_rank=grid.pp.rank, counts=grid.layer_counts)
        if f"{name}.embed_tokens.weight" in held:
            self.embed_tokens = _embedding(config, grid=grid, dtype=dtype)
        self._table = ""
        for table in ("relative_bias", "relative_bias_copy"):
            if f"{name}.{table}.weight" in held:
                self._table = table
                self.add_module(table, RelativeBias(config, bidirectional=not is_decoder, grid=grid, dtype=dtype))
        self.layers = nn.ModuleDict(
            {str(i): T5Block(config, has_cross=is_decoder, grid=grid, backend=backend, dtype=dtype) for i in layers}
        )
        self.norm = backend.norm(config, grid=grid, dtype=dtype) if f"{name}.norm.weight" in held else nn.Identity()
        self.recompute = Recompute()

    @property
    def bias(self) -> RelativeBias:
        """The table of distances, its own or its copy, of a stack that has layers here."""
        table = self.get_submodule(self._table)
        assert isinstance(table, RelativeBias)
        return table

    def forward(
        self,
        x_TH: Tensor,
        cu_seqlens: Sequence[int],
        *,
        across: Looking | None = None,
        memory_EH: Tensor | None = None,
    ) -> Tensor:
        """The stream [T, H] through this stage's layers, and the stack's norm where it stands."""
        if len(self.layers):
            # Made once for all layers and for the longest sequence: a shorter one's is its corner.
            by_distance_ASS = self.bias(max(b - a for a, b in pairwise(cu_seqlens)))
            inward = Looking(cu_seqlens, cu_seqlens, by_distance_ASS)
            layers = [
                functools.partial(block, inward=inward, across=across, memory_EH=memory_EH)
                for block in self.layers.values()
            ]
            x_TH = run_layers(layers, x_TH, self.recompute)
        result: Tensor = self.norm(x_TH)
        return result


class Seq2SeqStage(HeadStage):
    """
    One rank's part of an encoder-decoder: `forward` on every stage, `logits` on the last.

    Where a stage holds all of a stack, `encode` and `decode` run that stack apart from the other: several passages
    that were encoded one by one, for example, are one memory to decode from. Parameters carry the canonical names of
    `placement.py` and start uninitialised.
    """

    def __init__(self, config: ModelConfig, *, grid: Grid, backend: Backend, dtype: torch.dtype) -> None:
        super().__init__(config, grid=grid, dtype=dtype)
        self.backend = backend
        layers, border = grid.layers(config.num_layers), config.num_encoder_layers
        self.encodes, self.decodes = layers.start < border, layers.stop > border
        self.starts_decoding = layers.start <= border < layers.stop
        self.model = nn.ModuleDict()
        if grid.is_first_stage:
            self.model["embed_tokens"] = _embedding(config, grid=grid, dtype=dtype)
        parts = {"encoder": [i for i in layers if i < border], "decoder": [i - border for i in layers if i >= border]}
        self.encoder, self.decoder = (
            Stack(name, config, ids, grid=grid, backend=backend, dtype=dtype) for name, ids in parts.items()
        )
        if grid.is_last_stage:
            self.add_head(self._embedding(), bias=False)

    def forward(
        self,
        x: Tensor | None,
        *,
        encoder_tokens_E: Tensor,
        encoder_cu_seqlens: Sequence[int],
        decoder_tokens_T: Tensor,
        decoder_cu_seqlens: Sequence[int],
        passages: int = 1,
        cross_bias_E: Tensor | None = None,
    ) -> Tensor:
        """
        This stage's part of a training step, the same call on every stage.

        Args:
            x: what the stage before handed on, [rows, H] of `boundary_rows`; None on the first stage.
            encoder_tokens_E, decoder_tokens_T: int64; the decoder's begin with `config.decoder_start_id`.
            encoder_cu_seqlens: N + 1 boundaries in E. decoder_cu_seqlens: B + 1 boundaries in T; N = B * passages.
            passages: how many neighbouring sequences of the encoder one of the decoder reads.
            cross_bias_E: as for `decode`.
        Returns:
            What the next stage takes; on the last stage hidden [T, H] after the decoder's norm.
        """
        encoder_EH, decoder_TH = x, None
        if self.encodes:
            encoder_EH = self.encode(encoder_tokens_E if x is None else x, cu_seqlens=encoder_cu_seqlens)
        assert encoder_EH is not None
        if not self.decodes:
            return encoder_EH
        if not self.starts_decoding:
            num = encoder_cu_seqlens[-1] // (self.grid.tp.size if self.grid.sequence_parallel else 1)
            encoder_EH, decoder_TH = encoder_EH[:num], encoder_EH[num:]
        decoder_TH = self.decode(
            decoder_tokens_T if decoder_TH is None else decoder_TH,
            encoder_EH,
            cu_seqlens=decoder_cu_seqlens,
            encoder_cu_seqlens=encoder_cu_seqlens[::passages],
            cross_bias_E=cross_bias_E,
        )
        return decoder_TH if self.grid.is_last_stage else torch.cat((encoder_EH, decoder_TH))

    def encode(self, x: Tensor, *, cu_seqlens: Sequence[int]) -> Tensor:
        """
        This stage's layers of the encoder.

        Args:
            x: int64 tokens [E] on the first stage, hidden [E, H] on the others.
            cu_seqlens: boundaries of the sequences in E.
        Returns:
            Hidden [E, H]; after the encoder's norm where its last layer is.
        """
        hidden_EH: Tensor = self.encoder(self.model["embed_tokens"](x) if self.grid.is_first_stage else x, cu_seqlens)
        return hidden_EH

    def decode(
        self,
        x: Tensor,
        encoder_hidden_EH: Tensor,
        *,
        cu_seqlens: Sequence[int],
        encoder_cu_seqlens: Sequence[int],
        cross_bias_E: Tensor | None = None,
    ) -> Tensor:
        """
        This stage's layers of the decoder.

        Args:
            x: int64 tokens [T] where the decoder begins, hidden [T, H] on the stages after it.
            encoder_hidden_EH: what `encode` returned.
            cu_seqlens: B + 1 boundaries in T. encoder_cu_seqlens: B + 1 boundaries in E, what each sequence reads.
            cross_bias_E: added to every head's cross-attention scores of an encoder token, before the softmax;
                differentiable. Its gradient is the sum over this stage's layers alone.
        Returns:
            Hidden [T, H]; after the decoder's norm where its last layer is.
        """
        x = self.embed_decoder(x)
        # Every rank's heads read the bias: the paper's f sums what they say of it.
        by_key_E = None if cross_bias_E is None else copy_to_tp(cross_bias_E, self.grid.tp)
        hidden_TH: Tensor = self.decoder(
            x,
            cu_seqlens,
            across=Looking(cu_seqlens, encoder_cu_seqlens, by_key_E=by_key_E),
            memory_EH=self.backend.enter_columns(encoder_hidden_EH, self.grid),
        )
        return hidden_TH

    def embed_decoder(self, x: Tensor) -> Tensor:
        """The decoder's tokens [T] as its stream [T, H] where it begins; on the stages after it the stream itself."""
        embedding = self._embedding()
        if self.starts_decoding and embedding is not None:
            x = embedding(x)
        return x

    def head_input(self, hidden_RH: Tensor) -> Tensor:
        """Version 1.0 scales its hidden states, because its embedding is its head."""
        return hidden_RH * self.config.hidden_size**-0.5 if self.config.scale_logits else hidden_RH

    def _embedding(self) -> nn.Module | None:
        """The embedding on this stage: the encoder's, the decoder's copy, or none."""
        return self.model["embed_tokens"] if self.grid.is_first_stage else getattr(self.decoder, "embed_tokens", None)


def _embedding(config: ModelConfig, *, grid: Grid, dtype: torch.dtype) -> VocabParallelEmbedding:
    vocab = local_sizes(config, grid.tp.size).vocab
    return VocabParallelEmbedding(vocab, config.hidden_size, grid=grid, dtype=dtype)
