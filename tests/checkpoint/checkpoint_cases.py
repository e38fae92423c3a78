"""
A synthetic training state cut as a trainer cuts it, and what several ranks check with it.

Started by test_layouts.py as one process per rank, never collected by pytest. Every tensor's values depend on its name
alone, so that each rank knows what it must read, whichever layout wrote it.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_configs import LLAMA
from torch import Tensor

from trilithon_parallel import rendezvous
from trilithon_parallel.checkpoint import (
    CheckpointError,
    Piece,
    Progress,
    Retention,
    RunFacts,
    Saver,
    load,
    optimizer_names,
    read_manifest,
)
from trilithon_parallel.checkpoint import saver as saver_module
from trilithon_parallel.checkpoint.piece import Slices
from trilithon_parallel.collectives import barrier
from trilithon_parallel.config import ModelConfig, load_config
from trilithon_parallel.grid import Grid
from trilithon_parallel.placement import global_shapes, local_sizes, local_slice, placement_of, source_name, stage_names

Layout = tuple[int, int, int, int]  # tp, pp, dp, virtual

LAYOUTS: tuple[Layout, ...] = (
    (1, 1, 1, 1),
    (2, 1, 1, 1),
    (1, 2, 1, 1),
    (1, 1, 2, 1),
    (2, 2, 1, 1),
    (2, 1, 2, 1),
    (1, 2, 1, 2),
)
MODELS = {"llama": torch.bfloat16, "gpt2": torch.float32}
BIG = replace(
    LLAMA, vocab_size=8000, hidden_size=512, num_heads=8, num_kv_heads=8, head_dim=64, ffn_size=1408, max_context=512
)
STATUS = Path("/proc/self/status")
FACTS = RunFacts(seed=7, data_hash="d" * 64)


def named(layout: Layout) -> str:
    tp, pp, dp, virtual = layout
    return f"tp{tp}pp{pp}dp{dp}v{virtual}"


def world_size(layout: Layout) -> int:
    return layout[0] * layout[1] * layout[2]


def whole(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The global tensor of a name: random, from the name alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator).to(dtype)


def _names(config: ModelConfig, grid: Grid, virtual: int) -> Iterator[str]:
    """Parameters of all chunks of this rank."""
    for chunk in range(virtual):
        place = grid.chunk(chunk, virtual)
        yield from stage_names(config, pp=place.pp.size, pp_rank=place.pp.rank)


def range_slices(slices: Slices, start: int, stop: int) -> Iterator[Slices]:
    """The elements [start, stop) of a flattened rectangle, as at most three rectangles of the global tensor."""
    if len(slices) == 1:
        yield (slice(slices[0].start + start, slices[0].start + stop),)
        return
    top, left = slices[0].start, slices[1].start
    columns = slices[1].stop - left
    while start < stop:
        row, column = divmod(start, columns)
        if column == 0 and stop - start >= columns:
            rows, count = (stop - start) // columns, columns
        else:
            rows, count = 1, min(columns - column, stop - start)
        yield slice(top + row, top + row + rows), slice(left + column, left + column + count)
        start += rows * count


def state_pieces(config: ModelConfig, grid: Grid, *, virtual: int, dtype: torch.dtype, saving: bool) -> list[Piece]:
    """This rank's rectangles: what it gives (each element once over all ranks) or asks for (its whole share)."""
    shapes = global_shapes(config)
    found: list[Piece] = []

    def add(name: str, slices: Slices, kind: torch.dtype) -> None:
        shape = shapes[name.removesuffix(".master").removesuffix(".exp_avg").removesuffix(".exp_avg_sq")]
        block = tuple(item.stop - item.start for item in slices)
        tensor = whole(name, shape, kind)[slices] if saving else torch.full(block, 7.0, dtype=kind)
        found.append(Piece(name, slices, tensor))

    for parameter in _names(config, grid, virtual):
        name = source_name(parameter, config)
        if saving and parameter != name:
            continue  # the last stage's copy of a tied head
        place = local_slice(name, shapes[name], config=config, tp=grid.tp.size, tp_rank=grid.tp.rank)
        rule = placement_of(name)
        replicas = local_sizes(config, grid.tp.size).kv_replicas if rule.cut == "kv" else 1
        is_owner = grid.tp.rank == 0 if rule.cut is None else grid.tp.rank % replicas == 0
        if saving and not is_owner:
            continue
        if not saving or grid.dp.rank == 0:
            add(name, place.slices, dtype)
        numel = torch.Size(place.source_shape).numel()
        share = -(-numel // grid.dp.size)
        start, stop = min(grid.dp.rank * share, numel), min((grid.dp.rank + 1) * share, numel)
        for state in optimizer_names(name, dtype) if parameter == name else ():
            for slices in range_slices(place.slices, start, stop) if start < stop else ():
                add(state, slices, torch.float32)
    return found


def wrong(targets: list[Piece], config: ModelConfig) -> list[str]:
    """Targets that differ in any bit from what their name says."""
    shapes = global_shapes(config)
    names = []
    for target in targets:
        shape = shapes[target.name.removesuffix(".master").removesuffix(".exp_avg").removesuffix(".exp_avg_sq")]
        if not torch.equal(whole(target.name, shape, target.tensor.dtype)[target.slices], target.tensor):
            names.append(target.name)
    return names


def make_saver(
    run_dir: Path, config: ModelConfig, grid: Grid, *, dtype: torch.dtype, virtual: int = 1, **options: object
) -> Saver:
    defaults = {"retention": Retention(2), "side_files_from": None, "max_shard_bytes": 100_000}
    facts = RunFacts(FACTS.seed, FACTS.data_hash, virtual)
    return Saver(run_dir, config=config, grid=grid, facts=facts, dtype=dtype, **(defaults | options))


def progress(step: int) -> Progress:
    return Progress(step, step * 8, step * 8 * 64, {"loss_scale": 2.0**step, "rng": [step, 1, 2]})


def save_case(models: Path, runs: Path, model: str, layout: Layout, grid: Grid) -> None:
    config = load_config(models / model)
    dtype = MODELS[model]
    pieces = state_pieces(config, grid, virtual=layout[3], dtype=dtype, saving=True)
    saver = make_saver(
        runs / f"{model}-{named(layout)}", config, grid, dtype=dtype, virtual=layout[3], side_files_from=models / model
    )
    saver.start(pieces, progress(3))
    for piece in pieces:
        piece.tensor.fill_(-1)  # the trainer goes on: what was given is already copied
    assert saver.wait() == runs / f"{model}-{named(layout)}" / "step_00000003"
    saver.close()


def load_case(models: Path, runs: Path, model: str, source: Layout, layout: Layout, grid: Grid) -> None:
    config = load_config(models / model)
    targets = state_pieces(config, grid, virtual=layout[3], dtype=MODELS[model], saving=False)
    directory = runs / f"{model}-{named(source)}" / "step_00000003"
    manifest = load(directory, targets, config=config, axis=grid.world)
    assert wrong(targets, config) == []
    assert manifest.step == 3
    assert manifest.layout.tp == source[0]
    assert manifest.state == progress(3).state


def failure_case(models: Path, runs: Path, grid: Grid) -> list[str]:
    """What goes wrong on one rank alone: the error of every rank, then a good save after all of it."""
    config = load_config(models / "llama")
    pieces = state_pieces(config, grid, virtual=1, dtype=torch.bfloat16, saving=True)
    saver = make_saver(runs / "failing", config, grid, dtype=torch.bfloat16)
    said = []

    def attempt(run: Callable[[], object]) -> None:
        try:
            run()
            said.append("ok")
        except CheckpointError as error:
            said.append(f"{error.code}: {error.message}")

    first = pieces[0]
    wrong_dtype = [Piece(first.name, first.slices, first.tensor.double()), *pieces[1:]]
    attempt(lambda: saver.start(wrong_dtype if grid.rank == 1 else pieces, progress(1)))
    attempt(lambda: saver.start(pieces[1:] if grid.rank == 1 else pieces, progress(1)))

    def full_disk(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    original = saver_module.write_block
    saver_module.write_block = full_disk if grid.rank == 1 else original
    saver.start(pieces, progress(1))
    attempt(saver.wait)
    saver_module.write_block = original
    saver.start(pieces, progress(2))
    attempt(saver.wait)
    saver.close()
    attempt(lambda: load_damaged(runs / "failing" / "step_00000002", config, grid))
    said.append(" ".join(sorted(path.name for path in (runs / "failing").iterdir())))
    return said


def load_damaged(directory: Path, config: ModelConfig, grid: Grid) -> None:
    """Load what rank 0 has just damaged; the file is one that rank 1 verifies."""
    path = directory / list(read_manifest(directory).files)[3]  # of the ranks' turns, one of rank 1
    if grid.rank == 0:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    barrier(grid.world, label="damage")
    targets = state_pieces(config, grid, virtual=1, dtype=torch.bfloat16, saving=False)
    load(directory, targets, config=config, axis=grid.world)


def memory_case(runs: Path, grid: Grid, action: str) -> dict[str, int]:
    """Save a model of tens of MB at this layout, or load it: resident bytes before, at the peak, and of the whole."""
    config = BIG
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: imports had one of their own
    pieces = state_pieces(config, grid, virtual=1, dtype=torch.float32, saving=action == "save-big")
    if action == "save-big":
        saver = make_saver(runs / "big", config, grid, dtype=torch.float32, max_shard_bytes=10**9)
        saver.start(pieces, progress(1))
        saver.wait()
        saver.close()
    else:
        load(runs / "big" / "step_00000001", pieces, config=config, axis=grid.world)
    sizes = [3 * 4 * torch.Size(shape).numel() for shape in global_shapes(config).values()]
    peak = next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return {"grown": peak - before, "whole": sum(sizes), "largest": max(sizes) // 3}


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def run_matrix(models: Path, runs: Path, action: str, num_ranks: int) -> dict[str, str]:
    """Save at every layout of this world size, or load all that was saved at each of them."""
    results = {}
    for layout in (item for item in LAYOUTS if world_size(item) == num_ranks):
        grid = Grid.build(tp=layout[0], pp=layout[1], dp=layout[2])
        for model in MODELS:
            for source in LAYOUTS if action == "load" else (layout,):
                try:
                    if action == "load":
                        load_case(models, runs, model, source, layout, grid)
                    else:
                        save_case(models, runs, model, layout, grid)
                    results[f"{model}-{named(source)}-{named(layout)}"] = "ok"
                except Exception:
                    results[f"{model}-{named(source)}-{named(layout)}"] = traceback.format_exc()
    return results


def main(work_dir: Path, models: Path, runs: Path, action: str) -> None:
    """Join, run every case of this world size, write what happened."""
    torch.set_num_threads(1)
    world = rendezvous.join(timeout_s=60)
    results: dict[str, Any]
    if action in ("save", "load"):
        results = run_matrix(models, runs, action, world.world_size)
    elif action == "fail":
        results = {"said": failure_case(models, runs, Grid.build(tp=world.world_size, pp=1))}
    else:
        results = memory_case(runs, Grid.build(tp=world.world_size, pp=1), action)
    (work_dir / f"rank{world.rank}.json").write_text(json.dumps(results))
    rendezvous.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
