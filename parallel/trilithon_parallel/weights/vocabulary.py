"""
A trained encoder with another vocabulary, to be trained on in a domain of its own.

A piece that both vocabularies have keeps its row. Another one begins as the mean of the rows that the old vocabulary
cuts its text into, which is nearer to what it will become than a draw (Sachidananda et al. 2021, arXiv 2109.07460).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from trilithon_parallel.config import ModelError, load_config
from trilithon_parallel.pieces import METASPACE, UNKNOWN_PIECES
from trilithon_parallel.placement import placement_of
from trilithon_parallel.tokenizer import Tokenizer, load_tokenizer
from trilithon_parallel.weights.export import SIDE_FILES, TOKENIZER_FILES, export_model
from trilithon_parallel.weights.loader import load_state


@dataclass(frozen=True)
class Changed:
    """Rows of the new table: as they were, means of several, and of no text that the old vocabulary knew."""

    kept: int
    averaged: int
    unknown: int


def change_vocabulary(model_dir: Path, tokenizer_dir: Path, out_dir: Path) -> Changed:
    """
    Write an encoder's directory with another tokenizer and the table of its pieces, whole or not at all.

    Args:
        model_dir: of a BERT.
        tokenizer_dir: holds the other tokenizer, with [CLS], [SEP] and [MASK] if masked tokens are to be learned.
        out_dir: must not exist yet.
    Raises:
        ModelError: `model_unsupported`, not an encoder; what `load_config`, `load_tokenizer`, `load_state` and
            `export_model` refuse.
    """
    config = load_config(model_dir)
    if config.family != "bert":
        raise ModelError(
            f"the vocabulary of an encoder can be changed. Given: a {config.architecture}.",
            code="model_unsupported",
            hint="Allowed: a BERT.",
        )
    old, new = load_tokenizer(model_dir), load_tokenizer(tokenizer_dir)
    known = {old.id_to_piece(i): i for i in range(old.vocab_size)}
    kept = {i: known[piece] for i in range(new.vocab_size) if (piece := new.id_to_piece(i)) in known and piece}
    parts = {i: _parts(new.id_to_piece(i), old) for i in range(new.vocab_size) if i not in kept}
    state = load_state(model_dir, config=config)
    for name, tensor in state.items():
        if placement_of(name).cut == "vocab":
            state[name] = _new_rows(tensor, new.vocab_size, kept, parts)
    changed = replace(config, vocab_size=new.vocab_size, pad_id=_id_of(new, "[PAD]"))
    with tempfile.TemporaryDirectory() as folder:
        for name in SIDE_FILES:
            source = (tokenizer_dir if name in TOKENIZER_FILES else model_dir) / name
            if source.is_file():
                (Path(folder) / name).parent.mkdir(exist_ok=True)
                (Path(folder) / name).write_bytes(source.read_bytes())
        export_model(state, changed, out_dir, side_files_from=Path(folder))
    averaged = sum(map(bool, parts.values()))
    return Changed(len(kept), averaged, len(parts) - averaged)


def _parts(piece: str, old: Tokenizer) -> list[int]:
    """The old pieces of a new piece's text, without those that say that a text is not known."""
    text = piece.removeprefix("##").replace(METASPACE, "")
    return [i for i in old.encode(text, add_special_tokens=False) if old.id_to_piece(i) not in UNKNOWN_PIECES]


def _new_rows(
    table: torch.Tensor, num_rows: int, kept: Mapping[int, int], parts: Mapping[int, Sequence[int]]
) -> torch.Tensor:
    """A table [V, ...] with the rows of another vocabulary; a piece of no known text gets the mean of all rows."""
    wide = table.double()
    rows = wide.mean(0).expand(num_rows, *table.shape[1:]).clone()
    rows[list(kept)] = wide[list(kept.values())]
    for i, ids in parts.items():
        if ids:
            rows[i] = wide[list(ids)].mean(0)
    return rows.to(table.dtype)


def _id_of(tokenizer: Tokenizer, piece: str) -> int | None:
    return next((i for i in tokenizer.special_ids if tokenizer.id_to_piece(i) == piece), None)
