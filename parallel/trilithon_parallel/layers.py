"""
The sharded layers: column- and row-parallel products, the vocabulary-parallel embedding, the norms.

Shapes: T packed tokens, H hidden, K inputs and O outputs of a product, V vocabulary; a sharded size is the local one.
Training and serving use these very classes. Packing is for serving alone: it moves the weights into the backend's
packed form, so that each weight is in memory once, and the parameters are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilithon_parallel.collectives import reduce_from_tp
from trilithon_parallel.grid import Axis


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

    The paper's f (`copy_to_tp`) belongs before it; it is applied once for several products of one input, by the block.
    """

    def __init__(
        self, in_features: int, out_local: int, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.weight = empty_parameter(out_local, in_features, dtype=dtype, device=device)
        self.bias = empty_parameter(out_local, dtype=dtype, device=device) if bias else None

    def forward(self, x_TK: Tensor) -> Tensor:
        """[T, K] -> [T, O], O local."""
        return F.linear(x_TK, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """
    Y = g(X W^T) + b with W cut by input columns: the ranks' shares are summed, then the bias is added once.

    `terms` are the sizes of the pieces that this rank's inputs consist of at any tp (`placement.sum_terms`); their sum
    is `in_local`. A packed product may keep its sum in a wider dtype until the residual stream takes it: one rounding,
    after the last rank's share.
    """

    def __init__(
        self,
        terms: Sequence[int],
        out_features: int,
        *,
        bias: bool,
        axis: Axis,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.axis, self.terms = axis, tuple(terms)
        self.weight = empty_parameter(out_features, sum(terms), dtype=dtype, device=device)
        self.bias = empty_parameter(out_features, dtype=dtype, device=device) if bias else None
        self.product: Product | None = None

    def forward(self, x_TK: Tensor, residual_TO: Tensor) -> Tensor:
        """[T, K] local, and the residual stream [T, O] that the result is added to -> [T, O] on every rank."""
        if self.product is not None:
            if self.axis.size == 1:
                return self.product(x_TK, residual_TO)
            y_TO = self.product(x_TK)
        else:
            y_TO = F.linear(x_TK, self.weight)
        y_TO = reduce_from_tp(y_TO, self.axis)
        if self.bias is not None and (self.product is None or self.axis.size > 1):
            y_TO = y_TO + self.bias
        return (residual_TO + y_TO).to(residual_TO.dtype)

    def pack(self, make: Callable[[Tensor, Tensor | None], Product]) -> None:
        """Serve from here on: the weight, and the bias where no sum comes between, move into `make`'s product."""
        is_alone = self.axis.size == 1
        self.product = make(self.weight.detach(), None if self.bias is None or not is_alone else self.bias.detach())
        release(self, keep=() if is_alone else ("bias",))


class VocabParallelEmbedding(nn.Module):
    """Rows of the embedding cut by vocabulary: a rank looks up its own range, others give zeros, and g sums them."""

    def __init__(self, vocab_local: int, hidden: int, *, axis: Axis, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.axis, self.vocab_local = axis, vocab_local
        self.weight = empty_parameter(vocab_local, hidden, dtype=dtype, device=device)

    def forward(self, tokens_T: Tensor) -> Tensor:
        """int64 [T] -> [T, H]. Exact at any tp: all but one of the summed rows are zero."""
        if self.axis.is_trivial:
            return F.embedding(tokens_T, self.weight)
        local_T = tokens_T - self.axis.rank * self.vocab_local
        is_mine_T = (local_T >= 0) & (local_T < self.vocab_local)
        rows_TH = F.embedding(torch.where(is_mine_T, local_T, 0), self.weight)
        return reduce_from_tp(torch.where(is_mine_T.unsqueeze(-1), rows_TH, 0.0), self.axis)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * w; the mean and the scaling in fp32 (Zhang and Sennrich 2019)."""

    def __init__(self, hidden: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = empty_parameter(hidden, dtype=dtype, device=device)
        self._eps = torch.tensor(eps, dtype=torch.float32, device=device)

    def forward(self, x_TH: Tensor) -> Tensor:
        """[T, H] -> [T, H]. Three small operators for the scale: on CPUs torch's own `rms_norm` takes twice as long."""
        eps = self._eps if x_TH.dtype != torch.float64 else self._eps.double()
        norm_T1 = torch.linalg.vector_norm(x_TH, dim=-1, keepdim=True, dtype=eps.dtype)
        scale_T1 = torch.rsqrt(torch.addcmul(eps, norm_T1, norm_T1, value=1.0 / x_TH.shape[-1]))
        return (x_TH * scale_T1).to(x_TH.dtype) * self.weight


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
