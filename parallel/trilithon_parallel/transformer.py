"""
One config-driven block: norm, attention, norm, MLP, in the order and with the parts that the family has.

Shapes: T tokens, H hidden, A query heads, G key/value groups, C channels, F feed-forward; A, G, F are a rank's share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trilithon_parallel.activations import activation, native_gate
from trilithon_parallel.attention import AttentionView
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.grid import Grid
from trilithon_parallel.layers import Product
from trilithon_parallel.lora.adapter import columns, row
from trilithon_parallel.placement import local_sizes, sum_terms

if TYPE_CHECKING:
    from trilithon_parallel.backend import Backend


class Rotary:
    """
    Rotary positions (Su et al. 2021), half-split layout, angles in fp32; looked up, so a token's bits don't depend on
    its neighbours. `tables(positions)` is called once a step; every layer uses its result.
    """

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        half = config.head_dim // 2
        inverse_C = _frequencies(config, half)
        angles_SC = torch.outer(torch.arange(config.max_context, dtype=torch.float32), inverse_C)
        cos_SC, sin_SC = angles_SC.cos(), angles_SC.sin()
        # [max_context, 2, 1, C]: cosines of both halves; sines with the sign that the swapped halves need.
        self._table = torch.stack((torch.cat((cos_SC, cos_SC), -1), torch.cat((-sin_SC, sin_SC), -1)), 1).unsqueeze(2)
        self._table = self._table.to(device=device, dtype=dtype)

    def tables(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines [T, 1, C] of the step's positions."""
        cos_T1C, sin_T1C = self._table.index_select(0, positions_T).unbind(1)
        return cos_T1C, sin_T1C


def rotate(x_TAC: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (c, c + C/2) of channels by its position's angle."""
    if not torch.is_grad_enabled():
        return _turn(x_TAC, *tables)
    result: Tensor = _Rotation.apply(x_TAC, *tables)  # type: ignore[no-untyped-call]  # torch's apply is untyped
    return result


def _turn(x_TAC: Tensor, cos_T1C: Tensor, sin_T1C: Tensor) -> Tensor:
    low, high = x_TAC.chunk(2, -1)
    return torch.addcmul(x_TAC * cos_T1C, torch.cat((high, low), -1), sin_T1C)


class _Rotation(torch.autograd.Function):
    """A rotation's gradient is the rotation back: nothing of its input is kept."""

    @staticmethod
    def forward(ctx: Any, x_TAC: Tensor, cos_T1C: Tensor, sin_T1C: Tensor) -> Tensor:
        ctx.save_for_backward(cos_T1C, sin_T1C)
        return _turn(x_TAC, cos_T1C, sin_T1C)

    @staticmethod
    def backward(ctx: Any, grad_TAC: Tensor) -> tuple[Tensor, None, None]:
        cos_T1C, sin_T1C = ctx.saved_tensors
        return _turn(grad_TAC, cos_T1C, -sin_T1C), None, None


def _frequencies(config: ModelConfig, half: int) -> Tensor:
    """Inverse frequencies [C / 2]; `llama3` scaling as in Meta's release of Llama 3.1."""
    inverse = 1.0 / config.rope_theta ** (torch.arange(half, dtype=torch.float32) / half)
    scaling = config.rope_scaling
    if scaling is None:
        return inverse
    if scaling.kind == "linear":
        return inverse / scaling.factor
    # Turns that a channel makes within the trained context: many turns stay, few are slowed, a ramp lies between.
    turns = scaling.original_max_context * inverse / (2 * torch.pi)
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    ramp = ramp.clamp(0.0, 1.0)
    return inverse / scaling.factor * (1 - ramp) + inverse * ramp


def join(
    row_linear: nn.Module, x_TK: Tensor, residual_TH: Tensor, *, layer: int, site: str, view: AttentionView
) -> Tensor:
    """The residual stream after a part's last product, with dropout between the two where the view has any."""
    if view.dropout is None or view.dropout.hidden_rate == 0.0:
        return row(row_linear, x_TK, residual_TH, layer=layer, view=view)
    return residual_TH + view.dropout.hidden(
        row(row_linear, x_TK, None, layer=layer, view=view), layer=layer, site=site
    )


class Attention(nn.Module):
    """Grouped-query attention with heads cut by tp; keys and values go through the step's view."""

    def __init__(self, config: ModelConfig, *, grid: Grid, backend: Backend, dtype: torch.dtype) -> None:
        super().__init__()
        sizes = local_sizes(config, grid.tp.size)
        self.heads, self.groups, self.head_dim = sizes.heads, sizes.groups, config.head_dim
        self.grid, self.backend = grid, backend
        width, kv_width = sizes.heads * config.head_dim, sizes.groups * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (
            backend.column_linear(config.hidden_size, rows, bias=config.qkv_bias, grid=grid, dtype=dtype)
            for rows in (width, kv_width, kv_width)
        )
        terms = sum_terms("q", config, tp=grid.tp.size, tp_rank=grid.tp.rank)
        self.o_proj = backend.row_linear(terms, config.hidden_size, bias=config.out_bias, grid=grid, dtype=dtype)
        self.fused: Product | None = None

    def forward(
        self, x_TH: Tensor, residual_TH: Tensor, *, layer: int, rope: tuple[Tensor, Tensor] | None, view: AttentionView
    ) -> Tensor:
        """Normed input and the residual stream, both [T, H] -> the residual stream after attention."""
        if self.fused is not None:
            qkv_TAC = self.fused(x_TH).view(x_TH.shape[0], -1, self.head_dim)
            q_TAC, k_TGC, v_TGC = torch.split(qkv_TAC, [self.heads, self.groups, self.groups], 1)
        else:
            x_TH = self.backend.enter_columns(x_TH, self.grid)
            # A backend's products may gather their input themselves: they say how many tokens there are.
            parts = columns((self.q_proj, self.k_proj, self.v_proj), x_TH, layer=layer, view=view)
            q_TAC, k_TGC, v_TGC = (part.view(part.shape[0], -1, self.head_dim) for part in parts)
        if rope is not None:
            # Turned together, as one product gives them: a copy where there were three.
            qk_TAC = torch.cat((q_TAC, k_TGC), 1) if self.fused is None else qkv_TAC[:, : -self.groups]
            q_TAC, k_TGC = torch.split(rotate(qk_TAC, rope), [self.heads, self.groups], 1)
        out_TAC = view.attend(layer, q_TAC, k_TGC, v_TGC)
        return join(self.o_proj, out_TAC.flatten(1), residual_TH, layer=layer, site="attention", view=view)

    def prepare(self) -> None:
        """Pack for serving: q, k and v become one product."""
        self.fused = self.backend.pack_columns([self.q_proj, self.k_proj, self.v_proj])
        self.backend.pack_row(self.o_proj)


class MLP(nn.Module):
    """down(act(up(x))) or, gated, down(silu(gate(x)) * up(x)); F is cut by tp."""

    def __init__(self, config: ModelConfig, *, grid: Grid, backend: Backend, dtype: torch.dtype) -> None:
        super().__init__()
        ffn = local_sizes(config, grid.tp.size).ffn
        self.grid, self.backend = grid, backend
        self.activate = activation(config.activation, invariant=backend.batch_invariant)
        self.gate_up = native_gate(config.activation, dtype=dtype, device=grid.device)
        self.gate_proj = (
            backend.column_linear(config.hidden_size, ffn, bias=config.mlp_bias, grid=grid, dtype=dtype)
            if config.gated_mlp
            else None
        )
        self.up_proj = backend.column_linear(config.hidden_size, ffn, bias=config.mlp_bias, grid=grid, dtype=dtype)
        terms = sum_terms("ffn", config, tp=grid.tp.size, tp_rank=grid.tp.rank)
        self.down_proj = backend.row_linear(terms, config.hidden_size, bias=config.mlp_bias, grid=grid, dtype=dtype)
        self.fused: Product | None = None

    def forward(self, x_TH: Tensor, residual_TH: Tensor, *, layer: int, view: AttentionView) -> Tensor:
        """Normed input and the residual stream, both [T, H] -> the residual stream after the MLP."""
        if self.fused is not None:
            y_TF = self.fused(x_TH)
            gate_TF, up_TF = y_TF.chunk(2, -1) if self.gate_proj is not None else (None, y_TF)
        else:
            x_TH = self.backend.enter_columns(x_TH, self.grid)
            parts = [self.up_proj] if self.gate_proj is None else [self.gate_proj, self.up_proj]
            *gate, up_TF = columns(parts, x_TH, layer=layer, view=view)
            gate_TF = gate[0] if gate else None
        if gate_TF is None:
            hidden_TF = self.activate(up_TF)
        elif self.gate_up is not None:
            hidden_TF = self.gate_up(gate_TF, up_TF)
        else:
            hidden_TF = self.activate(gate_TF) * up_TF
        return join(self.down_proj, hidden_TF, residual_TH, layer=layer, site="mlp", view=view)

    def prepare(self) -> None:
        """Pack for serving: gate and up become one product."""
        parts = [self.up_proj] if self.gate_proj is None else [self.gate_proj, self.up_proj]
        self.fused = self.backend.pack_columns(parts)
        self.backend.pack_row(self.down_proj)


class Block(nn.Module):
    """One layer. Pre-norm (Llama, GPT-2): norms before the parts; post-norm (BERT): after the residual sums."""

    def __init__(self, config: ModelConfig, *, grid: Grid, backend: Backend, dtype: torch.dtype) -> None:
        super().__init__()
        self.is_pre_norm = config.norm_order == "pre"
        self.self_attn = Attention(config, grid=grid, backend=backend, dtype=dtype)
        self.mlp = MLP(config, grid=grid, backend=backend, dtype=dtype)
        self.post_attention_layernorm = backend.norm(config, grid=grid, dtype=dtype)
        other = backend.norm(config, grid=grid, dtype=dtype)
        if self.is_pre_norm:
            self.input_layernorm = other
        else:
            self.output_layernorm = other

    def forward(self, x_TH: Tensor, *, layer: int, rope: tuple[Tensor, Tensor] | None, view: AttentionView) -> Tensor:
        """The residual stream [T, H] through one layer; `layer` counts within the stage."""
        if self.is_pre_norm:
            x_TH = self.self_attn(self.input_layernorm(x_TH), x_TH, layer=layer, rope=rope, view=view)
            x_TH = self.mlp(self.post_attention_layernorm(x_TH), x_TH, layer=layer, view=view)
        else:
            x_TH = self.post_attention_layernorm(self.self_attn(x_TH, x_TH, layer=layer, rope=rope, view=view))
            x_TH = self.output_layernorm(self.mlp(x_TH, x_TH, layer=layer, view=view))
        return x_TH

    def prepare(self) -> None:
        """Pack every product of the layer for serving."""
        self.self_attn.prepare()
        self.mlp.prepare()
