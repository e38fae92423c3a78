"""
T5's blocks (Raffel et al. 2020): pre-norm without biases, unscaled attention with a bias by distance, and in the
decoder a second attention over what the encoder made.

Shapes: T tokens of a block's stream, E tokens of the encoder, B sequences, H hidden, A heads, C channels of a head, F
feed-forward, S positions; A and F are a rank's share.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilithon_parallel.backend import Backend
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.grid import Grid
from trilithon_parallel.layers import empty_parameter
from trilithon_parallel.placement import local_sizes, sum_terms

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def distance_buckets(distance: Tensor, *, bidirectional: bool, num_buckets: int, max_distance: int) -> Tensor:
    """
    The bucket of each distance (place of the key minus place of the query), int64 in [0, num_buckets).

    Near distances have a bucket each, farther ones share buckets that widen with their logarithm, and all beyond
    `max_distance` share one. With `bidirectional` the upper half of the buckets is for keys after the query; without,
    all of these are at distance 0.
    """
    first = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        first = (distance > 0) * num_buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = num_buckets // 2
    # The order of these fp32 operators decides which side of a border a distance falls on.
    share = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    wide = (exact + (share * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return first + torch.where(distance < exact, distance, wide)


class RelativeBias(nn.Module):
    """The table of one stack [buckets, A], heads cut by tp: its first layer's in the paper, read by all of them."""

    def __init__(self, config: ModelConfig, *, bidirectional: bool, grid: Grid, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.bidirectional = config, bidirectional
        heads = local_sizes(config, grid.tp.size).heads
        self.weight = empty_parameter(config.relative_buckets, heads, dtype=dtype, device=grid.device)

    def forward(self, length: int) -> Tensor:
        """What is added to the scores of a sequence of that many tokens: [A, S, S]; -inf where it may not look."""
        distance = torch.arange(1 - length, length, device=self.weight.device)
        by_distance = F.embedding(self._buckets(distance), self.weight).t()
        if not self.bidirectional:
            by_distance = by_distance.masked_fill(distance > 0, -torch.inf)
        # Query i reads distances -i .. S - 1 - i: the window that starts at S - 1 - i.
        return by_distance.unfold(1, length, 1).flip(1)

    def between(self, places_BQ: Tensor, num_keys: int) -> Tensor:
        """The same for queries at given places of B sequences, and keys from 0 on: [B, A, Q, num_keys]."""
        distance_BQS = torch.arange(num_keys, device=self.weight.device) - places_BQ.unsqueeze(-1)
        by_distance = F.embedding(self._buckets(distance_BQS), self.weight).permute(0, 3, 1, 2)
        return by_distance if self.bidirectional else by_distance.masked_fill(distance_BQS.unsqueeze(1) > 0, -torch.inf)

    def _buckets(self, distance: Tensor) -> Tensor:
        return distance_buckets(
            distance,
            bidirectional=self.bidirectional,
            num_buckets=self.config.relative_buckets,
            max_distance=self.config.relative_max_distance,
        )


@dataclass(frozen=True)
class Looking:
    """
    Who looks at whom in one kind of attention: sequence i of the queries at sequence i of the keys.

    `queries` and `keys` are the B + 1 boundaries of both sides. `by_distance_ASS` is added to the scores (its corner,
    where a sequence is shorter than S), and so is `by_key_E`, one number for each token that is looked at.
    """

    queries: Sequence[int]
    keys: Sequence[int]
    by_distance_ASS: Tensor | None = None
    by_key_E: Tensor | None = None

    def attend(self, q_TAC: Tensor, k_EAC: Tensor, v_EAC: Tensor) -> Tensor:
        """Unscaled attention: [T, A, C]. Neighbours of equal lengths run as one batch."""
        lens = zip(pairwise(self.queries), pairwise(self.keys), strict=True)
        shapes = [(q_stop - q_start, k_stop - k_start) for (q_start, q_stop), (k_start, k_stop) in lens]
        outputs, q_at, k_at = [], self.queries[0], self.keys[0]
        for (queries, keys), run in itertools.groupby(shapes):
            num = len(list(run))
            q_BATC, k_BASC, v_BASC = (
                x[at : at + num * length].view(num, length, *x.shape[1:]).transpose(1, 2)
                for x, at, length in ((q_TAC, q_at, queries), (k_EAC, k_at, keys), (v_EAC, k_at, keys))
            )
            bias = None if self.by_distance_ASS is None else self.by_distance_ASS[:, :queries, :keys].to(q_TAC.dtype)
            if self.by_key_E is not None:
                by_key_B11S = self.by_key_E[k_at : k_at + num * keys].view(num, 1, 1, keys).to(q_TAC.dtype)
                bias = by_key_B11S if bias is None else bias + by_key_B11S
            out_BATC = F.scaled_dot_product_attention(q_BATC, k_BASC, v_BASC, attn_mask=bias, scale=1.0)
            outputs.append(out_BATC.transpose(1, 2).flatten(0, 1))
            q_at, k_at = q_at + num * queries, k_at + num * keys
        return torch.cat(outputs)


class T5Attention(nn.Module):
    """Attention with heads cut by tp, of a stream to itself or to another one."""

    def __init__(self, config: ModelConfig, *, grid: Grid, backend: Backend, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.head_dim = local_sizes(config, grid.tp.size).heads, config.head_dim
        self.grid, self.backend = grid, backend
        self.q_proj, self.k_proj, self.v_proj = (
            backend.column_linear(config.hidden_size, self.heads * self.head_dim, bias=False, grid=grid, dtype=dtype)
            for _ in range(3)
        )
        terms = sum_terms("q", config, tp=grid.tp.size, tp_rank=grid.tp.rank)
        self.o_proj = backend.row_linear(terms, config.hidden_size, bias=False, grid=grid, dtype=dtype)

    def forward(
        self, x_TH: Tensor, residual_TH: Tensor, *, looking: Looking, memory_EH: Tensor | None = None
    ) -> Tensor:
        """
        Normed input and the residual stream, both [T, H] -> the residual stream after attention.

        `memory_EH` is what to look at, as `Backend.enter_columns` gives it; None for the input itself.
        """
        x_TH = self.backend.enter_columns(x_TH, self.grid)
        keys_values = self.keys_values(x_TH if memory_EH is None else memory_EH)
        return self.output(looking.attend(self.queries(x_TH), *keys_values), residual_TH)

    def queries(self, x_TH: Tensor) -> Tensor:
        """Of an input as `Backend.enter_columns` gives it: [T, A, C]."""
        return self._heads(self.q_proj(x_TH))

    def keys_values(self, memory_EH: Tensor) -> tuple[Tensor, Tensor]:
        """Of what to look at, as `Backend.enter_columns` gives it: twice [E, A, C]."""
        return self._heads(self.k_proj(memory_EH)), self._heads(self.v_proj(memory_EH))

    def output(self, out_TAC: Tensor, residual_TH: Tensor) -> Tensor:
        """What the heads found, added to the residual stream: [T, H]."""
        result: Tensor = self.o_proj(out_TAC.flatten(1), residual_TH)
        return result

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(-1, self.heads, self.head_dim)


class FeedForward(nn.Module):
    """down(relu(up(x))) of version 1.0, down(gelu(gate(x)) * up(x)) of 1.1; F is cut by tp."""

    def __init__(self, config: ModelConfig, *, grid: Grid, backend: Backend, dtype: torch.dtype) -> None:
        super().__init__()
        ffn, hidden = local_sizes(config, grid.tp.size).ffn, config.hidden_size
        self.grid, self.backend, self.activate = grid, backend, _ACTIVATIONS[config.activation]
        if config.gated_mlp:
            self.gate_proj = backend.column_linear(hidden, ffn, bias=False, grid=grid, dtype=dtype)
        self.up_proj = backend.column_linear(hidden, ffn, bias=False, grid=grid, dtype=dtype)
        terms = sum_terms("ffn", config, tp=grid.tp.size, tp_rank=grid.tp.rank)
        self.down_proj = backend.row_linear(terms, hidden, bias=False, grid=grid, dtype=dtype)
        self.is_gated = config.gated_mlp

    def forward(self, x_TH: Tensor, residual_TH: Tensor) -> Tensor:
        """Normed input and the residual stream, both [T, H] -> the residual stream after the MLP."""
        x_TH = self.backend.enter_columns(x_TH, self.grid)
        up_TF = self.up_proj(x_TH)
        hidden_TF = self.activate(self.gate_proj(x_TH)) * up_TF if self.is_gated else self.activate(up_TF)
        result: Tensor = self.down_proj(hidden_TF, residual_TH)
        return result


class T5Block(nn.Module):
    """One layer of either stack; a decoder's has cross-attention between its attention and its MLP."""

    def __init__(
        self, config: ModelConfig, *, has_cross: bool, grid: Grid, backend: Backend, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.input_layernorm = backend.norm(config, grid=grid, dtype=dtype)
        self.self_attn = T5Attention(config, grid=grid, backend=backend, dtype=dtype)
        if has_cross:
            self.cross_attention_layernorm = backend.norm(config, grid=grid, dtype=dtype)
            self.cross_attn = T5Attention(config, grid=grid, backend=backend, dtype=dtype)
        self.post_attention_layernorm = backend.norm(config, grid=grid, dtype=dtype)
        self.mlp = FeedForward(config, grid=grid, backend=backend, dtype=dtype)

    def forward(
        self, x_TH: Tensor, *, inward: Looking, across: Looking | None = None, memory_EH: Tensor | None = None
    ) -> Tensor:
        """
        The residual stream [T, H] through one layer.

        `inward`: at the stream itself. A decoder's layer looks `across` too, at `memory_EH`, the encoder's output as
        `Backend.enter_columns` gives it.
        """
        x_TH = self.self_attn(self.input_layernorm(x_TH), x_TH, looking=inward)
        if across is not None:
            x_TH = self.cross_attn(self.cross_attention_layernorm(x_TH), x_TH, looking=across, memory_EH=memory_EH)
        result: Tensor = self.mlp(self.post_attention_layernorm(x_TH), x_TH)
        return result
