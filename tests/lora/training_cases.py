"""
What several ranks check together about the training of adapters. Started by test_training.py, one process per rank.

Every case trains an adapter for three steps at its layout and compares losses, gradient norms, moments and the adapter
with one process that computes the same global batches. A rank writes {case: "ok" or the error} to `<dir>/rank<N>.json`.
"""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import torch
from lora_runs import CASES, STEPS, Case, make_model, steps

from trilithon_parallel import rendezvous
from trilithon_parallel.grid import Grid
from trilithon_parallel.layout import Layout
from trilithon_parallel.recompute import Recompute
from trilithon_parallel.step import StepResult, TrainingModel

# Relative to the largest value, after three steps of Adam, whose first ones divide by tiny roots.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}


def train(case: Case, layout: Layout, grid: Grid, models: Path) -> tuple[TrainingModel, list[StepResult]]:
    """Three steps."""
    model = make_model(
        models / case.model, layout, grid, lora=case.lora, dtype=case.dtype, recompute=case.recompute
    )  # fmt: skip
    return model, steps(model, 0, STEPS)


def check(case: Case, models: Path) -> None:
    """The layout's run against one process'."""
    layout = Layout(**case.sizes)
    grid = Grid.build(tp=layout.tp, pp=layout.pp, dp=layout.dp)
    model, results = train(case, layout, grid, models)
    reference, expected = train(replace(case, recompute=Recompute()), Layout(), Grid.single(), models)
    tolerance = TOLERANCE[case.dtype]
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.num_tokens == theirs.num_tokens
        assert not ours.is_skipped
        assert abs(ours.loss - theirs.loss) <= tolerance * abs(theirs.loss), (ours, theirs)
        assert abs(ours.grad_norm - theirs.grad_norm) <= 10 * tolerance * theirs.grad_norm, (ours, theirs)
    whole = {piece.name: piece.tensor for piece in reference.optimizer.targets()}
    for piece in model.optimizer.targets():
        theirs_part = whole[piece.name][piece.slices]
        scale = theirs_part.abs().max().item() if ".exp_avg" in piece.name else 1.0
        worst = (piece.tensor - theirs_part).abs().max().item()
        assert worst <= tolerance * scale * (10 if ".exp_avg" in piece.name else 1), (piece.name, piece.slices, worst)


def main(work_dir: Path, models: Path) -> None:
    """Join, run every case of this world size, write what happened."""
    torch.set_num_threads(1)
    world = rendezvous.join(timeout_s=100)
    results = {}
    for case in CASES[world.world_size]:
        try:
            check(case, models)
            results[case.name] = "ok"
        except Exception:
            results[case.name] = traceback.format_exc()
        (work_dir / f"rank{world.rank}.json").write_text(json.dumps(results))
    rendezvous.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
