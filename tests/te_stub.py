"""
What Transformer Engine is to our code, made of torch: classes and functions of its documented shape, for CPUs.

Products behave as its do where that matters: sizes are global, weights' gradients go to `main_grad` when fused, and
between tensor-parallel ranks they gather and scatter on dim 0. `install` puts it where the real one is imported from.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from trilithon_parallel.backend import te_ops


def _gather(x: Tensor, group: Any) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


def _sum(x: Tensor, group: Any) -> Tensor:
    x = x.contiguous()
    dist.all_reduce(x, group=group)
    return x


def _scatter_sum(x: Tensor, group: Any) -> Tensor:
    return _sum(x, group).chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()


class _Product(torch.autograd.Function):
    """Column: input gathered, its gradient summed (and scattered). Row: output summed (and scattered)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, module: StubLinear) -> Tensor:
        ctx.module, ctx.weight, ctx.fused = module, weight, module.fuse_wgrad_accumulation
        if ctx.fused and weight.requires_grad:
            ctx.main_grad = weight.main_grad  # type: ignore[attr-defined]  # an AttributeError where there is none
        if module.is_parallel and module.sequence_parallel and module.parallel_mode == "column":
            x = _gather(x, module.tp_group)
        ctx.save_for_backward(x)
        y = F.linear(x, weight)
        if module.is_parallel and module.parallel_mode == "row":
            y = (_scatter_sum if module.sequence_parallel else _sum)(y, module.tp_group)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (x,), module = ctx.saved_tensors, ctx.module
        if module.is_parallel and module.sequence_parallel and module.parallel_mode == "row":
            grad = _gather(grad, module.tp_group)
        d_x = grad @ ctx.weight
        if module.is_parallel and module.parallel_mode == "column":
            d_x = (_scatter_sum if module.sequence_parallel else _sum)(d_x, module.tp_group)
        d_weight = grad.t() @ x
        if not ctx.fused:
            return d_x, d_weight, None
        ctx.main_grad.add_(d_weight)
        if hasattr(ctx.weight, "grad_added_to_main_grad"):
            return d_x, torch.full_like(ctx.weight, torch.nan), None  # memory that nobody filled
        return d_x, None, None


class StubLinear(nn.Module):
    """te.Linear."""

    calls: ClassVar[list[dict[str, Any]]] = []

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sequence_parallel: bool,
        fuse_wgrad_accumulation: bool,
        tp_group: Any,
        tp_size: int,
        get_rng_state_tracker: Any,
        init_method: Any,
        bias: bool,
        return_bias: bool,
        params_dtype: torch.dtype,
        parallel_mode: str,
        parameters_split: Any,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.calls.append({key: value for key, value in locals().items() if key not in ("self", "__class__")})
        self.fuse_wgrad_accumulation, self.parallel_mode = fuse_wgrad_accumulation, parallel_mode
        self.tp_group, self.is_parallel, self.sequence_parallel = tp_group, tp_size > 1, sequence_parallel
        shape = [out_features, in_features]
        shape[0 if parallel_mode == "column" else 1] //= tp_size
        self.weight = nn.Parameter(torch.empty(shape, dtype=params_dtype, device=device))
        width = out_features // (tp_size if parallel_mode == "column" else 1)
        self.bias = nn.Parameter(torch.empty(width, dtype=params_dtype, device=device)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self.weight, self)  # type: ignore[no-untyped-call]  # torch's is untyped
        return y if self.bias is None else y + self.bias

    def get_extra_state(self) -> bytes:
        return b"pickled histories"

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError("extra state must never be read")


class StubNorm(nn.Module):
    """te.RMSNorm and te.LayerNorm by their shared arguments."""

    def __init__(
        self, normalized_shape: int, *, eps: float, zero_centered_gamma: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        assert zero_centered_gamma is False
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(normalized_shape, dtype=dtype, device=device))

    def get_extra_state(self) -> bytes:
        return b"state"


class StubRMSNorm(StubNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class StubLayerNorm(StubNorm):
    def __init__(self, normalized_shape: int, **options: Any) -> None:
        super().__init__(normalized_shape, **options)
        self.bias = nn.Parameter(torch.empty_like(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass
class StubRecipe:
    """Any recipe: what it was made with."""

    name: str
    options: dict[str, Any]


class Regions:
    """Records the autocast regions that are entered, and whether one is open."""

    def __init__(self) -> None:
        self.entered: list[dict[str, Any]] = []
        self.depth = 0

    @contextlib.contextmanager
    def open(self, **options: Any) -> Iterator[None]:
        self.entered.append(options)
        self.depth += 1
        assert self.depth == 1, "regions must not nest: scales move on at the end of the outermost"
        try:
            yield
        finally:
            self.depth -= 1


def install(monkeypatch: pytest.MonkeyPatch, *, is_old: bool = False, missing: dict[str, str] | None = None) -> Regions:
    """
    Make this process one where Transformer Engine imports; `forget` afterwards.

    Args:
        is_old: only the names from before `autocast` and `is_fp8_available` exist.
        missing: capability -> why the device lacks it, for example {"mxfp8": "compute capability 10.0 ..."}.
    """
    regions, missing = Regions(), missing or {}
    engine: Any = ModuleType("transformer_engine.pytorch")
    recipes: Any = ModuleType("transformer_engine.common.recipe")
    old: Any = ModuleType("transformer_engine.pytorch.fp8")
    engine.Linear, engine.RMSNorm, engine.LayerNorm = StubLinear, StubRMSNorm, StubLayerNorm
    if is_old:
        engine.fp8_autocast = regions.open
        old.FP8GlobalStateManager = type(
            "FP8GlobalStateManager",
            (),
            {
                f"is_{kind}_available": classmethod(lambda cls, kind=kind: (kind not in missing, missing.get(kind, "")))
                for kind in ("fp8", "mxfp8")
            },
        )
    else:
        engine.autocast = regions.open
        for kind in ("fp8", "mxfp8"):

            def answer(return_reason: bool = False, kind: str = kind) -> tuple[bool, str] | bool:
                return (kind not in missing, missing.get(kind, "")) if return_reason else kind not in missing

            setattr(engine, f"is_{kind}_available", answer)
    recipes.Format = type("Format", (), {"HYBRID": "hybrid", "E4M3": "e4m3"})
    for name in ("DelayedScaling", "Float8CurrentScaling", "MXFP8BlockScaling"):
        setattr(recipes, name, lambda name=name, **options: StubRecipe(name, options))
    for module in (ModuleType("transformer_engine"), ModuleType("transformer_engine.common"), engine, recipes, old):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(StubLinear, "calls", [])
    forget()
    with monkeypatch.context() as context:
        context.setattr(torch.cuda, "is_available", lambda: True)
        assert not te_ops.unavailable_reason()
    return regions


def forget() -> None:
    """Let the import guard look again."""
    te_ops._load.cache_clear()
    te_ops._classes.cache_clear()
