"""
`python -m trilithon_finetune.merging BASE ADAPTER OUT`: a base with an adapter merged into it, whole or not, which
serves the adapter's task.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from trilithon_parallel.config import ModelError
from trilithon_parallel.lora.merge import merge_adapter
from trilithon_server.tasks import TASK_FILE


def main(arguments: list[str] | None = None) -> int:
    """Merge; 0 where the directory is written, else 1, and the cause is printed."""
    parser = argparse.ArgumentParser(prog="python -m trilithon_finetune.merging")
    parser.add_argument("base", type=Path, metavar="BASE", help="a model directory")
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="an adapter directory in PEFT's layout")
    parser.add_argument("out", type=Path, metavar="OUT", help="the model directory to write")
    options = parser.parse_args(arguments)
    try:
        merge_adapter(options.base, options.adapter, options.out)
        if (task := options.adapter / TASK_FILE).is_file():
            shutil.copyfile(task, options.out / TASK_FILE)
    except ModelError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
