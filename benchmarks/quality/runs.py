"""
A finetuning job run here and now, phase after phase, as a worker runs it: for benchmarks that report what it reached.

Training starts with all cores in one process; `seconds` is the time of the training process alone, without the start of
the interpreter that every process has.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import secrets
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trilithon_finetune.paths import StorePaths
from trilithon_finetune.phases.phase import run_phase
from trilithon_finetune.phases.verify import loaded_stage, outputs_of_stage
from trilithon_finetune.recipes.base import Output, Sample
from trilithon_finetune.setup import read_job
from trilithon_finetune.train.work import open_work
from trilithon_parallel.config import load_config

HERE = Path(__file__).parent

_BEGAN = time.monotonic()


@dataclass(frozen=True)
class Result:
    """
    What a job came to.

    Attributes:
        export: the directory that a server loads.
        metrics: of the best evaluation, by which the export was chosen; `last`: of the last one.
        seconds: of training and its evaluations. step_seconds: of the steps alone.
        tokens: that were trained on.
        estimate: as it was told before; `peak_bytes`: what the training process held at most.
    """

    export: Path
    metrics: Mapping[str, float]
    last: Mapping[str, float]
    seconds: float
    step_seconds: float
    tokens: int
    peak_bytes: int
    estimate: Mapping[str, Any]
    verified: Mapping[str, Any]


def data_dir() -> Path:
    """The folder of real data: `$TRILITHON_DATA`, by default `../shared/data` beside the repository."""
    folder = Path(os.environ.get("TRILITHON_DATA", HERE.parents[2] / "shared" / "data"))
    if not folder.is_dir():
        sys.exit(f"the data folder {folder} is not there. Set TRILITHON_DATA.")
    return folder


def model_dir(name: str) -> Path:
    """A model of the store; fetch it with `trilithon pull` first."""
    from trilithon._store import resolve

    return resolve(name)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def run_job(
    folder: Path, model: Path, train: Path, valid: Path | None, config: Mapping[str, Any], *, ranks: int = 1
) -> Result:
    """
    Validate, prepare, train, export and verify.

    Args:
        folder: becomes a store; jobs in one folder share prepared data.
        config: fields of `JobConfig` but for the files.
    Raises:
        SystemExit: a phase failed; its message is shown.
    """
    assert ranks == 1, "more ranks are started by `trilithon finetune run`"
    store = StorePaths(folder)
    job_id = "ftjob-" + secrets.token_hex(10)
    root = store.job(job_id).root
    root.mkdir(parents=True)
    spec: dict[str, Any] = {
        "job_id": job_id,
        "tenant": "benchmark",
        "name": f"ft:{model.name}::{job_id}",
        "config": {"model": model.name, "training_file": train.name, **config},
        "model_dir": str(model),
        "training_path": str(train),
        "validation_path": None if valid is None else str(valid),
        "training_name": train.name,
        "validation_name": "" if valid is None else valid.name,
        "store": str(folder),
    }
    _write(root, spec)
    checked = _phase("validate", root)
    digests = {name: checked[name] for name in ("base_digest", "data_digest", "template_digest")}
    _write(root, {**spec, "config": checked["resolved"], **digests})
    _phase("prepare", root)
    began = time.monotonic()
    command = [sys.executable, "-m", "trilithon_finetune.train", str(root), "--attempt", "1"]
    if subprocess.run(command).returncode:
        sys.exit(f"training of {job_id} failed")
    seconds = time.monotonic() - began
    _phase("export", root)
    verified = _phase("verify", root)
    events = [json.loads(line) for line in (root / "attempts" / "1" / "events.jsonl").read_text("utf-8").splitlines()]
    steps = [event["data"] for event in events if event["kind"] == "step"]
    evaluations = [event["data"] for event in events if event["kind"] == "eval"]
    best = next((item for item in evaluations if item["step"] == verified["step"]), {})
    return Result(
        root / "export",
        best,
        evaluations[-1] if evaluations else {},
        seconds,
        sum(step["step_seconds"] for step in steps),
        steps[-1]["trained_tokens"],
        max(step["memory_bytes"] for step in steps),
        checked["estimate"],
        verified,
    )


def judge(result: Result, rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The recipe's numbers of an exported model, not an adapter, on rows that the job did not see."""
    work = open_work(read_job(result.export.parent))
    stage = loaded_stage(load_config(result.export), result.export, dtype=getattr(torch, work.config.dtype))
    stage.prepare()
    by_line, samples = dict(enumerate(rows, start=1)), []
    for line, row in by_line.items():
        encoded = work.recipe.encode(row, line, work.context, file="rows")
        samples += [item for item in encoded if isinstance(item, Sample)]
    said = outputs_of_stage(stage, [(sample, np.empty(0, np.float32)) for sample in samples])
    outputs = [Output(sample, values) for sample, values in zip(samples, said, strict=True)]
    answered = {sample.row for sample in samples}
    assert answered == set(by_line), f"{len(by_line) - len(answered)} rows could not be read"
    return dict(work.recipe.metrics(outputs, by_line, work.context))


def _write(root: Path, spec: Mapping[str, Any]) -> None:
    (root / "job.json").write_text(json.dumps(spec), encoding="utf-8")


def _phase(name: str, root: Path) -> dict[str, Any]:
    run_phase(name, root, 1)
    outcome = json.loads((root / "attempts" / "1" / f"{name}.json").read_text("utf-8"))
    if not outcome["ok"]:
        sys.exit(f"{name}: {outcome['error']['message']} {outcome['error']['hint']}")
    data: dict[str, Any] = outcome["data"]
    return data


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """A command line as results tell it: without folders, which change no number."""
    return {name: value for name, value in vars(args).items() if not isinstance(value, Path)}


def record(name: str, numbers: Mapping[str, Any]) -> None:
    """Write numbers with the versions that made them, and how long that took, to `results/NAME.json`; print them."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    seconds = round(time.monotonic() - _BEGAN)
    document = {**numbers, "wall_seconds": seconds, "versions": versions, "machine": platform.machine()}
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))
