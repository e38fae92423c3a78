"""The examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = (
    *(f"trilithon_finetune.data.{n}" for n in ("batches", "findings", "judging", "packing", "report", "strict_json")),
    *(f"trilithon_finetune.recipes.{name}" for name in ("messages", "texts")),
    *(f"trilithon_server.tasks.{name}" for name in ("answer_format", "yes_no_maybe")),
    "trilithon_server.text.template",
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    """Each module has examples, and they give what they show."""
    found = doctest.testmod(importlib.import_module(name))

    assert found.attempted > 0
    assert found.failed == 0
