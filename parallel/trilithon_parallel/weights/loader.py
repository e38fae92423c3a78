"""
Fill one rank's stage from a model directory: every rank reads its own slices and nothing else.

The whole directory is checked by its headers first, so that a missing, extra or misshapen tensor is found on every rank
at once and before a byte of data is read; NaN and infinity are found in the slices as they come.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from trilithon_parallel.config import ModelConfig, ModelError
from trilithon_parallel.grid import Grid
from trilithon_parallel.placement import global_shapes, local_slice, source_name, stage_names
from trilithon_parallel.weights.directory import WeightFiles, and_more
from trilithon_parallel.weights.names import NameTable, Slices, Source, file_shape, file_slices, name_table
from trilithon_parallel.weights.safetensors_io import DTYPE_NAMES

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load read: `num_bytes` of weights as they lie in the files, in `seconds`."""

    num_bytes: int
    seconds: float


def load_stage(stage: nn.Module, model_dir: Path, *, config: ModelConfig, grid: Grid) -> LoadReport:
    """
    Fill the parameters of a stage, named canonically, with this rank's slices; padding becomes zero.

    At most one 8 MiB buffer is held beside the stage itself (one tensor, where the stage is not on the CPU).

    Args:
        stage: holds exactly the parameters of `placement.stage_names`, in any float dtype, on any device.
        model_dir: the directory of safetensors files.
        config: of the same directory.
        grid: gives this rank's place along tp and pp.
    Returns:
        Bytes read and time taken.
    Raises:
        ModelError: `weights_missing`, `weights_extra`, `weights_shape`, `weights_dtype`, `weights_nonfinite`,
            `weights_truncated`, `weights_invalid` or `weights_pickled`, naming file and tensor.
    """
    began = time.monotonic()
    parameters = dict(stage.named_parameters())
    wanted = stage_names(config, pp=grid.pp.size, pp_rank=grid.pp.rank, counts=grid.layer_counts)
    assert set(parameters) == set(wanted), f"stage and placement disagree on {set(parameters) ^ set(wanted)}"
    shapes = global_shapes(config)
    num_bytes = 0
    with WeightFiles(model_dir) as files:
        reader = WeightReader(files, config)
        for name in wanted:
            owner = source_name(name, config)
            place = local_slice(name, shapes[owner], config=config, tp=grid.tp.size, tp_rank=grid.tp.rank)
            parameter = parameters[name]
            assert tuple(parameter.shape) == place.shape, f"{name}: {tuple(parameter.shape)} for {place.shape}"
            num_bytes += reader.fill(parameter.detach(), owner, place.slices)
    return LoadReport(num_bytes, time.monotonic() - began)


def load_state(model_dir: Path, *, config: ModelConfig, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """
    Every tensor of a model, whole, by canonical name: for exports and comparisons of models that fit in memory.

    Args:
        dtype: of the result; None keeps each tensor's own.
    Raises:
        ModelError: as for `load_stage`.
    """
    state: dict[str, torch.Tensor] = {}
    with WeightFiles(model_dir) as files:
        reader = WeightReader(files, config)
        for name, shape in global_shapes(config).items():
            state[name] = torch.empty(shape, dtype=dtype or reader.dtype_of(name))
            reader.fill(state[name], name, tuple(slice(0, size) for size in shape))
    return state


def check_weights(model_dir: Path, *, config: ModelConfig) -> None:
    """
    Check a directory's weights by their headers alone: names, shapes, dtypes, file sizes. Reads no data.

    Raises:
        ModelError: as for `load_stage`, but for NaN and infinity, which only reading finds.
    """
    with WeightFiles(model_dir) as files:
        WeightReader(files, config)


class WeightReader:
    """
    Reads canonical blocks out of files whose headers fit the config.

    Args:
        optional: canonical tensors that the config has no place for and that are read all the same where the files
            have them, with their shapes.
    Attributes:
        shapes: of all that can be read.
    """

    def __init__(
        self, files: WeightFiles, config: ModelConfig, *, optional: Mapping[str, tuple[int, ...]] | None = None
    ) -> None:
        self._files = files
        self.shapes = dict(global_shapes(config))
        for name, shape in (optional or {}).items():
            table = name_table(config, also=[name])
            if any(item in files.tensors for item in table.spellings(table.sources[name].file_name)):
                self.shapes[name] = shape
        self._table = name_table(config, also=self.shapes.keys() - global_shapes(config).keys())
        self._spelled = _match(files, self._table)
        self._check_shapes()
        self._tied_head = _HEAD if config.tied_embeddings and _HEAD in files.tensors else None
        if self._tied_head is not None:
            self._check_entry(_HEAD, self.shapes[_EMBEDDING])

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype that the files hold a canonical tensor in."""
        return self._files.tensors[self._spelled[name]].dtype

    def fill(self, out: torch.Tensor, name: str, slices: Slices) -> int:
        """Read a block of a canonical tensor into the leading corner of `out`, zero the rest; bytes read."""
        corner = tuple(slice(0, item.stop - item.start) for item in slices)
        target = out[corner]
        if target.shape != out.shape:
            out.zero_()
        if target.numel() == 0:
            return 0
        file_name = self._spelled[name]
        self._read(target, file_name, self._table.sources[name], name, slices)
        if name == _EMBEDDING and self._tied_head is not None:
            self._check_tied_head(target, slices)
        return target.numel() * self._files.tensors[file_name].dtype.itemsize

    def _read(self, target: torch.Tensor, file_name: str, source: Source, name: str, slices: Slices) -> None:
        where, transpose = file_slices(source, self.shapes[name], slices)
        file = self._files.file_of(file_name)
        on_host = target if target.device.type == "cpu" else torch.empty_like(target, device="cpu")
        file.read_into(file_name, where, on_host.t() if transpose else on_host)
        low, high = on_host.aminmax()  # both are NaN where any value is; no mask the size of the tensor
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise self._nonfinite(file_name, where, on_host.dtype)
        if on_host is not target:
            target.copy_(on_host)

    def _nonfinite(self, file_name: str, where: Slices, dtype: torch.dtype) -> ModelError:
        """Say where the first bad value is and whether the file or the cast is to blame."""
        file = self._files.file_of(file_name)
        entry = file.tensors[file_name]
        block = torch.empty([item.stop - item.start for item in where], dtype=entry.dtype)
        file.read_into(file_name, where, block)
        cast_is_to_blame = bool(torch.isfinite(block).all())
        bad = torch.nonzero(~torch.isfinite(block.to(dtype)))[0].tolist()
        at = [item.start + index for item, index in zip(where, bad, strict=True)]
        value = float(block[tuple(bad)])
        if cast_is_to_blame:
            return ModelError(
                f"{file.path.name} tensor {file_name} has a value at {at} that {dtype_name(dtype)} cannot hold. "
                f"Given: {value!r}.",
                code="weights_nonfinite",
                hint="Use --dtype bfloat16 or float32.",
            )
        return ModelError(
            f"{file.path.name} tensor {file_name} must hold finite numbers. Given: {value!r} at {at}.",
            code="weights_nonfinite",
            hint="The model is broken (often a training run that diverged): use an earlier checkpoint.",
        )

    def _check_tied_head(self, embedding: torch.Tensor, slices: Slices) -> None:
        """A tied model may come with a copy of its head; one that differs says that it is not tied at all."""
        assert self._tied_head is not None
        copy = torch.empty_like(embedding, device="cpu")
        file = self._files.file_of(self._tied_head)
        file.read_into(self._tied_head, slices, copy)
        if not torch.equal(copy, embedding.cpu()):
            raise ModelError(
                f"{file.path.name} tensor {self._tied_head} must equal the embedding, because config.json "
                "tie_word_embeddings is true. Given: other values.",
                code="weights_invalid",
                hint="Set tie_word_embeddings to false if the head is its own, or remove the tensor.",
            )

    def _check_shapes(self) -> None:
        for name, shape in self.shapes.items():
            self._check_entry(self._spelled[name], file_shape(self._table.sources[name], shape))

    def _check_entry(self, file_name: str, expected: tuple[int, ...]) -> None:
        entry, file = self._files.tensors[file_name], self._files.file_of(file_name).path.name
        if entry.shape != expected:
            raise ModelError(
                f"{file} tensor {file_name} must have shape {list(expected)} by config.json. "
                f"Given: {list(entry.shape)}.",
                code="weights_shape",
                hint="config.json and the weights are of different models: copy both from one place.",
            )
        if not entry.dtype.is_floating_point:
            raise ModelError(
                f"{file} tensor {file_name} must be F32, BF16, F16 or F64. Given: {DTYPE_NAMES[entry.dtype]}.",
                code="weights_dtype",
                hint="Quantised weights are not read from safetensors: use the model's unquantised files.",
            )


def _match(files: WeightFiles, table: NameTable) -> dict[str, str]:
    """Canonical name -> file tensor; every file tensor is used, known to be unneeded, or an error."""
    spelled: dict[str, str] = {}
    missing: list[str] = []
    for name, source in table.sources.items():
        found = [item for item in table.spellings(source.file_name) if item in files.tensors]
        if not found:
            missing.append(table.spellings(source.file_name)[0])
        else:
            spelled[name] = found[0]
    if missing:
        missing = list(dict.fromkeys(missing))
        raise ModelError(
            f"tensor {missing[0]} is missing in the weights{and_more(missing)}. Given: {_listing(files.tensors)}.",
            code="weights_missing",
            hint="config.json and the weights are of different models, or a file is missing: download all of it again.",
        )
    used = set(spelled.values())
    # A head beside a tied embedding is compared with it as it is read.
    tied = {_HEAD} if _HEAD not in table.sources else set()
    extra = [item for item in files.tensors if item not in used | tied and not table.is_ignorable(item)]
    if extra:
        raise ModelError(
            f"{files.file_of(extra[0]).path.name} tensor {extra[0]} has no place in this model{and_more(extra)}.",
            code="weights_extra",
            hint="config.json and the weights are of different models, or the model has parts that are not supported: "
            "nothing is left out in silence.",
        )
    return spelled


def _listing(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return f"{len(ordered)} tensors" + (f" ({', '.join(ordered[:3])}, ...)" if ordered else "")


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> `bfloat16`."""
    return str(dtype).removeprefix("torch.")
