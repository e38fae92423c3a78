"""Layouts of any size in one process: what is built, counted, refused and shown."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from te_runs import GPT2, LLAMA
from tiny import tiny_t5
from training_runs import SEQ_LEN, make_run

from trilithon_parallel import dry_run as dry
from trilithon_parallel.backend import select
from trilithon_parallel.config import ModelConfig, ModelError, load_config
from trilithon_parallel.costs import PlannedLayout, num_parameters
from trilithon_parallel.layout import Layout
from trilithon_parallel.memory import Numerics
from trilithon_parallel.models import build_stage
from trilithon_parallel.placement import global_shapes, local_slice, source_name, stage_names
from trilithon_parallel.presets import TABLE_1
from trilithon_parallel.pretrain.config import load_pretrain_config
from trilithon_parallel.pretrain.setup import prepare

LIMIT_BYTES = 1e9


def of(planned: PlannedLayout) -> Layout:
    """A recipe's layout as a trainer has it."""
    return Layout(
        tp=planned.tp,
        pp=planned.pp,
        dp=planned.dp,
        virtual=planned.virtual,
        micro_batch_size=planned.micro_batch,
        schedule=planned.schedule,
        sequence_parallel=planned.sequence_parallel,
        distributed_optimizer=planned.distributed_optimizer,
    )


def run(config: ModelConfig = LLAMA, global_batch_size: int = 8, **sizes: Any) -> dry.DryRun:
    """A dry run of a small model, in fp32."""
    return dry.dry_run(
        config,
        Layout(**sizes),
        numerics=Numerics("float32"),
        recompute="none",
        seq_len=32,
        global_batch_size=global_batch_size,
    )


@pytest.mark.parametrize("recipe", TABLE_1, ids=lambda recipe: recipe.name)
def test_every_row_of_table_1_passes(recipe: Any) -> None:
    """From 1.7 billion parameters on 32 ranks to a trillion on 3072: shapes, counts and schedule are in order."""
    report = dry.dry_run(
        recipe.config,
        of(recipe.layout),
        numerics=recipe.numerics,
        recompute=recipe.layout.recompute,
        seq_len=recipe.seq_len,
        global_batch_size=recipe.global_batch,
    )

    held = recipe.layout.tp * sum(rank.parameters for rank in report.ranks)  # with padding and copies
    assert report.layout.world_size == recipe.gpus
    assert num_parameters(recipe.config) <= held <= 1.03 * num_parameters(recipe.config)
    assert sum(rank.layers for rank in report.ranks) == recipe.config.num_layers
    assert report.bubble == pytest.approx((recipe.layout.pp - 1) / report.micro_batches / recipe.layout.virtual)


def test_a_trillion_parameters_take_less_than_a_gigabyte() -> None:
    """The last row of Table 1 in a process of its own."""
    code = """
from pathlib import Path
from trilithon_parallel.dry_run import dry_run
from trilithon_parallel.layout import Layout
from trilithon_parallel.presets import TABLE_1
row, layout = TABLE_1[-1], Layout(tp=8, pp=64, dp=6)
dry_run(row.config, layout, numerics=row.numerics, recompute="full", seq_len=2048, global_batch_size=3072)
status = Path("/proc/self/status").read_text()  # getrusage's peak is that of the process which forked this one
print(next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)

    assert int(done.stdout) < LIMIT_BYTES


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"tp": 4, "sequence_parallel": True},
        {"pp": 2, "tp": 2, "dp": 2},
        {"pp": 2, "virtual": 2, "schedule": "interleaved"},
        {"pp": 2, "layer_counts": (3, 1)},
    ],
    ids=lambda sizes: "-".join(map(str, sizes)) or "one",
)
@pytest.mark.parametrize("base", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_parameters_are_those_that_placement_gives(base: ModelConfig, sizes: dict[str, Any]) -> None:
    """Rank by rank the sum over its chunks' names, at uneven stages and with replicated groups too."""
    config, layout = replace(base, num_layers=4), Layout(**sizes)
    stages, shapes, expected = layout.pp * layout.virtual, global_shapes(config), [0] * layout.pp
    for stage in range(stages):
        for name in stage_names(config, pp=stages, pp_rank=stage, counts=layout.layer_counts):
            owner = source_name(name, config)
            place = local_slice(owner, shapes[owner], config=config, tp=layout.tp, tp_rank=layout.tp - 1)
            expected[stage % layout.pp] += math.prod(place.shape)

    report = run(config, **sizes)

    assert [rank.parameters for rank in report.ranks] == expected
    assert [rank.state_bytes for rank in report.ranks] == [count * (8 + 8 / layout.dp) for count in expected]


def test_messages_and_bytes_of_a_step() -> None:
    """Two stages, four micro-batches of 32 tokens: each sends four halves of 32 x 64 in fp32; and so on by hand."""
    report = run(tp=2, pp=2, dp=2)
    first = report.ranks[0]

    assert (report.micro_batches, first.ops, first.messages) == (4, 8, 4)
    assert first.sent_bytes == {
        "pp": 4 * 32 * 64 / 2 * 4,
        "tp": 1 * 4 * (8 * 32 * 64 * 1 / 2) * 4,
        "dp": first.parameters * 4.0,
    }


def test_the_text_joins_ranks_that_are_alike() -> None:
    """One line for the middle of the pipeline."""
    text = run(replace(LLAMA, num_layers=4), pp=4).text()

    assert "4 ranks: tp 1 x pp 4 x dp 1, 1f1b; 8 micro-batches a step and pipeline, bubble 37.5 %." in text
    assert [line.split("  ")[0] for line in text.splitlines()[3:]] == ["0", "1 to 2", "3"]


def test_encoder_decoders_are_built_too(tmp_path: Path) -> None:
    """Every stage of both stacks; bytes and memory are left out, for their lengths are the data's."""
    config = load_config(tiny_t5(tmp_path / "model"))
    report = run(config, pp=config.num_layers)

    assert sum(rank.layers for rank in report.ranks) == config.num_layers
    assert {rank.sent_bytes for rank in report.ranks} == {None}
    assert report.memory is None
    assert "-" in report.text().splitlines()[-1]


def test_a_stage_that_is_not_as_placed_is_named() -> None:
    """A wider model than the table's: the first tensors that differ, as built and as placed."""
    grid = dry._grid(Layout(), 0)
    model = build_stage(replace(LLAMA, ffn_size=112), grid=grid, backend=select("torch"), dtype=torch.float32)

    with pytest.raises(ModelError, match=r"down_proj\.weight \(64, 112\) and not \(64, 96\)") as caught:
        dry._check_stage(model, LLAMA, grid, global_shapes(LLAMA))
    assert caught.value.code == "dry_run_failed"


def test_R11_a_layout_that_does_not_fit_is_refused() -> None:
    """As before a real run: batch, heads; and a schedule that cannot be."""
    with pytest.raises(ModelError, match="global_batch_size must be a multiple of"):
        run(dp=3)
    with pytest.raises(ModelError, match="layout tp must be from 1 to"):
        run(tp=8)
    with pytest.raises(ModelError, match=r"layout virtual must be at least 2 with the interleaved schedule\. Given: 1"):
        run(pp=2, schedule="interleaved")


def test_a_configuration_file_has_a_dry_run(tmp_path: Path) -> None:
    """Sizes are the file's, whatever the number of ranks here."""
    settings = load_pretrain_config(make_run(tmp_path, layout={"tp": 2, "pp": 4}).config)
    report = dry.of_run(settings, prepare(settings))

    assert (len(report.ranks), report.micro_batches) == (4, 4)
    assert report.ranks[0].sent_bytes is not None
    assert report.ranks[0].sent_bytes["pp"] == 4 * 2 * SEQ_LEN * 48 / 2 * 4
