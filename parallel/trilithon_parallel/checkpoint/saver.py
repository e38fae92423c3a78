"""
Saving: every rank writes its own rectangles into files whose layout is known beforehand; all or nothing is published.

    start   all ranks   check the pieces; rank 0 makes `.tmp-step_...` with every file in full length
                        copy the pieces to host memory                          (from here on the trainer may go on)
    write   in threads  each rank writes its own runs of bytes and brings the files to the disk
    sum     in threads  each file is read back by one rank and hashed
    publish rank 0      manifest, rename, `latest`, retention

`poll`, called once a step on all ranks, hands on from one to the next when every rank is done.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import JsonValue

from trilithon_parallel.checkpoint.adapter import Base, adapter_files, check_adapter
from trilithon_parallel.checkpoint.coverage import check_coverage, check_pieces
from trilithon_parallel.checkpoint.describe import check_config, encoded, model_files, sync_folders, write_files
from trilithon_parallel.checkpoint.errors import CheckpointError, Task, agree, all_done
from trilithon_parallel.checkpoint.manifest import (
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    SavedLayout,
    Vocabulary,
    check_state,
    encode_manifest,
    file_entry,
    file_sum,
)
from trilithon_parallel.checkpoint.piece import Piece, write_block
from trilithon_parallel.checkpoint.run_dir import (
    TEMPORARY,
    Retention,
    is_complete,
    lock,
    prune,
    publish,
    remove_leftovers,
    step_name,
    steps,
    write_file,
)
from trilithon_parallel.checkpoint.table import Table, make_table
from trilithon_parallel.collectives import all_reduce
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.grid import Grid
from trilithon_parallel.placement import local_sizes
from trilithon_parallel.weights.directory import MAX_SHARD_BYTES
from trilithon_parallel.weights.loader import dtype_name


@dataclass(frozen=True)
class RunFacts:
    """
    What is the same in every checkpoint of a run: its seed, the hash of its data mix, chunks of layers a rank.

    `base`: of a run that trains an adapter, the model beneath.
    """

    seed: int
    data_hash: str
    virtual: int = 1
    base: Base | None = None


@dataclass(frozen=True)
class Progress:
    """
    How far the run has come: optimizer steps, samples and tokens since it began.

    `state` is what else a resume needs, as JSON: RNG, loss scale, ramps. Rank 0's is stored.
    """

    step: int
    consumed_samples: int
    consumed_tokens: int
    state: Mapping[str, JsonValue]


@dataclass
class _Save:
    """One save under way."""

    temporary: Path
    directory: Path
    progress: Progress
    phase: Literal["write", "sum", "publish"]
    task: Task
    small: dict[str, FileEntry]
    sums: dict[str, str]


class Saver:
    """
    Writes the checkpoints of a run. Every rank makes one and calls the same methods in the same order.

    At most one save is under way. Beside the run's own memory each rank needs as much host memory as its pieces take.

    Args:
        run_dir: made if it is missing; on a file system that all ranks see.
        config: of the model.
        grid: of the run.
        facts: of the run.
        dtype: of the parameters.
        retention: what stays when a new checkpoint is there.
        side_files_from: a model directory whose tokenizer and chat template go along, of an adapter the template alone;
            None for none.
        retriever_files_from: likewise, for the encoder that is trained beside a reader.
        max_shard_bytes: size of a file.
        permit: a file without which nothing is published any more: whoever replaces this run removes it.
    Attributes:
        protected: steps whose checkpoints stay whatever the retention; rank 0's counts.
    Raises:
        CheckpointError: `checkpoint_busy`, another run writes to `run_dir`.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        config: ModelConfig,
        grid: Grid,
        facts: RunFacts,
        dtype: torch.dtype,
        retention: Retention,
        side_files_from: Path | None,
        retriever_files_from: Path | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        permit: Path | None = None,
    ) -> None:
        self._permit, self._retriever_files_from = permit, retriever_files_from
        self._run_dir, self._config, self._grid, self._facts = run_dir, config, grid, facts
        self._dtype, self._retention, self._side_files_from = dtype, retention, side_files_from
        assert (config.lora is None) == (facts.base is None), "a run has a base beneath it where it trains an adapter"
        self.protected: set[int] = set()
        self._table: Table = make_table(config, dtype=dtype, max_shard_bytes=max_shard_bytes)
        self._save: _Save | None = None
        self._lock = -1
        error: BaseException | None = None
        try:
            if self._leads:
                self._lock = lock(run_dir)
        except (CheckpointError, OSError) as caught:
            error = caught
        agree(error, grid.world, label="checkpoint.lock")

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way; the same on all ranks."""
        return self._save is not None

    def start(self, pieces: Sequence[Piece], progress: Progress) -> None:
        """
        Begin a save; a previous one is waited for. On return the pieces' tensors may change. Collective.

        Args:
            pieces: this rank's rectangles. Over all ranks they hold every element of every tensor exactly once.
            progress: the same on all ranks.
        Raises:
            CheckpointError: pieces that do not fit or do not cover the model (`checkpoint_mismatch`,
                `checkpoint_coverage`), no room (`checkpoint_disk_full`), a state that is not JSON, or the failure of
                the previous save.
        """
        self.wait()
        world = self._grid.world
        error: BaseException | None = None
        try:
            check_state(progress.state)
            check_pieces(pieces, self._table.tensors)
        except CheckpointError as caught:
            error = caught
        agree(error, world, label="checkpoint.pieces")
        check_coverage(pieces, self._table.tensors, axis=world, exactly_once=True)
        directory = self._run_dir / step_name(progress.step)
        temporary = directory.with_name(TEMPORARY + directory.name)
        small: dict[str, FileEntry] = {}
        host: list[Piece] = []
        try:
            if self._leads:
                small = self._prepare(temporary, progress)
            host = [Piece(piece.name, piece.slices, _to_host(piece.tensor)) for piece in pieces]
        except (OSError, ValueError, RuntimeError) as caught:  # RuntimeError: torch has no memory for the copy
            error = caught
        try:
            agree(error, world, label="checkpoint.start")
        except CheckpointError:
            self._discard(temporary)
            raise
        task = Task(lambda: self._write(temporary, host))
        self._save = _Save(temporary, directory, progress, "write", task, small, {})

    def poll(self) -> Path | None:
        """
        Hand on the save that is under way, if there is one; costs one small all-reduce. Collective.

        Returns:
            The checkpoint's directory on the call that finds it published.
        Raises:
            CheckpointError: the save failed on some rank. What was published before is untouched, `latest` too, and
                the saver is ready for another try.
        """
        save, world = self._save, self._grid.world
        if save is None or not all_done(save.task, world, label="checkpoint.poll"):
            return None
        try:
            agree(save.task.error, world, label=f"checkpoint.{save.phase}")
        except CheckpointError:
            self._save = None
            self._discard(save.temporary)
            raise
        if save.phase == "write":
            save.phase = "sum"
            save.task = Task(lambda: self._sum(save))
        elif save.phase == "sum":
            sums = self._gather_sums(save)
            save.phase = "publish"
            save.task = Task(lambda: self._publish(save, sums) if self._leads else None)
        else:
            self._save = None
            return save.directory
        return None

    def wait(self) -> Path | None:
        """Wait until no save is under way; the result and the errors of `poll`. Collective."""
        published = None
        while self._save is not None:
            self._save.task.pause()
            published = self.poll()
        return published

    def close(self) -> None:
        """Give the run directory free; a save under way is waited for. Collective."""
        try:
            self.wait()
        finally:
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1

    @property
    def _leads(self) -> bool:
        return self._grid.rank == 0

    def _prepare(self, temporary: Path, progress: Progress) -> dict[str, FileEntry]:
        """Make the directory with every small file written and every tensor file in full length."""
        if any(is_complete(path) for path in steps(self._run_dir).values()):
            # Not before: a run may have died between a first checkpoint's last byte and its name.
            remove_leftovers(self._run_dir)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        small = self._describe(progress)
        for index, weight_map in self._table.indexes.items():
            small[index] = encoded({"metadata": {"total_size": self._table.num_bytes[index]}, "weight_map": weight_map})
        write_files(temporary, small)
        # What the files cannot say is found now, not when the run resumes.
        (check_config if self._config.lora is None else check_adapter)(temporary, self._config)
        for file, header in self._table.headers.items():
            _preallocate(temporary / file, header, self._table.sizes[file])
        sync_folders(temporary, self._table.headers)
        return {name: file_entry(temporary / name) for name in small}

    def _describe(self, progress: Progress) -> dict[str, bytes]:
        """The small files of a model directory, or of an adapter's."""
        if self._config.lora is None:
            return model_files(
                self._config,
                dtype=self._dtype,
                side_files_from=self._side_files_from,
                retriever_files_from=self._retriever_files_from,
            )
        assert self._facts.base is not None
        layout = self._layout().model_dump()
        return adapter_files(
            self._config,
            base=self._facts.base,
            facts={"step": progress.step, "layout": layout},
            side_files_from=self._side_files_from,
        )

    def _layout(self) -> SavedLayout:
        grid = self._grid
        return SavedLayout(tp=grid.tp.size, pp=grid.pp.size, dp=grid.dp.size, virtual=self._facts.virtual)

    def _write(self, temporary: Path, pieces: list[Piece]) -> None:
        """In a thread, on every rank: each of this rank's pieces to its place; its memory is given back at once."""
        with contextlib.ExitStack() as opened:
            fds: dict[str, int] = {}
            while pieces:
                piece = pieces.pop()
                stored = self._table.tensors[piece.name]
                if stored.file not in fds:
                    fds[stored.file] = os.open(temporary / stored.file, os.O_WRONLY | os.O_CLOEXEC)
                    opened.callback(os.close, fds[stored.file])
                for place in (stored, *stored.copies):
                    where, transpose = place.place(piece.slices)
                    block = piece.tensor.t().contiguous() if transpose else piece.tensor
                    write_block(fds[stored.file], place.start, place.file_shape, where, block)
            for fd in fds.values():
                os.fsync(fd)

    def _sum(self, save: _Save) -> None:
        """In a thread, on every rank: hash this rank's share of the files as they lie on the disk."""
        world = self._grid.world
        for file in list(self._table.sizes)[world.rank :: world.size]:
            save.sums[file] = file_sum(save.temporary / file)

    def _gather_sums(self, save: _Save) -> dict[str, str]:
        """Every file's checksum, on every rank: each row of the matrix is given by one rank, zero elsewhere."""
        rows = np.zeros((len(self._table.sizes), 32), dtype=np.int64)
        for row, file in zip(rows, self._table.sizes, strict=True):
            if file in save.sums:
                row[:] = np.frombuffer(bytes.fromhex(save.sums[file]), dtype=np.uint8)
        gathered = all_reduce(torch.from_numpy(rows), self._grid.world, label="checkpoint.sums").tolist()
        return {file: bytes(row).hex() for file, row in zip(self._table.sizes, gathered, strict=True)}

    def _publish(self, save: _Save, sums: Mapping[str, str]) -> None:
        """In a thread, on rank 0: the manifest, the name, and what may go now that this one is good."""
        sizes = self._table.sizes
        files = save.small | {file: FileEntry(bytes=sizes[file], sha256=sums[file]) for file in sizes}
        manifest = self._manifest(save.progress, files)
        if self._permit is not None and not self._permit.exists():
            raise CheckpointError(
                f"this run may not publish {save.directory.name}: {self._permit.name} is gone, so another one has "
                "taken its place.",
                code="checkpoint_busy",
                hint="Nothing is to be done: the other run goes on from the last checkpoint.",
            )
        write_file(save.temporary / MANIFEST_FILE, encode_manifest(manifest))
        publish(save.temporary, save.directory)
        remove_leftovers(self._run_dir)
        prune(self._run_dir, self._retention, verified=save.directory, protected=self.protected)

    def _manifest(self, progress: Progress, files: Mapping[str, FileEntry]) -> Manifest:
        config, grid = self._config, self._grid
        padded = local_sizes(config, grid.tp.size).vocab * grid.tp.size
        return Manifest(
            step=progress.step,
            consumed_samples=progress.consumed_samples,
            consumed_tokens=progress.consumed_tokens,
            layout=self._layout(),
            vocab=Vocabulary(true_size=config.vocab_size, padded_size=padded),
            rope_layout="half_split" if config.position == "rope" else None,
            dtypes={"weights": dtype_name(self._dtype), "optimizer": "float32"},
            tied_embeddings=config.tied_embeddings,
            seed=self._facts.seed,
            data_hash=self._facts.data_hash,
            state=dict(progress.state),
            base_digest=None if self._facts.base is None else self._facts.base.digest,
            files=dict(sorted(files.items())),
        )

    def _discard(self, temporary: Path) -> None:
        """Give back the room of a save that failed on some rank; all ranks have stopped writing."""
        if self._leads:
            shutil.rmtree(temporary, ignore_errors=True)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy in host memory, of its own even where the tensor is there already."""
    return tensor.detach().to(device="cpu", copy=True, memory_format=torch.contiguous_format)


def _preallocate(path: Path, header: bytes, size: int) -> None:
    """A file of its full length: that the disk is full is known before the first byte of data."""
    with path.open("xb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            file.truncate(size)  # a file system that cannot promise room: the writes find out
        file.write(header)
        file.flush()
        os.fsync(file.fileno())
