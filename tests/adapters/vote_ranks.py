"""Two ranks load adapters from directories that only one of them may have; each reports what it was left with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from trilithon_parallel import rendezvous
from trilithon_parallel.backend.torch_ops import TorchBackend
from trilithon_parallel.config import load_config
from trilithon_parallel.grid import Grid
from trilithon_parallel.lora.bank import AdapterBank
from trilithon_parallel.models import CausalStage
from trilithon_parallel.weights.loader import load_stage
from trilithon_server.engine.adapter_reads import AdapterReads
from trilithon_server.engine.adapters import Action, Command


def main(model_dir: Path, directory: str) -> dict[str, object]:
    """READ and PUT of a directory into slot 0."""
    grid = Grid.build(tp=2, pp=1, device="cpu")
    config = load_config(model_dir)
    stage = CausalStage(config, grid=grid, backend=TorchBackend(), dtype=torch.float32)
    load_stage(stage, model_dir, config=config, grid=grid)
    stage.prepare()
    bank = AdapterBank(stage, config=config, grid=grid, max_adapters=1, max_rank=8)
    reads = AdapterReads(bank, grid)
    reads.run([Command(Action.READ, 0, directory=directory)])
    (report,) = [r for r in reads.run([Command(Action.PUT, 0)]) if r.action == Action.PUT]
    try:
        with bank.batch([0], [0, 1]):
            is_held = True
    except AssertionError:
        is_held = False
    return {"code": report.code, "message": report.message, "held": is_held}


if __name__ == "__main__":
    work_dir, base, *given = sys.argv[1:]
    me = rendezvous.join(device="cpu", timeout_s=60.0).rank
    found = main(Path(base), given[me])
    (Path(work_dir) / f"rank{me}.json").write_text(json.dumps(found))
    rendezvous.leave()
