"""What becomes of a job's result: a zip file, an alias; and what a rank printed."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
from front_server import MODEL
from jobs_server import ACME_TENANT, JobsServer, Worker

from trilithon import Client, FailedPrecondition, Internal, InvalidArgument, NotFound
from trilithon_finetune.jobs.records import Job
from trilithon_finetune.jobs.states import JobState
from trilithon_server.catalog import Catalog, CatalogEntry

FILES = {
    "adapter_config.json": b"{}",
    "adapter_model.safetensors": b"w" * 3000,
    "optim-00001-of-00001.safetensors": b"o",
}
FILES |= {"manifest.json": b"m", ".hidden": b"h", "chat_template.jinja": b"{{ x }}"}
EXPORTED = {name: data for name, data in FILES.items() if name.startswith(("adapter", "chat"))}


def write(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in FILES.items():
        (directory / name).write_bytes(data)


def succeeded(served_jobs: JobsServer) -> Job:
    """A LoRA job with a checkpoint of step 2, an export, and its model in the catalogue."""
    worker, jobs = Worker(served_jobs.jobs), served_jobs.jobs
    job = served_jobs.job(tuning={"kind": "lora"})
    worker.validated(job.id)
    claim = worker.running(job.id)
    worker.checkpoint(claim, 2, {"train_loss": 1.0})
    write(jobs.paths.job(job.id).run / "step_00000002")
    write(jobs.paths.job(job.id).export)
    job = worker.succeeded(claim)
    entry = CatalogEntry(
        name=job.name, kind="adapter", base=MODEL, base_digest="b", path=jobs.paths.job(job.id).export,
        digest="d" + job.id, tenant=ACME_TENANT,
    )  # fmt: skip
    Catalog(jobs.paths.models).register(entry)
    return job


def test_an_export_is_a_zip_of_the_adapter_directory(client: Client, served_jobs: JobsServer) -> None:
    """The result and a checkpoint come as zip files without optimizer state, the same bytes every time."""
    job = succeeded(served_jobs)

    result = client.jobs.export(job.id)
    again = client.jobs.export(job.id, format="peft")
    step = client.jobs.export(job.id, step=2)

    content = served_jobs.http.get(f"/v1/files/{result.id}/content")
    with zipfile.ZipFile(io.BytesIO(content.content)) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == EXPORTED
    assert (result.purpose, result.filename) == ("fine-tune-results", f"{job.id}.zip")
    assert (result.sha256, step.sha256) == (again.sha256, again.sha256)
    assert step.filename == f"{job.id}-step-2.zip"
    with pytest.raises(Internal, match="could not be merged") as broken:
        client.jobs.export(job.id, format="model")  # no adapter's files, and the log says why
    assert str(served_jobs.model_dir) not in str(broken.value)
    with pytest.raises(NotFound, match="Steps: 2"):
        client.jobs.export(job.id, step=3)


def test_an_alias_moves_to_what_jobs_made(client: Client, served_jobs: JobsServer) -> None:
    """`deploy` points an alias at a job's model, tells where it pointed before, and refuses what is not served."""
    first, second = succeeded(served_jobs), succeeded(served_jobs)
    alias = f"faq-{first.id[-6:]}"

    made = client.jobs.deploy(first.id, alias)
    moved = client.jobs.deploy(second.id, alias)

    assert (made.model, made.alias, made.previous) == (first.name, alias, "")
    assert (moved.model, moved.previous) == (second.name, first.name)
    catalog = Catalog(served_jobs.jobs.paths.models)
    entry = catalog.get(alias, tenant=ACME_TENANT)
    assert entry is not None
    assert entry.name == second.name
    assert catalog.get(alias, tenant="other") is None
    with pytest.raises(FailedPrecondition) as caught:
        client.jobs.deploy(first.id, alias, step=2)
    assert caught.value.code == "not_servable"
    with pytest.raises(InvalidArgument) as wrong:
        client.jobs.deploy(first.id, "No Alias")
    assert wrong.value.param == "alias"


def test_nothing_comes_of_a_job_that_has_not_succeeded(client: Client, served_jobs: JobsServer) -> None:
    """Export and deploy say in which state the job is."""
    job = served_jobs.job()

    for call in (lambda: client.jobs.export(job.id), lambda: client.jobs.deploy(job.id, "faq")):
        with pytest.raises(FailedPrecondition, match="validating") as caught:
            call()
        assert caught.value.code == "job_not_succeeded"


def test_logs_are_the_end_of_what_a_rank_printed(client: Client, served_jobs: JobsServer) -> None:
    """The newest attempt's output is told, at most a MiB of it from the beginning of a line."""
    worker, jobs = Worker(served_jobs.jobs), served_jobs.jobs
    job = served_jobs.job()
    worker.validated(job.id)
    worker.claim(job.id, JobState.QUEUED)
    attempt = jobs.get(job.id, tenant=ACME_TENANT).attempt
    folder = jobs.paths.job(job.id).attempt(attempt)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rank-0.log").write_bytes(b"x" * (1 << 20) + b"\nthe end\xff\n")
    (folder / "rank-1.log").write_text("hello\n")

    assert client.jobs.logs(job.id, rank=1) == "hello\n"
    assert client.jobs.logs(job.id, attempt=attempt) == "the end�\n"
    with pytest.raises(NotFound):
        client.jobs.logs(job.id, rank=7)


def test_the_report_of_the_data_is_there_once_it_was_checked(served_jobs: JobsServer) -> None:
    """A job's report is what validation found out; before that there is none."""
    worker, job = Worker(served_jobs.jobs), served_jobs.job()
    path = f"/v1/fine_tuning/jobs/{job.id}/report"
    before = served_jobs.http.get(path)
    worker.validated(job.id, report={"ok": True, "rows": 3})

    assert (before.status_code, before.json()["error"]["code"]) == (404, "report_not_found")
    assert served_jobs.http.get(path).json() == {"ok": True, "rows": 3}


def test_the_picture_is_an_image_that_runs_nothing(served_jobs: JobsServer) -> None:
    """plot.svg is an SVG under a policy that loads nothing."""
    job = succeeded(served_jobs)

    answer = served_jobs.http.get(f"/v1/fine_tuning/jobs/{job.id}/plot.svg")

    assert answer.headers["content-type"] == "image/svg+xml"
    assert answer.headers["content-security-policy"] == "default-src 'none'"
    assert answer.text.startswith("<svg")
    assert job.name in answer.text
