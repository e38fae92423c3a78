"""
Bytes that a forward pass really keeps, beside what the planner predicts. Started by test_memory.py, never collected.

Every rank writes {case: [measured, predicted]} to `<dir>/rank<N>.json`, for one micro-batch on its stage.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from trilithon_parallel import rendezvous
from trilithon_parallel.backend import select
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.costs import RECOMPUTE_KINDS, PlannedLayout
from trilithon_parallel.grid import Grid
from trilithon_parallel.init import initialise
from trilithon_parallel.layout import Layout
from trilithon_parallel.memory import Numerics, stage_memory
from trilithon_parallel.objective import Batch
from trilithon_parallel.optimizer import AdamWSettings
from trilithon_parallel.presets import gpt, llama
from trilithon_parallel.recompute import Recompute
from trilithon_parallel.step import DropoutRates, TrainingModel

SEQ_LEN, MICRO_BATCH = 64, 2
MODELS = {
    "gpt": gpt(layers=4, hidden=64, heads=4, vocab=256, seq_len=SEQ_LEN),
    "llama": llama(layers=4, hidden=64, heads=4, groups=2, ffn=192, vocab=256, context=SEQ_LEN, tied=True),
}
# Ranks of one start -> layouts (tp, pp, sequence parallelism).
LAYOUTS = {1: [(1, 1, False)], 2: [(2, 1, False), (2, 1, True), (1, 2, False)]}


def measure(config: ModelConfig, layout: PlannedLayout, numerics: Numerics, grid: Grid) -> tuple[int, float]:
    """(bytes of all tensors that autograd keeps for one micro-batch, parameters apart; the planner's prediction)."""
    rates = DropoutRates(0.1, 0.1) if numerics.dropout else None
    model = TrainingModel(
        config,
        grid,
        Layout(tp=layout.tp, pp=layout.pp, micro_batch_size=MICRO_BATCH, distributed_optimizer=False),
        select("torch"),
        dtype=torch.float32,
        optimizer=AdamWSettings(),
        recompute=Recompute(layout.recompute),
        dropout=rates,
    )
    (chunk,) = model.chunks
    initialise(chunk.stage, config=config, grid=chunk.grid, seed=0, sigma=0.02)
    model.weights_changed()
    tokens = torch.arange(MICRO_BATCH * SEQ_LEN) % config.vocab_size
    batch = Batch(
        tokens_T=tokens,
        targets_T=tokens.roll(-1),
        weights_T=torch.ones(len(tokens)),
        positions_T=torch.arange(SEQ_LEN).repeat(MICRO_BATCH),
        cu_seqlens=range(0, len(tokens) + 1, SEQ_LEN),
        sample_ids=range(MICRO_BATCH),
        lengths=[SEQ_LEN] * MICRO_BATCH,
    )
    chunk.batches, chunk.dropout = [batch], None if rates is None else (rates, 0, 0)
    received = None if chunk.grid.is_first_stage else torch.randn(chunk.boundary_shape(0), requires_grad=True)
    owned = {parameter.untyped_storage().data_ptr() for parameter in chunk.stage.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in owned:
            kept.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        chunk.forward(0, received)
    predicted = stage_memory(
        config,
        layout,
        numerics,
        seq_len=SEQ_LEN,
        microbatches=1,
        stage="first" if grid.is_first_stage else "last",
    )
    return sum(x.untyped_storage().nbytes() for x in kept.values()), predicted.activations + predicted.ends


def main(work_dir: Path) -> None:
    """Join, measure every case of this world size, write what came out."""
    torch.set_num_threads(1)
    world = rendezvous.join(timeout_s=100)
    results = {}
    for tp, pp, sequence_parallel in LAYOUTS[world.world_size]:
        grid = replace(Grid.build(tp=tp, pp=pp), sequence_parallel=sequence_parallel)
        for name, config in MODELS.items():
            for kind in RECOMPUTE_KINDS:
                layout = PlannedLayout(tp, pp, 1, MICRO_BATCH, recompute=kind, sequence_parallel=sequence_parallel)
                case = f"{name}-{tp}x{pp}{'sp' * sequence_parallel}-{kind}"
                results[case] = measure(config, layout, Numerics("float32"), grid)
                if kind != "none" and tp == pp == 1:
                    dropped = Numerics("float32", dropout=True, fused_attention=False)
                    results[f"{case}-dropout"] = measure(config, layout, dropped, grid)
    (work_dir / f"rank{world.rank}.json").write_text(json.dumps(results))
    rendezvous.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
