"""
What ranks send each other in a training step, recorded and held beside the cost model. Started by test_volumes.py.

The recorder counts what goes into a call; what a rank then sends is that of a ring: 2 (n - 1) / n of an all-reduced
tensor, (n - 1) / n of one that is reduce-scattered, n - 1 times its share of one that is gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import rank_runner
import torch
from step_cases import LENGTH, MODELS, SAMPLES, batches_of

from trilithon_parallel import costs
from trilithon_parallel.backend import select
from trilithon_parallel.buckets import SHARE_MULTIPLE
from trilithon_parallel.collectives import Call, recording
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.costs import all_reduce_elements, data_elements, pipeline_elements, tensor_elements
from trilithon_parallel.grid import Grid
from trilithon_parallel.init import initialise
from trilithon_parallel.layout import Layout
from trilithon_parallel.optimizer import AdamWSettings
from trilithon_parallel.recompute import Recompute
from trilithon_parallel.step import TrainingModel

CONFIG = replace(MODELS["gpt2"], tied_embeddings=False)


def sent(calls: Sequence[Call], sizes: dict[str, int]) -> dict[str, float]:
    """Elements that this rank sends along each axis."""
    total: dict[str, float] = {}
    for call in calls:
        size = sizes.get(call.axis, 1)
        factor = {
            "all_reduce": 2 * (size - 1) / size,
            "all_reduce_max": 2 * (size - 1) / size,
            "reduce_scatter": (size - 1) / size,
            "all_gather": size - 1,
            "send": 1,
            "recv": 0,
        }[call.op]
        total[call.axis] = total.get(call.axis, 0.0) + call.elements * factor
    return total


def step(
    config: ModelConfig, layout: Layout, grid: Grid, recompute: Recompute | None = None
) -> tuple[TrainingModel, list[Call]]:
    """One training step of a fresh model, and all that it communicated."""
    grid = replace(grid, sequence_parallel=layout.sequence_parallel)
    model = TrainingModel(
        config, grid, layout, select("torch"), dtype=torch.float32, optimizer=AdamWSettings(), recompute=recompute
    )
    for chunk in model.chunks:
        initialise(chunk.stage, config=config, grid=chunk.grid, seed=3, sigma=0.1)
    with recording() as calls:
        model.train_step(batches_of(config, 0, layout, grid.dp.rank), learning_rate=1e-3, step=0)
    return model, calls


def _of_layer(layout: Layout, grid: Grid, kind: costs.Recompute, every: int = 1) -> float:
    """Elements that `every` further layers send to tensor-parallel peers for one micro-batch."""
    recompute, small = Recompute(kind, every=every), replace(CONFIG, num_layers=every)
    large = replace(CONFIG, num_layers=2 * every)
    counts = []
    for config in (small, large):
        calls = [call for call in step(config, layout, grid, recompute)[1] if not call.label.startswith("gradients")]
        counts.append(sent(calls, {"tp": layout.tp})["tp"])
    return (counts[1] - counts[0]) / layout.micro_batches(SAMPLES)


def tensor_parallel() -> list[dict[str, Any]]:
    """
    Every kind of layer: measured, and the cost model's elements.

    The model runs all of a group's forward again. Its last sum over tp isn't: nothing that is kept depends on it. That
    is an all-reduce of [T, H] a group, or under sequence parallelism a reduce-scatter, half of it.
    """
    size = torch.distributed.get_world_size()
    grid, results = Grid.build(tp=size, pp=1), []
    kinds: list[tuple[costs.Recompute, int]] = [("none", 1), ("selective", 1), ("full", 1), ("full", 2)]
    for is_sequence_parallel in (False, True):
        for kind, every in kinds:
            layout = Layout(tp=size, micro_batch_size=4, sequence_parallel=is_sequence_parallel)
            model = tensor_elements(CONFIG, micro_batch=4, seq_len=LENGTH, tp=size, recompute=kind) * every
            if kind == "full":
                one = all_reduce_elements(4 * LENGTH * CONFIG.hidden_size, size)
                model -= one / 2 if is_sequence_parallel else one
            results.append(
                {
                    "case": f"{kind}{every}{'-sp' if is_sequence_parallel else ''}",
                    "measured": _of_layer(layout, grid, kind, every),
                    "model": model,
                }
            )
    return results


def data_parallel() -> list[dict[str, float]]:
    """Sums of gradients and gathers of parameters, with and without distributed states: (measured, model, padding)."""
    size, results = torch.distributed.get_world_size(), []
    grid = Grid.build(tp=1, pp=1, dp=size)
    for is_distributed in (True, False):
        model, calls = step(CONFIG, Layout(dp=size, distributed_optimizer=is_distributed), grid)
        moved = [call for call in calls if call.label in ("gradients", "parameters")]
        true = sum(parameter.numel() for parameter in model.chunks[0].stage.parameters())
        padded = sum(len(bucket.data) for bucket in model.buckets.buckets)
        assert padded - true < len(model.buckets.buckets) * SHARE_MULTIPLE * size
        assert {call.dtype for call in moved} == {torch.float32}
        results.append({"measured": sent(moved, {"dp": size})["dp"], "model": data_elements(padded, dp=size)})
    return results


def pipeline() -> list[dict[str, float]]:
    """Boundary tensors that this rank sends, and the cost model's for as many messages."""
    results = []
    for layout in (
        Layout(pp=2, tp=2),
        Layout(pp=2, tp=2, micro_batch_size=2, sequence_parallel=True),
        Layout(pp=2, tp=2, virtual=2, schedule="interleaved"),
        Layout(pp=4, micro_batch_size=2),
    ):
        grid = Grid.build(tp=layout.tp, pp=layout.pp)
        _, calls = step(CONFIG, layout, grid)
        micro_batches, last = layout.micro_batches(SAMPLES), layout.pp * layout.virtual - 1
        stages = [chunk * layout.pp + grid.pp.rank for chunk in range(layout.virtual)]
        each = pipeline_elements(CONFIG, micro_batch=layout.micro_batch_size, seq_len=LENGTH, tp=layout.tp)
        measured = sent(calls, {})
        results.append(
            {
                "forward": measured.get("pp", 0.0),
                "forward model": micro_batches * each * sum(stage < last for stage in stages),
                "backward": measured.get("pp_back", 0.0),
                "backward model": micro_batches * each * sum(stage > 0 for stage in stages),
            }
        )
    return results


if __name__ == "__main__":
    rank_runner.run({2: [tensor_parallel, data_parallel], 4: [tensor_parallel, data_parallel, pipeline]})
