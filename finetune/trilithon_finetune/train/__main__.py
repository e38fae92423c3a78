"""`python -m trilithon_finetune.train JOB_DIR --attempt N [--probe]`, a process for each rank, by torchrun."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from trilithon_finetune.train.rank import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m trilithon_finetune.train")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--probe", action="store_true")
    args = parser.parse_args()
    sys.exit(main(args.directory, args.attempt, probe=args.probe))
