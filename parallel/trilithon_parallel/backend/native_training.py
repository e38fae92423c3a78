"""
The backward pass on CPUs by C kernels (`gemm.c`, `attention_backward.c`), behind the forward kernels of serving.

Training computes with the very products and the very attention that serve the model, so its log-probabilities are the
server's (bar E4); what is added here are their gradients. Weights' gradients are fp32: where a parameter has a
`main_grad`, the kernel adds to it and autograd is told nothing, which saves a copy of every weight's size.

Shapes: T packed tokens, K inputs and O outputs of a product, A query heads, G key/value groups, C channels.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trilithon_parallel.backend import native
from trilithon_parallel.backend.native_attention import NativeStep
from trilithon_parallel.backend.native_product import NativeProduct

BLOCK = 16


class _Matrix(ctypes.Structure):
    """`struct matrix` of the C file."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("row", ctypes.c_int64),
        ("column", ctypes.c_int64),
        ("is_bf16", ctypes.c_int32),
    )


def _matrix(x: Tensor) -> _Matrix:
    assert x.dtype in (torch.float32, torch.bfloat16)
    return _Matrix(x.data_ptr(), x.stride(0), x.stride(1), x.dtype == torch.bfloat16)


def matmul(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor | None = None) -> Tensor:
    """
    a b in fp32, added to `out_MN` where given (rows contiguous). fp32 or bfloat16 inputs, strided in any way.

    Raises:
        MemoryError: no room for the blocks that a thread packs (1.1 MB each).
    """
    rows, columns, depth = a_MK.shape[0], b_KN.shape[1], a_MK.shape[1]
    is_added = out_MN is not None
    out = torch.empty(rows, columns, dtype=torch.float32) if out_MN is None else out_MN
    assert out.dtype == torch.float32
    assert out.stride(1) == 1 or columns == 1
    if rows == 0 or columns == 0 or depth == 0:
        return out if is_added else out.zero_()
    a, b = _matrix(a_MK), _matrix(b_KN)
    failed = native.library().gemm(
        ctypes.addressof(a), ctypes.addressof(b), rows, columns, depth, out.data_ptr(), out.stride(0), is_added,
        torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("gemm: no memory for packed blocks")
    return out


def add_weight_gradient(weight: Tensor, grad_TO: Tensor, x_TK: Tensor) -> Tensor | None:
    """grad^T x: added to `weight.main_grad` where there is one (then None), else returned."""
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    grad_OK = matmul(grad_TO.t(), x_TK, main_grad)
    return grad_OK.to(weight.dtype) if main_grad is None else None


class TrainingProduct:
    """
    Serving's product of a parameter, with a gradient. The packed copy is made again after `forget()`.

    Args:
        weight: fp32 or bfloat16 [O, K]; stays a parameter.
        bias: [O] or None.
        terms, wide: as for `NativeProduct`.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, *, terms: Sequence[int], wide: bool = False
    ) -> None:
        self.weight, self.bias, self._terms, self._wide = weight, bias, terms, wide
        self._packed: NativeProduct | None = None

    @property
    def is_trained(self) -> bool:
        """Whether an optimizer moves the weights."""
        return self.weight.requires_grad

    def forget(self) -> None:
        """The weights have changed: pack them again before the next product."""
        self._packed = None

    def packed(self) -> NativeProduct:
        """The forward product of the weights as they are."""
        if self._packed is None:
            bias = None if self.bias is None else self.bias.detach()
            self._packed = NativeProduct(self.weight.detach(), bias, terms=self._terms, wide=self._wide)
        return self._packed

    def __call__(self, x_TK: Tensor, residual_TO: Tensor | None = None) -> Tensor:
        result: Tensor = _Linear.apply(x_TK, self.weight, self.bias, residual_TO, self)  # type: ignore[no-untyped-call]
        return result


class _Linear(torch.autograd.Function):
    """[residual +] x W^T + b."""

    @staticmethod
    def forward(
        ctx: Any, x_TK: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, product: TrainingProduct
    ) -> Tensor:
        ctx.save_for_backward(*([x_TK] if ctx.needs_input_grad[1] else []))  # of a frozen weight nothing is kept
        ctx.dtype = x_TK.dtype
        ctx.weight = weight  # not saved: its storage is the optimizer's, which updates it in place between steps
        return product.packed()(x_TK, residual)

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        residual = grad_TO if ctx.needs_input_grad[3] else None
        if grad_TO.dtype == torch.float64:  # a share of a sum that tp makes
            grad_TO = grad_TO.to(ctx.dtype)
        x = matmul(grad_TO, ctx.weight).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        weight = add_weight_gradient(ctx.weight, grad_TO, *ctx.saved_tensors) if ctx.needs_input_grad[1] else None
        bias = grad_TO.sum(0) if ctx.needs_input_grad[2] else None
        return x, weight, bias, residual, None


class _AttentionBackward(ctypes.Structure):
    """`struct attention` of the C file."""

    _fields_ = (
        *[
            (name, ctypes.c_int32)
            for name in ("num_sequences", "heads", "groups", "channels", "is_causal", "is_bf16", "num_threads")
        ],
        ("scale", ctypes.c_float),
        *[(name, ctypes.c_void_p) for name in ("bounds", "q", "k", "v", "d_out")],
        *[(name, ctypes.c_int64) for name in ("q_row", "k_row", "v_row", "d_row")],
        *[(name, ctypes.c_void_p) for name in ("d_q", "d_k", "d_v")],
    )


class PackedLayout:
    """
    Causal sequences packed one after another, as serving's kernel wants them: made once, used by every layer.

    The kernel reads keys and values from a paged cache; here each sequence has blocks of its own, in order, in a
    scratch cache of one layer.
    """

    def __init__(
        self, cu_seqlens: Sequence[int], *, heads: int, groups: int, channels: int, dtype: torch.dtype
    ) -> None:
        self.bounds = torch.tensor(cu_seqlens, dtype=torch.int64)
        tables, slots, first = [], [], 0
        for start, stop in itertools.pairwise(cu_seqlens):
            size = stop - start
            blocks = -(-size // BLOCK)
            tables.append(list(range(first, first + blocks)))
            slots.append(torch.arange(first * BLOCK, first * BLOCK + size))
            first += blocks
        self._step = NativeStep(
            heads=heads,
            groups=groups,
            channels=channels,
            num_blocks=first,
            dtype=dtype,
            bounds=cu_seqlens,
            context_lens=[0] * len(tables),
            tables=tables,
            slots_T=torch.cat(slots),
        )
        # Zeroed: positions that no token wrote take part with weight zero, so they must be finite.
        self._scratch = torch.zeros(2, groups, first, BLOCK, channels, dtype=dtype)

    def attend(self, q_TAC: Tensor, k_TGC: Tensor, v_TGC: Tensor) -> Tensor:
        """Attention of every sequence with itself: [T, A, C]. Differentiable."""
        result: Tensor = _Attention.apply(q_TAC, k_TGC, v_TGC, self)  # type: ignore[no-untyped-call]
        return result

    def forward(self, q_TAC: Tensor, k_TGC: Tensor, v_TGC: Tensor) -> Tensor:
        """The kernel's forward pass."""
        return self._step.attend(self._scratch.data_ptr(), q_TAC, k_TGC, v_TGC)


def _heads_contiguous(x_TAC: Tensor) -> Tensor:
    return x_TAC if x_TAC.stride()[1:] == (x_TAC.shape[2], 1) else x_TAC.contiguous()


class _Attention(torch.autograd.Function):
    """softmax(q k^T / sqrt(C)) v over each sequence, causal."""

    @staticmethod
    def forward(ctx: Any, q_TAC: Tensor, k_TGC: Tensor, v_TGC: Tensor, layout: PackedLayout) -> Tensor:
        q_TAC, k_TGC, v_TGC = (_heads_contiguous(x) for x in (q_TAC, k_TGC, v_TGC))
        ctx.save_for_backward(q_TAC, k_TGC, v_TGC)
        ctx.layout = layout
        return layout.forward(q_TAC, k_TGC, v_TGC)

    @staticmethod
    def backward(ctx: Any, d_out_TAC: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        d_out = _heads_contiguous(d_out_TAC)
        d_q = torch.empty(q.shape, dtype=torch.float32)
        d_k, d_v = torch.zeros(k.shape, dtype=torch.float32), torch.zeros(v.shape, dtype=torch.float32)
        bounds = ctx.layout.bounds
        step = _AttentionBackward(
            len(bounds) - 1, q.shape[1], k.shape[1], q.shape[2], True, q.dtype == torch.bfloat16,
            torch.get_num_threads(), q.shape[2] ** -0.5, bounds.data_ptr(),
            q.data_ptr(), k.data_ptr(), v.data_ptr(), d_out.data_ptr(),
            q.stride(0), k.stride(0), v.stride(0), d_out.stride(0), d_q.data_ptr(), d_k.data_ptr(), d_v.data_ptr(),
        )  # fmt: skip
        if native.library().attention_backward(ctypes.addressof(step)):
            raise MemoryError("attention_backward: no memory for a tile of scores")
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None
