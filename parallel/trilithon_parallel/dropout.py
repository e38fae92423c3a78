"""
Dropout that doesn't depend on the layout: a mask is a function of seed, step, sample, layer and site.

It is drawn for the whole sample and all heads, and a rank takes its part. So one process, tensor-parallel ranks,
sequence-parallel ranks and a second computation of the same layer all drop the same elements.

Shapes: T packed tokens, H hidden, K inputs of an adapter (a rank's share), A query heads (a rank's share), S tokens of
a sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trilithon_parallel.grid import Grid


@dataclass(frozen=True)
class DropoutRates:
    """Shares that are dropped while training: of the residual stream's inputs, attention weights, adapters' inputs."""

    hidden: float = 0.0
    attention: float = 0.0
    adapter: float = 0.0


@dataclass(frozen=True)
class Dropout:
    """
    The masks of one micro-batch on one stage.

    `hidden_rate`, `attention_rate`: shares that are dropped, 0 <= rate < 1. `sample_ids` and `lengths`: the global
    samples that are packed here and their tokens, in order. `first_layer`: the global id of the stage's first layer.
    `adapter_rate`: of adapters' inputs.
    """

    hidden_rate: float
    attention_rate: float
    seed: int
    step: int
    sample_ids: Sequence[int]
    lengths: Sequence[int]
    grid: Grid
    first_layer: int
    adapter_rate: float = 0.0

    def hidden(self, x_TH: Tensor, *, layer: int, site: str) -> Tensor:
        """Drop elements of the stream [T, H], or of this rank's tokens of it under sequence parallelism."""
        if self.hidden_rate == 0.0:
            return x_TH
        shape = x_TH.shape[1:]
        keep = torch.cat(
            [
                self._keep((size, *shape), self.hidden_rate, sample, layer, site)
                for sample, size in zip(self.sample_ids, self.lengths, strict=True)
            ]
        )
        if self.grid.sequence_parallel:
            keep = keep.chunk(self.grid.tp.size)[self.grid.tp.rank]
        return _drop(x_TH, keep, self.hidden_rate)

    def pooled(self, x_BH: Tensor, *, layer: int, site: str) -> Tensor:
        """Drop elements of one vector a sample, [B, H], the same on every rank."""
        if self.hidden_rate == 0.0:
            return x_BH
        shape = tuple(x_BH.shape[1:])
        keep = torch.stack([self._keep(shape, self.hidden_rate, sample, layer, site) for sample in self.sample_ids])
        return _drop(x_BH, keep, self.hidden_rate)

    def inputs(self, x_TK: Tensor, *, layer: int, site: str, size: int, start: int) -> Tensor:
        """Drop inputs of an adapter: [T, K], all tokens, and of `size` columns those of this rank, from `start` on."""
        if self.adapter_rate == 0.0:
            return x_TK
        keep = torch.cat(
            [
                self._keep((length, size), self.adapter_rate, sample, layer, site)
                for sample, length in zip(self.sample_ids, self.lengths, strict=True)
            ]
        )[:, start : start + x_TK.shape[1]]
        missing = x_TK.shape[1] - keep.shape[1]  # padding, which is zero anyway
        return _drop(x_TK, F.pad(keep, (0, missing)) if missing else keep, self.adapter_rate)

    def attention(self, weights_ASS: Tensor, *, sample: int, layer: int) -> Tensor:
        """Drop weights [A, S, S] of the sample at index `sample` of this micro-batch; A is this rank's share."""
        if self.attention_rate == 0.0:
            return weights_ASS
        heads, *shape = weights_ASS.shape
        keep = torch.stack(
            [
                self._keep(tuple(shape), self.attention_rate, self.sample_ids[sample], layer, f"head{head}")
                for head in range(self.grid.tp.rank * heads, (self.grid.tp.rank + 1) * heads)
            ]
        )
        return _drop(weights_ASS, keep, self.attention_rate)

    def _keep(self, shape: tuple[int, ...], rate: float, sample: int, layer: int, site: str) -> Tensor:
        key = f"{self.seed}/{self.step}/{sample}/{self.first_layer + layer}/{site}".encode()
        seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= rate


def _drop(x: Tensor, keep: Tensor, rate: float) -> Tensor:
    result: Tensor = _Drop.apply(x, keep.to(x.device), 1.0 / (1.0 - rate))  # type: ignore[no-untyped-call]  # torch's is
    return result


class _Drop(torch.autograd.Function):
    """x * mask * scale; of it all, a byte an element is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return torch.where(keep, x * scale, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return torch.where(keep, grad * ctx.scale, 0.0), None, None
