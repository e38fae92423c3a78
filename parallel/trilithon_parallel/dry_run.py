"""
A run's layout, of any number of ranks, checked in one process: the model is built on the meta device, which has shapes
and no memory, and its grid has sizes and no process groups.

Every distinct stage is built as a rank would build it and compared with the placement table and the memory model; the
schedule's table is simulated, and the messages that go with it are paired.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import nn

from trilithon_parallel.backend import select
from trilithon_parallel.config import ModelConfig, ModelError
from trilithon_parallel.costs import (
    PlannedLayout,
    Recompute,
    data_elements,
    num_parameters,
    pipeline_elements,
    tensor_elements,
)
from trilithon_parallel.grid import Axis, Grid, rank_of
from trilithon_parallel.layout import Layout
from trilithon_parallel.memory import (
    ELEMENT_BYTES,
    GRADIENT_BYTES,
    Memory,
    Numerics,
    bytes_per_parameter,
    peak_memory,
    stage_parameters,
)
from trilithon_parallel.models import build_seq2seq, build_stage
from trilithon_parallel.placement import global_shapes, local_slice, source_name, stage_layers, stage_names
from trilithon_parallel.schedule import ScheduleError, Send, schedule, with_messages
from trilithon_parallel.simulate import check_messages, simulate

if TYPE_CHECKING:
    from trilithon_parallel.pretrain.config import PretrainConfig
    from trilithon_parallel.pretrain.setup import Setup

GB = 1e9


@dataclass(frozen=True)
class RankReport:
    """
    What every rank of one pipeline place holds and does in a step, the ranks of its tp and dp axes being alike.

    `state_bytes`: parameters, gradients, masters and moments. `sent_bytes`: by axis, of the messages between stages
    both ways, of the layers' collectives, and of gradients and parameters; None for encoder-decoders, whose two streams
    are as long as the data makes them.
    """

    layers: int
    parameters: int
    state_bytes: float
    ops: int
    messages: int
    sent_bytes: dict[str, float] | None


@dataclass(frozen=True)
class DryRun:
    """What a layout comes to. `memory`: of the fullest rank; None where layers are counted out or of two kinds."""

    config: ModelConfig
    layout: Layout
    micro_batches: int
    bubble: float
    ranks: tuple[RankReport, ...]
    memory: Memory | None

    def text(self) -> str:
        """The report, a line for each run of pipeline ranks that are alike."""
        layout = self.layout
        lines = [
            f"{layout.world_size} ranks: tp {layout.tp} x pp {layout.pp} x dp {layout.dp}, {layout.schedule}"
            f"{f' with {layout.virtual} chunks a rank' if layout.virtual > 1 else ''}; "
            f"{self.micro_batches} micro-batches a step and pipeline, bubble {100 * self.bubble:.1f} %.",
            f"{num_parameters(self.config) / 1e6:.1f}M parameters"
            + ("." if self.memory is None else f"; the fullest rank needs {self.memory.total / GB:.2f} GB."),
            f"{'pipeline rank':14} {'layers':>6} {'parameters':>14} {'states GB':>9} {'ops':>6} {'messages':>8} "
            f"{'sent GB: pp':>11} {'tp':>9} {'dp':>9}",
        ]
        first = 0
        for report, run in groupby(self.ranks):
            last = first + len(list(run)) - 1
            name = str(first) if last == first else f"{first} to {last}"
            sent = ["-"] * 3 if report.sent_bytes is None else [f"{x / GB:.2f}" for x in report.sent_bytes.values()]
            lines.append(
                f"{name:14} {report.layers:6} {report.parameters:14} {report.state_bytes / GB:9.2f} {report.ops:6} "
                f"{report.messages:8} {sent[0]:>11} {sent[1]:>9} {sent[2]:>9}"
            )
            first = last + 1
        return "\n".join(lines)


def dry_run(
    config: ModelConfig,
    layout: Layout,
    *,
    numerics: Numerics,
    recompute: Recompute,
    seq_len: int,
    global_batch_size: int,
) -> DryRun:
    """
    Build and check a layout without any of its ranks. A trillion parameters over 3072 ranks take seconds.

    Raises:
        ModelError: `layout_invalid`, model, batch and layout don't fit, or the schedule cannot run; `dry_run_failed`, a
            stage is not what the placement table or the memory model says.
    """
    layout.check(config, tokens_per_micro_batch=seq_len * layout.micro_batch_size)
    micro_batches = layout.micro_batches(global_batch_size)
    planned = PlannedLayout(
        layout.tp, layout.pp, layout.dp, layout.micro_batch_size, layout.virtual, recompute, layout.sequence_parallel,
        layout.distributed_optimizer, layout.schedule,
    )  # fmt: skip
    try:
        table = schedule(layout.schedule, layout.pp, layout.virtual, micro_batches)
        timeline = simulate(table)
        steps = with_messages(table)
        check_messages(steps)
    except ScheduleError as error:
        raise ModelError(error.message, code="layout_invalid", hint=error.hint) from None
    stages = layout.pp * layout.virtual
    layers = [len(held) for held in stage_layers(config.num_layers, stages, layout.layer_counts)]
    parameters = _count_parameters(config, layout)
    element = ELEMENT_BYTES[numerics.dtype]
    per_message = element * pipeline_elements(
        config, micro_batch=layout.micro_batch_size, seq_len=seq_len, tp=layout.tp
    )
    per_layer = element * tensor_elements(
        config, micro_batch=layout.micro_batch_size, seq_len=seq_len, tp=layout.tp, recompute=recompute
    )
    # An all-reduce of gradients; or half of one, and the other half with the parameters.
    per_parameter = (GRADIENT_BYTES + element) / 2 if layout.distributed_optimizer else GRADIENT_BYTES
    ranks = []
    for rank in range(layout.pp):
        num_layers, held = sum(layers[rank :: layout.pp]), sum(parameters[rank :: layout.pp])
        messages = sum(isinstance(step, Send) for step in steps[rank])
        sent = {
            "pp": messages * per_message,
            "tp": num_layers * micro_batches * per_layer,
            "dp": data_elements(held, dp=layout.dp) * per_parameter,
        }
        ranks.append(
            RankReport(
                layers=num_layers,
                parameters=held,
                state_bytes=held * bytes_per_parameter(planned, numerics),
                ops=len(table.ranks[rank]),
                messages=messages,
                sent_bytes=None if config.is_seq2seq else sent,
            )
        )
    memory = None
    if not config.is_seq2seq and layout.layer_counts is None:
        memory = peak_memory(config, planned, numerics, seq_len=seq_len, microbatches=micro_batches)
    return DryRun(config, layout, micro_batches, float(timeline.bubble), tuple(ranks), memory)


def of_run(settings: PretrainConfig, setup: Setup) -> DryRun:
    """The dry run of a configuration file, at the batch size that it ends with. Raises as `dry_run`."""
    training = settings.training
    # In fp16 everything is as wide as in bf16.
    numerics = Numerics(
        "float32" if training.dtype == "float32" else "bfloat16",
        dropout=training.dropout > 0 or training.attention_dropout > 0,
        fused_attention=training.attention_dropout == 0,
    )
    return dry_run(
        setup.config,
        setup.layout,
        numerics=numerics,
        recompute=settings.layout.recompute,
        seq_len=settings.data.seq_len,
        global_batch_size=training.global_batch_size,
    )


def _count_parameters(config: ModelConfig, layout: Layout) -> list[int]:
    """Parameters of one tp rank of each stage; every distinct stage is built, stages that are alike once."""
    num_stages = layout.pp * layout.virtual
    layers = stage_layers(config.num_layers, num_stages, layout.layer_counts)
    shapes = global_shapes(config)
    counts: dict[tuple[object, ...], int] = {}
    found = []
    for stage in range(num_stages):
        # Stages of two stacks are told apart by where they stand.
        kind = (stage,) if config.is_seq2seq else (len(layers[stage]), stage == 0, stage == num_stages - 1)
        if kind not in counts:
            grid = _grid(layout, stage)
            build = build_seq2seq if config.is_seq2seq else build_stage
            model = build(config, grid=grid, backend=select("torch"), dtype=torch.float32)
            counts[kind] = _check_stage(model, config, grid, shapes)
        found.append(counts[kind])
    return found


def _grid(layout: Layout, stage: int) -> Grid:
    """The grid of tp and dp rank 0 as a stage's model chunk sees it: sizes and places, no groups."""
    tp, dp, num_stages = layout.tp, layout.dp, layout.pp * layout.virtual
    rank = rank_of(0, 0, stage % layout.pp, tp=tp, dp=dp)
    places = tuple(rank_of(0, 0, k % layout.pp, tp=tp, dp=dp) for k in range(num_stages))
    first = rank - rank % tp
    return Grid(
        tp=Axis("tp", 0, tp, tuple(range(first, first + tp))),
        pp=Axis("pp", stage, num_stages, places),
        dp=Axis("dp", 0, dp, tuple(range(rank, rank + tp * dp, tp))),
        world=Axis("world", rank, layout.world_size, tuple(range(layout.world_size))),
        device=torch.device("meta"),
        layer_counts=layout.layer_counts,
        sequence_parallel=layout.sequence_parallel,
    )


def _check_stage(model: nn.Module, config: ModelConfig, grid: Grid, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The number of a stage's parameters, whose names and shapes are those of the placement table; or ModelError."""
    pp = grid.pp
    expected = {}
    for name in stage_names(config, pp=pp.size, pp_rank=pp.rank, counts=grid.layer_counts):
        owner = source_name(name, config)
        place = local_slice(owner, shapes[owner], config=config, tp=grid.tp.size, tp_rank=grid.tp.rank)
        expected[name] = place.shape
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wrong = sorted(name for name in {*expected, *built} if expected.get(name) != built.get(name))
    if wrong:
        shown = ", ".join(f"{name} {built.get(name)} and not {expected.get(name)}" for name in wrong[:5])
        raise ModelError(f"stage {pp.rank} of {pp.size} is not as placed: {shown}.", code="dry_run_failed")
    count = sum(map(math.prod, built.values()))
    if not config.is_seq2seq:
        predicted = stage_parameters(
            config,
            tp=grid.tp.size,
            num_layers=len(grid.layers(config.num_layers)),
            is_first=grid.is_first_stage,
            is_last=grid.is_last_stage,
        )
        if predicted != count:
            raise ModelError(
                f"stage {pp.rank} of {pp.size} must have the {predicted} parameters of the memory model. "
                f"Given: {count}.",
                code="dry_run_failed",
            )
    return count
