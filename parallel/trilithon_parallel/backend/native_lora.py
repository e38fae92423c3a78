"""Low-rank products on CPUs by the C kernel (`lora.c`): all adapters of a step in one call for each place."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from trilithon_parallel.backend import native


class _Factors(ctypes.Structure):
    """`struct factors` of the C file."""

    _fields_ = (
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("unused", ctypes.c_int32),
    )


class _Site(ctypes.Structure):
    """`struct site` of the C file."""

    _fields_ = (
        *[(name, ctypes.c_int64) for name in ("words", "width")],
        *[(name, ctypes.c_int32) for name in ("num_terms", "num_parts", "is_bf16", "is_wide")],
        *[(name, ctypes.c_void_p) for name in ("terms", "starts", "slots")],
    )


@dataclass(frozen=True)
class PackedFactors:
    """One adapter's factors of one product, in the kernel's panels; `rank` is even where they are bfloat16."""

    a_panels: Tensor
    b_panels: Tensor
    rank: int
    scale: float


def max_rows() -> int:
    """Rows of one adapter that the kernel takes together."""
    return int(native.library().lora_rows())


def max_rank() -> int:
    """The largest rank that the kernel takes."""
    return int(native.library().lora_rank())


def panel_floats(a_shape: tuple[int, int], b_shape: tuple[int, int], dtype: torch.dtype) -> int:
    """What one product's factors A [R, K] and B [O, R] take in panels, in 32-bit words."""
    width, rank = int(native.library().lora_width()), a_shape[0] + (dtype == torch.bfloat16 and a_shape[0] % 2)
    elements = -(-rank // width) * width * a_shape[1] + -(-b_shape[0] // (2 * width)) * 2 * width * rank
    return elements * dtype.itemsize // 4


class Arena:
    """
    Memory for one adapter's panels, side by side in the largest pages that the system gives.

    A step reads every adapter once, in pieces of a few dozen KiB: on small pages a third of its time would go to
    looking pages up.
    """

    def __init__(self, num_floats: int) -> None:
        # Private: memory that processes could share has no large pages.
        region = mmap.mmap(-1, 4 * max(1, num_floats), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them: small pages then
                region.madvise(mmap.MADV_HUGEPAGE)
        self._room = torch.frombuffer(region, dtype=torch.float32)  # keeps the region

    def hold(self, panels: Tensor) -> Tensor:
        """A copy in here."""
        kept, self._room = self._room[: panels.numel()], self._room[panels.numel() :]
        return kept.copy_(panels.flatten())


def pack(factors: Sequence[tuple[Tensor, Tensor, float] | None], arena: Arena) -> list[PackedFactors | None]:
    """
    Copy the factors of products with one input into panels, in the order in which the kernel reads them.

    Args:
        factors: (A [R, K], B [O, R], scale) of each product, which add `scale` B (A x); None for nothing.
        arena: with room for them.
    """
    width = int(native.library().lora_width())
    even = [None if item is None else (*_even(item[0], item[1]), item[2]) for item in factors]
    a_panels = [None if item is None else arena.hold(_panels(item[0], width)) for item in even]
    b_panels = [None if item is None else arena.hold(_panels(item[1], 2 * width)) for item in even]
    return [
        None if item is None or a is None or b is None else PackedFactors(a, b, item[0].shape[0], item[2])
        for item, a, b in zip(even, a_panels, b_panels, strict=True)
    ]


def _even(a_RK: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor]:
    """With an even rank where two elements are one word."""
    if a_RK.dtype == torch.bfloat16 and a_RK.shape[0] % 2:
        return F.pad(a_RK, (0, 0, 0, 1)), F.pad(b_OR, (0, 1))
    return a_RK, b_OR


def _panels(weight_OK: Tensor, width: int) -> Tensor:
    words_OK = F.pad(weight_OK, (0, 0, 0, -weight_OK.shape[0] % width)).contiguous().view(torch.float32)
    return words_OK.view(-1, width, words_OK.shape[1]).transpose(1, 2)


class NativeSite:
    """
    Products that share their input: what every slot's adapter adds to their joint result.

    Args:
        terms: sizes of the pieces that the inputs consist of, as for `NativeProduct`.
        outputs: of each product, side by side in the result.
        num_slots: adapters at once.
        dtype: fp32 or bfloat16, of inputs and factors.
    """

    def __init__(self, terms: Sequence[int], outputs: Sequence[int], *, num_slots: int, dtype: torch.dtype) -> None:
        self._library = native.library()
        self._elements = 4 // dtype.itemsize  # of a 32-bit word
        # Held here: the structures have their addresses alone.
        self._terms = torch.tensor(terms, dtype=torch.int64) // self._elements
        self._starts = torch.tensor([0, *accumulate(outputs)], dtype=torch.int64)
        self._slots = (_Factors * (num_slots * len(outputs)))()
        self._kept: list[Sequence[PackedFactors | None]] = [[None] * len(outputs)] * num_slots
        self._num_parts = len(outputs)
        self._site = _Site(
            sum(terms) // self._elements,
            sum(outputs),
            len(terms),
            len(outputs),
            dtype == torch.bfloat16,
            False,
            self._terms.data_ptr(),
            self._starts.data_ptr(),
            ctypes.addressof(self._slots),
        )
        self._address = ctypes.addressof(self._site)

    def put(self, slot: int, factors: Sequence[PackedFactors | None]) -> None:
        """Give a slot its factors, one for each product; None where the adapter leaves a product as it is."""
        self._kept[slot] = factors
        for part, item in enumerate(factors):
            at = slot * self._num_parts + part
            if item is None:
                self._slots[at] = _Factors(None, None, 0, 0.0, 0)
            else:
                panels = item.a_panels.data_ptr(), item.b_panels.data_ptr()
                self._slots[at] = _Factors(*panels, item.rank, item.scale, 0)

    def add(self, y_TO: Tensor, x_TK: Tensor, *, groups: Tensor, rows: Tensor) -> None:
        """
        Add to the result, in the inputs' dtype or fp64, what each row's adapter adds.

        Args:
            groups: int64 [groups, 3]: slot, first row, rows (at most `max_rows()`), of places in `rows`.
            rows: int64, which rows of x and y.
        """
        if x_TK.stride(1) != 1 or x_TK.stride(0) % self._elements:
            x_TK = x_TK.contiguous()
        assert y_TO.is_contiguous()
        self._site.is_wide = y_TO.dtype == torch.float64
        self._library.lora(
            self._address,
            groups.data_ptr(),
            groups.shape[0],
            rows.data_ptr(),
            x_TK.data_ptr(),
            x_TK.stride(0) // self._elements,
            y_TO.data_ptr(),
            torch.get_num_threads(),
        )
