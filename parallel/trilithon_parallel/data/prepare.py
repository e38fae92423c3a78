"""
Texts to indexed token files: read, tokenise in several processes, write, publish.

Workers are processes of this very module's function, fed over pipes with blocks of whole rows: a line of JSON, then
bytes. Blocks come back in the order in which they were read, so the files do not depend on the number of workers.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from trilithon_parallel.data.documents import Block, Findings, check_inputs, documents_of, read_blocks
from trilithon_parallel.data.errors import DataError
from trilithon_parallel.data.index import token_dtype
from trilithon_parallel.data.index_writer import IndexWriter
from trilithon_parallel.tokenizer import Tokenizer, load_tokenizer

BLOCK_BYTES = 1 << 20
"""Bytes of rows that a worker gets at once."""

FORMAT = "trilithon-tokens-1"
"""What `PREFIX.json` calls itself."""

_SETTINGS_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Tokenising:
    """How documents become tokens: `tokenizer` a path, `eod` the id that ends each document or None."""

    tokenizer: str
    text_key: str
    eod: int | None
    dtype: str


@dataclass(frozen=True)
class TokenisedBlock:
    """The documents of one block: their lengths, all tokens as bytes, and what was left out or wrong."""

    lengths: list[int]
    num_empty: int
    num_findings: int
    findings: list[str]
    tokens: bytes


@dataclass(frozen=True)
class Prepared:
    """What was written; `num_empty` documents without text were left out."""

    prefix: Path
    num_documents: int
    num_tokens: int
    num_empty: int
    dtype: str
    eod_id: int | None


def open_tokenizer(path: Path) -> Tokenizer:
    """
    The tokenizer of a model directory, or of one file of it (`.json` or `.model`) with the settings beside it.

    Raises:
        ModelError: as `load_tokenizer`.
        DataError: the path is neither.
    """
    if path.is_dir():
        return load_tokenizer(path)
    if not path.is_file() or path.suffix not in (".json", ".model"):
        raise DataError(
            f"tokenizer must be a model directory, a tokenizer.json or a SentencePiece .model file. Given: {path}.",
            code="tokenizer_missing",
        )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / f"tokenizer{path.suffix}").symlink_to(path.resolve())
        for name in _SETTINGS_FILES:
            if (beside := path.resolve().parent / name).is_file():
                (Path(folder) / name).symlink_to(beside)
        return load_tokenizer(Path(folder))


def prepare(
    inputs: Sequence[Path],
    output: Path,
    *,
    tokenizer: Path,
    text_key: str = "text",
    append_eod: bool = True,
    eod: str | None = None,
    workers: int = 1,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Prepared:
    """
    Turn texts into `OUTPUT.bin`, `OUTPUT.idx` and `OUTPUT.json`.

    Args:
        inputs: .jsonl files (a document per row) and .txt files (a document each), in this order.
        output: the prefix.
        tokenizer: a model directory or tokenizer file; no special tokens are added but the end of document.
        text_key: the field of a row that holds its text.
        append_eod: end every document with a token.
        eod: that token, spelt as in the vocabulary; the tokenizer's end token by default.
        workers: processes.
        progress: called with the bytes done and the bytes of all inputs.
    Raises:
        DataError: `data_rows` lists what is wrong with the inputs; nothing is written. `data_exists`, `data_empty`,
            `data_eod`.
        ModelError: the tokenizer cannot be read.
    """
    findings = Findings()
    total_bytes = check_inputs(inputs, findings)
    findings.raise_any()
    opened = open_tokenizer(tokenizer)
    dtype = token_dtype(opened.vocab_size)
    settings = Tokenising(
        str(tokenizer.resolve()), text_key, _eod_id(opened, eod) if append_eod else None, dtype.newbyteorder("<").str
    )
    done = num_empty = 0
    blocks = (block for path in inputs for block in read_blocks(path, block_bytes=BLOCK_BYTES))
    with IndexWriter(output, dtype=dtype, overwrite=overwrite) as writer, ExitStack() as stack:
        for block, tokenised in stack.enter_context(_tokenised(blocks, settings, opened, workers)):
            done += len(block.content)
            progress(done, total_bytes)
            num_empty += tokenised.num_empty
            findings.add(*tokenised.findings)
            findings.total += tokenised.num_findings - len(tokenised.findings)
            if findings.total:
                continue
            tokens: NDArray[Any] = np.frombuffer(tokenised.tokens, dtype)
            for document in np.split(tokens, np.cumsum(tokenised.lengths)[:-1]) if tokenised.lengths else []:
                writer.add_document(document)
        findings.raise_any()
        if not writer.num_documents:
            raise DataError(
                f"the input must hold at least one document with text. Given: {num_empty} empty ones.",
                code="data_empty",
                hint="Nothing was written.",
            )
        facts = {
            "format": FORMAT,
            "tokenizer": opened.digest,
            "vocab_size": opened.vocab_size,
            "eod_id": settings.eod,
        }
        writer.publish(facts)
        return Prepared(output, writer.num_documents, writer.num_tokens, num_empty, dtype.name, settings.eod)


def tokenise_block(block: Block, settings: Tokenising, tokenizer: Tokenizer) -> TokenisedBlock:
    """The tokens of one block of rows: a pure function, here or in a worker."""
    findings = Findings()
    texts = documents_of(block, text_key=settings.text_key, findings=findings)
    end = [] if settings.eod is None else [settings.eod]
    documents = [tokenizer.encode(text, add_special_tokens=False) + end for text in texts if text]
    flat = np.array([token for document in documents for token in document], dtype=settings.dtype)
    return TokenisedBlock(
        lengths=[len(document) for document in documents],
        num_empty=sum(not text for text in texts),
        num_findings=findings.total,
        findings=findings.shown,
        tokens=flat.tobytes(),
    )


def work(requests: IO[bytes], replies: IO[bytes]) -> None:
    """A worker's life: settings first, then blocks until the pipe ends."""
    settings = Tokenising(**json.loads(requests.readline()))
    tokenizer = open_tokenizer(Path(settings.tokenizer))
    while line := requests.readline():
        head = json.loads(line)
        block = Block(head["path"], head["first_line"], requests.read(head["num_bytes"]))
        fields = asdict(tokenise_block(block, settings, tokenizer))
        tokens = fields.pop("tokens")
        replies.write(json.dumps(fields | {"num_bytes": len(tokens)}).encode() + b"\n" + tokens)
        replies.flush()


class _Worker:
    """One process that tokenises blocks, one at a time."""

    def __init__(self, settings: Tokenising) -> None:
        code = "import sys; from trilithon_parallel.data.prepare import work; work(sys.stdin.buffer, sys.stdout.buffer)"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],  # -P: nothing of the working directory is imported
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        self._settings = json.dumps(asdict(settings)).encode() + b"\n"

    def tokenise(self, block: Block) -> TokenisedBlock:
        """Send a block, wait for its tokens."""
        head = {"path": block.path, "first_line": block.first_line, "num_bytes": len(block.content)}
        try:
            self._requests.write(self._settings + json.dumps(head).encode() + b"\n" + block.content)
            self._requests.flush()
            self._settings = b""  # said once, before the first block
            reply = json.loads(self._replies.readline())
        except (BrokenPipeError, ValueError):
            raise DataError(
                f"a worker ended with status {self._process.wait()} at {block.path}:{block.first_line}.",
                code="worker_lost",
                hint="See its own words above; use fewer workers if memory ran out. Nothing was written.",
            ) from None
        return TokenisedBlock(**{name: reply[name] for name in ("lengths", "num_empty", "num_findings", "findings")},
                              tokens=self._replies.read(reply["num_bytes"]))  # fmt: skip

    def close(self) -> None:
        """End the process; it leaves when its input does."""
        self._process.kill()
        for pipe in (self._requests, self._replies):
            with suppress(BrokenPipeError):  # bytes that nobody will read
                pipe.close()
        self._process.wait()


@contextmanager
def _tokenised(
    blocks: Iterable[Block], settings: Tokenising, tokenizer: Tokenizer, workers: int
) -> Iterator[Iterable[tuple[Block, TokenisedBlock]]]:
    """Blocks with their tokens, in order; with one worker in this process, else in as many others."""
    if workers <= 1:
        yield ((block, tokenise_block(block, settings, tokenizer)) for block in blocks)
        return
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        for _ in range(workers):
            worker = _Worker(settings)
            stack.callback(worker.close)  # before the pool waits for its threads, which wait for replies
            idle.put(worker)
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)

        def tokenise(block: Block) -> TokenisedBlock:
            worker = idle.get()
            try:
                return worker.tokenise(block)
            finally:
                idle.put(worker)

        def in_order() -> Iterator[tuple[Block, TokenisedBlock]]:
            pending: deque[tuple[Block, Future[TokenisedBlock]]] = deque()
            for block in blocks:
                pending.append((block, pool.submit(tokenise, block)))
                if len(pending) > 2 * workers:  # what is read ahead stays small
                    yield _finished(pending.popleft())
            while pending:
                yield _finished(pending.popleft())

        yield in_order()


def _finished(entry: tuple[Block, Future[TokenisedBlock]]) -> tuple[Block, TokenisedBlock]:
    return entry[0], entry[1].result()


def _eod_id(tokenizer: Tokenizer, eod: str | None) -> int:
    """The id that ends documents."""
    if eod is None:
        if tokenizer.eos_ids:
            return tokenizer.eos_ids[0]
        raise DataError(
            "the tokenizer names no end token, and none is given.",
            code="data_eod",
            hint="Name one that it has, or write documents without an end.",
        )
    ids = [i for i in range(tokenizer.vocab_size) if tokenizer.id_to_piece(i) == eod]
    if not ids:
        special = ", ".join(tokenizer.id_to_piece(i) for i in sorted(tokenizer.special_ids)[:8]) or "none"
        raise DataError(
            f"the end of documents must be a token of the vocabulary. Given: {eod!r}.",
            code="data_eod",
            hint=f"Its special tokens are: {special}.",
        )
    return ids[0]
