from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetune_jobs import JobDir, make_job, write_rows
from task_rows import DECODER_TASKS, rows
from tiny import tiny_bert, tiny_llama

MakeJob = Callable[..., JobDir]


@pytest.fixture(scope="session")
def decoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, small weights so that training has something to do."""
    return tiny_llama(tmp_path_factory.mktemp("decoder") / "m", scale=0.1)


@pytest.fixture(scope="session")
def encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a pooler in its file, no masked-LM head, and rows of the vocabulary that nothing uses."""
    path = tiny_bert(tmp_path_factory.mktemp("encoder") / "m", scale=0.1, sentence_encoder=False)
    document = json.loads((path / "tokenizer.json").read_text("utf-8"))
    vocabulary = document["model"]["vocab"]
    last = sorted(vocabulary, key=vocabulary.__getitem__)[-4:]
    renamed = {word: f"[unused{i}]" for i, word in enumerate(last)}
    document["model"]["vocab"] = {renamed.get(word, word): index for word, index in vocabulary.items()}
    for token in document["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
    (path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    return path


@pytest.fixture
def job(tmp_path: Path, decoder_dir: Path, encoder_dir: Path) -> MakeJob:
    """Makes a job of a task over its own rows: `job("ner", count=20, held_out=8, training={...})`."""

    def make(task: str, *, count: int = 20, held_out: int = 8, **config: Any) -> JobDir:
        model_dir = decoder_dir if task in DECODER_TASKS else encoder_dir
        train = write_rows(tmp_path / "train.jsonl", rows(task, count))
        valid = write_rows(tmp_path / "valid.jsonl", rows(task, held_out, first=1000)) if held_out else None
        training = {"epochs": 2, "batch_size": 8, **config.pop("training", {})}
        return make_job(tmp_path, model_dir, train, valid, task=task, training=training, **config)

    return make
