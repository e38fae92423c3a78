"""
Ranks that meet in collectives for ever: `looping.py MODE DIRECTORY`, started as ranks of one world.

`sum`: all-reduce without end, under a watchdog of 2 s. `busy`: the same, and rank 1 stops meeting the others at step 5.
`seed`: compare facts; rank 2 has another seed. `signal`: until a signal came to any rank, agreed by all.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from trilithon_parallel import rendezvous
from trilithon_parallel.collectives import all_reduce
from trilithon_parallel.grid import Grid
from trilithon_parallel.health import HealthError, Signals, agree
from trilithon_parallel.launch.ending import end_process
from trilithon_parallel.watchdog import Watchdog

MODE, DIRECTORY = sys.argv[1], Path(sys.argv[2])
TIMEOUT_S = 2.0


def meet(grid: Grid) -> None:
    """Step after step; the marks `step3-rank<N>` tell a test that the ranks are under way."""
    with Watchdog(
        rank=grid.rank, world_size=grid.world_size, run_dir=DIRECTORY, timeout_s=TIMEOUT_S, first_timeout_s=60.0
    ) as watch:
        for step in range(1_000_000):
            watch.step(step)
            all_reduce(torch.ones(4), grid.world, label="sum")
            if step == 3:
                (DIRECTORY / f"step3-rank{grid.rank}").write_text(str(os.getpid()))
            while MODE == "busy" and step == 5 and grid.rank == 1:
                watch.enter("evaluation", timeout_s=TIMEOUT_S)
                time.sleep(60)


def stop_together(grid: Grid, signals: Signals) -> int:
    """The step at which all ranks stop."""
    (DIRECTORY / f"step3-rank{grid.rank}").write_text(str(os.getpid()))
    for step in range(1_000_000):
        if signals.agreed(grid):
            return step
    return -1


world = rendezvous.join(timeout_s=60)
grid = Grid.build(tp=1, pp=1, dp=world.world_size)
if MODE == "seed":
    try:
        agree(grid, {"config": "same", "seed": "2" if grid.rank == 2 else "1"})
    except HealthError as error:
        print(f"{error.code} {error.fields} {error.ranks} {error}")
        end_process(3)
elif MODE == "signal":
    with Signals() as signals:
        step = stop_together(grid, signals)
    (DIRECTORY / f"stopped-rank{grid.rank}").write_text(str(step))
    rendezvous.leave()
    end_process(signals.exit_code)
else:
    meet(grid)
