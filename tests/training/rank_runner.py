"""What every script of cases has in common: join, run the cases of this world size, write what each returned."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trilithon_parallel import rendezvous


def run(cases: Mapping[int, Sequence[Callable[[], Any]]]) -> None:
    """
    Run the functions for this number of ranks, one after another, on all ranks alike.

    A rank on which one fails ends there, so that its peers, who wait for it, fail too and at once.

    Writes {name: {"value": ...} or {"error": traceback}} to `rank<N>.json` in the directory of the first argument.
    """
    torch.set_num_threads(1)
    work_dir = Path(sys.argv[1])
    world = rendezvous.join(timeout_s=60)
    results: dict[str, dict[str, Any]] = {}
    for case in cases[world.world_size]:
        try:
            results[case.__name__] = {"value": case()}
        except Exception:
            results[case.__name__] = {"error": traceback.format_exc()}
        (work_dir / f"rank{world.rank}.json").write_text(json.dumps(results))
        if "error" in results[case.__name__]:
            os._exit(1)
    rendezvous.leave()
