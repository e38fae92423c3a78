"""Weights in and out of checkpoints: to a model directory for other software, and from one for a new run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from trilithon_parallel.checkpoint.describe import encoded, write_files
from trilithon_parallel.checkpoint.errors import CheckpointError, agree, together
from trilithon_parallel.checkpoint.manifest import verify
from trilithon_parallel.checkpoint.piece import Piece
from trilithon_parallel.checkpoint.run_dir import sync_directory
from trilithon_parallel.checkpoint.table import MASTER
from trilithon_parallel.config import QUERY_DIR, RETRIEVER_DIR, ModelConfig
from trilithon_parallel.grid import Axis, Grid
from trilithon_parallel.lora.files import CONFIG_FILE
from trilithon_parallel.placement import global_shapes
from trilithon_parallel.weights.base import SIGMA, BaseReader
from trilithon_parallel.weights.directory import MAX_SHARD_BYTES, WeightFiles, write_shards
from trilithon_parallel.weights.export import SIDE_FILES
from trilithon_parallel.weights.loader import WeightReader, dtype_name
from trilithon_parallel.weights.safetensors_io import TensorSpec


def export(
    directory: Path, out_dir: Path, *, dtype: torch.dtype | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """
    Copy a checkpoint's weights into a model directory, in one pass, one tensor in memory at a time.

    Serving needs no export: a checkpoint is a model directory as it stands. This leaves the optimizer behind. What was
    trained beside the model goes to model directories of their own, `retriever/` and `query/`.

    Args:
        directory: of the checkpoint; it is verified first.
        out_dir: must not exist yet; it is there whole or not at all.
        dtype: of the weights written; None keeps the checkpoint's.
        max_shard_bytes: size of a file.
    Raises:
        CheckpointError: `export_exists`; `checkpoint_unsupported`, an adapter's; or what `verify` raises.
    """
    if out_dir.exists():
        raise CheckpointError(
            f"{out_dir.name} exists already, and exports never overwrite.",
            code="export_exists",
            hint="Name a new directory, or remove that one.",
        )
    if (directory / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{directory.name} holds an adapter, not a model. Given: {CONFIG_FILE}.",
            code="checkpoint_unsupported",
            hint="It is an adapter directory as it stands; to have a model, merge it into its base.",
        )
    verify(directory, axis=Grid.single().world)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".tmp-{out_dir.name}-") as temporary:
        model_dir = Path(temporary) / "model"
        _copy_model(directory, model_dir, dtype=dtype, max_shard_bytes=max_shard_bytes)
        model_dir.rename(out_dir)
    sync_directory(out_dir.parent)


def _copy_model(directory: Path, model_dir: Path, *, dtype: torch.dtype | None, max_shard_bytes: int) -> None:
    model_dir.mkdir()
    with WeightFiles(directory) as files:
        config = json.loads((directory / "config.json").read_bytes())
        if dtype is not None:
            config["torch_dtype"] = dtype_name(dtype)
        small = {"config.json": encoded(config)}
        for name in ("generation_config.json", *SIDE_FILES):
            if (directory / name).is_file():
                small[name] = (directory / name).read_bytes()
        write_files(model_dir, small)
        specs = [TensorSpec(entry.name, dtype or entry.dtype, entry.shape) for entry in files.tensors.values()]
        write_shards(model_dir, specs, lambda spec: files.file_of(spec.name).read(spec.name), max_bytes=max_shard_bytes)
    for folder in (RETRIEVER_DIR, QUERY_DIR):
        if (directory / folder).is_dir():
            _copy_model(directory / folder, model_dir / folder, dtype=dtype, max_shard_bytes=max_shard_bytes)
    sync_directory(model_dir)


def import_model_directory(model_dir: Path, targets: Sequence[Piece], *, config: ModelConfig, axis: Axis) -> None:
    """
    Fill the weights of a new run from a model directory: a published model, an export, or another run's checkpoint.

    Weights are cast to the targets' dtype; `.master` targets get the same numbers in fp32, before any rounding to the
    parameters' dtype. There is no optimizer state: moments begin at zero, and a target of theirs is refused.

    Args:
        model_dir: safetensors files with `config.json`.
        targets: this rank's rectangles of parameters and masters.
        config: of the run; its shapes must be the directory's.
        axis: all ranks that load together.
    Raises:
        CheckpointError: on all ranks alike, for all that `load_stage` refuses, NaN and infinity included.
    """
    _check_targets(targets, config, axis)

    def run() -> None:
        with WeightFiles(model_dir) as files:
            reader = WeightReader(files, config)
            for target in targets:
                reader.fill(target.tensor.detach(), target.name.removesuffix(MASTER), target.slices)

    together(run, axis, label="checkpoint.import")


def import_base(
    model_dir: Path,
    targets: Sequence[Piece],
    *,
    config: ModelConfig,
    axis: Axis,
    seed: int,
    sigma: float = SIGMA,
    fresh: Collection[str] = (),
) -> None:
    """
    As `import_model_directory`, for a model that begins from another one: with the head of a task, with a masked-LM
    head, with another vocabulary. What the directory lacks is drawn, the same at every layout.

    Args:
        config: of the new model; `task_head.for_task` and `for_masked_lm` make it from the directory's.
        seed, sigma, fresh: as for `weights.base.BaseReader`.
    Raises:
        CheckpointError: on all ranks alike, for all that `import_model_directory` refuses; `weights_shape`, the
            directory's model has another shape than the new one.
    """
    _check_targets(targets, config, axis)

    def run() -> None:
        with BaseReader(model_dir, config=config, seed=seed, sigma=sigma, fresh=fresh) as reader:
            for target in targets:
                reader.fill(target.tensor.detach(), target.name.removesuffix(MASTER), target.slices)

    together(run, axis, label="checkpoint.import")


def _check_targets(targets: Sequence[Piece], config: ModelConfig, axis: Axis) -> None:
    """Weights and masters alone; on all ranks alike."""
    error: BaseException | None = None
    shapes = global_shapes(config)
    for target in targets:
        if target.name.removesuffix(MASTER) not in shapes:
            error = CheckpointError(
                f"a model directory has weights alone. Given: a target {target.name}.",
                code="checkpoint_mismatch",
                hint="Moments begin at zero in a new run; to continue one, load its checkpoint.",
            )
    agree(error, axis, label="checkpoint.import")
