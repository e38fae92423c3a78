"""Do the rectangles of all ranks together make up the model? Checked by sums, without one rank seeing another's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from trilithon_parallel.checkpoint.errors import CheckpointError
from trilithon_parallel.checkpoint.piece import Piece, Slices
from trilithon_parallel.checkpoint.table import Stored
from trilithon_parallel.collectives import all_reduce
from trilithon_parallel.grid import Axis
from trilithon_parallel.weights.loader import dtype_name

_MODULUS = 2**31  # sums over ranks of numbers below it cannot overflow 64 bits


def check_pieces(pieces: Iterable[Piece], tensors: Mapping[str, Stored]) -> None:
    """
    Check each piece against the tensor that it is a part of.

    Raises:
        CheckpointError: `checkpoint_mismatch`, naming tensor, file and what differs.
    """
    for piece in pieces:
        stored = tensors.get(piece.name)
        if stored is None:
            raise _mismatch(f"the checkpoint has no tensor {piece.name}")
        inside = len(piece.slices) == len(stored.shape) and all(
            0 <= item.start <= item.stop <= size and item.step in (None, 1)
            for item, size in zip(piece.slices, stored.shape, strict=True)
        )
        if not inside:
            given = [f"{item.start}:{item.stop}" for item in piece.slices]
            raise _mismatch(
                f"{stored.file} tensor {piece.name} has shape {list(stored.shape)}, and a part of it must lie within. "
                f"Given: {given}"
            )
        if tuple(piece.tensor.shape) != piece.shape:
            raise _mismatch(
                f"a part of {stored.file} tensor {piece.name} must have shape {list(piece.shape)}. "
                f"Given: {list(piece.tensor.shape)}"
            )
        if piece.tensor.dtype != stored.dtype:
            raise _mismatch(
                f"{stored.file} tensor {piece.name} is {dtype_name(stored.dtype)}. "
                f"Given: {dtype_name(piece.tensor.dtype)}"
            )


def _mismatch(message: str) -> CheckpointError:
    return CheckpointError(
        f"{message}.",
        code="checkpoint_mismatch",
        hint="A run resumes with the model and the dtype that it was saved with; to change them, begin a new run from "
        "the weights.",
    )


def check_coverage(pieces: Sequence[Piece], tensors: Mapping[str, Stored], *, axis: Axis, exactly_once: bool) -> None:
    """
    Check that over all ranks every tensor is held (`exactly_once`) or asked for (at least once). Collective.

    Exactly once: the number of elements and the sums of their positions and of the positions' squares must be those of
    the whole tensor, so that a gap is not made good by an overlap elsewhere.

    Raises:
        CheckpointError: `checkpoint_coverage`, naming the first tensor, on all ranks alike.
    """
    order = {name: i for i, name in enumerate(tensors)}
    given = torch.zeros((len(order), 3), dtype=torch.int64)
    for piece in pieces:
        shape = tensors[piece.name].shape
        given[order[piece.name]] += torch.tensor(position_sums(shape, piece.slices))
    given = all_reduce(given, axis, label="checkpoint.coverage")
    for name, row in zip(tensors, given.tolist(), strict=True):
        stored = tensors[name]
        count, *sums = position_sums(stored.shape, tuple(slice(0, size) for size in stored.shape))
        fits = [row[0], row[1] % _MODULUS, row[2] % _MODULUS] == [count, *sums] if exactly_once else row[0] >= count
        if not fits:
            often = "exactly once" if exactly_once else "at least once"
            raise CheckpointError(
                f"each of the {count} elements of {stored.file} tensor {name} must be given {often} over all ranks. "
                f"Given: {row[0]} elements.",
                code="checkpoint_coverage",
                hint="Run and checkpoint differ in their parameters; nothing of a model is left out in silence.",
            )


def position_sums(shape: Sequence[int], slices: Slices) -> tuple[int, int, int]:
    """
    Of a block's elements: how many, the sum of their row-major positions, the sum of the squares (both modulo 2^31).

    >>> position_sums((2, 3), (slice(0, 2), slice(1, 2)))
    (2, 5, 17)
    """
    count, first, second = 1, 0, 0  # of the dims so far: sums of 1, p, p^2
    for size, item in zip(shape, slices, strict=True):
        num = item.stop - item.start
        ones = (item.start + item.stop - 1) * num // 2
        squares = _squares(item.stop) - _squares(item.start)
        # p' = p * size + i: expand sum of p' and p'^2 over all pairs (p, i)
        second = second * size * size * num + 2 * first * size * ones + count * squares
        first = first * size * num + count * ones
        count *= num
    return count, first % _MODULUS, second % _MODULUS


def _squares(stop: int) -> int:
    """0^2 + 1^2 + ... + (stop - 1)^2."""
    return (stop - 1) * stop * (2 * stop - 1) // 6
