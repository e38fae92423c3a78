"""
Compute backends behind one seam: torch operators everywhere, Transformer Engine on CUDA devices.

Models ask a backend for layers and never learn which one they have; parameter names and files don't either.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from trilithon_parallel.config import ModelConfig, ModelError
from trilithon_parallel.fp8 import Fp8Recipe
from trilithon_parallel.grid import Grid
from trilithon_parallel.layers import Product

BackendName = Literal["torch", "te", "auto"]


class Forgetful(Protocol):
    """Something derived from weights."""

    @property
    def is_trained(self) -> bool:
        """Whether an optimizer moves the weights."""
        ...

    def forget(self) -> None:
        """The weights have changed."""
        ...


class Backend(Protocol):
    """What the blocks need. `batch_invariant`: every row's bits are those it has alone, at any dtype."""

    name: str
    batch_invariant: bool

    def column_linear(
        self, in_features: int, out_local: int, *, bias: bool, grid: Grid, dtype: torch.dtype
    ) -> nn.Module:
        """X W^T + b with W [out_local, in_features]; names `weight`, `bias`."""
        ...

    def row_linear(
        self, terms: Sequence[int], out_features: int, *, bias: bool, grid: Grid, dtype: torch.dtype
    ) -> nn.Module:
        """residual + g(X W^T) + b with W [out_features, sum(terms)], see `sum_terms`; called with (x, residual)."""
        ...

    def norm(self, config: ModelConfig, *, grid: Grid, dtype: torch.dtype) -> nn.Module:
        """The family's norm over H."""
        ...

    def enter_columns(self, x_TH: Tensor, grid: Grid) -> Tensor:
        """What stands between a norm and the column-parallel products that share its output: the paper's f."""
        ...

    def train(self, stage: nn.Module) -> Sequence[Forgetful]:
        """
        Let a stage's products train with serving's numbers, where this backend has numbers of its own.

        What is returned must `forget()` whenever the weights have changed. Every rank calls it for each of its stages
        in order, before their parameters get a `main_grad`.
        """
        ...

    def autocast(self) -> AbstractContextManager[object]:
        """What surrounds one micro-batch's forward pass through one stage: lower precision, where it was chosen."""
        ...

    def pack_columns(self, parts: Sequence[nn.Module]) -> Product | None:
        """
        One product of several column-parallel layers with one input, for serving; their parameters are released.

        None where the backend packs nothing and the layers stay as they are.
        """
        ...

    def pack_row(self, part: nn.Module) -> None:
        """Pack a row-parallel layer for serving, where the backend packs at all."""
        ...


def select(
    name: BackendName,
    *,
    batch_invariant: bool = False,
    device: str | torch.device = "cpu",
    fp8: Fp8Recipe | None = None,
) -> Backend:
    """
    The backend of that name; "auto" takes Transformer Engine where it imports and the device is CUDA, else torch.

    Args:
        fp8: train with 8-bit products scaled in that way (Transformer Engine alone has them): by the largest values of
            past steps ("delayed"), of the tensor itself ("current"), or of blocks of 32 elements ("mxfp8").
    Raises:
        ModelError: `backend_unavailable`, "te", `fp8` or `batch_invariant` was asked for and cannot be used; the
            message keeps the reason.
    """
    from trilithon_parallel.backend import te_ops, torch_ops

    if name not in ("torch", "te", "auto"):
        raise ModelError(
            f"backend is unknown. Given: {name!r}.", code="backend_unavailable", hint="Allowed: torch, te, auto."
        )
    if batch_invariant and torch.device(device).type == "cuda":
        raise ModelError(
            "the batch-invariant mode is not available on CUDA: norms, products and softmaxes of its libraries add in "
            "an order that depends on how many rows there are.",
            code="backend_unavailable",
            hint="Turn batch_invariant off, or serve on cpu.",
        )
    if name == "torch":
        reason = "backend torch has no 8-bit products"
    elif name == "auto" and torch.device(device).type != "cuda":
        reason = "the device is not CUDA"
    else:
        reason = te_ops.unavailable_reason()
    if fp8 is not None:
        reason = reason or te_ops.fp8_unavailable_reason(fp8)
        if reason:
            raise ModelError(
                f"fp8 {fp8} is not available on backend {name}: {reason}.",
                code="backend_unavailable",
                hint="It takes trilithon[gpu] and a CUDA device with such products; leave fp8 out elsewhere.",
            )
    if name == "torch" or (name == "auto" and reason):
        return torch_ops.TorchBackend(batch_invariant=batch_invariant)
    if reason:
        raise ModelError(
            f"backend 'te' is not available: {reason}.",
            code="backend_unavailable",
            hint="Install trilithon[gpu] on a CUDA machine, or use backend torch or auto.",
        )
    if batch_invariant:
        raise ModelError(
            "backend 'te' has no batch-invariant mode.",
            code="backend_unavailable",
            hint="Use backend torch with batch_invariant, or turn batch_invariant off.",
        )
    return te_ops.TransformerEngineBackend(fp8=fp8)
