"""
A run of a few steps that keeps checkpoints of its adapter and may be killed at any of them; a script of one process.

    long_run.py MODELS RUN_DIR LOSSES [DIES_AT]

Begins, or goes on from the newest checkpoint. Appends "step loss" to LOSSES; kills itself where it is told to.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from lora_runs import RUN_STEPS, begin_run, run_on


def main(models: Path, run_dir: Path, losses: Path, dies_at: int) -> None:
    """Run to the end, or to the step before which it dies."""
    torch.set_num_threads(1)
    model, saver, first = begin_run(models, run_dir)
    with losses.open("a") as file:
        for step, loss in run_on(model, saver, first, RUN_STEPS):
            print(step, loss.hex(), file=file, flush=True)
            if step == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
