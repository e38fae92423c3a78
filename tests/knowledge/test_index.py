"""Indexes on disk: what is published is opened, in versions; what is refused, before it is written and after."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from knowledge.retrieval_cases import COUNT, ENCODER, WIDTH, is_whole, opened, publish, random_vectors, told

from trilithon.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, TrilithonError
from trilithon_server.knowledge.dense import Backend
from trilithon_server.knowledge.index import IndexStore
from trilithon_server.knowledge.manifest import MANIFEST_FILE, file_entry
from trilithon_server.knowledge.passages import Passage, passage_line, write_passages
from trilithon_server.knowledge.stored import StoredPassages
from trilithon_server.knowledge.version import Queries


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "indexes"


@pytest.mark.parametrize("backend", ["flat", "hnsw"])
def test_what_is_published_is_opened(backend: Backend, root: Path) -> None:
    """The manifest tells what made the version and lists its files, none of them pickled."""
    version = publish(root, 1, backend=backend)
    index, folder = opened(root), root / "wiki" / "v00000001"

    assert version == 1 == index.version == IndexStore(root).current("wiki")
    assert is_whole(index)
    facts = index.manifest
    assert (facts.index, facts.backend, facts.dim, facts.count, facts.created) == (
        "wiki",
        backend,
        WIDTH,
        COUNT,
        1_700_000_000,
    )
    assert facts.encoder == ENCODER
    assert IndexStore(root).manifest("wiki") == facts
    assert {path.name for path in folder.iterdir()} == {*facts.files, MANIFEST_FILE}
    assert {Path(name).suffix for name in facts.files} == {".npy", ".json", ".jsonl"}
    for name in facts.files:
        if name.endswith(".npy"):
            np.load(folder / name, allow_pickle=False)


def test_the_same_passages_make_the_same_files(root: Path) -> None:
    """Two indexes of the same content differ in their names alone."""
    for name in ("a", "b"):
        publish(root, 1, name=name, backend="hnsw")
    a, b = (IndexStore(root).manifest(name) for name in ("a", "b"))

    assert a.files == b.files
    assert IndexStore(root).names() == ["a", "b"]


def test_versions_follow_each_other(root: Path) -> None:
    """Numbers rise, the newest two stay; one that was opened is read though its files are gone."""
    publish(root, 1)
    first = opened(root)
    numbers = [publish(root, version) for version in (2, 3, 4)]

    assert numbers == [2, 3, 4]
    assert sorted(path.name for path in (root / "wiki").iterdir()) == ["current", "v00000003", "v00000004"]
    assert opened(root).version == 4
    assert is_whole(first)


def test_an_index_is_deleted(root: Path) -> None:
    """Its name is free, nothing of it is left, another of a like name stays; whoever has it open reads on."""
    publish(root, 1)
    publish(root, 1, name="wiki-2")
    index = opened(root)
    store = IndexStore(root)
    store.delete("wiki")

    assert store.names() == ["wiki-2"]
    assert sorted(path.name for path in root.iterdir()) == [".locks", "wiki-2"]
    assert is_whole(index)
    for call in (store.current, store.manifest, store.delete):
        with pytest.raises(NotFound, match='index "wiki" does not exist') as caught:
            call("wiki")
        assert caught.value.code == "index_not_found"


def test_only_indexes_are_listed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the lock of an index that is called as its pointer is, and not what a killed deletion left behind."""
    publish(root, 1)
    publish(root, 1, name="current")
    publish(root, 1, name="gone")

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        IndexStore(root).delete("gone")

    assert [path.name for path in root.glob(".gone.*.tmp/current")] == ["current"]
    assert IndexStore(root).names() == ["current", "wiki"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a.b", "-a", "a" * 65, "\u00e9", "a\n", "*"])
def test_names_that_are_no_folder_are_refused(name: str, root: Path) -> None:
    """No name leads out of the folder, or to a file of another index."""
    publish(root, 1)
    for call in (IndexStore(root).current, IndexStore(root).delete, lambda given: publish(root, 2, name=given)):
        with pytest.raises(InvalidArgument, match="an index's name must have 1 to 64 letters") as caught:
            call(name)
        assert caught.value.code == "index_invalid"


@pytest.mark.parametrize(
    ("passages", "vectors", "code", "says"),
    [
        ([], np.zeros((0, 2), np.float32), "passages_invalid", "at least one passage"),
        (told(1, 2), np.zeros((3, 2), np.float32), "vectors_invalid", r"each of 2 passages needs a vector.*\[3, 2\]"),
        (told(1, 2), np.zeros(2, np.float32), "vectors_invalid", r"Given: vectors \[2\]"),
        (told(1, 2), np.zeros((2, 2), np.float16), "vectors_invalid", "must be float32"),
        ([*told(1, 1), *told(1, 1)], np.zeros((2, 2), np.float32), "passages_invalid", "id must not repeat"),
        ([Passage("a", "", "?!")], np.zeros((1, 2), np.float32), "index_invalid", "needs a passage with a word"),
    ],
)
def test_what_cannot_be_an_index_is_refused(
    passages: list[Passage], vectors: Any, code: str, says: str, root: Path
) -> None:
    """The version before stays, and nothing of the refused one is left."""
    publish(root, 1)
    with pytest.raises(InvalidArgument, match=says) as caught:
        IndexStore(root).publish("wiki", passages, vectors, encoder=ENCODER, created=0)

    assert caught.value.code == code
    assert sorted(path.name for path in (root / "wiki").iterdir()) == ["current", "v00000001"]
    assert is_whole(opened(root))


def test_acc_A04_an_index_of_another_encoder_is_refused(root: Path) -> None:
    """
    When it is opened, and again when it is asked: both digests are named.

    Inverse check: seen to answer, with scores that mean nothing, when the digests are not compared.
    """
    publish(root, 1)
    with pytest.raises(FailedPrecondition, match=r"vectors of the encoder a1\. Given: queries of b2\.") as caught:
        IndexStore(root).open("wiki", model_digest="b2")
    assert caught.value.code == "index_encoder"

    queries = Queries(texts=["x"], vectors_NH=random_vectors(1, WIDTH, seed=0), model_digest="b2")
    for mode in ("dense", "hybrid"):
        with pytest.raises(FailedPrecondition, match="Given: queries of b2"):
            opened(root).search(queries, 1, mode=mode)  # type: ignore[arg-type]  # a literal of the loop
    assert opened(root).search(Queries(texts=["version1"]), 1, mode="bm25")[0]


# -- what is refused when a version is opened ----------------------------------------------------------------

Harm = Callable[[Path], None]


def rewritten(folder: Path, **changes: Any) -> None:
    """A manifest that says something else, and has the right checksum."""
    body = json.loads((folder / MANIFEST_FILE).read_bytes()) | changes
    del body["sha256"]
    compact = json.dumps(body, sort_keys=True, separators=(",", ":"))
    (folder / MANIFEST_FILE).write_text(json.dumps({"sha256": hashlib.sha256(compact.encode()).hexdigest(), **body}))


def resealed(folder: Path, name: str, array: Any) -> None:
    """Another file in place of one, and a manifest that fits it."""
    if isinstance(array, bytes):
        (folder / name).write_bytes(array)
    else:
        np.save(folder / name, array)
    files = json.loads((folder / MANIFEST_FILE).read_bytes())["files"]
    rewritten(folder, files={**files, name: file_entry(folder / name).model_dump()})


def _gone(folder: Path) -> None:
    (folder / "vectors.npy").unlink()


def _all_gone(folder: Path) -> None:
    shutil.rmtree(folder)


def _flipped(folder: Path) -> None:
    data = bytearray((folder / "vectors.npy").read_bytes())
    data[-3] ^= 1
    (folder / "vectors.npy").write_bytes(data)


def _cut(folder: Path) -> None:
    data = (folder / "passages.jsonl").read_bytes()
    (folder / "passages.jsonl").write_bytes(data[:-1])


def _manifest_flipped(folder: Path) -> None:
    text = (folder / MANIFEST_FILE).read_text()
    (folder / MANIFEST_FILE).write_text(text.replace('"dim": 8', '"dim": 9'))


def _unlisted(folder: Path) -> None:
    files = json.loads((folder / MANIFEST_FILE).read_bytes())["files"]
    del files["ids.npy"]
    rewritten(folder, files=files)


def _pickled(folder: Path) -> None:
    path = folder / "aside"
    with path.open("wb") as file:
        np.save(file, np.array([{}] * COUNT, dtype=object), allow_pickle=True)
    resealed(folder, "ids.npy", path.read_bytes())


def _other_passage(folder: Path) -> None:
    offsets = write_passages(folder / "passages.jsonl", [Passage("q", "", "x")] * COUNT)
    resealed(folder, "passages.jsonl", (folder / "passages.jsonl").read_bytes())
    resealed(folder, "offsets.npy", np.array(offsets, np.int64))


def _array(name: str, array: Any) -> Harm:
    return lambda folder: resealed(folder, name, array)


def _says(**changes: Any) -> Harm:
    return lambda folder: rewritten(folder, **changes)


@pytest.mark.parametrize(
    ("harm", "code", "says"),
    [
        (_gone, "index_corrupt", r"vectors\.npy cannot be read: No such file or directory"),
        (_all_gone, "index_corrupt", r"manifest\.json cannot be read"),
        (_flipped, "index_corrupt", r"vectors\.npy does not fit its checksum"),
        (_cut, "index_corrupt", r"passages\.jsonl must have \d+ bytes\. Given: \d+"),
        (_manifest_flipped, "index_corrupt", r"manifest\.json does not fit its own checksum"),
        (_unlisted, "index_corrupt", r"must list the files of a flat index\. Differing: ids\.npy"),
        (_says(format=2), "index_unsupported", r"a format that is not read here\. Given: 2\. Allowed: 1"),
        (_says(backend="ivf"), "index_unsupported", r'a backend .* Given: "ivf"\. Allowed: flat, hnsw'),
        (_says(backend="hnsw"), "index_corrupt", r"files of a hnsw index\. Differing: graph\.npy"),
        (_says(count=0), "index_corrupt", r"is not a manifest: count: Input should be greater than"),
        (_says(count="5"), "index_corrupt", r"is not a manifest: count: Input should be a valid integer"),
        (_says(version=7), "index_corrupt", r'has the files of index "wiki" version 7'),
        (_says(index="other"), "index_corrupt", r'has the files of index "other" version 1'),
        (_says(dim=9), "index_corrupt", r"vectors\.npy must be float32 \[5, 9\]\. Given: float32 \[5, 8\]"),
        (
            _array("vectors.npy", np.zeros((COUNT, WIDTH))),
            "index_corrupt",
            r"vectors\.npy must be float32 \[5, 8\]\. Given: float64",
        ),
        (_array("vectors.npy", np.full((COUNT, WIDTH), np.nan, np.float32)), "index_corrupt", "must be finite"),
        (_array("vectors.npy", b"\x93NUMPY"), "index_corrupt", 'index "wiki" version 1: '),
        (_array("ids.npy", np.array([b"a", b"b", b"c", b"d", b"a"])), "index_corrupt", "none of them twice"),
        (_array("ids.npy", np.arange(COUNT)), "index_corrupt", "must hold byte strings"),
        (_pickled, "index_corrupt", "Python objects"),
        (_array("offsets.npy", np.arange(COUNT + 1)), "index_corrupt", r"offsets\.npy must tell the lines"),
        (_array("offsets.npy", np.arange(COUNT)), "index_corrupt", r"offsets\.npy must be int64 \[6\]"),
        (_array("bm25_rows.npy", np.array([9], np.int32)), "index_corrupt", "the BM25 arrays do not fit"),
        (_array("bm25_words.json", b"["), "index_corrupt", 'index "wiki" version 1: '),
    ],
)
def test_a_version_that_is_not_what_was_written_is_refused(harm: Harm, code: str, says: str, root: Path) -> None:
    """
    Missing, cut, changed, unknown and ill-fitting files, each named, and no path of the machine; the one before opens.

    Inverse check: seen to open, or to end in another error, without the check that the case is for.
    """
    publish(root, 1)
    harm(root / "wiki" / "v00000001")
    with pytest.raises(TrilithonError, match=says) as caught:
        opened(root)

    assert caught.value.code == code
    assert caught.value.message.startswith('index "wiki" version 1')
    assert str(root) not in str(caught.value)


def test_a_passage_of_another_id_is_not_handed_out(root: Path) -> None:
    """Passages are read when they are found, and then must be those that were indexed."""
    publish(root, 1)
    _other_passage(root / "wiki" / "v00000001")
    index = opened(root)
    with pytest.raises(DataLoss, match=r'passages\.jsonl:1 must be passage "p0"\. Given: "q"'):
        index.search(Queries(texts=["number0"]), 1, mode="bm25")


def test_R11_a_search_reads_a_passage_once_and_no_more_than_an_answer_may_have(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each question's passages count, though the same were found; what is too much is refused before it is read."""
    publish(root, 1)
    index, rows = opened(root), list[int]()
    plain = StoredPassages.read

    def read(passages: StoredPassages, row: int) -> Passage:
        rows.append(row)
        return plain(passages, row)

    monkeypatch.setattr(StoredPassages, "read", read)
    queries = Queries(texts=["version1"] * 4)
    size = sum(len(passage_line(passage)) for passage in told(1))
    found = index.search(queries, COUNT, mode="bm25", most_bytes=4 * size)
    once = list(rows)
    with pytest.raises(InvalidArgument, match=r"that are found must have at most [\d,]+ bytes in all") as refused:
        index.search(queries, COUNT, mode="bm25", most_bytes=4 * size - 1)
    with pytest.raises(InvalidArgument, match="Lower top_k"):
        index.search(queries, COUNT, mode="bm25", most_bytes=1)

    assert [[hit.passage for hit in hits] for hits in found] == [told(1)] * 4
    assert once == list(range(COUNT))
    assert rows == [*once, *once]
    assert refused.value.code == "search_invalid"


@pytest.mark.parametrize("content", ["", "1", "0\n", "x\n", "-1\n", "1\n2\n"])
def test_a_pointer_that_names_no_version_is_refused(content: str, root: Path) -> None:
    """Half a number is not taken for one."""
    publish(root, 1)
    (root / "wiki" / "current").write_text(content)
    with pytest.raises(DataLoss, match="current must hold a version"):
        opened(root)


def test_a_reader_that_is_overtaken_opens_the_newer_version(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Who has read that version 1 is current, and finds it gone because 3 was published, gets 3.

    Inverse check: seen to fail without the second look.
    """
    publish(root, 1)
    current = IndexStore.current

    def overtaken(store: IndexStore, name: str) -> int:
        found = current(store, name)
        if found == 1:
            monkeypatch.undo()
            publish(root, 2)
            publish(root, 3)
        return found

    monkeypatch.setattr(IndexStore, "current", overtaken)

    assert opened(root).version == 3
