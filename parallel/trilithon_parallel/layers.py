"""
The sharded layers: column- and row-parallel products, the vocabulary-parallel embedding, the norms.

Shapes: T packed tokens, H hidden, K inputs and O outputs of a product, V vocabulary; a sharded size is the local one.
Training and serving use these very classes. Packing is for serving alone: it moves the weights into the backend's
packed form, so that each weight is in memory once, and the parameters are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilithon_parallel.collectives import leave_rows
from trilithon_parallel.grid import Grid

if TYPE_CHECKING:
    from trilithon_parallel.lora.adapter import Adapter


class Product(Protocol):
    """A packed product Y = X W^T + b. `residual`, where given, is added to the result."""

    def __call__(self, x_TK: Tensor, residual_TO: Tensor | None = None) -> Tensor:
        """[T, K] -> [T, O], in the residual's dtype where one is given; without, a sum may come in a wider one."""
        ...


def empty_parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An uninitialised parameter: a loader or an initialiser must fill it before use."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device))


class ColumnParallelLinear(nn.Module):
    """
    Y = X W^T + b with W cut by output rows: every rank makes its own slice of Y from the whole X.

    The paper's f (`enter_columns`) belongs before it; the block applies it once for several products of one input.
    `terms`: None where the whole input is every rank's, else as for `RowParallelLinear`.
    """

    terms: Sequence[int] | None = None
    adapter: Adapter | None = None

    def __init__(
        self, in_features: int, out_local: int, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.weight = empty_parameter(out_local, in_features, dtype=dtype, device=device)
        self.bias = empty_parameter(out_local, dtype=dtype, device=device) if bias else None
        self.product: Product | None = None

    def forward(self, x_TK: Tensor) -> Tensor:
        """[T, K] -> [T, O], O local."""
        return F.linear(x_TK, self.weight, self.bias) if self.product is None else self.product(x_TK)


class RowParallelLinear(nn.Module):
    """
    Y = g(X W^T) + b with W cut by input columns: the ranks' shares are summed, then the bias is added once.

    `terms` are the sizes of the pieces that this rank's inputs consist of at any tp (`placement.sum_terms`); their sum
    is `in_local`. A packed product may keep its sum in a wider dtype until the residual stream takes it: one rounding,
    after the last rank's share.
    """

    adapter: Adapter | None = None

    def __init__(self, terms: Sequence[int], out_features: int, *, bias: bool, grid: Grid, dtype: torch.dtype) -> None:
        super().__init__()
        self.grid, self.terms = grid, tuple(terms)
        self.weight = empty_parameter(out_features, sum(terms), dtype=dtype, device=grid.device)
        self.bias = empty_parameter(out_features, dtype=dtype, device=grid.device) if bias else None
        self.product: Product | None = None

    def forward(
        self, x_TK: Tensor, residual_TO: Tensor | None, adapt: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """
        [T, K] local -> [T, O] on every rank (with sequence parallelism the rank's tokens, [T / tp, O]).

        `residual_TO`: the residual stream, of the result's shape, that the result is added to; None for none. `adapt`
        adds an adapter's share to this rank's share of the product.
        """
        if self.product is None:
            y_TO = F.linear(x_TK, self.weight)
        elif self.grid.tp.is_trivial:
            y_TO = self.product(x_TK, residual_TO).to(x_TK.dtype)
            return y_TO if adapt is None else adapt(y_TO)
        else:
            y_TO = self.product(x_TK)
        y_TO = leave_rows(y_TO if adapt is None else adapt(y_TO), self.grid)
        if self.bias is not None:
            y_TO = y_TO + self.bias
        return (y_TO if residual_TO is None else residual_TO + y_TO).to(x_TK.dtype)

    def pack(self, make: Callable[[Tensor, Tensor | None], Product]) -> None:
        """Serve from here on: the weight, and the bias where no sum comes between, move into `make`'s product."""
        is_alone = self.grid.tp.is_trivial
        self.product = make(self.weight.detach(), None if self.bias is None or not is_alone else self.bias.detach())
        release(self, keep=() if is_alone else ("bias",))


class VocabParallelEmbedding(nn.Module):
    """Rows of the embedding cut by vocabulary: a rank looks up its own range, others give zeros, and g sums them."""

    def __init__(self, vocab_local: int, hidden: int, *, grid: Grid, dtype: torch.dtype) -> None:
        super().__init__()
        self.grid, self.vocab_local = grid, vocab_local
        self.weight = empty_parameter(vocab_local, hidden, dtype=dtype, device=grid.device)

    def forward(self, tokens_T: Tensor) -> Tensor:
        """int64 [T] -> [T, H], or the rank's tokens of it. Exact at any tp: all but one of the summed rows are zero."""
        if self.grid.tp.is_trivial:
            return lookup(self.weight, tokens_T)
        local_T = tokens_T - self.grid.tp.rank * self.vocab_local
        is_mine_T = (local_T >= 0) & (local_T < self.vocab_local)
        rows_TH = lookup(self.weight, torch.where(is_mine_T, local_T, 0))
        return leave_rows(torch.where(is_mine_T.unsqueeze(-1), rows_TH, 0.0), self.grid)


class _Lookup(torch.autograd.Function):
    """Rows of a table whose gradients are added where they belong, not made as a table of zeros first."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, index_T: Tensor) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(index_T)
        return F.embedding(index_T, weight)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[None, None]:
        (index_T,) = ctx.saved_tensors
        ctx.weight.main_grad.index_add_(0, index_T, grad_TH.to(ctx.weight.main_grad.dtype))
        return None, None


def lookup(weight: Tensor, index_T: Tensor) -> Tensor:
    """Rows [T, H] of a table [rows, H]; gradients go straight to the table's `main_grad` where it has one."""
    if hasattr(weight, "main_grad") and torch.is_grad_enabled():
        result: Tensor = _Lookup.apply(weight, index_T)  # type: ignore[no-untyped-call]  # torch's apply is untyped
        return result
    return F.embedding(index_T, weight)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * w; the mean and the scaling in fp32 (Zhang and Sennrich 2019)."""

    def __init__(self, hidden: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = empty_parameter(hidden, dtype=dtype, device=device)
        self._eps = torch.tensor(eps, dtype=torch.promote_types(dtype, torch.float32), device=device)

    def forward(self, x_TH: Tensor) -> Tensor:
        """[T, H] -> [T, H]. Three small operators for the scale: on CPUs torch's own `rms_norm` takes twice as long."""
        if not torch.is_grad_enabled():
            return (x_TH * _rms_scale(x_TH, self._eps)).to(x_TH.dtype) * self.weight
        result: Tensor = _RMSNorm.apply(x_TH, self.weight, self._eps)  # type: ignore[no-untyped-call]  # as above
        return result


def _rms_scale(x_TH: Tensor, eps: Tensor) -> Tensor:
    """1 / sqrt(mean(x^2) + eps), [T, 1]."""
    norm_T1 = torch.linalg.vector_norm(x_TH, dim=-1, keepdim=True, dtype=eps.dtype)
    return torch.rsqrt(torch.addcmul(eps, norm_T1, norm_T1, value=1.0 / x_TH.shape[-1]))


class _RMSNorm(torch.autograd.Function):
    """The same operators as without a gradient; the backward keeps the input and one number a token."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weight_H: Tensor, eps: Tensor) -> Tensor:
        scale_T1 = _rms_scale(x_TH, eps)
        ctx.save_for_backward(x_TH, weight_H, scale_T1)
        return (x_TH * scale_T1).to(x_TH.dtype) * weight_H

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x_TH, weight_H, scale_T1 = ctx.saved_tensors
        unit_TH, inner_TH = x_TH * scale_T1, grad_TH * weight_H
        mean_T1 = (inner_TH * unit_TH).mean(-1, keepdim=True)
        d_x_TH = torch.addcmul(inner_TH, unit_TH, mean_T1, value=-1.0) * scale_T1
        d_weight_H = (grad_TH * unit_TH).sum(0).to(weight_H.dtype) if ctx.needs_input_grad[1] else None
        return d_x_TH.to(x_TH.dtype), d_weight_H, None


class LayerNorm(nn.Module):
    """y = (x - mean) / sqrt(var + eps) * w + b; statistics in fp32 (torch's kernel keeps them so)."""

    def __init__(self, hidden: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.weight = empty_parameter(hidden, dtype=dtype, device=device)
        self.bias = empty_parameter(hidden, dtype=dtype, device=device)

    def forward(self, x_TH: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        return F.layer_norm(x_TH, self.weight.shape, self.weight, self.bias, self.eps)


def release(module: nn.Module, *, keep: Sequence[str] = ()) -> None:
    """Drop a module's own parameters (not its children's), but for `keep`: their memory is the packed product's now."""
    for name in list(module._parameters):
        if name not in keep:
            module._parameters[name] = None
