"""
Adapters beside a stage's products while it trains: y = W x + b + B (scale * A x), with everything but A and B frozen.

A column-parallel product's B is cut like the product and its A is whole; a row-parallel one's A is cut like the product
and its B is whole, so each rank's share joins the sum that tp makes anyway. Both halves are products of their own, so
the backend multiplies as it does when it serves adapters (`bank.py`), and in the same order.

Shapes: T packed tokens, K inputs and O outputs of a product (local), R rank.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trilithon_parallel.attention import AttentionView
from trilithon_parallel.config import ModelConfig, ModelError
from trilithon_parallel.grid import Grid
from trilithon_parallel.layers import ColumnParallelLinear, RowParallelLinear
from trilithon_parallel.lora.spec import products
from trilithon_parallel.placement import local_slice


@dataclass(frozen=True, eq=False)
class Adapter:
    """
    What stands beside one product. `site` names its dropout; a shared A has one.

    `start` is the first of the rank's columns of the product's `inputs`.
    """

    down: ColumnParallelLinear
    up: ColumnParallelLinear
    scale: float
    site: str
    inputs: int
    start: int

    def narrow(self, x_TK: Tensor, *, layer: int, view: AttentionView) -> Tensor:
        """A x, [T, R], of inputs some of which are dropped while training."""
        if view.dropout is not None:
            x_TK = view.dropout.inputs(x_TK, layer=layer, site=self.site, size=self.inputs, start=self.start)
        result: Tensor = self.down(x_TK)
        return result

    def add(self, hidden_TR: Tensor, y_TO: Tensor) -> Tensor:
        """The product's result [T, O], in fp64 where ranks sum it, with the adapter's share."""
        result: Tensor = y_TO + self.up(hidden_TR * self.scale)
        return result


def columns(parts: Sequence[nn.Module], x_TK: Tensor, *, layer: int, view: AttentionView) -> list[Tensor]:
    """Column-parallel products of one input, each with its adapter where it has one; a shared A is used once."""
    results: list[Tensor] = []
    narrowed: dict[ColumnParallelLinear, Tensor] = {}
    for part in parts:
        y_TO: Tensor = part(x_TK)
        adapter = _adapter_of(part)
        if adapter is not None:
            if adapter.down not in narrowed:
                narrowed[adapter.down] = adapter.narrow(x_TK, layer=layer, view=view)
            y_TO = adapter.add(narrowed[adapter.down], y_TO)
        results.append(y_TO)
    return results


def row(part: nn.Module, x_TK: Tensor, residual_TO: Tensor | None, *, layer: int, view: AttentionView) -> Tensor:
    """A row-parallel product with its adapter where it has one."""
    adapter = _adapter_of(part)
    result: Tensor
    if adapter is None:
        result = part(x_TK, residual_TO)
    else:
        result = part(x_TK, residual_TO, functools.partial(adapter.add, adapter.narrow(x_TK, layer=layer, view=view)))
    return result


def _adapter_of(part: nn.Module) -> Adapter | None:
    return part.adapter if isinstance(part, ColumnParallelLinear | RowParallelLinear) else None


def attach(stage: nn.Module, layers: nn.ModuleDict, *, config: ModelConfig, grid: Grid, dtype: torch.dtype) -> None:
    """
    Give a stage's products the adapters of `config.lora`, uninitialised, and freeze all else of the stage.

    Args:
        layers: the stage's blocks by global layer id.
    Raises:
        ModelError: `lora_invalid`, a description that does not fit; `backend_unavailable`, the products are not
            this project's own.
    """
    assert config.lora is not None
    config.lora.check(config)
    stage.requires_grad_(False)
    for layer, block in layers.items():
        for leaf in (leaf for leaf in products(config) if leaf in config.lora.targets):
            path = products(config)[leaf][0]
            _adapt(block, f"model.layers.{layer}.{path}", path, leaf, config=config, grid=grid, dtype=dtype)


def _adapt(
    block: nn.Module, name: str, path: str, leaf: str, *, config: ModelConfig, grid: Grid, dtype: torch.dtype
) -> None:
    """Put the halves under the product, so that their names are those of `lora_shapes`."""
    spec, part = config.lora, block.get_submodule(path)
    assert spec is not None
    if not isinstance(part, ColumnParallelLinear | RowParallelLinear):
        raise ModelError(
            "adapters are trained by backend torch alone. Given: another one.",
            code="backend_unavailable",
            hint="Use backend torch, or finetune all weights.",
        )
    outputs, inputs = part.weight.shape
    rank, owner = spec.rank_of(leaf), spec.owner_of(leaf)
    down = ColumnParallelLinear(inputs, rank, bias=False, dtype=dtype, device=grid.device)
    if isinstance(part, RowParallelLinear):
        down.terms = part.terms
    elif owner != leaf:
        shared = block.get_submodule(path.removesuffix(leaf) + owner).lora_A
        assert isinstance(shared, ColumnParallelLinear)
        down = shared
    part.lora_A = down
    part.lora_B = ColumnParallelLinear(rank, outputs, bias=False, dtype=dtype, device=grid.device)
    whole = (products(config)[leaf][1], products(config)[leaf][2])
    place = local_slice(f"{name}.weight", whole, config=config, tp=grid.tp.size, tp_rank=grid.tp.rank)
    part.adapter = Adapter(down, part.lora_B, spec.scale_of(leaf), f"{owner}.lora", whole[1], place.slices[1].start)
