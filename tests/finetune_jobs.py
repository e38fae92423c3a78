"""A job's directory without a store, and its phases run on it: for tests of what happens inside a job."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ports import free_port

from trilithon_finetune.paths import StorePaths
from trilithon_finetune.phases.phase import run_phase
from trilithon_finetune.train import rank

JOB_ID = "ftjob-" + "a" * 20
LIMIT_S = 240


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@dataclass
class JobDir:
    """One job: `phase` and `train` run what a worker would."""

    root: Path
    attempt: int = 1

    @property
    def run(self) -> Path:
        """The trainer's directory."""
        return self.root / "run"

    @property
    def spec(self) -> dict[str, Any]:
        """job.json."""
        document: dict[str, Any] = json.loads((self.root / "job.json").read_text("utf-8"))
        return document

    def outcome(self, name: str) -> dict[str, Any]:
        """What a phase left behind in this attempt."""
        path = self.root / "attempts" / str(self.attempt) / f"{name}.json"
        document: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return document

    def phase(self, name: str) -> dict[str, Any]:
        """Run a phase and return its data; a failure is an AssertionError with its message."""
        outcome = self.try_phase(name)
        assert outcome["ok"], outcome["error"]["message"]
        data: dict[str, Any] = outcome["data"]
        if name == "validate":
            known = ("base_digest", "data_digest", "template_digest")
            self.change({"config": data["resolved"], **{key: data[key] for key in known}})
        return data

    def try_phase(self, name: str) -> dict[str, Any]:
        """Run a phase, in this process, and return its outcome."""
        code = run_phase(name, self.root, self.attempt)
        outcome = self.outcome(name)
        assert code == (0 if outcome["ok"] else 1)
        return outcome

    def change(self, values: Mapping[str, Any]) -> None:
        """Write other values into job.json."""
        (self.root / "job.json").write_text(json.dumps(self.spec | dict(values)), encoding="utf-8")

    def configure(self, section: str, **values: Any) -> None:
        """Write other values into a section of the configuration."""
        config = self.spec["config"]
        config[section] = {**config.get(section, {}), **values}
        self.change({"config": config})

    def start(self) -> list[subprocess.Popen[bytes]]:
        """The ranks of the job's layout."""
        sizes = self.spec["config"]["parallel"]
        world_size, port = sizes["tp"] * sizes["pp"] * sizes["dp"], free_port()
        command = [sys.executable, "-m", "trilithon_finetune.train", str(self.root), "--attempt", str(self.attempt)]
        with one_core() if world_size == 1 else contextlib.nullcontext():
            return [
                subprocess.Popen(
                    command,
                    env=one_thread()
                    | {
                        "RANK": str(rank),
                        "LOCAL_RANK": str(rank),
                        "WORLD_SIZE": str(world_size),
                        "LOCAL_WORLD_SIZE": str(world_size),
                        "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(port),
                    },
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
                for rank in range(world_size)
            ]

    def train(self, *, expect: int = 0) -> str:
        """Run all ranks to their end; what they printed."""
        return finish(self.start(), expect=expect)

    def train_here(self, *, expect: int = 0) -> None:
        """The same for a job of one rank, in this process."""
        kept, threads = dict(os.environ), torch.get_num_threads()
        os.environ.update(one_rank(free_port()))
        try:
            with one_core():
                assert expect == rank.main(self.root, self.attempt)
        finally:
            os.environ.clear()
            os.environ.update(kept)
            torch.set_num_threads(threads)

    def walk(self) -> JobDir:
        """Every phase of a job of one rank, in this process."""
        for phase in ("validate", "prepare"):
            self.phase(phase)
        self.train_here()
        for phase in ("export", "verify"):
            self.phase(phase)
        return self

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """What the attempt told."""
        path = self.root / "attempts" / str(self.attempt) / "events.jsonl"
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        return [event for event in map(json.loads, lines) if kind is None or event["kind"] == kind]

    def losses(self) -> list[float]:
        """Training losses by step, of all attempts."""
        return self.numbers("loss")

    def numbers(self, name: str) -> list[float]:
        """A column of the trainer's record by step, of all attempts."""
        lines = (self.run / "metrics.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line)[name] for line in lines]

    def checkpoints(self) -> list[Path]:
        """By step."""
        return sorted(self.run.glob("step_*"))


def one_rank(port: int) -> dict[str, str]:
    """torchrun's variables of a world of one."""
    sizes = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return {**sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """
    Of this thread and those that it starts: as many as there are cores would wait for each other most of the time where
    other files' tests use the cores, too, and a tiny model gains nothing by them.
    """
    cores = os.sched_getaffinity(0)
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.sched_setaffinity(0, {sorted(cores)[worker % len(cores)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def one_thread() -> dict[str, str]:
    """The environment of a process that has one thread."""
    return dict(os.environ) | {"OMP_NUM_THREADS": "1"}


def finish(ranks: list[subprocess.Popen[bytes]], *, expect: int = 0) -> str:
    """Wait for ranks; all must end with the code `expect`."""
    try:
        printed = [rank.communicate(timeout=LIMIT_S)[0].decode() for rank in ranks]
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(signal.SIGKILL)
                rank.wait()
    assert [expect] * len(ranks) == [rank.returncode for rank in ranks], "\n".join(printed)
    return "\n".join(printed)


def make_job(
    folder: Path, model_dir: Path, training_path: Path, validation_path: Path | None = None, **config: Any
) -> JobDir:
    """
    A job that nothing has looked at yet.

    Args:
        folder: becomes a store.
        config: fields of `JobConfig`.
    """
    store = StorePaths(folder / "store")
    root = store.job(JOB_ID).root
    root.mkdir(parents=True)
    document = {
        "job_id": JOB_ID,
        "tenant": "test",
        "name": "ft:tiny::aaaa",
        "config": {"model": "tiny", "training_file": "train", "seed": 7, **config},
        "model_dir": str(model_dir),
        "training_path": str(training_path),
        "validation_path": None if validation_path is None else str(validation_path),
        "training_name": training_path.name,
        "validation_name": "" if validation_path is None else validation_path.name,
        "store": str(store.root),
    }
    (root / "job.json").write_text(json.dumps(document), encoding="utf-8")
    return JobDir(root)


def twin(made: JobDir, folder: Path) -> JobDir:
    """The same job in a directory of its own, over the same prepared data."""
    root = folder / made.root.name
    shutil.copytree(made.root, root)
    return JobDir(root)
