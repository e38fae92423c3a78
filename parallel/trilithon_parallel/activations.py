"""
What stands between an MLP's products: silu or gelu, gated or not.

Shapes: T tokens, F feed-forward, a rank's share. In the batch-invariant mode an element's place doesn't show in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trilithon_parallel.backend import native

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}
# Torch runs fewer elements than this on one thread, and its vector loops handle multiples of `VECTOR` without a tail.
SERIAL_ELEMENTS, VECTOR = 32768, 64


def activation(kind: str, *, invariant: bool) -> Callable[[Tensor], Tensor]:
    """The function of that name, in torch's operators."""
    function = ACTIVATIONS[kind]
    return functools.partial(rowwise, function) if invariant else function


def native_gate(kind: str, *, dtype: torch.dtype, device: torch.device) -> Callable[[Tensor, Tensor], Tensor] | None:
    """
    activation(gate) * up by the C kernel, invariant whatever the mode; None where there is none for this case.

    It takes [T, F] twice, rows contiguous and equally far apart, as the halves of one product are. Differentiable.
    """
    is_known = kind == "silu" and device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
    if not is_known or native.unavailable_reason():
        return None

    return _gated_silu


def _gated_silu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        result: Tensor = _GatedSilu.apply(gate_TF, up_TF)  # type: ignore[no-untyped-call]  # torch's apply is untyped
        return result
    rows, width = gate_TF.shape
    stride = gate_TF.stride(0)
    assert gate_TF.stride() == up_TF.stride() == (stride, 1)
    out_TF = torch.empty(rows, width, dtype=gate_TF.dtype)
    native.library().gated_silu(
        gate_TF.data_ptr(),
        up_TF.data_ptr(),
        stride,
        out_TF.data_ptr(),
        rows,
        width,
        gate_TF.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return out_TF


class _GatedSilu(torch.autograd.Function):
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_TF, up_TF)
        return _gated_silu(gate_TF, up_TF)  # autograd is off in here

    @staticmethod
    def backward(ctx: Any, d_out_TF: Tensor) -> tuple[Tensor, Tensor]:
        gate_TF, up_TF = ctx.saved_tensors
        d_out_TF = d_out_TF.contiguous()
        d_gate_TF, d_up_TF = torch.empty_like(d_out_TF), torch.empty_like(d_out_TF)
        native.library().gated_silu_backward(
            gate_TF.data_ptr(),
            up_TF.data_ptr(),
            gate_TF.stride(0),
            d_out_TF.data_ptr(),
            d_gate_TF.data_ptr(),
            d_up_TF.data_ptr(),
            *d_out_TF.shape,
            d_out_TF.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )
        return d_gate_TF, d_up_TF


def rowwise(function: Callable[[Tensor], Tensor], x_TF: Tensor) -> Tensor:
    """
    `function` of each element, with bits that don't depend on the element's place.

    Torch's vector loops compute the tail of an array by another formula than its body (silu and gelu differ in the
    last bit), and where a tail falls depends on shape and threads. Here no call has a tail and each runs on one thread.
    """
    width = x_TF.shape[1]
    padded_TF = F.pad(x_TF, (0, -width % VECTOR))
    step = max(1, SERIAL_ELEMENTS // padded_TF.shape[1])
    return torch.cat([function(part) for part in torch.split(padded_TF, step)])[:, :width]
