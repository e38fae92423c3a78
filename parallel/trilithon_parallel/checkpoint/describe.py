"""The small files that make a directory of weights a model directory: configuration, tokenizer, chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from trilithon_parallel.checkpoint.errors import CheckpointError
from trilithon_parallel.checkpoint.run_dir import sync_directory, write_file
from trilithon_parallel.config import RETRIEVER_DIR, ModelConfig, load_config
from trilithon_parallel.weights.export import SIDE_FILES, hub_config

# Serving's words for the same weights: a run may be resumed whatever they say.
_FREE_FIELDS = ("dtype", "bos_id", "eos_ids", "pad_id", "decoder_start_id", "pooling", "normalize")


def model_files(
    config: ModelConfig, *, dtype: torch.dtype, side_files_from: Path | None, retriever_files_from: Path | None = None
) -> dict[str, bytes]:
    """
    File name -> content: `config.json`, `generation_config.json` of a model that generates, and the side files.

    Args:
        config: of the model.
        dtype: of its weights.
        side_files_from: a model directory whose tokenizer, chat template and pooling files go along, to an encoder of
            questions beside one of passages, too; None for none.
        retriever_files_from: likewise, for the encoder that is trained beside a reader.
    """
    document = hub_config(config, dtype=dtype)
    files = {"config.json": encoded(document)}
    if config.is_causal or config.is_seq2seq:
        ids = {key: value for key, value in document.items() if key.endswith("_token_id")}
        files["generation_config.json"] = encoded(ids)
    for name in SIDE_FILES if side_files_from is not None else ():
        assert side_files_from is not None
        if (side_files_from / name).is_file():
            files[name] = (side_files_from / name).read_bytes()
    for folder, model in config.beside.items():
        source = retriever_files_from if folder == RETRIEVER_DIR else side_files_from
        beside = model_files(model, dtype=dtype, side_files_from=source)
        files |= {f"{folder}/{name}": data for name, data in beside.items()}
    return files


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write small files and bring them, and the folders they are in, to the disk."""
    for name, data in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(directory / name, data)
    sync_folders(directory, files)


def sync_folders(directory: Path, files: Iterable[str]) -> None:
    """Bring the folders that files are in to the disk."""
    for folder in {(directory / name).parent for name in files}:
        sync_directory(folder)


def encoded(document: Mapping[str, Any]) -> bytes:
    """A JSON file's bytes."""
    return (json.dumps(document, indent=2) + "\n").encode()


def check_config(directory: Path, config: ModelConfig) -> None:
    """
    Compare the model that a directory's `config.json` describes to the run's.

    Raises:
        CheckpointError: `checkpoint_mismatch`, naming the first field that differs.
    """
    saved = load_config(directory)
    for folder, model in config.beside.items():
        check_config(directory / folder, model)
    config = config.alone()
    for field in fields(ModelConfig):
        theirs, ours = getattr(saved, field.name), getattr(config, field.name)
        if theirs != ours and field.name not in _FREE_FIELDS:
            raise CheckpointError(
                f"{directory.name}/config.json is of another model: {field.name} must be {ours!r} for this run. "
                f"Given: {theirs!r}.",
                code="checkpoint_mismatch",
                hint="Resume with the model's own configuration, or begin a new run from the weights.",
            )
