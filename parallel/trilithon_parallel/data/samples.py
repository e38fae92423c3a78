"""
Which tokens a sample has: documents in a shuffled order, one behind the other, cut into windows, the windows shuffled.

The order is Megatron's, number for number, so a run that began there can go on here: all epochs' documents are shuffled
together by `RandomState(seed)` (a stream that numpy has frozen), then the samples. A last epoch of which less than 80%
is needed is shuffled apart, so that no document of it comes early and another not at all.

Windows are not stored: sample i of the unshuffled order begins at token `i * stride`, and the running sum of the
document lengths tells which documents that means.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilithon_parallel.data.errors import DataError
from trilithon_parallel.data.publish import publish_folder

LAST_EPOCH_SHARE = 0.80
"""A last epoch of which a smaller share is used is shuffled apart (Megatron's threshold)."""

_ARRAYS = ("order", "ends", "shuffle")


@dataclass(frozen=True)
class Piece:
    """Tokens [start, stop) of a document."""

    document: int
    start: int
    stop: int


@dataclass(frozen=True)
class Windows:
    """
    How a token stream is cut: window i is tokens [i * stride, i * stride + stride + overlap).

    `overlap` is 1 for next-token prediction, whose last target is the next window's first token, else 0.
    """

    stride: int
    overlap: int

    def count(self, num_tokens: int) -> int:
        """Whole windows in so many tokens."""
        return max(0, (num_tokens - self.overlap) // self.stride)


@dataclass(frozen=True)
class SampleIndex:
    """
    The samples of one source.

    Attributes:
        order: the document at each place of the stream, i32[places].
        ends: tokens of the stream up to the end of each place, i64[places].
        shuffle: the window of each sample, u32 or i64[samples].
        num_epochs: how often the documents are gone through, the last time perhaps in part.
    """

    windows: Windows
    num_epochs: int
    order: NDArray[np.int32]
    ends: NDArray[np.int64]
    shuffle: NDArray[np.uint32] | NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.shuffle)

    def pieces(self, sample: int) -> list[Piece]:
        """The pieces of documents that make up a sample, in order; never empty ones."""
        begin = int(self.shuffle[sample]) * self.windows.stride
        missing = self.windows.stride + self.windows.overlap
        place = int(np.searchsorted(self.ends, begin, side="right"))
        found: list[Piece] = []
        while missing:
            opening = int(self.ends[place - 1]) if place else 0
            start, length = max(0, begin - opening), int(self.ends[place]) - opening
            stop = min(length, start + missing)
            if stop > start:
                found.append(Piece(int(self.order[place]), start, stop))
            missing -= stop - start
            place += 1
        return found


def split_documents(num_documents: int, split: Sequence[float]) -> list[range]:
    """
    Cut documents into parts by shares, in the order of the file.

    >>> split_documents(100, (98, 2, 0))
    [range(0, 98), range(98, 100), range(100, 100)]

    Args:
        num_documents: of the file.
        split: shares of any sum, none negative; 98, 2, 0 holds out 2%.
    Raises:
        DataError: no share is positive, or one is negative.
    Source: Megatron-LM's `--split`.
    """
    if not split or min(split) < 0 or sum(split) <= 0:
        raise DataError(
            f"split must be shares of at least 0, one of them positive. Given: {list(split)}.",
            hint="98,2,0 trains on 98% of the documents and holds 2% out.",
        )
    total = float(sum(split))
    ends = [0.0]
    for share in split:
        ends.append(ends[-1] + share / total)
    borders = [round(end * float(num_documents)) for end in ends]
    return [range(begin, end) for begin, end in itertools.pairwise(borders)]


def build_samples(
    lengths: NDArray[np.int64], documents: range, *, windows: Windows, seed: int, num_samples: int | None
) -> SampleIndex:
    """
    The samples of some documents.

    Args:
        lengths: tokens of every document of the file, i64[D].
        documents: those that are used.
        windows: how samples are cut.
        seed: of the shuffles, from 0 to 2**32 - 1.
        num_samples: at least so many, over as many epochs as they need; None for one epoch.
    Raises:
        DataError: `data_empty`, there is no token, or one epoch holds no sample.
    """
    part = np.arange(documents.start, documents.stop, dtype=np.int32)
    epoch_tokens = int(lengths[documents.start : documents.stop].sum())
    needed = windows.stride * (1 if num_samples is None else num_samples) + windows.overlap
    if epoch_tokens == 0 or (num_samples is None and epoch_tokens < needed):
        raise DataError(
            f"documents [{documents.start}, {documents.stop}) must hold a sample of "
            f"{windows.stride + windows.overlap} tokens. Given: {epoch_tokens} tokens.",
            code="data_empty",
            hint="Add documents, or choose a shorter sequence or another split.",
        )
    num_epochs = 1 if num_samples is None else max(1, -(-needed // epoch_tokens))
    total = windows.count(num_epochs * epoch_tokens)
    before_last = windows.count((num_epochs - 1) * epoch_tokens)
    apart = (
        num_samples is not None
        and num_epochs > 1
        and num_samples - before_last < int(LAST_EPOCH_SHARE * windows.count(epoch_tokens))
    )
    random = np.random.RandomState(seed)
    if apart:
        order = np.concatenate([_shuffled(random, np.tile(part, n)) for n in (num_epochs - 1, 1)])
    else:
        order = _shuffled(random, np.tile(part, num_epochs))
    kind = np.uint32 if total < np.iinfo(np.uint32).max - 1 else np.int64
    ranges = [(0, before_last), (before_last, total)] if apart else [(0, total)]
    shuffle = np.concatenate([_shuffled(random, np.arange(*bounds, dtype=kind)) for bounds in ranges])
    return SampleIndex(windows, num_epochs, order, np.cumsum(lengths[order], dtype=np.int64), shuffle)


def cached_samples(
    cache_dir: Path | None,
    index_digest: str,
    lengths: NDArray[np.int64],
    documents: range,
    *,
    windows: Windows,
    seed: int,
    num_samples: int | None,
) -> SampleIndex:
    """
    `build_samples`, kept in `cache_dir` under a name made of everything that it depends on; None keeps nothing.

    Any number of processes may build at once: the first to finish publishes, and all read what was published.

    Raises:
        DataError: as `build_samples`; `data_cache` where a kept array does not fit.
    """
    options = {"windows": windows, "seed": seed, "num_samples": num_samples}
    if cache_dir is None:
        return build_samples(lengths, documents, windows=windows, seed=seed, num_samples=num_samples)
    parts = [1, index_digest, documents.start, documents.stop, *(repr(item) for item in options.items())]
    folder = cache_dir / f"samples-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}"
    if not folder.is_dir():
        built = build_samples(lengths, documents, windows=windows, seed=seed, num_samples=num_samples)

        def fill(aside: Path) -> None:
            for name in _ARRAYS:
                np.save(aside / f"{name}.npy", getattr(built, name), allow_pickle=False)

        publish_folder(folder, fill)
    order, ends, shuffle = (open_array(folder / f"{name}.npy") for name in _ARRAYS)
    num_epochs = len(order) // max(1, len(documents))
    if len(ends) != len(order) or num_epochs * len(documents) != len(order) or len(shuffle) != windows.count(ends[-1]):
        raise DataError(
            f"{folder} must hold arrays of one shape. Given: {len(order)}, {len(ends)} and {len(shuffle)} entries.",
            code="data_cache",
            hint="Delete this folder; it is built again.",
        )
    return SampleIndex(windows, num_epochs, order, ends, shuffle)


def open_array(path: Path) -> NDArray[Any]:
    """
    Map a kept one-dimensional array of whole numbers.

    Raises:
        DataError: `data_cache`, the file is not such an array.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path} is not a kept array: {error}.", code="data_cache", hint="Delete its folder; it is built again."
        ) from None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"{path} must hold whole numbers in one row. Given: {array.dtype} {array.shape}.",
            code="data_cache",
            hint="Delete its folder; it is built again.",
        )
    return np.asarray(array)


def _shuffled(random: np.random.RandomState, array: NDArray[Any]) -> NDArray[Any]:
    random.shuffle(array)
    return array
