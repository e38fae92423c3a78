"""One step's attention over the paged cache by the C kernel (`paged_attention.c`), read in place."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from trilithon_parallel.backend import native

# The kernel's own limits (see the C file): rows of queries in a tile, channels of a head.
MAX_ROWS, MAX_CHANNELS = 48, 256


class _Step(ctypes.Structure):
    """`struct step` of the C file."""

    _fields_ = (
        *[
            (name, ctypes.c_int32)
            for name in (
                "num_sequences",
                "num_tokens",
                "heads",
                "groups",
                "channels",
                "table_width",
                "is_bf16",
                "num_threads",
            )
        ],
        ("num_blocks", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("num_items", ctypes.c_int32),
        *[(name, ctypes.c_void_p) for name in ("slots", "bounds", "context_lens", "tables", "items")],
    )


def takes(*, heads: int, groups: int, channels: int, dtype: torch.dtype) -> bool:
    """Whether the kernel computes attention of this shape (sizes are the rank's own)."""
    return (
        dtype in (torch.float32, torch.bfloat16)
        and channels % 16 == 0
        and channels <= MAX_CHANNELS
        and heads // groups <= MAX_ROWS
    )


class NativeStep:
    """One step's ragged batch, laid out for the kernel once and used by every layer."""

    def __init__(
        self,
        *,
        heads: int,
        groups: int,
        channels: int,
        num_blocks: int,
        dtype: torch.dtype,
        bounds: Sequence[int],
        context_lens: Sequence[int],
        tables: Sequence[Sequence[int]],
        slots_T: Tensor,
    ) -> None:
        self._function = native.library().paged_attention
        tile = MAX_ROWS // (heads // groups)
        items = [
            (i, first, min(tile, stop - start - first))
            for i, (start, stop) in enumerate(pairwise(bounds))
            for first in range(0, stop - start, tile)
        ]
        # Long items first: the threads that take them share the short ones.
        items.sort(key=lambda item: -item[2] * (context_lens[item[0]] + item[1] + item[2]))
        width = max(map(len, tables), default=1)
        int32 = functools.partial(torch.tensor, dtype=torch.int32)
        # Held here: the structure has their addresses alone.
        self._tensors = (
            slots_T.contiguous(),
            int32(bounds),
            int32(context_lens),
            int32([[*table, *[0] * (width - len(table))] for table in tables]),
            int32(items),
        )
        self._step = _Step(
            len(tables),
            len(slots_T),
            heads,
            groups,
            channels,
            width,
            dtype == torch.bfloat16,
            torch.get_num_threads(),
            num_blocks,
            channels**-0.5,
            len(items),
            *[tensor.data_ptr() for tensor in self._tensors],
        )
        self._address = ctypes.addressof(self._step)

    def attend(self, layer_address: int, q_TAC: Tensor, k_TGC: Tensor, v_TGC: Tensor) -> Tensor:
        """Write keys and values into the layer's cache, then attend: [T, A, C]. A token's heads must be contiguous."""
        channels = q_TAC.shape[-1]
        assert all(x.stride()[1:] == (channels, 1) or x.shape[1] == 1 for x in (q_TAC, k_TGC, v_TGC))
        out_TAC = torch.empty(q_TAC.shape, dtype=q_TAC.dtype)
        self._function(
            self._address,
            layer_address,
            q_TAC.data_ptr(),
            q_TAC.stride(0),
            k_TGC.data_ptr(),
            k_TGC.stride(0),
            v_TGC.data_ptr(),
            v_TGC.stride(0),
            out_TAC.data_ptr(),
        )
        return out_TAC
