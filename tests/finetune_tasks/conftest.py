"""Tokenizers of encoder tasks: a small one made here, and MiniLM's."""

from __future__ import annotations

from pathlib import Path

import pytest
from finetune_tasks.encoder_fixtures import letter_tokenizer

from trilithon_parallel.tokenizer import Tokenizer, load_tokenizer
from trilithon_server.tasks.pieces import WordPieces


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Uncased WordPiece in which words are cut into letters."""
    return letter_tokenizer(tmp_path_factory.mktemp("letters"))


@pytest.fixture(scope="session")
def pieces(tokenizer: Tokenizer) -> WordPieces:
    """Words read with it."""
    return WordPieces(tokenizer)


@pytest.fixture(scope="session")
def minilm_tokenizer(minilm_dir: Path) -> Tokenizer:
    """MiniLM's 30,522 uncased pieces."""
    return load_tokenizer(minilm_dir)


@pytest.fixture(scope="session")
def minilm_pieces(minilm_tokenizer: Tokenizer) -> WordPieces:
    """Words read with it."""
    return WordPieces(minilm_tokenizer)
