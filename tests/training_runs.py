"""Small pretraining runs for tests: a model, its tokens, a configuration file, and a process that trains."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from ports import free_port
from tiny import tiny_llama

from trilithon_parallel.data.index_writer import IndexWriter
from trilithon_parallel.report import StepMetrics, read_metrics

SEQ_LEN, BATCH, STEPS = 32, 8, 12
# Of runs that are disturbed from outside: too many for the fastest machine to end first, few enough to be done again.
LONG = 80
LIMIT_S = 120.0


def write_tokens(prefix: Path, *, vocab: int, documents: int = 30, seed: int = 0) -> None:
    """Documents that can be learned: each counts upwards from a random token."""
    random = np.random.RandomState(seed)
    with IndexWriter(prefix, dtype=np.dtype(np.uint16)) as writer:
        for _ in range(documents):
            start, size = random.randint(5, vocab), random.randint(40, 120)
            writer.add_sequence((start + np.arange(size)) % (vocab - 5) + 5)
            writer.end_document()
        writer.publish()


@dataclass
class Run:
    """A configuration in a folder of its own; `settings` may be changed before `write`."""

    folder: Path
    settings: dict[str, Any]

    @property
    def config(self) -> Path:
        """The YAML file."""
        return self.folder / "config.yaml"

    @property
    def directory(self) -> Path:
        """Where the run keeps what it makes."""
        return self.folder / "run"

    def change(self, section: str, **values: Any) -> Run:
        """Set fields of a section and write the file."""
        self.settings[section] |= values
        self.config.write_text(yaml.safe_dump(self.settings))
        return self

    def metrics(self) -> list[StepMetrics]:
        """What the run has recorded so far."""
        path = self.directory / "metrics.jsonl"
        return read_metrics(path) if path.exists() else []

    def losses(self) -> list[float]:
        """Every step's loss, to the last bit."""
        return [metrics.loss for metrics in self.metrics()]

    def weights(self) -> bytes:
        """The weight file of the last step."""
        return next(max(self.directory.glob("step_*")).glob("model-*.safetensors")).read_bytes()

    def start(self, *, ranks: int = 1, configs: dict[int, Path] | None = None) -> list[subprocess.Popen[str]]:
        """Start the ranks as plain processes, one thread each; `configs` gives a rank another file."""
        port = free_port()
        return [
            subprocess.Popen(
                [sys.executable, "-m", "trilithon_parallel.pretrain", str((configs or {}).get(rank, self.config))],
                env=os.environ
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
                | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(ranks)
        ]

    def finish(self, *, ranks: int = 1) -> str:
        """Run to the end; what rank 0 printed."""
        processes = self.start(ranks=ranks)
        try:
            outputs = [process.communicate(timeout=LIMIT_S)[0] for process in processes]
        finally:
            kill(processes)
        assert [process.returncode for process in processes] == [0] * ranks, "\n".join(outputs)
        return outputs[0]

    def wait_for_step(self, step: int, processes: list[subprocess.Popen[str]]) -> None:
        """Until that step is recorded, or a rank has ended."""
        deadline = time.monotonic() + LIMIT_S
        while len(self.metrics()) < step and all(process.poll() is None for process in processes):
            assert time.monotonic() < deadline, f"step {step} never came"
            time.sleep(0.005)


def kill(processes: list[subprocess.Popen[str]]) -> None:
    """End what still runs, at once, and reap it."""
    for process in processes:
        process.kill()
    for process in processes:
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()


def make_run(folder: Path, *, layout: dict[str, Any] | None = None, **training: Any) -> Run:
    """A run of 12 steps of 8 samples on a tiny Llama (3 groups of 3 heads, 4 layers), a checkpoint every 3 steps."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_llama(folder / "model", layers=4, hidden=48, heads=6, groups=3, head_dim=16, ffn=100)
    write_tokens(folder / "tokens", vocab=384)
    run = Run(
        folder,
        {
            "model": {"config": "model"},
            "data": {
                "tokenizer": "model",
                "seq_len": SEQ_LEN,
                "train": [{"prefix": "tokens"}],
                "split": [0.8, 0.2, 0.0],
            },
            "layout": {"micro_batch_size": 2, **(layout or {})},
            "training": {
                "steps": STEPS,
                "global_batch_size": BATCH,
                "learning_rate": {"peak": 0.01, "warmup": 0.1},
                **training,
            },
            "run": {
                "directory": "run",
                "checkpoint_every": 3,
                "num_threads": 1,
                "evaluate_every": 6,
                "evaluate_samples": 8,
            },
        },
    )
    return run.change("run")
