"""
Adapter directories in the layout of PEFT: read strictly, and written as they are read.

An adapter may come from a stranger. Only `adapter_config.json`, `adapter_model.safetensors` and `trilithon.json` are
opened, each once and only where it lies in the directory; nothing is unpickled, and every tensor has its place.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from trilithon_parallel.config import ModelConfig, ModelError
from trilithon_parallel.lora.described import foreign_spec, own_spec
from trilithon_parallel.lora.files import (
    CONFIG_FILE,
    FACTS_FILE,
    FACTS_FORMAT,
    TEMPLATE_FILE,
    TENSORS_FILE,
    FileLayout,
    file_layout,
    small_files,
)
from trilithon_parallel.lora.peft_config import invalid, parse_config, read_document
from trilithon_parallel.lora.spec import LoraSpec, lora_shapes, owner_name
from trilithon_parallel.weights.directory import PICKLED, and_more
from trilithon_parallel.weights.loader import dtype_name
from trilithon_parallel.weights.names import Block, Slices, file_slices
from trilithon_parallel.weights.safetensors_io import SafetensorsFile, TensorSpec, bytes_of, write_safetensors


@dataclass(frozen=True, eq=False)
class AdapterFiles:
    """
    An adapter that was read whole and found good; it holds its tensors in host memory, and no file.

    Attributes:
        spec: what the adapter is. A GPT-2's from elsewhere has the layout `fused`, since its q, k and v share one A.
        digest: SHA-256 over the configuration and the tensors, in hex.
        base_model: what the adapter says of its base; "" where it is silent.
        facts: of trilithon.json; {} where there is none.
    """

    spec: LoraSpec
    digest: str
    base_model: str
    facts: Mapping[str, Any]
    _shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    _layout: FileLayout = field(repr=False)
    _tensors: Mapping[str, Tensor] = field(repr=False)

    def fill(self, out: Tensor, name: str, slices: Slices) -> None:
        """
        Copy a block of a tensor into the leading corner of `out`, cast to its dtype, and zero the rest.

        Args:
            name: of `lora_shapes(config, spec)`: unfused, so that a shared A has each name.
            slices: one per dim, within the true shape, as `placement.local_slice` gives them.
        Raises:
            ModelError: `adapter_invalid`, a value that the dtype cannot hold.
        """
        corner = out[tuple(slice(0, item.stop - item.start) for item in slices)]
        if corner.shape != out.shape:
            out.zero_()
        place = self._layout.places[name]
        where, _ = file_slices(place, self._shapes[name], slices)
        corner.copy_(self._tensors[place.file_name][where])
        if not bool(torch.isfinite(corner).all()):
            raise invalid(
                TENSORS_FILE,
                f"tensor {place.file_name} must have values that {dtype_name(out.dtype)} can hold",
                "a larger one",
                "Use bfloat16 or float32.",
            )

    def tensor(self, name: str) -> Tensor:
        """A whole tensor of `lora_shapes`, in the dtype of the file."""
        place = self._layout.places[name]
        out = torch.empty(self._shapes[name], dtype=self._tensors[place.file_name].dtype)
        self.fill(out, name, tuple(slice(0, size) for size in out.shape))
        return out


def read_adapter(directory: Path, *, config: ModelConfig, max_rank: int | None = None) -> AdapterFiles:
    """
    Read an adapter directory whole.

    Args:
        directory: written by PEFT, `write_adapter` or a training run's checkpoint.
        config: of the base model.
        max_rank: the largest rank that is taken; None for any.
    Raises:
        ModelError: `adapter_missing`, `adapter_pickled`, `adapter_invalid`, `adapter_unsupported`, `adapter_rank`,
            `lora_invalid`, and `weights_...` for a broken safetensors file; each names file, field or tensor.
    """
    config = config.without_lora()
    document = read_document(_inside(directory, CONFIG_FILE))
    facts: dict[str, Any] = {}
    if (directory / FACTS_FILE).exists():
        facts = read_document(_inside(directory, FACTS_FILE))
        if facts.get("format") != FACTS_FORMAT:
            raise invalid(FACTS_FILE, f"format must be {FACTS_FORMAT}", facts.get("format"), "Use a newer version.")
    parsed = parse_config(document, config)
    with SafetensorsFile(_inside(directory, TENSORS_FILE)) as file:
        if "lora" in facts:
            spec = own_spec(facts["lora"], parsed, config)
        else:
            spec = foreign_spec(parsed, config, list(file.tensors))
        spec.check(config)
        rank, leaf = max((spec.rank_of(leaf), leaf) for leaf in spec.targets)
        if max_rank is not None and rank > max_rank:
            raise ModelError(
                f"{CONFIG_FILE} rank of {leaf} is above the limit. Given: {rank}. Allowed: 1 to {max_rank}.",
                code="adapter_rank",
                hint="Raise the limit, or train an adapter of lower rank.",
            )
        layout = file_layout(config, spec)
        tensors = _read_tensors(file, layout)
    shapes = lora_shapes(config, spec)
    _check_blocks(tensors, layout, shapes)
    _check_copies(tensors, layout)
    return AdapterFiles(spec, _digest(document, tensors), parsed.base_model, facts, shapes, layout, tensors)


def _inside(directory: Path, name: str) -> Path:
    """A regular file of the directory; one that leads out of it is not opened."""
    if not directory.is_dir():
        raise ModelError(
            f"adapter directory {directory.name!r} does not exist.",
            code="adapter_missing",
            hint=f"Give a directory with {CONFIG_FILE} and {TENSORS_FILE}.",
        )
    path = directory / name
    if not path.is_file():
        pickled = sorted(item.name for item in directory.iterdir() if item.suffix in PICKLED)
        if name == TENSORS_FILE and pickled:
            raise ModelError(
                f"{pickled[0]} is pickled{and_more(pickled)}: loading it would run code that the file brings along, so "
                f"it is never opened. Given: no {TENSORS_FILE}.",
                code="adapter_pickled",
                hint="Save the adapter again with PEFT's save_pretrained, which writes safetensors.",
            )
        raise ModelError(
            f"{name} is missing in the adapter directory.",
            code="adapter_missing",
            hint=f"An adapter holds {CONFIG_FILE} and {TENSORS_FILE}: copy both.",
        )
    if not path.resolve().is_relative_to(directory.resolve()):
        raise ModelError(
            f"{name} is a link that leads out of the adapter directory.",
            code="adapter_invalid",
            hint="Copy the file itself into the directory (`cp -L`).",
        )
    return path


def _read_tensors(file: SafetensorsFile, layout: FileLayout) -> dict[str, Tensor]:
    """Every tensor by the name that is written, after names, shapes and dtypes were found right."""
    spelled = {layout.spellings.get(key, key): key for key in file.tensors}
    missing = [name for name in layout.shapes if name not in spelled]
    if missing:
        raise ModelError(
            f"{TENSORS_FILE} lacks tensor {missing[0]}{and_more(missing)}. Given: {len(file.tensors)} tensors.",
            code="adapter_invalid",
            hint=f"{CONFIG_FILE} and the tensors are of different adapters, or of another base model.",
        )
    extra = [key for name, key in spelled.items() if name not in layout.shapes]
    if extra or len(spelled) < len(file.tensors):
        extra = extra or [key for key in file.tensors if key not in spelled.values()]
        raise ModelError(
            f"{TENSORS_FILE} tensor {extra[0]} has no place in this adapter{and_more(extra)}.",
            code="adapter_invalid",
            hint=f"{CONFIG_FILE} doesn't name its module, or the model has no such product: nothing is left out in "
            "silence.",
        )
    for name, shape in layout.shapes.items():
        entry = file.tensors[spelled[name]]
        if entry.shape != shape:
            is_transposed = entry.shape == tuple(reversed(shape))
            raise ModelError(
                f"{TENSORS_FILE} tensor {entry.name} must have shape {list(shape)}. Given: {list(entry.shape)}"
                f"{', its transpose' if is_transposed else ''}.",
                code="adapter_invalid",
                hint="lora_A is [r, in] and lora_B [out, r]; the base model's sizes and r must be the adapter's.",
            )
        if not entry.dtype.is_floating_point:
            raise invalid(TENSORS_FILE, f"tensor {entry.name} must be F32, BF16, F16 or F64", dtype_name(entry.dtype))
    tensors = {}
    for name in layout.shapes:
        tensors[name] = file.read(spelled[name])
        is_finite = torch.isfinite(tensors[name])
        if not bool(is_finite.all()):
            at = torch.nonzero(~is_finite)[0].tolist()
            raise ModelError(
                f"{TENSORS_FILE} tensor {spelled[name]} must hold finite numbers. "
                f"Given: {float(tensors[name][tuple(at)])!r} at {at}.",
                code="adapter_invalid",
                hint="The adapter is broken (often a training run that diverged): use an earlier checkpoint.",
            )
    return tensors


def _check_blocks(tensors: Mapping[str, Tensor], layout: FileLayout, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Beside the blocks of a shared file tensor there must be zeros."""
    inside: dict[str, Tensor] = {}
    for name, place in layout.places.items():
        if isinstance(place, Block):
            mask = inside.setdefault(place.file_name, torch.zeros(place.shape, dtype=torch.bool))
            mask[file_slices(place, shapes[name], tuple(slice(0, size) for size in shapes[name]))[0]] = True
    for file_name, mask in inside.items():
        if bool((tensors[file_name] != 0).logical_and_(~mask).any()):
            raise invalid(
                TENSORS_FILE,
                f"tensor {file_name} must be zero beside the blocks that {FACTS_FILE} means",
                "other values there",
                f"Somebody has trained it further: remove {FACTS_FILE}, which no longer describes it.",
            )


def _check_copies(tensors: Mapping[str, Tensor], layout: FileLayout) -> None:
    """A shared A must be the same under each name."""
    for owner, copies in layout.copies.items():
        for copy in copies:
            if not torch.equal(tensors[layout.places[owner].file_name], tensors[copy.file_name]):
                raise invalid(
                    TENSORS_FILE,
                    f"tensor {copy.file_name} must equal that of the other products of its input, since {FACTS_FILE} "
                    "says layout fused",
                    "other values",
                    f"Somebody has trained it further: remove {FACTS_FILE}, which no longer describes it.",
                )


def _digest(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"\n{name} {dtype_name(tensors[name].dtype)} {list(tensors[name].shape)}\n".encode())
        digest.update(bytes_of(tensors[name]))
    return digest.hexdigest()


def write_adapter(
    directory: Path,
    state: Mapping[str, Tensor],
    *,
    config: ModelConfig,
    spec: LoraSpec,
    base_model: str,
    facts: Mapping[str, JsonValue],
    side_files_from: Path | None = None,
) -> None:
    """
    Write an adapter directory in one step: it is there whole or not at all.

    Args:
        directory: must not exist yet.
        state: every tensor of `lora_shapes`, whole; a shared A is taken by its owner's name.
        config: of the base model.
        base_model: a name or path that PEFT users load the base by.
        facts: what trilithon.json says besides: digests, job, step.
        side_files_from: a directory whose chat template goes along; None for none.
    Raises:
        ModelError: `export_exists`; `weights_missing`, `weights_shape` for a state that is not this adapter's.
    """
    if directory.exists():
        raise ModelError(
            f"{directory.name} exists already, and exports never overwrite.",
            code="export_exists",
            hint="Name a new directory, or remove that one.",
        )
    spec.check(config)
    layout, shapes = file_layout(config, spec), lora_shapes(config, spec)
    for name in (name for name in shapes if owner_name(name, spec) == name):
        if name not in state:
            raise ModelError(f"adapter lacks tensor {name}.", code="weights_missing", hint="Give all of it.")
        if tuple(state[name].shape) != shapes[name]:
            raise ModelError(
                f"adapter tensor {name} must have shape {list(shapes[name])}. Given: {list(state[name].shape)}.",
                code="weights_shape",
                hint="Give whole tensors without padding.",
            )

    def produce(tensor: TensorSpec) -> Tensor:
        out = torch.zeros(tensor.shape, dtype=tensor.dtype)
        for name, place in layout.places.items():
            if place.file_name == tensor.name:
                where, _ = file_slices(place, shapes[name], tuple(slice(0, size) for size in shapes[name]))
                out[where] = state[owner_name(name, spec)].detach().to(device="cpu", dtype=tensor.dtype)
        return out

    directory.parent.mkdir(parents=True, exist_ok=True)
    dtype = next(iter(state.values())).dtype
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".tmp-{directory.name}-") as temporary:
        made = Path(temporary) / "adapter"
        made.mkdir()
        for file_name, data in small_files(config, spec, base_model=base_model, facts=facts).items():
            (made / file_name).write_bytes(data)
        if side_files_from is not None and (side_files_from / TEMPLATE_FILE).is_file():
            shutil.copyfile(side_files_from / TEMPLATE_FILE, made / TEMPLATE_FILE)
        specs = [TensorSpec(file_name, dtype, shape) for file_name, shape in layout.shapes.items()]
        write_safetensors(made / TENSORS_FILE, specs, produce)
        _sync(made)
        made.rename(directory)
    _sync(directory.parent)


def _sync(directory: Path) -> None:
    """Bring directory entries to the disk."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
