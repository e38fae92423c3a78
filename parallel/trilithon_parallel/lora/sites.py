"""
One place of the model where adapters add to a product's result: whose rows, which factors, how they are multiplied.

Shapes: T packed tokens, K inputs and O outputs of a product (local), R rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from trilithon_parallel.backend import native_lora
from trilithon_parallel.backend.native_lora import Arena, NativeSite
from trilithon_parallel.backend.torch_ops import TorchBackend
from trilithon_parallel.layers import Product


@dataclass(frozen=True)
class Rows:
    """
    Whose adapter each row of a step has, by adapter.

    Attributes:
        rows: int64: rows of the step that have an adapter, those of one adapter next to each other.
        spans: (slot, first, last) of places in `rows`, one for each adapter.
        groups: int64 [groups, 3], the same cut into pieces for the kernel: slot, first, count.
    """

    rows: Tensor
    spans: tuple[tuple[int, int, int], ...]
    groups: Tensor


@dataclass(frozen=True)
class Factors:
    """One adapter's A [R, K] and B [O, R] of one product, as this rank holds them."""

    a_RK: Tensor
    b_OR: Tensor
    scale: float


Put = Callable[[int], None]
"""Puts an adapter's factors, which are packed already, into a slot."""


class Site(Protocol):
    """Products with one input, and what the slots' adapters add to their joint result."""

    def room(self, ranks: Sequence[int]) -> int:
        """32-bit words of an arena that `pack` takes for factors of these ranks; 0 for a product without any."""
        ...

    def pack(self, factors: Sequence[Factors | None], arena: Arena) -> Put:
        """Pack an adapter's factors, one for each product; None where the adapter leaves a product as it is."""
        ...

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        ...

    def add(self, y_TO: Tensor, x_TK: Tensor, rows: Rows) -> None:
        """Add to a result, in place: in the inputs' dtype, or fp64 where ranks sum it."""
        ...


class KernelSite:
    """A site on the C kernel: one call for all rows of a step."""

    def __init__(self, terms: Sequence[int], outputs: Sequence[int], *, num_slots: int, dtype: torch.dtype) -> None:
        self._native = NativeSite(terms, outputs, num_slots=num_slots, dtype=dtype)
        self._inputs, self._outputs, self._dtype = sum(terms), list(outputs), dtype

    def room(self, ranks: Sequence[int]) -> int:
        """See `Site.room`."""
        return sum(
            native_lora.panel_floats((rank, self._inputs), (size, rank), self._dtype)
            for rank, size in zip(ranks, self._outputs, strict=True)
        )

    def pack(self, factors: Sequence[Factors | None], arena: Arena) -> Put:
        """See `Site.pack`."""
        packed = native_lora.pack([f if f is None else (f.a_RK, f.b_OR, f.scale) for f in factors], arena)
        return functools.partial(self._native.put, factors=packed)

    def clear(self, slot: int) -> None:
        """See `Site.clear`."""
        self._native.put(slot, [None] * len(self._outputs))

    def add(self, y_TO: Tensor, x_TK: Tensor, rows: Rows) -> None:
        """See `Site.add`."""
        self._native.add(y_TO, x_TK, groups=rows.groups, rows=rows.rows)


class ProductSite:
    """
    A site on the backend's own products, one adapter after another: the kernel's reference, and for other devices.

    Args:
        terms: how tp cuts the inputs, as for the backend's product; None where it doesn't.
    """

    def __init__(
        self, terms: Sequence[int] | None, outputs: Sequence[int], *, num_slots: int, backend: TorchBackend
    ) -> None:
        self._terms, self._outputs, self._backend = terms, list(outputs), backend
        self._slots: dict[int, list[tuple[Product, Product, float] | None]] = {}

    def room(self, ranks: Sequence[int]) -> int:
        """See `Site.room`: products have memory of their own."""
        return 0

    def pack(self, factors: Sequence[Factors | None], arena: Arena) -> Put:
        """See `Site.pack`."""
        make = self._backend.product
        packed = [
            f if f is None else (make(f.a_RK, None, terms=self._terms), make(f.b_OR, None), f.scale) for f in factors
        ]

        def put(slot: int) -> None:
            self._slots[slot] = packed

        return put

    def clear(self, slot: int) -> None:
        """See `Site.clear`."""
        self._slots.pop(slot, None)

    def add(self, y_TO: Tensor, x_TK: Tensor, rows: Rows) -> None:
        """See `Site.add`."""
        for slot, first, last in rows.spans:
            index = rows.rows[first:last].to(x_TK.device)
            own_TK, start = x_TK.index_select(0, index), 0
            for item, size in zip(self._slots[slot], self._outputs, strict=True):
                if item is not None:
                    a, b, scale = item
                    added_TO = b(a(own_TK).to(x_TK.dtype) * scale).to(x_TK.dtype)
                    y_TO[:, start : start + size].index_add_(0, index, added_TO.to(y_TO.dtype))
                start += size


def arrange(slots: Sequence[int], bounds: Sequence[int], *, piece: int) -> Rows | None:
    """
    The rows of a step by adapter; None where no sequence has one. Pure.

    >>> rows = arrange([1, -1, 0, 1], [0, 1, 2, 4, 5], piece=8)
    >>> rows.rows.tolist(), rows.spans, rows.groups.tolist()
    ([2, 3, 0, 4], ((0, 0, 2), (1, 2, 4)), [[0, 0, 2], [1, 2, 2]])
    """
    by_slot: dict[int, list[int]] = {}
    for slot, (start, stop) in zip(slots, pairwise(bounds), strict=True):
        if slot >= 0:
            by_slot.setdefault(slot, []).extend(range(start, stop))
    if not by_slot:
        return None
    rows: list[int] = []
    spans, groups = [], []
    for slot in sorted(by_slot):
        first = len(rows)
        rows += by_slot[slot]
        spans.append((slot, first, len(rows)))
        groups += [(slot, at, min(piece, len(rows) - at)) for at in range(first, len(rows), piece)]
    return Rows(torch.tensor(rows, dtype=torch.int64), tuple(spans), torch.tensor(groups, dtype=torch.int64))
