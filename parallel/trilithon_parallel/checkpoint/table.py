"""
What a checkpoint's files hold and where, from the model's config alone: every rank computes the same table.

Weights lie in `model-0000i-of-0000n.safetensors` under the names and in the layout that `transformers` and our loader
read; where an adapter is trained, it alone lies in `adapter_model.safetensors`, as PEFT reads it. Optimizer state lies
in `optim-0000i-of-0000n.safetensors`, fp32, canonical names, global shapes. What is trained beside the model lies in
model directories of their own: in `retriever/` a reader's encoder, in `query/` an encoder of questions beside one of
passages; the strength of a reader's bias in `reader.safetensors`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from trilithon_parallel.checkpoint.errors import CheckpointError
from trilithon_parallel.checkpoint.piece import Slices
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.lora.files import TENSORS_FILE, file_layout
from trilithon_parallel.lora.peft import read_adapter
from trilithon_parallel.lora.spec import owned_shapes
from trilithon_parallel.placement import global_shapes
from trilithon_parallel.shapes import STRENGTH
from trilithon_parallel.weights.directory import INDEX_FILE, WeightFiles, and_more
from trilithon_parallel.weights.loader import check_weights, dtype_name
from trilithon_parallel.weights.names import Direct, Place, file_shape, file_slices, name_table
from trilithon_parallel.weights.safetensors_io import SafetensorsFile, TensorSpec, header_bytes, split_shards

OPTIM_INDEX_FILE = "optim.safetensors.index.json"

STRENGTH_FILE = "reader.safetensors"

MASTER, EXP_AVG, EXP_AVG_SQ = ".master", ".exp_avg", ".exp_avg_sq"
"""Endings of optimizer state: the fp32 copy of a parameter that is not fp32 itself, Adam's first and second moment."""


@dataclass(frozen=True, slots=True)
class Stored:
    """
    One global tensor in a file: `start` is the byte at which the data of the file's tensor begins.

    `shape` is the canonical one, `file_shape` that of the file's tensor, which may be its transpose or hold others too.
    `copies`: where else in the files the same values stand.
    """

    file: str
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    file_shape: tuple[int, ...]
    source: Place
    copies: tuple[Stored, ...] = ()

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
    shapes, places = _own_shapes(config), _places(config)
    weights = {
        place.file_name: TensorSpec(place.file_name, dtype, file_shape(place, shapes[name]))
        for name, held in places.items()
        for place in held
    }
    strength = weights.pop(STRENGTH, None)
    states = [
        TensorSpec(state, torch.float32, shape)
        for name, shape in shapes.items()
        for state in optimizer_names(name, dtype)
    ]
    headers: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    starts: dict[str, tuple[str, int]] = {}
    indexes: dict[str, dict[str, str]] = {}
    num_bytes: dict[str, int] = {}
    if config.lora is not None:
        _lay_out({TENSORS_FILE: [*weights.values()]}, headers, sizes, starts)
    if strength is not None:
        _lay_out({STRENGTH_FILE: [strength]}, headers, sizes, starts)
    for stem, index, specs in (
        ("model", INDEX_FILE, [] if config.lora is not None else [*weights.values()]),
        ("optim", OPTIM_INDEX_FILE, states),
    ):
        if specs:
            shards = split_shards(specs, max_bytes=max_shard_bytes)
            files = {f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}
            indexes[index] = _lay_out(files, headers, sizes, starts)
            num_bytes[index] = sum(spec.num_bytes for spec in specs)
    tensors: dict[str, Stored] = {}
    for name, held in places.items():
        first, *copies = [
            Stored(*starts[place.file_name], dtype, shapes[name], file_shape(place, shapes[name]), place)
            for place in held
        ]
        tensors[name] = replace(first, copies=tuple(copies))
    tensors |= {
        spec.name: Stored(*starts[spec.name], spec.dtype, spec.shape, spec.shape, Direct(spec.name)) for spec in states
    }
    table = Table(tensors, headers, sizes, indexes, num_bytes)
    for folder, model in config.beside.items():
        table = _joined(table, folder, make_table(model, dtype=dtype, max_shard_bytes=max_shard_bytes))
    return table


def _joined(table: Table, folder: str, beside: Table) -> Table:
    """A model's table and that of one beside it, which keeps its names within its folder."""
    at = f"{folder}/"
    return Table(
        {**table.tensors, **_beside(folder, beside.tensors)},
        {**table.headers, **{at + file: header for file, header in beside.headers.items()}},
        {**table.sizes, **{at + file: size for file, size in beside.sizes.items()}},
        {
            **table.indexes,
            **{at + index: weight_map for index, weight_map in beside.indexes.items()},
        },
        {**table.num_bytes, **{at + index: size for index, size in beside.num_bytes.items()}},
    )


def _beside(folder: str, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors of a model beside another one, as that one's checkpoint names them."""
    return {f"{folder}.{name}": replace(stored, file=f"{folder}/{stored.file}") for name, stored in tensors.items()}


def trained_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """The tensors that a checkpoint holds, with their true shapes: the adapter's where one is trained, else all."""
    return global_shapes(config) if config.lora is None else owned_shapes(config, config.lora)


def _own_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Without those of the models beside."""
    folders = tuple(f"{folder}." for folder in config.beside)
    return {name: shape for name, shape in trained_shapes(config).items() if not name.startswith(folders)}


def _places(config: ModelConfig) -> Mapping[str, tuple[Place, ...]]:
    """Where each of them is written, under the names of the files: a shared A in several places."""
    if config.lora is not None:
        layout = file_layout(config, config.lora)
        names = owned_shapes(config, config.lora)
        return {name: (layout.places[name], *layout.copies.get(name, ())) for name in names}
    table = name_table(config.alone())
    found: dict[str, tuple[Place, ...]] = {
        name: (replace(source, file_name=table.spellings(source.file_name)[0]),)
        for name, source in table.sources.items()
    }
    if config.reads is not None and config.reads.has_strength:
        found[STRENGTH] = (Direct(STRENGTH),)
    return found


def _lay_out(
    files: Mapping[str, Sequence[TensorSpec]],
    headers: dict[str, bytes],
    sizes: dict[str, int],
    starts: dict[str, tuple[str, int]],
) -> dict[str, str]:
    """Give every tensor of `files` its first byte; tensor name -> file."""
    index: dict[str, str] = {}
    for file, shard in files.items():
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
    shapes = _own_shapes(config)
    tensors = _read_model(directory, config) if config.lora is None else _read_adapter(directory, config)
    beside: dict[str, Stored] = {}
    for folder, model in config.beside.items():
        beside |= _beside(folder, read_table(directory / folder, model))
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
    return {**tensors, **beside}


def _read_model(directory: Path, config: ModelConfig) -> dict[str, Stored]:
    plain = config.alone()
    check_weights(directory, config=plain)
    names, shapes = name_table(plain), global_shapes(plain)
    tensors: dict[str, Stored] = {}
    if config.reads is not None and config.reads.has_strength:
        tensors[STRENGTH] = _read_strength(directory)
    with WeightFiles(directory) as files:
        for name, source in names.sources.items():
            spelled = next(item for item in names.spellings(source.file_name) if item in files.tensors)
            entry = files.tensors[spelled]
            file = files.file_of(spelled).path.name
            tensors[name] = Stored(file, entry.start, entry.dtype, shapes[name], entry.shape, source)
    return tensors


def _read_strength(directory: Path) -> Stored:
    with SafetensorsFile(directory / STRENGTH_FILE) as file:
        entry = file.tensors.get(STRENGTH)
        if entry is None or entry.shape != (1,):
            raise CheckpointError(
                f"{STRENGTH_FILE} must hold {STRENGTH} of shape [1]. Given: {list(file.tensors)}.",
                code="weights_missing",
                hint="The files are of different checkpoints: copy the whole directory again.",
            )
        return Stored(STRENGTH_FILE, entry.start, entry.dtype, entry.shape, entry.shape, Direct(STRENGTH))


def _read_adapter(directory: Path, config: ModelConfig) -> dict[str, Stored]:
    read_adapter(directory, config=config)
    shapes, tensors = trained_shapes(config), {}
    with SafetensorsFile(directory / TENSORS_FILE) as file:
        for name, (place, *_) in _places(config).items():
            entry = file.tensors[place.file_name]
            tensors[name] = Stored(TENSORS_FILE, entry.start, entry.dtype, shapes[name], entry.shape, place)
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
