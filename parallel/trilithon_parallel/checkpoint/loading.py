"""Loading: every rank reads the bytes of its own rectangles, at whatever layout; nothing is left out in silence."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from trilithon_parallel.checkpoint.adapter import check_adapter
from trilithon_parallel.checkpoint.coverage import check_coverage, check_pieces
from trilithon_parallel.checkpoint.describe import check_config
from trilithon_parallel.checkpoint.errors import CheckpointError, agree, together
from trilithon_parallel.checkpoint.manifest import Manifest, verify
from trilithon_parallel.checkpoint.piece import Piece, read_block
from trilithon_parallel.checkpoint.table import Stored, read_table
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.grid import Axis


def load(
    directory: Path,
    targets: Sequence[Piece],
    *,
    config: ModelConfig,
    axis: Axis,
    verified: Manifest | None = None,
    base_digest: str | None = None,
) -> Manifest:
    """
    Fill `targets` from a checkpoint, bit for bit. Collective.

    Beside the targets a rank holds at most one of them in host memory (none where they are contiguous, on the CPU and
    not transposed in the file).

    Args:
        directory: `RUN/step_00000123`.
        targets: this rank's rectangles, to be filled; several ranks may ask for the same elements, and together they
            must ask for every tensor of the checkpoint.
        config: of the run that resumes.
        axis: all ranks that load together: `grid.world`.
        verified: what `find_latest` or `verify` returned for this directory; None verifies it here.
        base_digest: of the model beneath the adapter that the run trains, as its `Base` has it; None without one.
    Returns:
        The checkpoint's manifest: step, samples, the trainer's state.
    Raises:
        CheckpointError: on all ranks alike, naming file and tensor.
    """
    manifest = verify(directory, axis=axis) if verified is None else verified
    tensors: dict[str, Stored] = {}
    error: BaseException | None = None
    try:
        _check_base(directory, manifest, base_digest)
        if config.lora is None:
            check_config(directory, config)
        else:
            check_adapter(directory, config)
        tensors.update(read_table(directory, config))
        check_pieces(targets, tensors)
    except (ValueError, OSError) as caught:
        error = caught
    agree(error, axis, label="checkpoint.table")
    check_coverage(targets, tensors, axis=axis, exactly_once=False)
    together(lambda: _fill(directory, targets, tensors), axis, label="checkpoint.load")
    return manifest


def _check_base(directory: Path, manifest: Manifest, base_digest: str | None) -> None:
    if manifest.base_digest != base_digest:
        raise CheckpointError(
            f"{directory.name} is of an adapter of another base model: its digest must be {base_digest!r} here. "
            f"Given: {manifest.base_digest!r}.",
            code="checkpoint_mismatch",
            hint="Resume with the base model that the run began with.",
        )


def _fill(directory: Path, targets: Sequence[Piece], tensors: dict[str, Stored]) -> None:
    with contextlib.ExitStack() as opened:
        fds: dict[str, int] = {}
        for target in sorted(targets, key=lambda item: (tensors[item.name].file, tensors[item.name].start)):
            stored = tensors[target.name]
            if stored.file not in fds:
                fds[stored.file] = os.open(directory / stored.file, os.O_RDONLY | os.O_CLOEXEC)
                opened.callback(os.close, fds[stored.file])
            where, transpose = stored.place(target.slices)
            out = target.tensor.detach()
            if out.device.type == "cpu" and out.is_contiguous() and not transpose:
                read_block(fds[stored.file], stored.start, stored.file_shape, where, out)
                continue
            block = torch.empty([item.stop - item.start for item in where], dtype=stored.dtype)
            read_block(fds[stored.file], stored.start, stored.file_shape, where, block)
            out.copy_(block.t() if transpose else block)
