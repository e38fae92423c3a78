"""
Transformer Engine behind the backend seam: the only module that imports it.

Its layers become ours: parameters are called `weight` and `bias` and sit directly on the module, as torch's do, and
no `_extra_state` reaches a state dict. So files, loader and placement never learn which backend is running.
Attention stays with `attention.py`, whose views own the cache; torch's fused kernel runs it on CUDA devices.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from trilithon_parallel.backend import Forgetful
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.grid import Grid
from trilithon_parallel.layers import Product

# What importing it has been seen to raise: missing wheels, missing CUDA libraries, a failed sanity check of its own.
_IMPORT_ERRORS = (ImportError, OSError, RuntimeError, AssertionError)


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
    """Transformer Engine's products and norms; sizes that it is given are global, it divides by tp itself."""

    name = "te"
    batch_invariant = False

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
        """Nothing to do: its kernels have their own backward pass."""
        return []

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


def _leave(weight: Tensor) -> None:
    """An initialiser that does nothing: a loader or our own layout-invariant initialiser fills the weights."""
