"""Texts to token files: what is written, that workers change nothing, and what bad rows are told."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from trilithon_parallel.config import ModelError
from trilithon_parallel.data import prepare as module
from trilithon_parallel.data.documents import read_blocks
from trilithon_parallel.data.errors import DataError
from trilithon_parallel.data.index import IndexedTokens
from trilithon_parallel.data.prepare import open_tokenizer, prepare
from trilithon_parallel.tokenizer import load_tokenizer

EOD = 2  # of `tokenizer_dir`


def test_documents_become_tokens(write_rows: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path) -> None:
    """Rows and text files in their order, each ending in the end token; empty ones are left out and counted."""
    rows = write_rows("rows.jsonl", ["the first", "", "the \u00e9nd", b"", b'{"id": 1, "text": "last"}'])
    text = tmp_path / "book.txt"
    text.write_bytes(b"\xef\xbb\xbfa book\r\nof two lines\n")
    done = prepare([rows, text], tmp_path / "out" / "corpus", tokenizer=tokenizer_dir)

    tokenizer = load_tokenizer(tokenizer_dir)
    tokens = IndexedTokens(done.prefix)
    texts = ["the first", "the \u00e9nd", "last", "a book\r\nof two lines\n"]
    assert [tokens.read(i).tolist() for i in range(tokens.num_documents)] == [
        [*tokenizer.encode(item, add_special_tokens=False), EOD] for item in texts
    ]
    assert (done.num_documents, done.num_empty, done.num_tokens) == (4, 1, tokens.num_tokens)
    assert (done.dtype, done.eod_id) == ("uint16", EOD)
    facts = tokens.facts()
    assert facts["tokenizer"] == tokenizer.digest
    assert facts["idx_sha256"] == tokens.index_digest


def test_the_end_is_chosen_or_left_out(write_rows: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path) -> None:
    """Another token by its spelling, or none."""
    rows = write_rows("rows.jsonl", ["a", "b"])
    named = prepare([rows], tmp_path / "named", tokenizer=tokenizer_dir, eod="<|endoftext|>")
    bare = prepare([rows], tmp_path / "bare", tokenizer=tokenizer_dir, append_eod=False)

    assert IndexedTokens(named.prefix).read(1).tolist()[-1] == named.eod_id == 0
    assert bare.eod_id is None
    assert bare.num_tokens == named.num_tokens - 2


def test_workers_change_nothing(
    write_rows: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    One process and three write the same bytes, from many small blocks that end anywhere in the file.

    Inverse seen: taking replies as they come instead of in order.
    """
    monkeypatch.setattr(module, "BLOCK_BYTES", 300)
    rows = write_rows("rows.jsonl", [f"document {i} " + "word " * (i * 7 % 90) for i in range(150)])
    seen: list[tuple[int, int]] = []
    for workers in (1, 3):
        prepare(
            [rows, rows],
            tmp_path / f"w{workers}",
            tokenizer=tokenizer_dir,
            workers=workers,
            progress=lambda done, total: seen.append((done, total)),
        )

    for suffix in ("bin", "idx", "json"):
        assert (tmp_path / f"w1.{suffix}").read_bytes() == (tmp_path / f"w3.{suffix}").read_bytes()
    size = 2 * rows.stat().st_size
    assert seen[-1] == (size, size)
    assert len(seen) > 100


@pytest.mark.parametrize("block_bytes", [1, 7, 64, 10_000])
def test_blocks_are_whole_rows(block_bytes: int, write_rows: Callable[..., Path]) -> None:
    """Blocks joined are the file; each ends with a row and knows its first line."""
    rows = write_rows("rows.jsonl", ["x" * (i * 13 % 40) for i in range(20)])
    blocks = list(read_blocks(rows, block_bytes=block_bytes))

    content = b"".join(block.content for block in blocks)
    assert content == rows.read_bytes()
    line = 1
    for block in blocks:
        assert block.content.endswith(b"\n")
        assert block.first_line == line
        line += block.content.count(b"\n")


def test_a_last_row_without_newline_counts(tokenizer_dir: Path, tmp_path: Path) -> None:
    """As editors and `truncate` leave it."""
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "a"}\n{"text": "b"}')

    assert prepare([tmp_path / "rows.jsonl"], tmp_path / "c", tokenizer=tokenizer_dir).num_documents == 2


BAD_ROWS = [
    b'{"text": "good"}',
    b'{"txt": "b"}',
    b"[1]",
    b'{"text": 5}',
    b"nope",
    b'{"text": "\\ud800"}',
    b'{"text": "\xff"}',
    b'{"text": null}',
]


@pytest.mark.parametrize("workers", [1, 2])
def test_R11_every_bad_row_is_listed_and_nothing_written(
    workers: int,
    write_rows: Callable[..., Path],
    tokenizer_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    File, line, rule and value of each; the files of an earlier run stay as they were.

    Inverse seen: raising at the first bad row shows one finding of seven.
    """
    monkeypatch.setattr(module, "BLOCK_BYTES", 40)
    rows = write_rows("bad.jsonl", BAD_ROWS)

    with pytest.raises(DataError) as raised:
        prepare([rows], tmp_path / "c", tokenizer=tokenizer_dir, workers=workers)

    assert raised.value.code == "data_rows"
    lines = raised.value.message.splitlines()
    assert lines[0] == "the input has 7 findings:"
    assert [line.strip().removeprefix(str(rows)) for line in lines[1:]] == [
        ":2 must have the field 'text'. Given: the fields 'txt'.",
        ":3 must be a JSON object. Given: '[1]'.",
        ":4 text must be a string. Given: '5'.",
        ":5 must be one JSON object. Given: 'nope' (Expecting value: line 1 column 1 (char 0)).",
        ":6 text must be Unicode text. Given: half of a surrogate pair.",
        ":7 must be UTF-8. Given: the byte 0xff at byte 10 of it.",
        ":8 text must be a string. Given: 'null'.",
    ]
    assert sorted(os.listdir(tmp_path)) == ["bad.jsonl"]


def test_R11_many_findings_are_counted(write_rows: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path) -> None:
    """Twenty are shown, the others counted."""
    rows = write_rows("bad.jsonl", [b"x"] * 25 + [json.dumps({"text": "fine"}).encode()] + [b"y"] * 40)

    with pytest.raises(DataError) as raised:
        prepare([rows], tmp_path / "c", tokenizer=tokenizer_dir)

    lines = raised.value.message.splitlines()
    assert lines[0] == "the input has 65 findings:"
    assert len(lines) == 22
    assert lines[-1].strip() == "... and 45 more."


def test_R11_unreadable_inputs_are_listed_together(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Files that are missing, folders, and files of another kind, before anything is read."""
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "table.csv").touch()
    (tmp_path / "latin.txt").write_bytes(b"one\nna\xefve\n")
    inputs = [tmp_path / name for name in ("none.txt", "folder.jsonl", "table.csv")]

    with pytest.raises(DataError) as raised:
        prepare(inputs, tmp_path / "c", tokenizer=tokenizer_dir)
    assert "none.txt is not a file." in raised.value.message
    assert "folder.jsonl is not a file." in raised.value.message
    assert "table.csv must end in one of .jsonl, .ndjson, .txt. Given: .csv." in raised.value.message
    with pytest.raises(DataError, match=r"latin\.txt:2 must be UTF-8\. Given: the byte 0xef at byte 2 of it"):
        prepare([tmp_path / "latin.txt"], tmp_path / "c", tokenizer=tokenizer_dir)


def test_R11_wrong_options_are_explained(write_rows: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path) -> None:
    """No text at all, an end token that is not there, a tokenizer that is none, files that exist."""
    rows, empty = write_rows("rows.jsonl", ["a"]), write_rows("empty.jsonl", ["", ""])

    with pytest.raises(DataError, match=r"at least one document with text\. Given: 2 empty ones"):
        prepare([empty], tmp_path / "c", tokenizer=tokenizer_dir)
    with pytest.raises(DataError, match=r"Given: '<eod>'\. Its special tokens are: <\|endoftext\|>, <\|im_start\|>"):
        prepare([rows], tmp_path / "c", tokenizer=tokenizer_dir, eod="<eod>")
    with pytest.raises(DataError, match=r"tokenizer must be a model directory.*Given: .*rows\.jsonl"):
        prepare([rows], tmp_path / "c", tokenizer=rows)
    with pytest.raises(ModelError, match="holds no tokenizer"):
        prepare([rows], tmp_path / "c", tokenizer=tmp_path)
    prepare([rows], tmp_path / "c", tokenizer=tokenizer_dir)
    before = (tmp_path / "c.bin").read_bytes()
    with pytest.raises(DataError, match=r"c\.idx exists already"):
        prepare([empty], tmp_path / "c", tokenizer=tokenizer_dir)
    with pytest.raises(DataError, match="at least one document"):
        prepare([empty], tmp_path / "c", tokenizer=tokenizer_dir, overwrite=True)
    assert (tmp_path / "c.bin").read_bytes() == before


def test_R10_a_lost_worker_is_an_error_and_leaves_nothing(
    write_rows: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that ends in the middle is named with its status; no file and no process stays."""
    monkeypatch.setattr(module, "BLOCK_BYTES", 40)
    workers: list[module._Worker] = []
    start = module._Worker.__init__

    def started(worker: module._Worker, settings: module.Tokenising) -> None:
        start(worker, settings)
        workers.append(worker)

    monkeypatch.setattr(module._Worker, "__init__", started)
    rows = write_rows("rows.jsonl", [f"document {i}" for i in range(200)])

    with pytest.raises(DataError, match=r"a worker ended with status -9 at .*rows\.jsonl:\d+"):
        prepare(
            [rows],
            tmp_path / "c",
            tokenizer=tokenizer_dir,
            workers=2,
            progress=lambda done, total: workers[0]._process.kill(),
        )

    assert sorted(os.listdir(tmp_path)) == ["rows.jsonl"]
    assert all(worker._process.returncode is not None for worker in workers)


def test_a_tokenizer_file_with_its_settings(tokenizer_dir: Path, tmp_path: Path) -> None:
    """One file of a model directory is read with what stands beside it, whatever it is called."""
    copy = tmp_path / "mine.json"
    copy.write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes((tokenizer_dir / "tokenizer_config.json").read_bytes())

    opened = open_tokenizer(copy)

    assert opened.digest == load_tokenizer(tokenizer_dir).digest
    assert opened.eos_ids == (EOD,)


def test_real_texts(shared_data: Callable[[str], Path], smollm2_dir: Path, tmp_path: Path) -> None:
    """Real articles and a real book survive: decoding the documents gives the texts."""
    rows, book = shared_data("pretrain/wikipedia_en_abstracts.jsonl"), shared_data("pretrain/gutenberg/botchan.txt")
    prepare([rows, book], tmp_path / "real", tokenizer=smollm2_dir, eod="<|endoftext|>")

    tokenizer, tokens = load_tokenizer(smollm2_dir), IndexedTokens(tmp_path / "real")
    texts = [json.loads(line)["text"] for line in rows.read_text("utf-8").splitlines()]
    texts.append(book.read_bytes().decode("utf-8-sig"))
    decoded = [tokenizer.decode(tokens.read(i)[:-1].tolist(), skip_special_tokens=False) for i in range(len(texts))]
    assert decoded == texts
