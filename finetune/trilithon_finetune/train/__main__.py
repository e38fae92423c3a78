"""`python -m trilithon_finetune.train JOB_DIR --attempt N`, a process for each rank, with torchrun's variables set."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from trilithon_finetune.train.rank import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m trilithon_finetune.train")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--attempt", type=int, required=True)
    args = parser.parse_args()
    sys.exit(main(args.directory, args.attempt))
