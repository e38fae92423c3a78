"""The verbs against a real server with jobs, over both protocols; jobs are moved by hand, so that nothing trains."""

from __future__ import annotations

import io
import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs_server import Worker
from served import Server

from trilithon._job_types import JobEvent
from trilithon.cli._finetune_follow import Follow
from trilithon_finetune.jobs.records import Job
from trilithon_finetune.jobs.service import Jobs
from trilithon_finetune.jobs.states import JobState
from trilithon_server.catalog import Catalog, CatalogEntry

Run = Callable[..., Any]
Printed = Any
MODEL, LOCAL = "smollm2-135m-instruct", "local"
LIMIT_S = 120.0


@pytest.fixture(params=["http", "grpc"])
def url(request: pytest.FixtureRequest, server: tuple[Server, Jobs]) -> str:
    """The server's address, over each protocol."""
    running, _ = server
    return running.url if request.param == "http" else running.grpc_target


@pytest.fixture
def jobs(server: tuple[Server, Jobs]) -> Jobs:
    """The server's store."""
    return server[1]


def _job(jobs: Jobs, **config: Any) -> Job:
    from trilithon_finetune.config import JobConfig

    file = jobs.put_file(io.BytesIO(b"{}\n"), tenant=LOCAL, filename="rows.jsonl", purpose="fine-tune")
    document = {"model": MODEL, "training_file": file.id, "tuning": {"kind": "lora"}, **config}
    return jobs.create(JobConfig.model_validate(document), tenant=LOCAL)


def _succeeded(jobs: Jobs) -> Job:
    worker, job = Worker(jobs), _job(jobs)
    worker.validated(job.id)
    claim = worker.running(job.id)
    worker.step(claim, 1, total_steps=1, train_loss=2.0)
    worker.checkpoint(claim, 1, {"train_loss": 2.0})
    folder = jobs.paths.job(job.id)
    folder.run.mkdir(parents=True, exist_ok=True)
    (folder.run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0, "learning_rate": 0.1}) + "\n")
    folder.export.mkdir(parents=True)
    (folder.export / "adapter_config.json").write_text("{}")
    (folder.export / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 20_000)
    done = worker.succeeded(claim)
    entry = CatalogEntry(name=job.name, kind="adapter", base=MODEL, base_digest="b", path=folder.export, digest=job.id,
                         tenant=LOCAL)  # fmt: skip
    Catalog(jobs.paths.models).register(entry)
    return done


def test_create_uploads_checks_and_queues(url: str, jobs: Jobs, job_yaml: Path, run: Run) -> None:
    """Paths become ids; a dry run leaves no file behind; bad data is exit code 3 before anything is queued."""
    before = len(jobs.list_files(tenant=LOCAL, limit=100).data)

    dry = run("create", job_yaml, "--dry-run", "-o", "json", "--url", url)
    left = len(jobs.list_files(tenant=LOCAL, limit=100).data)
    created = run("create", job_yaml, "-y", "-o", "json", "--url", url)
    (job_yaml.parent / "chats.jsonl").write_text('{"messages": []}\n')
    bad = run("create", job_yaml, "-y", "--url", url)

    assert dry.code == 0, dry.err
    assert dry.json["estimate"]["steps"] == 6
    assert left == before
    job = jobs.get(created.json["id"], tenant=LOCAL)
    assert (job.config["training"]["epochs"], job.seed or job.config["seed"]) == (2, 3)
    assert job.training_file.startswith("file-")
    assert bad.code == 3
    assert "chats.jsonl:1" in bad.err
    assert len(jobs.list_files(tenant=LOCAL, limit=100).data) == before + 2


def test_wait_follows_a_job_and_ctrl_c_leaves_it(
    server: tuple[Server, Jobs], jobs: Jobs, job_yaml: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--wait` ends with the job; Ctrl-C ends the command with 130, says that the job goes on, and it does."""
    url = server[0].url
    following = threading.Event()

    class Told(Follow):
        def __call__(self, event: JobEvent) -> None:
            following.set()
            super().__call__(event)

    def finish() -> None:
        assert following.wait(LIMIT_S)
        worker, job_id = Worker(jobs), jobs.list(tenant=LOCAL, limit=1).data[0].id
        worker.validated(job_id)
        claim = worker.running(job_id)
        worker.step(claim, 1, total_steps=1, train_loss=2.0)
        worker.succeeded(claim)

    def interrupt() -> None:
        assert following.wait(LIMIT_S)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # as a terminal does

    def meanwhile(what: Callable[[], None]) -> Printed:
        following.clear()
        thread = threading.Thread(target=what)
        thread.start()
        done: Printed = run("create", job_yaml, "-y", "--wait", "--url", url)
        thread.join(LIMIT_S)
        return done

    monkeypatch.setattr("trilithon.cli._finetune_new.Follow", Told)
    waited, left = meanwhile(finish), meanwhile(interrupt)

    assert waited.code == 0, waited.err
    assert "step 1/1  loss 2.0000" in waited.err
    assert "served already" in waited.out
    assert left.code == 130
    job_id = left.err.split()[0]
    assert f"{job_id} goes on (validating)" in left.err
    assert jobs.get(job_id, tenant=LOCAL).state is JobState.VALIDATING


def test_what_is_there_is_told(url: str, jobs: Jobs, run: Run, here: Path) -> None:
    """Every verb that reads says over both protocols what it says of a store."""
    job = _succeeded(jobs)

    listed = run("ls", "--state", "succeeded", "-o", "json", "--url", url).json
    got = run("get", job.id, "--url", url)
    events = run("events", job.id, "--url", url)
    followed = run("events", job.id, "-f", "--url", url)
    checkpoints = run("checkpoints", job.id, "-o", "json", "--url", url).json
    metrics = run("metrics", job.id, "--csv", "--url", url)
    drawn = run("plot", job.id, "-o", "loss.svg", "--url", url)
    missing = run("logs", job.id, "--url", url)

    assert job.id in [item["id"] for item in listed]
    assert got.out.startswith(f"{job.id}  succeeded\n")
    assert events.out == followed.out
    assert events.out.splitlines()[-1].endswith("succeeded: The job has succeeded.")
    assert checkpoints[0]["metrics"] == {"train_loss": 2.0}
    assert metrics.out.splitlines()[1].startswith("1,2.0,")
    assert (drawn.code, (here / "loss.svg").read_text()[:4]) == (0, "<svg")
    assert missing.code == 2


def test_results_come_over_the_wire(url: str, jobs: Jobs, run: Run, here: Path) -> None:
    """export brings every byte and leaves no file on the server; deploy moves the name."""
    job = _succeeded(jobs)
    before = jobs.list_files(tenant=LOCAL, limit=100).data

    exported = run("export", job.id, "-o", "adapter", "--url", url)
    deployed = run("deploy", job.id, "--as", "faq", "--url", url)
    again = run("deploy", job.id, "--as", "faq", "-o", "json", "--url", url).json
    cancelled = run("cancel", job.id, "--url", url)

    assert exported.code == 0, exported.err
    assert (here / "adapter" / "adapter_model.safetensors").read_bytes() == bytes(range(256)) * 20_000
    assert [path.name for path in here.iterdir()] == ["adapter"]
    assert jobs.list_files(tenant=LOCAL, limit=100).data == before
    assert deployed.out.startswith(f"faq -> {job.name}")
    assert again["previous"] == job.name
    assert cancelled.code == 2


def test_a_server_checks_a_file(server: tuple[Server, Jobs], jobs: Jobs, job_yaml: Path, run: Run) -> None:
    """`validate --url` sends the file, tells findings as the command's own check does, and removes it again."""
    url = server[0].url
    (job_yaml.parent / "bad.jsonl").write_text('{"messages": []}\n')
    before = jobs.list_files(tenant=LOCAL, limit=100).data

    good = run("validate", "chats.jsonl", "--model", MODEL, "--task", "sft", "--url", url)
    bad = run("validate", "bad.jsonl", "--model", MODEL, "--task", "sft", "--url", url)
    here = run("validate", "bad.jsonl", "--model", MODEL, "--task", "sft")

    assert (good.code, bad.code) == (0, 3)
    assert bad.out.splitlines()[0] == here.out.splitlines()[0]
    assert jobs.list_files(tenant=LOCAL, limit=100).data == before
