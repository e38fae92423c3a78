"""Samples: which tokens each has, epochs, splits, the cache that several builders race for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from trilithon_parallel.data.errors import DataError
from trilithon_parallel.data.index import IndexedTokens
from trilithon_parallel.data.samples import SampleIndex, Windows, build_samples, cached_samples, split_documents


def stream_of(index: SampleIndex, lengths: NDArray[np.int64]) -> list[tuple[int, int]]:
    """The whole unshuffled stream, token by token, as (document, place in it)."""
    return [(int(document), place) for document in index.order for place in range(lengths[document])]


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    stride=st.integers(1, 20),
    overlap=st.integers(0, 1),
    num_samples=st.integers(1, 60),
    seed=st.integers(0, 2**32 - 1),
)
def test_samples_are_windows_of_the_stream(
    lengths: list[int], stride: int, overlap: int, num_samples: int, seed: int
) -> None:
    """
    Sample i is a window of stride + overlap tokens, every window is exactly one sample, and there are enough.

    Inverse seen: `stop = min(length, missing)` cuts a window short that begins within a document.
    """
    table = np.array([*lengths, 5], np.int64)
    documents = range(len(table))
    index = build_samples(table, documents, windows=Windows(stride, overlap), seed=seed, num_samples=num_samples)
    stream = stream_of(index, table)

    assert len(index) >= num_samples
    assert sorted(index.shuffle.tolist()) == list(range(len(index)))
    assert sorted(index.order.tolist()) == sorted([*documents] * index.num_epochs)
    for i, window in enumerate(index.shuffle.tolist()):
        pieces = index.pieces(i)
        tokens = [(piece.document, place) for piece in pieces for place in range(piece.start, piece.stop)]
        assert tokens == stream[window * stride : window * stride + stride + overlap]
        assert all(piece.stop > piece.start for piece in pieces)


def test_a_small_last_epoch_is_shuffled_apart() -> None:
    """Below 80% of its samples, the last epoch's documents and samples come last; from 80% on they are mixed in."""
    lengths = np.full(10, 10, np.int64)

    def last_documents(num_samples: int) -> list[int]:
        windows = Windows(stride=1, overlap=0)
        index = build_samples(lengths, range(10), windows=windows, seed=3, num_samples=num_samples)
        assert index.num_epochs == 2
        return sorted(index.order[10:].tolist())

    assert last_documents(179) == list(range(10))
    assert last_documents(180) != list(range(10))
    apart = build_samples(lengths, range(10), windows=Windows(1, 0), seed=3, num_samples=150)
    assert max(apart.shuffle[:100]) == 99


def test_seeds_decide_the_order() -> None:
    """Equal seeds give equal samples; another seed gives others."""
    lengths = np.full(20, 7, np.int64)
    a, b, c = (
        build_samples(lengths, range(20), windows=Windows(4, 1), seed=seed, num_samples=50) for seed in (1, 1, 2)
    )

    assert np.array_equal(a.order, b.order)
    assert np.array_equal(a.shuffle, b.shuffle)
    assert not np.array_equal(a.order, c.order)


def test_split_by_documents() -> None:
    """98, 2, 0 as Megatron cuts it: parts cover the documents once, in order, whatever the shares."""
    assert split_documents(50, (98, 2, 0)) == [range(49), range(49, 50), range(50, 50)]
    assert split_documents(1000, (0.949, 0.05, 0.001)) == [range(949), range(949, 999), range(999, 1000)]
    for num in range(60):
        parts = split_documents(num, (7, 2, 1))
        assert [i for part in parts for i in part] == list(range(num))


@pytest.mark.parametrize("split", [(), (0, 0, 0), (1, -1, 0)])
def test_R11_wrong_splits_are_explained(split: tuple[float, ...]) -> None:
    """Shares are not negative, and one is positive."""
    with pytest.raises(DataError, match="split must be shares of at least 0"):
        split_documents(10, split)


@pytest.mark.parametrize(("documents", "num_samples"), [(range(0), 5), (range(2), 5), (range(2, 3), None)])
def test_R11_too_few_tokens_are_explained(documents: range, num_samples: int | None) -> None:
    """No token at all, or less than one sample in an epoch that shall be read once."""
    with pytest.raises(DataError, match="must hold a sample of 9 tokens") as raised:
        build_samples(np.array([0, 0, 8], np.int64), documents, windows=Windows(8, 1), seed=0, num_samples=num_samples)

    assert raised.value.code == "data_empty"


def _cached(cache: Path, tokens: IndexedTokens, *, num_samples: int = 70, seed: int = 7) -> SampleIndex:
    return cached_samples(
        cache,
        tokens.index_digest,
        tokens.document_lengths(),
        range(tokens.num_documents),
        windows=Windows(16, 1),
        seed=seed,
        num_samples=num_samples,
    )


def test_kept_arrays_are_those_that_were_built(write_tokens: Callable[..., Path], tmp_path: Path) -> None:
    """The cache is keyed by everything that decides the samples, and is read back equal, as maps of the files."""
    tokens = IndexedTokens(write_tokens())
    cache = tmp_path / "cache"
    built = _cached(cache, tokens)
    again = _cached(cache, tokens)

    assert len(list(cache.iterdir())) == 1
    assert (again.num_epochs, len(again)) == (built.num_epochs, len(built))
    assert again.pieces(3) == built.pieces(3)
    assert not again.order.flags.writeable
    direct = build_samples(tokens.document_lengths(), range(40), windows=Windows(16, 1), seed=7, num_samples=70)
    assert np.array_equal(again.shuffle, direct.shuffle)
    assert again.num_epochs == direct.num_epochs
    _cached(cache, tokens, seed=8)
    _cached(cache, tokens, num_samples=71)
    _cached(cache, IndexedTokens(write_tokens("other", seed=1)))
    assert len(list(cache.iterdir())) == 4


_BUILDER = """
import sys
from pathlib import Path
from trilithon_parallel.data.index import IndexedTokens
from trilithon_parallel.data.samples import Windows, cached_samples
tokens = IndexedTokens(Path(sys.argv[1]))
sys.stdin.readline()
samples = cached_samples(Path(sys.argv[2]), tokens.index_digest, tokens.document_lengths(), range(tokens.num_documents),
                         windows=Windows(16, 1), seed=7, num_samples=400_000)
print(int(samples.shuffle[:100].sum()), samples.pieces(399_999))
"""


def test_racing_builders_leave_one_good_cache(write_tokens: Callable[..., Path], tmp_path: Path) -> None:
    """
    Builders that start together leave one whole cache, nothing beside it, and read the same samples.

    The index is needed on every node, and each may build it: row 14 of what users of the neighbours hit
    (Megatron-LM#907, #1355: built on one node only).
    Inverse seen, in every second run: with the arrays written in place, one reads what another has only begun.
    """
    prefix, cache = write_tokens(num_documents=300), tmp_path / "cache"
    builders = [
        subprocess.Popen(
            [sys.executable, "-c", _BUILDER, str(prefix), str(cache)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(3)
    ]
    for builder in builders:
        assert builder.stdin is not None
        builder.stdin.write(b"go\n")
        builder.stdin.flush()
    answers = {builder.communicate(timeout=60)[0] for builder in builders}

    assert len(answers) == 1
    assert answers != {b""}
    (folder,) = cache.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["ends.npy", "order.npy", "shuffle.npy"]


def test_R11_a_damaged_cache_is_explained(write_tokens: Callable[..., Path], tmp_path: Path) -> None:
    """A kept array that is cut, is something else, or does not fit the others is named, with what to do."""
    tokens, cache = IndexedTokens(write_tokens()), tmp_path / "cache"
    _cached(cache, tokens)
    (folder,) = cache.iterdir()
    whole = (folder / "shuffle.npy").read_bytes()

    for content in (whole[:40], whole[:-8], b"", b"something else entirely, not an array"):
        (folder / "shuffle.npy").write_bytes(content)
        with pytest.raises(DataError, match=r"shuffle\.npy is not a kept array") as raised:
            _cached(cache, tokens)
        assert raised.value.code == "data_cache"
    np.save(folder / "shuffle.npy", np.arange(5), allow_pickle=False)
    with pytest.raises(DataError, match="must hold arrays of one shape"):
        _cached(cache, tokens)


def test_S1_a_kept_array_is_never_unpickled(write_tokens: Callable[..., Path], tmp_path: Path) -> None:
    """An array of objects, which numpy would unpickle, is refused unread."""
    tokens, cache = IndexedTokens(write_tokens()), tmp_path / "cache"
    _cached(cache, tokens)
    (folder,) = cache.iterdir()
    header = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    (folder / "order.npy").write_bytes(header + b"\x80\x04N.")

    with pytest.raises(DataError, match=r"order\.npy is not a kept array"):
        _cached(cache, tokens)
