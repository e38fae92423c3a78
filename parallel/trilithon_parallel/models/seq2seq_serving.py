"""
Serving encoder-decoders: one step over a paged cache.

What a layer of the decoder sees of the encoder's sequences are keys and values that depend on one sequence alone. They
are made once, in the step that encodes it, and lie in blocks of the cache that the decoder's own tokens have, too: at a
layer, a block holds keys and values of its attention to itself, or of its attention to the encoder.

Shapes: E tokens to encode, T of the decoder, H hidden, A heads (a rank's share), C channels of a head; in a group of
B sequences with as many queries, Q queries and S keys of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from trilithon_parallel.attention import BLOCK_SIZE, PagedBatch, PagedKVCache, similar_lengths
from trilithon_parallel.models.seq2seq import Seq2SeqStage
from trilithon_parallel.models.t5 import T5Block


@dataclass(slots=True)
class Sources:
    """
    What one sequence of the decoder reads: sequences of the encoder, in any order.

    Attributes:
        lengths: tokens of each.
        blocks: of all, one after the other; each begins in a block of its own.
        biases: one each, added to the scores of its tokens; empty: none.
    """

    lengths: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    biases: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Seq2SeqBatch:
    """
    One step.

    Attributes:
        encoder_lengths: of the sequences to encode. encoder_slots_E: where in the cache each of their tokens goes.
        paged: the decoder's part. sources: what each of its sequences reads, encoded before or in this step.
    """

    encoder_lengths: Sequence[int]
    encoder_slots_E: Tensor
    paged: PagedBatch
    sources: Sequence[Sources]

    @property
    def num_encoder_tokens(self) -> int:
        """E."""
        return sum(self.encoder_lengths)


def serve(
    stage: Seq2SeqStage,
    x: Tensor | None,
    batch: Seq2SeqBatch,
    cache: PagedKVCache,
    *,
    encoder_tokens_E: Tensor,
    decoder_tokens_T: Tensor,
) -> Tensor:
    """
    This stage's part of a step.

    Args:
        x: what the stage before handed on, [rows, H] of `boundary_rows`; None on the first stage.
        encoder_tokens_E, decoder_tokens_T: int64; either may be empty.
    Returns:
        What the next stage takes; on the last stage hidden [T, H] after the decoder's norm.
    """
    num = batch.num_encoder_tokens
    if x is None:
        hidden_EH = torch.empty(0, stage.config.hidden_size, dtype=stage.dtype, device=stage.grid.device)
    else:
        hidden_EH = x[:num]
    if stage.encodes and num:
        bounds = [0, *accumulate(batch.encoder_lengths)]
        hidden_EH = stage.encode(encoder_tokens_E if x is None else hidden_EH, cu_seqlens=bounds)
    if not stage.decodes:
        return hidden_EH
    if stage.starts_decoding:
        decoder_TH = stage.embed_decoder(decoder_tokens_T)
    else:
        assert x is not None
        decoder_TH = x[num:]
    decoder_TH = _decode(stage, decoder_TH, hidden_EH, batch, cache)
    return decoder_TH if stage.grid.is_last_stage else torch.cat((hidden_EH, decoder_TH))


def _decode(stage: Seq2SeqStage, x_TH: Tensor, encoder_EH: Tensor, batch: Seq2SeqBatch, cache: PagedKVCache) -> Tensor:
    device = x_TH.device
    encoder_slots_E, slots_T = batch.encoder_slots_E.to(device), batch.paged.slots_T.to(device)
    memory_EH = stage.backend.enter_columns(encoder_EH, stage.grid)
    inward, across = _Reads(cache, _own(stage, batch.paged)), _Reads(cache, _other(stage, batch))
    for layer, block in enumerate(stage.decoder.layers.values()):
        assert isinstance(block, T5Block)
        if len(memory_EH):
            cache.write(layer, encoder_slots_E, *block.cross_attn.keys_values(memory_EH))
        if len(x_TH):
            normed_TH = stage.backend.enter_columns(block.input_layernorm(x_TH), stage.grid)
            cache.write(layer, slots_T, *block.self_attn.keys_values(normed_TH))
            found_TAC = inward.attend(layer, block.self_attn.queries(normed_TH))
            x_TH = block.self_attn.output(found_TAC, x_TH)
            normed_TH = stage.backend.enter_columns(block.cross_attention_layernorm(x_TH), stage.grid)
            found_TAC = across.attend(layer, block.cross_attn.queries(normed_TH))
            x_TH = block.cross_attn.output(found_TAC, x_TH)
            x_TH = block.mlp(block.post_attention_layernorm(x_TH), x_TH)
    result: Tensor = stage.decoder.norm(x_TH)
    return result


@dataclass(frozen=True)
class _Group:
    """B sequences of Q queries each that read equally many (padded) blocks."""

    rows: Tensor  # int64 [B * Q], their places in T
    blocks: Tensor  # int64 [B * blocks]
    bias: Tensor  # [B, A or 1, Q or 1, S]; -inf where nobody may look
    num_sequences: int


@dataclass(frozen=True)
class _Reads:
    """Unscaled attention to what lies in a cache."""

    cache: PagedKVCache
    groups: Sequence[_Group]

    def attend(self, layer: int, q_TAC: Tensor) -> Tensor:
        """[T, A, C]."""
        out_TAC = torch.empty_like(q_TAC)
        for group in self.groups:
            num, heads, channels = group.num_sequences, *q_TAC.shape[1:]
            k_BASC, v_BASC = (
                x.view(heads, num, -1, channels).transpose(0, 1) for x in self.cache.gather(layer, group.blocks, num)
            )
            q_BAQC = q_TAC.index_select(0, group.rows).view(num, -1, heads, channels).transpose(1, 2)
            found_BAQC = F.scaled_dot_product_attention(q_BAQC, k_BASC, v_BASC, attn_mask=group.bias, scale=1.0)
            out_TAC.index_copy_(0, group.rows, found_BAQC.transpose(1, 2).flatten(0, 1))
        return out_TAC


def _own(stage: Seq2SeqStage, paged: PagedBatch) -> list[_Group]:
    """How the decoder's sequences read themselves: by distance, nothing that comes later."""
    lens = _lengths(paged)
    table, dtype = stage.decoder.bias, stage.dtype
    groups = []
    for members in _alike(lens, [context + new for context, new in zip(paged.context_lens, lens, strict=True)]):
        places_BQ = torch.tensor([[paged.context_lens[i] + q for q in range(lens[i])] for i in members])
        width = int(places_BQ.max()) // BLOCK_SIZE + 1
        bias = table.between(places_BQ.to(table.weight.device), width * BLOCK_SIZE).to(dtype)
        groups.append(_group(members, paged, [paged.block_tables[i][:width] for i in members], bias))
    return groups


def _other(stage: Seq2SeqStage, batch: Seq2SeqBatch) -> list[_Group]:
    """How they read the encoder's: all of it, by bias."""
    groups = []
    for members in _alike(_lengths(batch.paged), [BLOCK_SIZE * len(one.blocks) for one in batch.sources]):
        width = max(len(batch.sources[i].blocks) for i in members)
        bias_BS = torch.full((len(members), width * BLOCK_SIZE), -torch.inf)
        for row_S, i in zip(bias_BS, members, strict=True):
            one, at = batch.sources[i], 0
            for length, added in zip(one.lengths, one.biases or [0.0] * len(one.lengths), strict=True):
                row_S[at : at + length] = added
                at += -(-length // BLOCK_SIZE) * BLOCK_SIZE
        bias = bias_BS[:, None, None, :].to(stage.grid.device, stage.dtype)
        groups.append(_group(members, batch.paged, [batch.sources[i].blocks for i in members], bias))
    return groups


def _group(members: list[int], paged: PagedBatch, tables: Sequence[list[int]], bias: Tensor) -> _Group:
    width = bias.shape[-1] // BLOCK_SIZE
    # Padded with a sequence's own first block: nothing of a neighbour's is ever read.
    blocks = [table + [table[0]] * (width - len(table)) for table in tables]
    rows = [row for i in members for row in range(paged.cu_seqlens[i], paged.cu_seqlens[i + 1])]
    flat = torch.tensor(blocks, dtype=torch.int64).flatten()
    return _Group(torch.tensor(rows).to(bias.device), flat.to(bias.device), bias, len(members))


def _lengths(paged: PagedBatch) -> list[int]:
    return [stop - start for start, stop in zip(paged.cu_seqlens, paged.cu_seqlens[1:], strict=False)]


def _alike(queries: Sequence[int], keys: Sequence[int]) -> list[list[int]]:
    """Sequences with as many queries and about as many keys, which one product takes together."""
    return [
        group
        for count in sorted(set(queries))
        for group in similar_lengths([i for i, num in enumerate(queries) if num == count], keys)
    ]
