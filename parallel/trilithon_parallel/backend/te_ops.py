"""
Transformer Engine behind the backend seam: the only module that imports it.

Its layers become ours: parameters are called `weight` and `bias` and sit directly on the module, as torch's do, and
no `_extra_state` reaches a state dict. So files, loader and placement never learn which backend is running.
Attention stays with `attention.py`, whose views own the cache; torch's fused kernel runs it on CUDA devices. So does
AdamW with torch: its fused kernel works on flat buckets already, a few launches a step whatever the model.

While training, a product adds its weight's gradient to the fp32 `main_grad` in the kernel that makes it, and hands
autograd none: the hooks of `buckets.py` run all the same. Marking a parameter with `grad_added_to_main_grad` would make
it hand out uninitialised memory instead, for others' hooks; ours has no such mark.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trilithon_parallel.backend import Forgetful
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.fp8 import Fp8Recipe
from trilithon_parallel.grid import Grid, make_axis, rank_of
from trilithon_parallel.layers import Product

# What importing it has been seen to raise: missing wheels, missing CUDA libraries, a failed sanity check of its own.
_IMPORT_ERRORS = (ImportError, OSError, RuntimeError, AssertionError)
# Classes of its recipes.
_RECIPES: dict[Fp8Recipe, str] = {
    "delayed": "DelayedScaling",
    "current": "Float8CurrentScaling",
    "mxfp8": "MXFP8BlockScaling",
}


@functools.cache
def _load() -> ModuleType | str:
    """`transformer_engine.pytorch`, or why it cannot be used. Tried once: a failed import leaves half a library."""
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    try:
        return importlib.import_module("transformer_engine.pytorch")
    except _IMPORT_ERRORS as error:
        return f"importing transformer_engine failed with {type(error).__name__}: {str(error).strip() or 'no message'}"


def unavailable_reason() -> str:
    """Why Transformer Engine cannot be used here; empty where it can."""
    found = _load()
    return found if isinstance(found, str) else ""


def fp8_unavailable_reason(recipe: Fp8Recipe) -> str:
    """Why this device or version has no such 8-bit products; empty where it has."""
    te: Any = _load()
    if not hasattr(importlib.import_module("transformer_engine.common.recipe"), _RECIPES[recipe]):
        return f"this version of Transformer Engine has no {_RECIPES[recipe]}"
    probe = "is_mxfp8_available" if recipe == "mxfp8" else "is_fp8_available"
    if hasattr(te, probe):
        is_available, reason = getattr(te, probe)(return_reason=True)
    else:  # before 2.8 the answers were methods of its state
        state = importlib.import_module("transformer_engine.pytorch.fp8").FP8GlobalStateManager
        is_available, reason = getattr(state, probe)()
    return "" if is_available else str(reason).rstrip(".") or "the device has no such products"


def _recipe(name: Fp8Recipe) -> Any:
    """Its recipe: E4M3 forward and, but for MXFP8, E5M2 backward; every default that matters is said."""
    recipe: Any = importlib.import_module("transformer_engine.common.recipe")
    make = getattr(recipe, _RECIPES[name])
    if name == "delayed":
        return make(
            margin=0,
            fp8_format=recipe.Format.HYBRID,
            amax_history_len=1024,
            amax_compute_algo="max",
            reduce_amax=True,
        )
    return make(fp8_format=recipe.Format.HYBRID if name == "current" else recipe.Format.E4M3)


class _Stateless:
    """
    Hides Transformer Engine's extra state (FP8 histories, pickled) from state dicts: never written, never read.

    `nn.Module` leaves `_extra_state` out where these two methods are its own.
    """

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state


@functools.cache
def _classes() -> dict[str, type[nn.Module]]:
    """Our subclasses of its layers, made when first needed (the base classes exist only after the import)."""
    te: Any = _load()
    assert not isinstance(te, str), te

    class Column(_Stateless, te.Linear):  # type: ignore[misc]  # a base class known at run time only
        """Column-parallel product; its own backward holds the paper's f."""

    class Row(_Stateless, te.Linear):  # type: ignore[misc]  # as above
        """Row-parallel product; its own forward holds the paper's g, and adds the bias once after it."""

        def forward(self, x_TK: Tensor, residual_TO: Tensor | None) -> Tensor:
            """[T, K] local and the residual stream [T, O], or None -> [T, O]."""
            y_TO = cast(Tensor, super().forward(x_TK))
            return y_TO if residual_TO is None else residual_TO + y_TO

    class RMS(_Stateless, te.RMSNorm):  # type: ignore[misc]  # as above
        """RMSNorm."""

    class Layer(_Stateless, te.LayerNorm):  # type: ignore[misc]  # as above
        """LayerNorm."""

    return {"column": Column, "row": Row, "rms": RMS, "layer": Layer}


class TransformerEngineBackend:
    """
    Transformer Engine's products and norms; sizes that it is given are global, it divides by tp itself.

    Args:
        fp8: how 8-bit products are scaled; None for products in the parameters' precision.
    """

    name = "te"
    batch_invariant = False

    def __init__(self, *, fp8: Fp8Recipe | None = None) -> None:
        self.fp8 = fp8
        self._recipe = None if fp8 is None else _recipe(fp8)
        self._amax_group: dist.ProcessGroup | None = None

    def column_linear(
        self, in_features: int, out_local: int, *, bias: bool, grid: Grid, dtype: torch.dtype
    ) -> nn.Module:
        """A column-parallel `te.Linear`."""
        return self._linear("column", in_features, out_local * grid.tp.size, bias=bias, grid=grid, dtype=dtype)

    def row_linear(
        self, terms: Sequence[int], out_features: int, *, bias: bool, grid: Grid, dtype: torch.dtype
    ) -> nn.Module:
        """A row-parallel `te.Linear`, called with (x, residual)."""
        return self._linear("row", sum(terms) * grid.tp.size, out_features, bias=bias, grid=grid, dtype=dtype)

    def norm(self, config: ModelConfig, *, grid: Grid, dtype: torch.dtype) -> nn.Module:
        """`te.RMSNorm` or `te.LayerNorm`."""
        return _classes()[config.norm](
            config.hidden_size, eps=config.norm_eps, zero_centered_gamma=False, dtype=dtype, device=grid.device
        )

    def enter_columns(self, x_TH: Tensor, grid: Grid) -> Tensor:
        """Nothing: each of its column-parallel layers gathers its input and reduces that input's gradient itself."""
        return x_TH

    def train(self, stage: nn.Module) -> Sequence[Forgetful]:
        """Let products add to `main_grad`; with delayed scaling make the group that agrees on the largest values."""
        for part in stage.modules():
            if isinstance(part, _classes()["column"] | _classes()["row"]):
                cast(Any, part).fuse_wgrad_accumulation = True
        if self.fp8 == "delayed" and self._amax_group is None:
            self._amax_group = _amax_group(cast(Grid, stage.grid))
        return []

    def autocast(self) -> AbstractContextManager[object]:
        """`te.autocast` with the recipe: it ends with the forward pass, and at its end delayed scales move on."""
        if self._recipe is None:
            return nullcontext()
        te: Any = _load()
        if hasattr(te, "autocast"):
            region = te.autocast(enabled=True, recipe=self._recipe, amax_reduction_group=self._amax_group)
        else:
            region = te.fp8_autocast(enabled=True, fp8_recipe=self._recipe, fp8_group=self._amax_group)
        return cast(AbstractContextManager[object], region)

    def pack_columns(self, parts: Sequence[nn.Module]) -> Product | None:
        """None: its kernels read the weights as they are."""
        return None

    def pack_row(self, part: nn.Module) -> None:
        """Nothing to do, as above."""

    def _linear(
        self, kind: str, in_features: int, out_features: int, *, bias: bool, grid: Grid, dtype: torch.dtype
    ) -> nn.Module:
        options: dict[str, Any] = {
            "sequence_parallel": grid.sequence_parallel,
            "fuse_wgrad_accumulation": False,
            "tp_group": grid.tp.group,
            "tp_size": grid.tp.size,
            "get_rng_state_tracker": None,
            "init_method": _leave,
            "bias": bias,
            "return_bias": False,
            "params_dtype": dtype,
            "parallel_mode": kind,
            "parameters_split": None,
            "device": grid.device,
        }
        return _classes()[kind](in_features, out_features, **options)


def _amax_group(grid: Grid) -> dist.ProcessGroup | None:
    """The ranks that hold the same layers, over tp and dp, and so scale alike."""
    tp, dp = grid.tp.size, grid.dp.size
    groups = [
        tuple(rank_of(t, d, p, tp=tp, dp=dp) for d in range(dp) for t in range(tp))
        for p in range(grid.world_size // (tp * dp))
    ]
    return make_axis("amax", groups, grid.rank).group


def _leave(weight: Tensor) -> None:
    """An initialiser that does nothing: a loader or our own layout-invariant initialiser fills the weights."""
