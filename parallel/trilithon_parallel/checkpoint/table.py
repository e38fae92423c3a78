"""
What a checkpoint's files hold and where, from the model's config alone: every rank computes the same table.

Weights lie in `model-0000i-of-0000n.safetensors` under the names and in the layout that `transformers` and our loader
read; optimizer state lies in `optim-0000i-of-0000n.safetensors`, fp32, canonical names, global shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from trilithon_parallel.checkpoint.errors import CheckpointError
from trilithon_parallel.checkpoint.piece import Slices
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.placement import global_shapes
from trilithon_parallel.weights.directory import INDEX_FILE, WeightFiles, and_more
from trilithon_parallel.weights.loader import check_weights, dtype_name
from trilithon_parallel.weights.names import Direct, Source, file_shape, file_slices, name_table
from trilithon_parallel.weights.safetensors_io import TensorSpec, header_bytes, split_shards

OPTIM_INDEX_FILE = "optim.safetensors.index.json"

MASTER, EXP_AVG, EXP_AVG_SQ = ".master", ".exp_avg", ".exp_avg_sq"
"""Endings of optimizer state: the fp32 copy of a parameter that is not fp32 itself, Adam's first and second moment."""


@dataclass(frozen=True, slots=True)
class Stored:
    """
    One global tensor in a file: `start` is the byte at which the data of the file's tensor begins.

    `shape` is the canonical one, `file_shape` that of the file's tensor, which may be its transpose or hold others too.
    """

    file: str
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    file_shape: tuple[int, ...]
    source: Source

    def place(self, slices: Slices) -> tuple[Slices, bool]:
        """Where a canonical block lies in the file's tensor, and whether it is transposed there."""
        return file_slices(self.source, self.shape, slices)


@dataclass(frozen=True)
class Table:
    """
    Everything about the files of one checkpoint but their data.

    Attributes:
        tensors: global tensor -> where it lies.
        headers: file -> the bytes that it begins with.
        sizes: file -> its size in bytes.
        indexes: index file -> tensor name -> file.
        num_bytes: index file -> bytes of tensor data it covers.
    """

    tensors: Mapping[str, Stored]
    headers: Mapping[str, bytes]
    sizes: Mapping[str, int]
    indexes: Mapping[str, Mapping[str, str]]
    num_bytes: Mapping[str, int]


def optimizer_names(name: str, dtype: torch.dtype) -> list[str]:
    """
    The optimizer state of a parameter of `dtype`.

    >>> optimizer_names("a", torch.float32)
    ['a.exp_avg', 'a.exp_avg_sq']
    """
    endings = (EXP_AVG, EXP_AVG_SQ) if dtype == torch.float32 else (MASTER, EXP_AVG, EXP_AVG_SQ)
    return [name + ending for ending in endings]


def make_table(config: ModelConfig, *, dtype: torch.dtype, max_shard_bytes: int) -> Table:
    """The table of a checkpoint to be written: weights in `dtype`, files of at most `max_shard_bytes`. Pure."""
    names = name_table(config)
    shapes = global_shapes(config)
    weights: dict[str, TensorSpec] = {}
    named: dict[str, str] = {}
    for name, source in names.sources.items():
        named[name] = names.spellings(source.file_name)[0]
        weights[named[name]] = TensorSpec(named[name], dtype, file_shape(source, shapes[name]))
    states = [
        TensorSpec(state, torch.float32, shape)
        for name, shape in shapes.items()
        for state in optimizer_names(name, dtype)
    ]
    headers: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    starts: dict[str, tuple[str, int]] = {}
    indexes: dict[str, dict[str, str]] = {}
    for stem, index, specs in (("model", INDEX_FILE, [*weights.values()]), ("optim", OPTIM_INDEX_FILE, states)):
        indexes[index] = _lay_out(stem, split_shards(specs, max_bytes=max_shard_bytes), headers, sizes, starts)
    tensors = {
        name: Stored(*starts[named[name]], dtype, shapes[name], weights[named[name]].shape, source)
        for name, source in names.sources.items()
    }
    tensors |= {
        spec.name: Stored(*starts[spec.name], spec.dtype, spec.shape, spec.shape, Direct(spec.name)) for spec in states
    }
    num_bytes = {
        INDEX_FILE: sum(spec.num_bytes for spec in weights.values()),
        OPTIM_INDEX_FILE: sum(spec.num_bytes for spec in states),
    }
    return Table(tensors, headers, sizes, indexes, num_bytes)


def _lay_out(
    stem: str,
    shards: Sequence[Sequence[TensorSpec]],
    headers: dict[str, bytes],
    sizes: dict[str, int],
    starts: dict[str, tuple[str, int]],
) -> dict[str, str]:
    """Give every tensor of `shards` its file and first byte; tensor name -> file."""
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        headers[file] = header_bytes(shard)
        at = len(headers[file])
        for spec in shard:
            index[spec.name] = file
            starts[spec.name] = (file, at)
            at += spec.num_bytes
        sizes[file] = at
    return index


def read_table(directory: Path, config: ModelConfig) -> Mapping[str, Stored]:
    """
    Where every global tensor lies in a checkpoint that is there, by its indexes and headers.

    Raises:
        ModelError: a file is missing or broken, a tensor is missing, one too many, or of another shape or dtype than
            `config` implies; file and tensor are named.
    """
    check_weights(directory, config=config)
    names, shapes = name_table(config), global_shapes(config)
    tensors: dict[str, Stored] = {}
    with WeightFiles(directory) as files:
        for name, source in names.sources.items():
            spelled = next(item for item in names.spellings(source.file_name) if item in files.tensors)
            entry = files.tensors[spelled]
            file = files.file_of(spelled).path.name
            tensors[name] = Stored(file, entry.start, entry.dtype, shapes[name], entry.shape, source)
    expected = {state: name for name in shapes for state in optimizer_names(name, tensors[name].dtype)}
    with WeightFiles(directory, stem="optim") as files:
        _check_names(files, expected)
        for state, name in expected.items():
            entry, file = files.tensors[state], files.file_of(state).path.name
            if entry.shape != shapes[name]:
                raise CheckpointError(
                    f"{file} tensor {state} must have shape {list(shapes[name])} by config.json. "
                    f"Given: {list(entry.shape)}.",
                    code="weights_shape",
                    hint="The files are of different checkpoints: copy the whole directory again.",
                )
            if entry.dtype != torch.float32:
                raise CheckpointError(
                    f"{file} tensor {state} must be float32. Given: {dtype_name(entry.dtype)}.",
                    code="weights_dtype",
                    hint="Optimizer state is kept in full precision: use the checkpoint as it was saved.",
                )
            tensors[state] = Stored(file, entry.start, entry.dtype, entry.shape, entry.shape, Direct(state))
    return tensors


def _check_names(files: WeightFiles, expected: Mapping[str, str]) -> None:
    missing = [name for name in expected if name not in files.tensors]
    if missing:
        raise CheckpointError(
            f"tensor {missing[0]} is missing in {OPTIM_INDEX_FILE}{and_more(missing)}.",
            code="weights_missing",
            hint="The checkpoint is of another model, or of parameters in another dtype.",
        )
    extra = [name for name in files.tensors if name not in expected]
    if extra:
        raise CheckpointError(
            f"{files.file_of(extra[0]).path.name} tensor {extra[0]} has no place in this model{and_more(extra)}.",
            code="weights_extra",
            hint="The checkpoint is of another model, or of parameters in another dtype.",
        )
