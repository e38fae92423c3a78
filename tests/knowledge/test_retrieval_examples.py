"""The examples in the docstrings of retrieval are true."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = (
    *(f"trilithon_server.knowledge.{name}" for name in ("passages", "ranking", "version", "words")),
    "trilithon_finetune.metrics.retrieval",
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    """Each module has examples, and they give what they show."""
    found = doctest.testmod(importlib.import_module(name))

    assert found.attempted > 0
    assert found.failed == 0
