"""
The torch backend: the reference everywhere, and packed products on CPUs.

Our own kernel makes them where a C compiler is at hand (`native_product.py`), else oneDNN's operators, which are
private to torch, so they are probed once. All stand behind `Product`; `F.linear` is the reference of their tests.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilithon_parallel.backend import native_product
from trilithon_parallel.backend.native_product import NativeProduct, even_terms
from trilithon_parallel.backend.native_training import TrainingProduct
from trilithon_parallel.collectives import enter_columns
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.grid import Grid
from trilithon_parallel.layers import ColumnParallelLinear, LayerNorm, Product, RMSNorm, RowParallelLinear, release

# Rows of every product in the batch-invariant mode: one shape, so one kernel and one order of additions.
INVARIANT_ROWS = 16


@functools.cache
def has_native_bf16() -> bool:
    """True where the CPU multiplies bfloat16 itself (AVX512-BF16, AMX, or AVX512 with oneDNN's help)."""
    return _can_pack(torch.bfloat16)


def preferred_dtype(device: str | torch.device) -> torch.dtype:
    """The fastest dtype to serve at: bfloat16 where the device multiplies it natively, else float32."""
    if torch.device(device).type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if has_native_bf16() else torch.float32


@functools.cache
def _can_pack(dtype: torch.dtype) -> bool:
    """Whether this CPU and this torch have the packed product for `dtype`, checked by running it once."""
    x, weight = torch.ones(2, 32, dtype=dtype), torch.ones(16, 32, dtype=dtype)
    try:
        result = _OneDnnProduct(weight, None)(x)
    except (AttributeError, RuntimeError):
        return False
    return bool((result == 32).all())


class _OneDnnProduct:
    """One product with its weight in oneDNN's blocked layout."""

    def __init__(self, weight_OK: Tensor, bias_O: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight_OK.detach(), None)
        self._bias = bias_O

    def __call__(self, x_TK: Tensor, residual_TO: Tensor | None = None) -> Tensor:
        if residual_TO is None:
            y_TO: Tensor = torch.ops.mkldnn._linear_pointwise(x_TK, self._weight, self._bias, "none", [], "")
        else:
            y_TO = torch.ops.mkldnn._linear_pointwise.binary(x_TK, residual_TO, self._weight, self._bias, "add")
        return y_TO


class _WidenedProduct:
    """
    A bfloat16 or float16 product without the instructions, or in fp32 terms: an fp32 product of the widened weight.

    The same numbers as a native product (which also adds in fp32), several times faster than torch's emulation there,
    at twice the weights' memory.
    """

    def __init__(self, product: Product) -> None:
        self._product = product

    def __call__(self, x_TK: Tensor, residual_TO: Tensor | None = None) -> Tensor:
        y_TO = self._product(x_TK.float(), None if residual_TO is None else residual_TO.float())
        return y_TO if y_TO.dtype == torch.float64 else y_TO.to(x_TK.dtype)


class _PlainProduct:
    """`F.linear` over joined weights: other devices, and CPUs or dtypes without packed products."""

    def __init__(self, weight_OK: Tensor, bias_O: Tensor | None) -> None:
        self._weight, self._bias = weight_OK, bias_O

    def __call__(self, x_TK: Tensor, residual_TO: Tensor | None = None) -> Tensor:
        y_TO = F.linear(x_TK, self._weight, self._bias)
        return y_TO if residual_TO is None else residual_TO + y_TO


class _TiledProduct:
    """Batch-invariant: always `INVARIANT_ROWS` rows at once, the last tile filled with zeros."""

    def __init__(self, product: Product) -> None:
        self._product = product

    def __call__(self, x_TK: Tensor, residual_TO: Tensor | None = None) -> Tensor:
        rows = x_TK.shape[0]
        missing = -rows % INVARIANT_ROWS
        padded = F.pad(x_TK, (0, 0, 0, missing)) if missing else x_TK
        tiles = [self._product(tile) for tile in torch.split(padded, INVARIANT_ROWS)]
        y_TO = (torch.cat(tiles) if len(tiles) > 1 else tiles[0])[:rows]
        return y_TO if residual_TO is None else residual_TO + y_TO


class _TermsProduct:
    """
    A row-parallel product whose sum does not depend on the layout: products of the terms in fp32, their sum in fp64.

    tp moves whole terms between ranks. A term has the same bits wherever it is made, and 29 spare bits make the order
    in which a dozen of them are added immaterial; so tp = 2 rounds to fp32 what tp = 1 rounds. One long fp32 sum, cut
    in two, would differ by the roundings of its whole length (2e-5 in a log-probability of a 30-layer model).
    """

    def __init__(
        self,
        weight_OK: Tensor,
        bias_O: Tensor | None,
        *,
        terms: Sequence[int],
        make: Callable[[Tensor, Tensor | None], Product],
    ) -> None:
        self._sizes = list(terms)
        self._products = [make(part_OK.contiguous(), None) for part_OK in torch.split(weight_OK, self._sizes, 1)]
        self._bias = bias_O

    def __call__(self, x_TK: Tensor, residual_TO: Tensor | None = None) -> Tensor:
        parts_TK = torch.split(x_TK, self._sizes, -1)
        terms = [product(part_TK) for product, part_TK in zip(self._products, parts_TK, strict=True)]
        y_TO = torch.stack(terms).sum(0, dtype=torch.float64)
        if self._bias is not None:
            y_TO += self._bias
        return y_TO if residual_TO is None else (residual_TO + y_TO).to(residual_TO.dtype)


class TorchBackend:
    """Plain torch modules; on CPUs packing gives products that read weights in the order of their use."""

    name = "torch"

    def __init__(self, *, batch_invariant: bool = False) -> None:
        self.batch_invariant = batch_invariant

    def column_linear(
        self, in_features: int, out_local: int, *, bias: bool, grid: Grid, dtype: torch.dtype
    ) -> nn.Module:
        """A `ColumnParallelLinear`."""
        return ColumnParallelLinear(in_features, out_local, bias=bias, dtype=dtype, device=grid.device)

    def row_linear(
        self, terms: Sequence[int], out_features: int, *, bias: bool, grid: Grid, dtype: torch.dtype
    ) -> nn.Module:
        """A `RowParallelLinear`."""
        return RowParallelLinear(terms, out_features, bias=bias, grid=grid, dtype=dtype)

    def norm(self, config: ModelConfig, *, grid: Grid, dtype: torch.dtype) -> nn.Module:
        """`RMSNorm` or `LayerNorm`."""
        kind = RMSNorm if config.norm == "rms" else LayerNorm
        return kind(config.hidden_size, config.norm_eps, dtype=dtype, device=grid.device)

    def enter_columns(self, x_TH: Tensor, grid: Grid) -> Tensor:
        """The paper's f, or with sequence parallelism g-bar's gather."""
        return enter_columns(x_TH, grid)

    def train(self, stage: nn.Module) -> list[TrainingProduct]:
        """Serving's own products with a gradient, where our kernel is what serves; elsewhere torch's stay."""
        products = []
        for part in stage.modules():
            if isinstance(part, RowParallelLinear):
                # A bias stands after the sum that tp makes, unless there is none to make.
                bias = part.bias if part.grid.tp.is_trivial else None
                terms: Sequence[int] = part.terms
                is_wide = self.batch_invariant or part.weight.dtype == torch.float32
            elif isinstance(part, ColumnParallelLinear):
                bias, terms, is_wide = part.bias, part.terms or even_terms(part.weight.shape[1]), False
            else:
                continue
            if part.weight.device.type == "cpu" and native_product.takes(part.weight.dtype, terms):
                part.product = TrainingProduct(part.weight, bias, terms=terms, wide=is_wide)
                products.append(part.product)
        return products

    def autocast(self) -> AbstractContextManager[object]:
        """Nothing: products run in the parameters' own precision."""
        return nullcontext()

    def pack_columns(self, parts: Sequence[nn.Module]) -> Product:
        """One product of the joined weights, packed where the CPU can; the parts' parameters are released."""
        columns = [part for part in parts if isinstance(part, ColumnParallelLinear)]
        assert len(columns) == len(parts)
        weights = [part.weight.detach() for part in columns]
        biases = [part.bias.detach() for part in columns if part.bias is not None]
        for part in columns:
            release(part)
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        return self.product(weight, torch.cat(biases) if biases else None)

    def pack_row(self, part: nn.Module) -> None:
        """Give a row-parallel layer its packed product; in fp32 and when batch-invariant, the same sum at every tp."""
        assert isinstance(part, RowParallelLinear)
        part.pack(functools.partial(self.product, terms=part.terms))

    def product(self, weight_OK: Tensor, bias_O: Tensor | None, *, terms: Sequence[int] | None = None) -> Product:
        """The best product for this weight here; `terms` where the inputs are cut by tp."""
        dtype, is_cpu = weight_OK.dtype, weight_OK.device.type == "cpu"
        is_exact = terms is not None and (self.batch_invariant or (is_cpu and dtype == torch.float32))
        native_terms = even_terms(weight_OK.shape[1]) if terms is None else terms
        if is_cpu and native_product.takes(dtype, native_terms):
            return NativeProduct(weight_OK, bias_O, terms=native_terms, wide=is_exact)
        if dtype in (torch.bfloat16, torch.float16) and (is_exact or (is_cpu and not _can_pack(dtype))):
            bias = None if bias_O is None else bias_O.float()
            return _WidenedProduct(self.product(weight_OK.float(), bias, terms=terms))

        def make(weight_OK: Tensor, bias_O: Tensor | None) -> Product:
            kind = _OneDnnProduct if is_cpu and _can_pack(dtype) else _PlainProduct
            return _TiledProduct(kind(weight_OK, bias_O)) if self.batch_invariant else kind(weight_OK, bias_O)

        if is_exact and terms is not None:
            return _TermsProduct(weight_OK, bias_O, terms=terms, make=make)
        return make(weight_OK, bias_O)
