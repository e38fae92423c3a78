"""The token file: its bytes, what a broken one is told, and that it appears whole or not at all."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilithon_parallel.data.errors import DataError
from trilithon_parallel.data.index import DTYPES, IndexedTokens, token_dtype
from trilithon_parallel.data.index_writer import IndexWriter

GOLDEN_SHA256 = "416ba3f8d9601192c5b0c9424ce7e61d6ac2d9d464dba8e5ee55deb8247de3aa"


def write_golden(prefix: Path) -> Path:
    """Sequences [1, 2, 3] and [4, 5], a document each, in u16."""
    with IndexWriter(prefix, dtype=token_dtype(100)) as writer:
        writer.add_document([1, 2, 3])
        writer.add_document([4, 5])
        writer.publish()
    return prefix


def test_golden_bytes(tmp_path: Path) -> None:
    """
    The format, byte for byte.

    Inverse seen: dtype code 4, or pointers counted in tokens, changes the digest.
    """
    prefix = write_golden(tmp_path / "golden")
    index = Path(f"{prefix}.idx").read_bytes()

    assert len(index) == 82
    assert hashlib.sha256(index).hexdigest() == GOLDEN_SHA256
    assert Path(f"{prefix}.bin").read_bytes() == struct.pack("<5H", 1, 2, 3, 4, 5)
    assert index[:34] == b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 2, 3)
    assert index[34:] == struct.pack("<2i2q3q", 3, 2, 0, 6, 0, 1, 2)


@pytest.mark.parametrize(("vocab", "name"), [(65_499, "uint16"), (65_500, "int32"), (128_256, "int32")])
def test_dtype_follows_the_vocabulary(vocab: int, name: str) -> None:
    """u16 below 65500 ids, else i32."""
    assert token_dtype(vocab).name == name


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(st.lists(st.integers(0, 100), max_size=5), max_size=3), max_size=6),
    code=st.sampled_from([1, 2, 3, 4, 5, 8]),
)
def test_what_is_written_is_read(
    documents: list[list[list[int]]], code: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any documents of any sequences, empty ones included, in any whole-number dtype."""
    prefix = tmp_path_factory.mktemp("round") / "trip"
    with IndexWriter(prefix, dtype=DTYPES[code]) as writer:
        for document in documents:
            for sequence in document:
                writer.add_sequence(sequence)
            writer.end_document()
        writer.publish()

    tokens = IndexedTokens(prefix)

    joined = [[token for sequence in document for token in sequence] for document in documents]
    assert [tokens.read(i).tolist() for i in range(tokens.num_documents)] == joined
    assert tokens.document_lengths().tolist() == [len(document) for document in joined]
    flat = [sequence for document in documents for sequence in document]
    assert [tokens.sequence(i).tolist() for i in range(tokens.num_sequences)] == flat
    assert tokens.dtype == DTYPES[code]


def test_modes_are_read(tmp_path: Path) -> None:
    """A file with a mode per sequence, as multimodal data has it."""
    prefix = write_golden(tmp_path / "golden")
    with Path(f"{prefix}.idx").open("ab") as file:
        file.write(bytes([0, 1]))

    modes = IndexedTokens(prefix).modes

    assert modes is not None
    assert modes.tolist() == [0, 1]


def test_either_file_names_the_pair(tmp_path: Path) -> None:
    """The prefix may be given with `.bin` or `.idx`; other dots belong to the name."""
    prefix = write_golden(tmp_path / "corpus.v2")

    for name in ("corpus.v2", "corpus.v2.bin", "corpus.v2.idx"):
        assert IndexedTokens(tmp_path / name).prefix == prefix


def _put(offset: int, form: str, value: int) -> Callable[[bytearray], None]:
    def change(index: bytearray) -> None:
        struct.pack_into(form, index, offset, value)

    return change


def _cut(size: int) -> Callable[[bytearray], None]:
    def change(index: bytearray) -> None:
        del index[size:]

    return change


CORRUPTIONS = {
    "empty": (_cut(0), "byte 0 must be a header of 34 bytes. Given: a file of 0 bytes"),
    "header cut": (_cut(33), "byte 33 must be a header of 34 bytes. Given: a file of 33 bytes"),
    "magic": (_put(0, "B", 0), r"byte 0 must be the magic b'MMIDIDX\x00\x00'. Given: b'\x00MIDIDX\x00\x00'"),
    "magic end": (_put(8, "B", 1), "byte 0 must be the magic"),
    "version": (_put(9, "<Q", 2), "byte 9 must be version 1. Given: version 2"),
    "code 0": (_put(17, "B", 0), "byte 17 must be a dtype code from 1 to 8. Given: code 0"),
    "code 9": (_put(17, "B", 9), "byte 17 must be a dtype code from 1 to 8. Given: code 9"),
    "float": (_put(17, "B", 7), "byte 17 must be the dtype code of whole numbers (1 to 5, or 8). Given: code 7"),
    "more sequences": (_put(18, "<Q", 3), "byte 18 must be a file of 94 bytes (or 97 with modes) for 3 sequences"),
    "fewer sequences": (_put(18, "<Q", 1), "byte 18 must be a file of 70 bytes"),
    "endless sequences": (_put(18, "<Q", 2**64 - 1), "byte 18 must be a file of"),
    "no border": (_put(26, "<Q", 0), "byte 26 must be at least one document border. Given: 0"),
    "more borders": (_put(26, "<Q", 4), "4 document borders. Given: 82 bytes"),
    "negative length": (_put(38, "<i", -2), "byte 38 must be a length of sequence 1 of at least 0. Given: -2"),
    "length": (_put(34, "<i", 4), "byte 50 must be the pointer of sequence 1 at byte 8, the end of those before it"),
    "pointer": (_put(42, "<q", 2), "byte 42 must be the pointer of sequence 0 at byte 0"),
    "pointer back": (_put(50, "<q", -6), "byte 50 must be the pointer of sequence 1 at byte 6"),
    "first border": (_put(58, "<q", 1), "byte 58 must be a first document border of 0. Given: 1"),
    "border back": (_put(66, "<q", 3), "byte 74 must be document border 2 not before border 1, which is 3. Given: 2"),
    "last border": (
        _put(74, "<q", 1),
        "byte 74 must be a last document border of 2, the number of sequences. Given",
    ),
    "cut": (_cut(81), "Given: 81 bytes"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_R11_a_broken_index_is_explained(name: str, tmp_path: Path) -> None:
    """
    Each corruption gives one sentence with the file, the byte, what must be there and what is.

    Inverse seen: without the check of the pointers, "length", "pointer" and "pointer back" open without a word.
    """
    change, sentence = CORRUPTIONS[name]
    prefix = write_golden(tmp_path / "broken")
    index = bytearray(Path(f"{prefix}.idx").read_bytes())
    change(index)
    Path(f"{prefix}.idx").write_bytes(index)

    with pytest.raises(DataError) as raised:
        IndexedTokens(prefix)

    assert str(prefix) in raised.value.message
    assert sentence in raised.value.message
    assert raised.value.code == "data_index"
    assert raised.value.hint


@pytest.mark.parametrize(("num_bytes", "given"), [(9, "9 bytes"), (12, "12 bytes"), (0, "0 bytes")])
def test_R11_a_token_file_of_another_length_is_refused(num_bytes: int, given: str, tmp_path: Path) -> None:
    """`.bin` must have exactly the bytes that the index says."""
    prefix = write_golden(tmp_path / "broken")
    Path(f"{prefix}.bin").write_bytes(bytes(num_bytes))

    with pytest.raises(DataError, match=f"must have 10 bytes, 5 tokens of uint16.*Given: {given}"):
        IndexedTokens(prefix)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_R11_a_missing_file_is_named(suffix: str, tmp_path: Path) -> None:
    """One file of the pair is not there."""
    prefix = write_golden(tmp_path / "half")
    Path(f"{prefix}.{suffix}").unlink()

    with pytest.raises(DataError, match=rf"half\.{suffix} cannot be read: No such file"):
        IndexedTokens(prefix)


@pytest.mark.parametrize("token", [-1, 70_000])
def test_R11_a_token_that_does_not_fit_is_refused(token: int, tmp_path: Path) -> None:
    """A token is not cut down to the dtype."""
    with (
        IndexWriter(tmp_path / "c", dtype=token_dtype(100)) as writer,
        pytest.raises(DataError, match=r"tokens must be from 0 to 65535 in uint16\. Given: "),
    ):
        writer.add_document([1, token])


def test_R10_an_unfinished_file_leaves_nothing(tmp_path: Path) -> None:
    """A writer that fails before it publishes leaves neither file nor temporary name."""
    writer = IndexWriter(tmp_path / "c", dtype=token_dtype(100))
    with suppress(KeyError), writer:
        writer.add_document([1])
        raise KeyError

    assert os.listdir(tmp_path) == []


def test_R10_a_published_file_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    """A second writer of the same name is refused before it writes, and also when it loses a race."""
    late = IndexWriter(tmp_path / "c", dtype=token_dtype(100))
    write_golden(tmp_path / "c")
    with pytest.raises(DataError, match="exists already"):
        IndexWriter(tmp_path / "c", dtype=token_dtype(100))
    with late:
        late.add_document([9])
        with pytest.raises(DataError, match="exists already"):
            late.publish()

    assert IndexedTokens(tmp_path / "c").read(0).tolist() == [1, 2, 3]
    with IndexWriter(tmp_path / "c", dtype=token_dtype(100), overwrite=True) as writer:
        writer.add_document([9])
        writer.publish()
    assert IndexedTokens(tmp_path / "c").read(0).tolist() == [9]
    assert sorted(os.listdir(tmp_path)) == ["c.bin", "c.idx"]


def test_digest_tells_contents_apart(tmp_path: Path) -> None:
    """Equal contents have one digest wherever they lie; another token or another border has another."""
    documents = {"a": [[1, 2], [3]], "b": [[1, 2], [3]], "token": [[1, 2], [4]], "border": [[1], [2, 3]]}
    for name, content in documents.items():
        with IndexWriter(tmp_path / name, dtype=token_dtype(100)) as writer:
            for document in content:
                writer.add_document(document)
            writer.publish()

    digests = {name: IndexedTokens(tmp_path / name).digest for name in documents}

    assert digests["a"] == digests["b"]
    assert len(set(digests.values())) == 3


def test_tokens_are_mapped_not_read(tmp_path: Path) -> None:
    """A document is a read-only view of the file."""
    view = IndexedTokens(write_golden(tmp_path / "c")).read(1)

    assert not view.flags.writeable
    assert not view.flags.owndata
    assert isinstance(view, np.ndarray)
