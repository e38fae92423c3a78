"""
One attention, two views of its keys and values: packed sequences (training, encoders) and paged blocks (serving).

Shapes: T new tokens of the step, B sequences, A query heads, G key/value groups (both local to the rank), C channels
of a head, N cache blocks, S gathered positions. Query heads of one group are folded as rows of one product, which on
CPUs is several times faster than grouped `scaled_dot_product_attention`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from trilithon_parallel.backend import native_attention
from trilithon_parallel.backend.native import unavailable_reason
from trilithon_parallel.backend.native_attention import NativeStep
from trilithon_parallel.backend.native_training import PackedLayout
from trilithon_parallel.backend.torch_ops import has_native_bf16
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.dropout import Dropout
from trilithon_parallel.grid import Grid
from trilithon_parallel.placement import local_sizes
from trilithon_parallel.recompute import again

BLOCK_SIZE = 16
# Decode rows share one padded gather while padding stays below the larger of their own length and this many positions.
PADDING_SLACK = 1024
# Queries of a chunk that are scored at once: bounds the score matrix, and skips most of the causal upper triangle.
QUERY_TILE = 128
# Shape of every product in the batch-invariant mode: rows of queries, keys.
ROW_TILE, KEY_TILE = 16, 256


class AttentionView(Protocol):
    """What a layer's attention needs: somewhere to put the new keys and values, and everything to attend to."""

    dropout: Dropout | None

    def attend(self, layer: int, q_TAC: Tensor, k_TGC: Tensor, v_TGC: Tensor) -> Tensor:
        """Attention output [T, A, C] of one layer; `layer` counts within this stage."""
        ...


@dataclass
class PackedView:
    """
    Sequences packed one after another, nothing cached: training, encoders, scoring. Differentiable.

    `cu_seqlens` are the B + 1 boundaries in T; `causal` hides later tokens; `selective` keeps nothing of attention's
    inside for the backward pass (`recompute.py`). Where the C kernels run, causal attention is serving's own.
    """

    cu_seqlens: Sequence[int]
    causal: bool
    dropout: Dropout | None = None
    selective: bool = False
    _native: dict[tuple[int, ...], PackedLayout] = field(default_factory=dict, repr=False)

    def attend(self, layer: int, q_TAC: Tensor, k_TGC: Tensor, v_TGC: Tensor) -> Tensor:
        """Attention of each sequence with itself."""
        if self.dropout is not None and self.dropout.attention_rate > 0.0:
            return self._by_sequence(layer, q_TAC, k_TGC, v_TGC)
        if self.causal and torch.is_grad_enabled() and _is_native(q_TAC, k_TGC):
            return self._layout(q_TAC, k_TGC).attend(q_TAC, k_TGC, v_TGC)
        if self.selective and torch.is_grad_enabled():
            return again(self._fused, q_TAC, k_TGC, v_TGC)
        return self._fused(q_TAC, k_TGC, v_TGC)

    def _layout(self, q_TAC: Tensor, k_TGC: Tensor) -> PackedLayout:
        """The kernel's view of these sequences, made at the first layer."""
        shape = (q_TAC.shape[1], k_TGC.shape[1], q_TAC.shape[2])
        if shape not in self._native:
            heads, groups, channels = shape
            self._native[shape] = PackedLayout(
                self.cu_seqlens, heads=heads, groups=groups, channels=channels, dtype=q_TAC.dtype
            )
        return self._native[shape]

    def _fused(self, q_TAC: Tensor, k_TGC: Tensor, v_TGC: Tensor) -> Tensor:
        """By torch's kernel: neighbours of one length at once."""
        outputs = []
        lengths = [stop - start for start, stop in pairwise(self.cu_seqlens)]
        start = 0
        for length, run in itertools.groupby(lengths):
            stop = start + length * len(list(run))
            if length:
                parts = (x[start:stop].view(-1, length, *x.shape[1:]) for x in (q_TAC, k_TGC, v_TGC))
                outputs.append(_dense(*parts, causal=self.causal).flatten(0, 1))
            start = stop
        if len(outputs) == 1:
            return outputs[0]
        return torch.cat(outputs) if outputs else q_TAC.new_empty(q_TAC.shape)

    def _by_sequence(self, layer: int, q_TAC: Tensor, k_TGC: Tensor, v_TGC: Tensor) -> Tensor:
        """With dropout of the weights: they are made in full, a sequence at a time."""
        outputs = []
        for sequence, (start, stop) in enumerate(pairwise(self.cu_seqlens)):
            parts = (x[start:stop].transpose(0, 1) for x in (q_TAC, k_TGC, v_TGC))
            run = functools.partial(self._dropped, sequence=sequence, layer=layer)
            outputs.append(again(run, *parts) if self.selective and torch.is_grad_enabled() else run(*parts))
        return torch.cat([out_ASC.transpose(0, 1) for out_ASC in outputs])

    def _dropped(self, q_ASC: Tensor, k_GSC: Tensor, v_GSC: Tensor, *, sequence: int, layer: int) -> Tensor:
        assert self.dropout is not None
        per_group = q_ASC.shape[0] // k_GSC.shape[0]
        k_ASC, v_ASC = (x.repeat_interleave(per_group, 0) for x in (k_GSC, v_GSC))
        scores_ASS = q_ASC @ k_ASC.transpose(1, 2) * q_ASC.shape[2] ** -0.5
        if self.causal:
            later = torch.ones(scores_ASS.shape[1:], dtype=torch.bool, device=scores_ASS.device).triu(1)
            scores_ASS = scores_ASS.masked_fill(later, -torch.inf)
        weights_ASS = scores_ASS.softmax(-1, dtype=torch.promote_types(torch.float32, q_ASC.dtype)).to(q_ASC.dtype)
        return self.dropout.attention(weights_ASS, sample=sequence, layer=layer) @ v_ASC


def _is_native(q_TAC: Tensor, k_TGC: Tensor) -> bool:
    heads, channels = q_TAC.shape[1:]
    return (
        q_TAC.device.type == "cpu"
        and native_attention.takes(heads=heads, groups=k_TGC.shape[1], channels=channels, dtype=q_TAC.dtype)
        and not unavailable_reason()
    )


def _dense(q_BSAC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, *, causal: bool) -> Tensor:
    """Sequences of one length, each attending to itself, by torch's kernel: [B, S, A, C]."""
    out_BASC = F.scaled_dot_product_attention(
        q_BSAC.transpose(1, 2),
        k_BSGC.transpose(1, 2),
        v_BSGC.transpose(1, 2),
        is_causal=causal,
        enable_gqa=q_BSAC.shape[2] != k_BSGC.shape[2],
    )
    return out_BASC.transpose(1, 2)


class PagedKVCache:
    """
    Keys and values of this stage's layers that decode, in blocks of 16 tokens: `kv_LKGNSC` [layers, 2, G, N, 16, C].

    A block of a group is 16 * C contiguous elements, and one index_select over N gathers whole sequences. Memory is
    zeroed when made: positions that were never written take part in products with weight zero, so must be finite.
    With the native kernel (`is_native`) a block of keys lies transposed, [C, 16], which only that kernel reads.

    Args:
        native: use the compiled kernel; None uses it where it is available and takes the model's shape.
    """

    def __init__(
        self, config: ModelConfig, grid: Grid, *, num_blocks: int, dtype: torch.dtype, native: bool | None = None
    ) -> None:
        sizes = local_sizes(config, grid.tp.size)
        # The kernel scales scores and adds nothing to them.
        fits = (
            grid.device.type == "cpu"
            and config.position != "relative"
            and native_attention.takes(heads=sizes.heads, groups=sizes.groups, channels=config.head_dim, dtype=dtype)
        )
        self.is_native = fits and not unavailable_reason() if native is None else native
        assert not self.is_native or fits
        self.heads = sizes.heads
        num_layers = _decoder_layers(config, grid)
        self.num_blocks, self.groups, self.head_dim = num_blocks, sizes.groups, config.head_dim
        self.kv_LKGNSC = torch.zeros(
            num_layers, 2, sizes.groups, num_blocks, BLOCK_SIZE, config.head_dim, dtype=dtype, device=grid.device
        )
        # Views made once: per layer both kinds with kind and group folded, by block and by position.
        self.addresses = [kv.data_ptr() for kv in self.kv_LKGNSC.unbind(0)]
        self._by_block = [kv.flatten(0, 1) for kv in self.kv_LKGNSC.unbind(0)]
        self._keys = [kv[0].flatten(1, 2) for kv in self.kv_LKGNSC.unbind(0)]
        self._values = [kv[1].flatten(1, 2) for kv in self.kv_LKGNSC.unbind(0)]

    @staticmethod
    def bytes_per_block(config: ModelConfig, grid: Grid, dtype: torch.dtype) -> int:
        """Memory of one block on this rank, all its layers, keys and values together."""
        num_layers = _decoder_layers(config, grid)
        per_layer = 2 * local_sizes(config, grid.tp.size).groups * BLOCK_SIZE * config.head_dim
        return num_layers * per_layer * dtype.itemsize

    def copy_block(self, src: int, dst: int) -> None:
        """Copy one block, all layers (copy-on-write of a shared block)."""
        self.kv_LKGNSC[:, :, :, dst] = self.kv_LKGNSC[:, :, :, src]

    def write(self, layer: int, slots_T: Tensor, k_TGC: Tensor, v_TGC: Tensor) -> None:
        """Store new keys and values; a slot is block * 16 + offset."""
        self._keys[layer].index_copy_(1, slots_T, k_TGC.transpose(0, 1))
        self._values[layer].index_copy_(1, slots_T, v_TGC.transpose(0, 1))

    def gather(self, layer: int, blocks: Tensor, num_sequences: int) -> tuple[Tensor, Tensor]:
        """Keys and values [G * B, S, C] of B sequences that have equally many (padded) blocks, listed flat."""
        gathered = self._by_block[layer].index_select(1, blocks)
        kv = gathered.view(2, self.groups * num_sequences, -1, self.head_dim)
        return kv[0], kv[1]


def _decoder_layers(config: ModelConfig, grid: Grid) -> int:
    """How many of this stage's layers decode; a stage of an encoder-decoder may have none."""
    return sum(layer >= config.num_encoder_layers for layer in grid.layers(config.num_layers))


@dataclass
class PagedBatch:
    """
    One step's ragged batch. Sequence i has new tokens [cu_seqlens[i], cu_seqlens[i + 1]) and `context_lens[i]` tokens
    in the cache before them; `block_tables[i]` lists its blocks, enough for both; `slots_T`: where each new token goes.
    """

    cu_seqlens: list[int]
    context_lens: list[int]
    block_tables: list[list[int]]
    slots_T: Tensor

    @staticmethod
    def slots(block_tables: Sequence[Sequence[int]], context_lens: Sequence[int], new_lens: Sequence[int]) -> Tensor:
        """The slots of every new token, in batch order: int64 [T]."""
        slots = [
            table[position >> 4] * BLOCK_SIZE + (position & 15)
            for table, context, new in zip(block_tables, context_lens, new_lens, strict=True)
            for position in range(context, context + new)
        ]
        return torch.tensor(slots, dtype=torch.int64)


@dataclass
class _DecodeGroup:
    """Sequences with one new token each that share a padded gather."""

    rows_B: Tensor | None  # their tokens in T; None: the whole step, in order
    blocks: Tensor  # int64 [B * blocks per sequence]
    mask: Tensor  # [G * B, 1, S]: 0 where the sequence has a token, -inf elsewhere
    num_sequences: int


@dataclass
class _Chunk:
    """One sequence with several new tokens (prefill), or one of them in the batch-invariant mode."""

    start: int
    stop: int
    context_len: int
    blocks: Tensor
    masks: dict[int, Tensor] = field(default_factory=dict)  # by first query of a tile; shared by the layers


class PagedView:
    """
    One step of serving: new keys and values go to the paged cache, and each sequence attends to all of its own.

    Everything that depends on the batch alone is prepared here once and shared by all layers. With `batch_invariant`
    a row's bits don't depend on the batch, on how its prompt was cut into chunks, or on padding: every product has
    one shape (`ROW_TILE` rows, `KEY_TILE` keys), and what padding adds is exactly zero.
    """

    dropout: Dropout | None = None  # serving drops nothing

    def __init__(self, cache: PagedKVCache, batch: PagedBatch, *, batch_invariant: bool = False) -> None:
        self._cache, self._scale, self._is_invariant = cache, cache.head_dim**-0.5, batch_invariant
        dtype, self._device = cache.kv_LKGNSC.dtype, cache.kv_LKGNSC.device
        is_emulated = dtype != torch.float32 and self._device.type == "cpu" and not has_native_bf16()
        # Torch emulates bfloat16 products on CPUs without the instructions, many times slower than widening once.
        self._dtype = torch.float32 if is_emulated else dtype
        self._slots_T = batch.slots_T.to(self._device)
        if cache.is_native:  # invariant by its own order of additions
            self._native = NativeStep(
                heads=cache.heads,
                groups=cache.groups,
                channels=cache.head_dim,
                num_blocks=cache.num_blocks,
                dtype=dtype,
                bounds=batch.cu_seqlens,
                context_lens=batch.context_lens,
                tables=batch.block_tables,
                slots_T=self._slots_T,
            )
            return
        lens = [stop - start for start, stop in pairwise(batch.cu_seqlens)]
        singles = [i for i, new in enumerate(lens) if new == 1]
        self._decodes = [
            self._decode_group(batch, members, is_all=len(members) == len(lens))
            for members in similar_lengths(singles, batch.context_lens)
        ]
        self._chunks = [
            _Chunk(
                batch.cu_seqlens[i],
                batch.cu_seqlens[i + 1],
                batch.context_lens[i],
                self._device_blocks([self._table(batch, i, self._width(batch.context_lens[i] + new))]),
            )
            for i, new in enumerate(lens)
            if new > 1
        ]

    def attend(self, layer: int, q_TAC: Tensor, k_TGC: Tensor, v_TGC: Tensor) -> Tensor:
        """Write the new keys and values, then attend: [T, A, C]."""
        if self._cache.is_native:
            return self._native.attend(self._cache.addresses[layer], q_TAC, k_TGC, v_TGC)
        self._cache.write(layer, self._slots_T, k_TGC, v_TGC)
        if len(self._decodes) == 1 and self._decodes[0].rows_B is None:
            return self._decode(layer, self._decodes[0], q_TAC)
        out_TAC = torch.empty_like(q_TAC)
        for group in self._decodes:
            assert group.rows_B is not None
            out_TAC.index_copy_(0, group.rows_B, self._decode(layer, group, q_TAC.index_select(0, group.rows_B)))
        for chunk in self._chunks:
            span = slice(chunk.start, chunk.stop)
            if chunk.context_len == 0 and not self._is_invariant:
                q, k, v = (x[span].to(self._dtype) for x in (q_TAC, k_TGC, v_TGC))
                out_TAC[span] = _dense(*(x.unsqueeze(0) for x in (q, k, v)), causal=True).squeeze(0)
            else:
                out_TAC[span] = self._continue(layer, chunk, q_TAC[span])
        return out_TAC

    def _decode(self, layer: int, group: _DecodeGroup, q_BAC: Tensor) -> Tensor:
        """One token of each sequence: [B, A, C]. Rows of a product = query heads of a group."""
        num, groups, channels = group.num_sequences, self._cache.groups, self._cache.head_dim
        per_group = q_BAC.shape[1] // groups
        # B: (group, sequence) pairs
        k_BSC, v_BSC = (x.to(self._dtype) for x in self._cache.gather(layer, group.blocks, num))
        q_BQC = q_BAC.to(self._dtype).view(num, groups, per_group, channels).transpose(0, 1)
        out_BQC = self._softmax_product(q_BQC.reshape(groups * num, per_group, channels), k_BSC, v_BSC, group.mask)
        out_BAC = out_BQC.view(groups, num, per_group, channels).transpose(0, 1).reshape(num, -1, channels)
        return out_BAC.to(q_BAC.dtype)

    def _continue(self, layer: int, chunk: _Chunk, q_TAC: Tensor) -> Tensor:
        """A chunk of one sequence whose earlier tokens may be cached: [T, A, C], a tile of queries at a time."""
        groups, channels, context = self._cache.groups, self._cache.head_dim, chunk.context_len
        per_group = q_TAC.shape[1] // groups
        k_GSC, v_GSC = (x.to(self._dtype) for x in self._cache.gather(layer, chunk.blocks, 1))
        outputs = []
        for first in range(0, q_TAC.shape[0], QUERY_TILE):
            q_tile = q_TAC[first : first + QUERY_TILE].to(self._dtype)
            tile, num_keys = q_tile.shape[0], context + first + q_tile.shape[0]
            if self._is_invariant:
                num_keys = -(-num_keys // KEY_TILE) * KEY_TILE
            if first not in chunk.masks:
                last_key_T1 = torch.arange(context + first, context + first + tile).unsqueeze(1)
                mask_TS = torch.zeros(tile, num_keys).masked_fill_(torch.arange(num_keys) > last_key_T1, -torch.inf)
                chunk.masks[first] = mask_TS.repeat_interleave(per_group, 0).unsqueeze(0).to(self._device, self._dtype)
            q_GQC = q_tile.view(tile, groups, per_group, channels).transpose(0, 1).reshape(groups, -1, channels)
            out_GQC = self._softmax_product(q_GQC, k_GSC[:, :num_keys], v_GSC[:, :num_keys], chunk.masks[first])
            out_TAC = out_GQC.view(groups, tile, per_group, channels).transpose(0, 1)
            outputs.append(out_TAC.reshape(tile, -1, channels).to(q_TAC.dtype))
        return torch.cat(outputs)

    def _softmax_product(self, q_BQC: Tensor, k_BSC: Tensor, v_BSC: Tensor, mask: Tensor) -> Tensor:
        """softmax(Q K^T / sqrt(C) + mask) V, [B, Q, C]; B counts (group, sequence) pairs, Q rows of queries."""
        k_BCS = k_BSC.transpose(1, 2)
        if not self._is_invariant:
            scores_BQS = torch.baddbmm(mask.expand(q_BQC.shape[0], -1, -1), q_BQC, k_BCS, alpha=self._scale)
            return torch.bmm(scores_BQS.softmax(-1), v_BSC)
        rows = q_BQC.shape[1]
        q_BQC = F.pad(q_BQC, (0, 0, 0, -rows % ROW_TILE))
        keys = [slice(first, first + KEY_TILE) for first in range(0, k_BSC.shape[1], KEY_TILE)]
        scores_BQS = torch.cat([_row_tiles(q_BQC, k_BCS[:, :, span]) for span in keys], -1)
        weights_BQS = (scores_BQS[:, :rows] * self._scale + mask).softmax(-1)
        weights_BQS = F.pad(weights_BQS, (0, 0, 0, -rows % ROW_TILE))
        out_BQC = _row_tiles(weights_BQS[:, :, keys[0]], v_BSC[:, keys[0]])
        for span in keys[1:]:  # in order of position: a tile of padding adds exact zeros
            out_BQC = out_BQC + _row_tiles(weights_BQS[:, :, span], v_BSC[:, span])
        return out_BQC[:, :rows]

    def _decode_group(self, batch: PagedBatch, members: list[int], *, is_all: bool) -> _DecodeGroup:
        lens = torch.tensor([batch.context_lens[i] + 1 for i in members])
        width = self._width(int(lens.max()))
        blocks = self._device_blocks([self._table(batch, i, width) for i in members])
        is_beyond_BS = torch.arange(width * BLOCK_SIZE) >= lens.unsqueeze(1)
        mask_BS = torch.zeros(is_beyond_BS.shape, dtype=self._dtype).masked_fill_(is_beyond_BS, -torch.inf)
        rows = None if is_all else torch.tensor([batch.cu_seqlens[i] for i in members], device=self._device)
        mask = mask_BS.repeat(self._cache.groups, 1).unsqueeze(1).to(self._device)
        return _DecodeGroup(rows, blocks, mask, len(members))

    def _width(self, num_tokens: int) -> int:
        """Blocks to gather for so many tokens; whole key tiles in the batch-invariant mode."""
        size = KEY_TILE if self._is_invariant else BLOCK_SIZE
        return -(-num_tokens // size) * size // BLOCK_SIZE

    def _table(self, batch: PagedBatch, i: int, width: int) -> list[int]:
        """The first `width` blocks of a sequence, padded with its own first: nothing of a neighbour's is ever read."""
        table = batch.block_tables[i][:width]
        return table + [table[0]] * (width - len(table))

    def _device_blocks(self, tables: list[list[int]]) -> Tensor:
        return torch.tensor(tables, dtype=torch.int64, device=self._device).flatten()


def _row_tiles(a_BQX: Tensor, b_BXY: Tensor) -> Tensor:
    """A batched product made of products of `ROW_TILE` rows each: [B, Q, Y]."""
    rows, inner = a_BQX.shape[1:]
    if rows == ROW_TILE:
        return torch.bmm(a_BQX, b_BXY)
    tiles = rows // ROW_TILE
    return torch.stack(
        [
            torch.bmm(a_QX.reshape(tiles, ROW_TILE, inner), b_XY.expand(tiles, -1, -1)).flatten(0, 1)
            for a_QX, b_XY in zip(a_BQX, b_BXY, strict=True)
        ]
    )


def similar_lengths(members: list[int], lens: Sequence[int]) -> list[list[int]]:
    """Split sequences into groups that waste little on padding to their longest; order within a group is kept."""
    if not members:
        return []
    ordered = sorted(members, key=lambda i: -lens[i])
    groups = [[ordered[0]]]
    longest, padding, real = lens[ordered[0]], 0, 0  # `real` counts the others' tokens, not the longest one's
    for i in ordered[1:]:
        padding, real = padding + longest - lens[i], real + lens[i]
        if padding > max(real, PADDING_SLACK):
            groups.append([])
            longest, padding, real = lens[i], 0, 0
        groups[-1].append(i)
    return [sorted(group) for group in groups]
