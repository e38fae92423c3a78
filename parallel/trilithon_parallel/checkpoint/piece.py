"""A rectangle of a global tensor in one rank's memory, and where its elements lie in a file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from trilithon_parallel.config import ModelError
from trilithon_parallel.weights.safetensors_io import bytes_of

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Piece:
    """
    A rectangle of one global canonical tensor, held by this rank.

    Attributes:
        name: of the global tensor: a name of `placement.global_shapes`, or with `.master`, `.exp_avg`, `.exp_avg_sq`
            behind it.
        slices: one per dim, step 1, within the true (unpadded) global shape.
        tensor: of the shape of `slices`, on any device. Saving reads it, loading fills it.
    """

    name: str
    slices: Slices
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of `slices`."""
        return tuple(item.stop - item.start for item in self.slices)


def runs(shape: Sequence[int], slices: Slices) -> tuple[npt.NDArray[np.int64], int]:
    """
    A block of a row-major tensor as contiguous runs: (first element of each run, elements in a run).

    >>> runs((4, 6), (slice(1, 3), slice(2, 5)))
    (array([ 8, 14]), 3)
    >>> runs((4, 6), (slice(1, 3), slice(0, 6)))
    (array([6]), 12)
    """
    assert len(shape) == len(slices)
    if not shape:
        return np.zeros(1, dtype=np.int64), 1
    inner = len(shape) - 1  # dims after this one are whole, so that it and they are one run
    while inner > 0 and slices[inner] == slice(0, shape[inner]):
        inner -= 1
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    starts = np.array([slices[inner].start * strides[inner]], dtype=np.int64)
    for dim in reversed(range(inner)):
        at = np.arange(slices[dim].start, slices[dim].stop, dtype=np.int64) * strides[dim]
        starts = (at[:, None] + starts[None, :]).reshape(-1)
    return starts, (slices[inner].stop - slices[inner].start) * strides[inner]


def write_block(fd: int, start: int, shape: Sequence[int], slices: Slices, block: Tensor) -> None:
    """
    Write a block of the tensor of `shape` whose data begins at byte `start`; bytes beside the block stay as they are.

    Args:
        block: contiguous, on the CPU, in the dtype of the file, of the shape of `slices`.
    """
    for view, offset in _windows(start, shape, slices, block):
        while view:
            count = os.pwrite(fd, view, offset)
            view, offset = view[count:], offset + count


def read_block(fd: int, start: int, shape: Sequence[int], slices: Slices, block: Tensor) -> None:
    """
    Fill `block` (as for `write_block`) from the file; only its own bytes are read.

    Raises:
        ModelError: `weights_truncated`, the file ends too early.
    """
    for view, offset in _windows(start, shape, slices, block):
        while view:
            count = os.preadv(fd, [view], offset)
            if count == 0:
                raise ModelError(
                    f"a tensor's data ends at byte {offset} of its file, before it is complete.",
                    code="weights_truncated",
                    hint="Use an earlier checkpoint, or copy this one again.",
                )
            view, offset = view[count:], offset + count


def _windows(start: int, shape: Sequence[int], slices: Slices, block: Tensor) -> Iterator[tuple[memoryview, int]]:
    """Each run of the block: its bytes in memory and where they lie in the file."""
    if block.numel() == 0:
        return
    firsts, length = runs(shape, slices)
    assert len(firsts) * length == block.numel(), f"{tuple(block.shape)} for {slices}"
    memory, size = bytes_of(block), length * block.dtype.itemsize
    for i, offset in enumerate((start + firsts * block.dtype.itemsize).tolist()):
        yield memory[i * size : (i + 1) * size], offset
