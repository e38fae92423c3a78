"""A home with tiny models under the names that examples use, a store whose jobs are moved by hand, and the command."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from finetune_jobs import write_rows
from jobs_server import Worker
from served import Server, serving
from task_rows import rows
from tiny import tiny_bert, tiny_llama

from trilithon.cli import main
from trilithon_finetune.config import JobConfig
from trilithon_finetune.jobs.records import Job
from trilithon_finetune.jobs.service import Jobs
from trilithon_finetune.paths import StorePaths

DECODER, ENCODER = "smollm2-135m-instruct", "all-minilm-l6-v2"
LOCAL = "local"


def _store_model(home: Path, name: str, make: Callable[[Path], Path]) -> None:
    """A model directory as `trilithon pull` leaves it."""
    path = make(home / "models" / name)
    files = {item.name: {"num_bytes": item.stat().st_size} for item in path.iterdir()}
    manifest = {"source": "tests", "digest": "0" * 64, "licence": "Apache-2.0", "files": files, "size_bytes": 1}
    (path / "trilithon.json").write_text(json.dumps({**manifest, "created": "2026-01-01T00:00:00Z"}))


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store with a tiny decoder and a tiny encoder."""
    path = tmp_path_factory.mktemp("home")
    _store_model(path, DECODER, lambda folder: tiny_llama(folder, scale=0.1))
    _store_model(path, ENCODER, lambda folder: tiny_bert(folder, scale=0.1, sentence_encoder=False))
    return path


@pytest.fixture
def here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and an environment that knows that home and no server."""
    monkeypatch.setenv("TRILITHON_HOME", str(home))
    monkeypatch.delenv("TRILITHON_URL", raising=False)
    monkeypatch.delenv("TRILITHON_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def job_yaml(here: Path) -> Path:
    """A configuration with its data."""
    write_rows(here / "chats.jsonl", rows("sft", 24))
    write_rows(here / "dev.jsonl", rows("sft", 6, first=1000))
    path = here / "job.yaml"
    path.write_text(
        f"model: {DECODER}\ntask: sft\ntraining_file: chats.jsonl\nvalidation_file: dev.jsonl\n"
        "training: {epochs: 2, batch_size: 8}\nseed: 3\n"
    )
    return path


@dataclass
class Printed:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed, as JSON."""
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Printed]:
    """Runs `trilithon finetune ...` in this process."""

    def command(*arguments: object, verb: str = "finetune") -> Printed:
        code = main([verb, *map(str, arguments)])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return Printed(code, printed.out, printed.err)

    return command


@dataclass
class Made:
    """A store in the working directory; flags name it to the command."""

    jobs: Jobs
    worker: Worker

    @property
    def flags(self) -> tuple[str, str]:
        """What names it."""
        return ("--store", str(self.jobs.paths.root))

    def job(self, **config: Any) -> Job:
        """A job that waits for validation."""
        import io

        file = self.jobs.put_file(io.BytesIO(b"{}\n"), tenant=LOCAL, filename="rows.jsonl", purpose="fine-tune")
        document = {"model": DECODER, "training_file": file.id, **config}
        return self.jobs.create(JobConfig.model_validate(document), tenant=LOCAL)

    def trained(self, *, steps: int = 4, lr: float = 1e-3, **config: Any) -> Job:
        """A job that ran to its end, with numbers, a checkpoint of step 2, and a log."""
        job = self.job(tuning={"kind": "lora"}, optimizer={"lr": lr}, **config)
        resolved = JobConfig.model_validate(job.config).model_dump(mode="json")
        self.worker.validated(job.id, resolved=resolved)
        claim = self.worker.running(job.id)
        run = self.jobs.paths.job(job.id).run
        run.mkdir(parents=True, exist_ok=True)
        with (run / "metrics.jsonl").open("w") as file:
            for step in range(1, steps + 1):
                row = {"step": step, "loss": lr * 1000 / step, "learning_rate": lr, "tokens": 100, "step_s": 0.5}
                row |= {"validation_loss": 0.5 / step, "validation": {"f1": 0.1 * step}} if step % 2 == 0 else {}
                file.write(json.dumps(row) + "\n")
                self.worker.step(claim, step, total_steps=steps, train_loss=lr * 1000 / step, step_seconds=0.5)
        self.worker.checkpoint(claim, 2, {"valid_loss": 0.25, "f1": 0.2})
        attempt = self.jobs.paths.job(job.id).attempt(claim.job.attempt)
        attempt.mkdir(parents=True, exist_ok=True)
        (attempt / "rank-0.log").write_text("hello\n\x1b[2Jworld\n")
        return self.worker.succeeded(claim)


@pytest.fixture
def made(here: Path) -> Iterator[Made]:
    """A store whose jobs the test moves itself."""
    jobs = Jobs(None, StorePaths(here / "jobs"))
    yield Made(jobs, Worker(jobs))
    jobs.close()


@pytest.fixture(scope="session")
def server(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Jobs]]:
    """`trilithon serve DECODER --jobs DIR` without a worker, and its store."""
    store = tmp_path_factory.mktemp("served") / "store"
    flags = ("--jobs", str(store), "--job-slots", "0", "--kv-cache-bytes", "16MiB", "--served-name", DECODER)
    with serving(home / "models" / DECODER, *flags, env={"TRILITHON_HOME": str(home)}) as running:
        jobs = Jobs(None, StorePaths(store))
        yield running, jobs
        jobs.close()


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """SIGINT interrupts, although who started the tests may have it ignored, as shells do in the background."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)
