"""
Checkpoints of adapters between layouts, checked by the ranks together. Started by test_checkpoints.py.

At each layout the ranks save what two steps made, load what every layout saved, and take a third step. A rank writes
{case: "ok" or the error} to `<dir>/rank<N>.json`.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import torch
from lora_runs import CHECKPOINTED, make_model, resume, save, steps

from trilithon_parallel import rendezvous
from trilithon_parallel.grid import Grid
from trilithon_parallel.layout import Layout


def main(work_dir: Path, models: Path) -> None:
    """Save at every layout, then load at every layout what every one saved."""
    torch.set_num_threads(1)
    world = rendezvous.join(timeout_s=100)
    results = {}
    for name, lora in CHECKPOINTED.items():
        try:
            check(name, lora, models, work_dir)
            results[name] = "ok"
        except Exception:
            results[name] = traceback.format_exc()
        (work_dir / f"rank{world.rank}.json").write_text(json.dumps(results))
    rendezvous.leave()


def check(name: str, lora: dict[str, object], models: Path, work_dir: Path) -> None:
    """One model at every layout of two ranks; `<dir>/<model>-single` holds what one process saved."""
    layouts = [Layout(tp=2), Layout(pp=2), Layout(dp=2)]
    saved = [work_dir / f"{name}-single"]
    for index, layout in enumerate(layouts):
        grid = Grid.build(tp=layout.tp, pp=layout.pp, dp=layout.dp)
        model = make_model(models / name, layout, grid, lora=lora)
        steps(model, 0, 2)
        saved.append(work_dir / f"{name}-{index}")
        save(model, saved[-1], step=2)
    for layout in layouts:
        grid = Grid.build(tp=layout.tp, pp=layout.pp, dp=layout.dp)
        losses = []
        for run_dir in saved:
            model = make_model(models / name, layout, grid, lora=lora)
            resume(model, run_dir)
            # What was read, written again at this layout, has the same bytes.
            again = run_dir.with_name(f"{run_dir.name}-{layout.tp}{layout.pp}{layout.dp}")
            save(model, again, step=2)
            losses.append(steps(model, 2, 3)[0].loss)
        assert max(losses) - min(losses) <= 1e-5 * losses[0], losses


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
