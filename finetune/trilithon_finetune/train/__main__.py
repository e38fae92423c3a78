"""`python -m trilithon_finetune.train JOB_DIR --attempt N [--probe]`, a process for each rank, by torchrun."""

from __future__ import annotations

import argparse
from pathlib import Path

from trilithon_finetune.train.rank import main
from trilithon_parallel.launch.ending import end_process

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m trilithon_finetune.train")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--probe", action="store_true")
    args = parser.parse_args()
    end_process(main(args.directory, args.attempt, probe=args.probe))
