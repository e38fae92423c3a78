"""A tiny real model, and a short directory where a server keeps its sockets."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import tiny_llama


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four heads and two layers with a window of 8,192 tokens."""
    return tiny_llama(tmp_path_factory.mktemp("life") / "tiny", context=8192)


@pytest.fixture
def sockets() -> Iterator[Path]:
    """An empty directory with a path short enough for Unix sockets, given to servers as XDG_RUNTIME_DIR."""
    path = Path(tempfile.mkdtemp(prefix="tl-", dir="/tmp"))
    yield path
    shutil.rmtree(path)
