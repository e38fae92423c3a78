"""Data files in a folder of their own, and what rows are encoded with: tiny tokenizers under several chat templates."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from finetune_data.data_fixtures import MakeContext, WriteRows
from tiny import tiny_bert, tiny_llama

from trilithon_finetune.recipes import RECIPES
from trilithon_finetune.recipes.base import Context
from trilithon_parallel.config import load_config
from trilithon_parallel.tokenizer import load_tokenizer
from trilithon_server.text.template import ChatTemplate, load_template


@pytest.fixture(scope="session")
def decoder_context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    """A tiny decoder with a ChatML template; the task is `sft`."""
    return _context(tiny_llama(tmp_path_factory.mktemp("decoder") / "model"), "sft")


@pytest.fixture(scope="session")
def encoder_context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    """A tiny encoder; the task is `mlm`."""
    return _context(tiny_bert(tmp_path_factory.mktemp("encoder") / "model"), "mlm")


def _context(model_dir: Path, task: str) -> Context:
    return Context(
        tokenizer=load_tokenizer(model_dir),
        template=load_template(model_dir),
        model=load_config(model_dir),
        max_tokens=256,
        labels=(),
        options=RECIPES[task].Options(),
    )


@pytest.fixture
def make_context(decoder_context: Context) -> MakeContext:
    """A function from a task, the text of a template and fields of `Context` to a decoder's context."""

    def make(task: str = "sft", *, template: str | None = None, **fields: Any) -> Context:
        context = replace(decoder_context, options=RECIPES[task].Options(), **fields)
        return context if template is None else replace(context, template=ChatTemplate(template))

    return make


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """A function that writes rows, objects or bytes, into a file, one a line."""

    def write(rows: Iterable[Mapping[str, Any] | bytes], *, name: str = "train.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write
