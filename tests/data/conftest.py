"""Small token files and texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from tiny_tokenizers import write_bpe_tokenizer

from trilithon_parallel.data.index import token_dtype
from trilithon_parallel.data.index_writer import IndexWriter

EOD = 0

WriteTokens = Callable[..., Path]
WriteRows = Callable[..., Path]


@pytest.fixture
def write_tokens(tmp_path: Path) -> WriteTokens:
    """A function that writes documents of random tokens, each ending in 0, and gives the prefix."""

    def write(name: str = "corpus", *, num_documents: int = 40, seed: int = 0, vocab: int = 100) -> Path:
        random = np.random.RandomState(seed)
        with IndexWriter(tmp_path / name, dtype=token_dtype(vocab)) as writer:
            for _ in range(num_documents):
                writer.add_document([*random.randint(1, vocab, random.randint(1, 40)), EOD])
            writer.publish()
        return tmp_path / name

    return write


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """A function that writes a .jsonl file of texts, or of raw lines."""

    def write(name: str, texts: Sequence[str | bytes]) -> Path:
        lines = [text if isinstance(text, bytes) else json.dumps({"text": text}).encode() for text in texts]
        (tmp_path / name).write_bytes(b"".join(line + b"\n" for line in lines))
        return tmp_path / name

    return write


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of 300 ids; `<|im_end|>`, id 2, ends a text."""
    path = tmp_path_factory.mktemp("tokenizer")
    write_bpe_tokenizer(path, vocab=300, context=128, chat_template=False)
    return path
