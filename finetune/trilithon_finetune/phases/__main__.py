"""`python -m trilithon_finetune.phases PHASE JOB_DIR --attempt N`: one phase of a job in a process of its own."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from trilithon_finetune.phases.phase import PHASES, run_phase


def main() -> int:
    """Run a phase; 0 where it ended well."""
    parser = argparse.ArgumentParser(prog="python -m trilithon_finetune.phases")
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--attempt", type=int, required=True)
    args = parser.parse_args()
    return run_phase(args.phase, args.directory, args.attempt)


if __name__ == "__main__":
    sys.exit(main())
