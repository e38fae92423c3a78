"""Products on CPUs by the C kernel (`product.c`): faster than oneDNN's for the rows of a decode step, and invariant."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from trilithon_parallel.backend import native

# Inputs of a term where the caller does not say: what keeps one panel of the weight in a core's nearest cache.
TERM_INPUTS = 576


class _Product(ctypes.Structure):
    """`struct product` of the C file."""

    _fields_ = (
        ("words", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("num_terms", ctypes.c_int32),
        ("is_bf16", ctypes.c_int32),
        *[(name, ctypes.c_void_p) for name in ("terms", "panels", "bias")],
    )


def takes(dtype: torch.dtype, terms: Sequence[int]) -> bool:
    """Whether the kernel multiplies this dtype, cut into terms of these sizes, on this machine."""
    if native.unavailable_reason() or dtype not in (torch.float32, torch.bfloat16):
        return False
    if dtype == torch.float32:
        return True
    return bool(native.library().product_takes_bf16()) and not any(size % 2 for size in terms)


def even_terms(inputs: int) -> list[int]:
    """
    Terms of a product that no layout cuts, as even as their number allows and of even sizes where `inputs` is even.

    >>> even_terms(576), even_terms(1000), even_terms(1536)
    ([576], [500, 500], [512, 512, 512])
    """
    count = -(-inputs // TERM_INPUTS)
    borders = [inputs * i // count // 2 * 2 for i in range(count)] + [inputs]
    return [stop - start for start, stop in pairwise(borders)]


class NativeProduct:
    """
    Y = X W^T + b with the weight in panels. A row's bits don't depend on the other rows, on threads or on the outputs
    that other ranks hold.

    Args:
        weight_OK: fp32 or bfloat16; it is copied.
        bias_O: of any float dtype, or None.
        terms: sizes of the pieces that the K inputs consist of; a term is summed in fp32, the terms in fp64.
        wide: without a residual the sum stays fp64, for ranks to add their shares before anything is rounded.
    """

    def __init__(self, weight_OK: Tensor, bias_O: Tensor | None, *, terms: Sequence[int], wide: bool = False) -> None:
        outputs, inputs = weight_OK.shape
        assert sum(terms) == inputs
        self._library = native.library()
        self._outputs, self._wide = outputs, wide
        self._elements = 4 // weight_OK.element_size()  # of a 32-bit word
        panel = int(self._library.product_panel())
        padded_OK = F.pad(weight_OK.detach(), (0, 0, 0, -outputs % panel))
        words_OK = padded_OK.contiguous().view(torch.float32)
        # Held here: the structure has their addresses alone.
        self._panels = words_OK.view(-1, panel, words_OK.shape[1]).transpose(1, 2).contiguous()
        self._bias = None if bias_O is None else bias_O.detach().float().contiguous()
        self._terms = torch.tensor(terms, dtype=torch.int64) // self._elements
        self._product = _Product(
            words_OK.shape[1],
            outputs,
            len(terms),
            weight_OK.dtype == torch.bfloat16,
            self._terms.data_ptr(),
            self._panels.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
        )
        self._address = ctypes.addressof(self._product)

    def __call__(self, x_TK: Tensor, residual_TO: Tensor | None = None) -> Tensor:
        if x_TK.stride(1) != 1 or x_TK.stride(0) % self._elements:
            x_TK = x_TK.contiguous()
        is_wide = self._wide and residual_TO is None
        residual_TO = residual_TO.contiguous() if residual_TO is not None else None
        y_TO = torch.empty(x_TK.shape[0], self._outputs, dtype=torch.float64 if is_wide else x_TK.dtype)
        self._library.product(
            self._address,
            x_TK.shape[0],
            x_TK.data_ptr(),
            x_TK.stride(0) // self._elements,
            None if residual_TO is None else residual_TO.data_ptr(),
            None if is_wide else y_TO.data_ptr(),
            y_TO.data_ptr() if is_wide else None,
            torch.get_num_threads(),
        )
        return y_TO
