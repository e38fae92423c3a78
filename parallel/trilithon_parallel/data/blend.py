"""
Blends: which source each sample of the stream comes from.

Sample k goes to the source that is furthest behind its share, `argmax(w * max(k, 1) - count)`, the first on ties. So
every prefix of the stream has the blend's proportions, to about one sample, and a longer blend begins as the shorter.
Source: Megatron-LM's blended datasets (arXiv 2201.11990, section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trilithon_parallel.data.errors import DataError

MAX_SOURCES = 256
"""A sample's source is stored in one byte."""

_BLOCK = 4096  # samples between two rows of running counts


def normalised(weights: Sequence[float]) -> list[float]:
    """
    Weights that sum to 1.

    Raises:
        DataError: there is none or too many, or one is not a positive number.
    """
    if not 1 <= len(weights) <= MAX_SOURCES:
        raise DataError(f"a blend must have from 1 to {MAX_SOURCES} sources. Given: {len(weights)}.")
    for i, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight > 0):
            raise DataError(
                f"blend weight {i} must be a number above 0. Given: {weight}.", hint="Leave the source out instead."
            )
    given = np.array(weights, np.float64)
    shares: list[float] = (given / np.sum(given)).tolist()  # rounds as Megatron's, so ties fall alike
    return shares


def blend(weights: Sequence[float], num_samples: int) -> NDArray[np.uint8]:
    """
    The source of each of so many samples, by weight.

    >>> blend((0.5, 0.3, 0.2), 10).tolist()
    [0, 1, 2, 0, 1, 0, 2, 0, 1, 0]

    Args:
        weights: one per source, positive; normalised here.
        num_samples: length of the stream.
    """
    shares = normalised(weights)
    sources = bytearray(num_samples)
    if len(shares) > 1:
        counts = [0] * len(shares)
        for k in range(num_samples):
            due = k or 1
            errors = [share * due - count for share, count in zip(shares, counts, strict=True)]
            source = errors.index(max(errors))
            sources[k] = source
            counts[source] += 1
    return np.frombuffer(sources, np.uint8)


def blend_exhaustively(sizes: Sequence[int]) -> NDArray[np.uint8]:
    """
    The source of each sample when every sample of every source comes exactly once; a spent source drops out.

    >>> blend_exhaustively((4, 2)).tolist()
    [0, 1, 0, 0, 1, 0]

    Args:
        sizes: samples per source, at least 1; they are the weights too.
    """
    shares = normalised(sizes)
    left, counts = dict(enumerate(sizes)), [0] * len(sizes)
    sources = bytearray(sum(sizes))
    for k in range(len(sources)):
        due = k or 1
        source = max(left, key=lambda i: (shares[i] * due - counts[i], -i))
        sources[k] = source
        counts[source] += 1
        left[source] -= 1
        if not left[source]:
            del left[source]
    return np.frombuffer(sources, np.uint8)


@dataclass(frozen=True)
class BlendIndex:
    """
    A blend that can be asked for any sample.

    `sources` is u8[samples]; `counts` i64[blocks + 1, sources]: the samples of each source before each block.
    """

    sources: NDArray[np.uint8]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, sources: NDArray[np.uint8], num_sources: int) -> BlendIndex:
        """Count block by block."""
        starts = range(0, len(sources), _BLOCK)
        blocks = [np.bincount(sources[i : i + _BLOCK], minlength=num_sources) for i in starts]
        rows = np.cumsum([np.zeros(num_sources, np.int64), *blocks], axis=0, dtype=np.int64)
        return cls(sources, rows)

    def __len__(self) -> int:
        return len(self.sources)

    def locate(self, sample: int) -> tuple[int, int]:
        """The source of a sample, and which sample of that source it is."""
        block = sample // _BLOCK
        source = int(self.sources[sample])
        within = np.count_nonzero(self.sources[block * _BLOCK : sample] == source)
        return source, int(self.counts[block, source]) + int(within)

    def num_samples(self, source: int) -> int:
        """How many samples of a source the whole blend takes."""
        return int(self.counts[-1, source])


@dataclass(frozen=True)
class BlendSource:
    """A source of a published blend: its tokens in billions, its weight in percent, and the printed epochs."""

    name: str
    tokens: float
    weight: float
    epochs: float

    def epochs_of(self, tokens: float) -> float:
        """How often the source is read in a run of so many billion tokens."""
        return self.weight / 100 * tokens / self.tokens


MT_NLG_TOKENS = 270.0
"""Billions of tokens that MT-NLG 530B was trained on."""

MT_NLG_BLEND = (
    BlendSource("Books3", 25.7, 14.336, 1.5),
    BlendSource("OpenWebText2", 14.8, 19.336, 3.6),
    BlendSource("Stack Exchange", 11.6, 5.689, 1.4),
    BlendSource("PubMed Abstracts", 4.4, 2.897, 1.8),
    BlendSource("Wikipedia", 4.2, 4.771, 3.2),
    BlendSource("Gutenberg (PG-19)", 2.7, 0.873, 0.9),
    BlendSource("BookCorpus2", 1.5, 1.007, 1.8),
    BlendSource("NIH ExPorter", 0.3, 0.208, 1.9),
    BlendSource("ArXiv", 20.8, 1.359, 0.2),
    BlendSource("GitHub", 24.3, 1.588, 0.2),
    BlendSource("Pile-CC", 49.8, 9.446, 0.5),
    BlendSource("CC-2020-50", 68.7, 13.017, 0.5),
    BlendSource("CC-2021-04", 82.6, 15.652, 0.5),
    BlendSource("RealNews", 21.9, 8.962, 1.1),
    BlendSource("CC-Stories", 5.3, 0.859, 0.5),
)
"""The blend of MT-NLG 530B (arXiv 2201.11990, table 2); the weights sum to 100."""
