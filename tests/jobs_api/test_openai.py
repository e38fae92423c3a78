"""The openai package, unchanged, against our routes."""

from __future__ import annotations

import io
from collections.abc import Iterator

import openai
import pytest
from front_server import ACME, MODEL
from jobs_server import ACME_TENANT, DATA, JobsServer, Worker

from trilithon_finetune.jobs.states import JobState


@pytest.fixture
def api(served_jobs: JobsServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served_jobs.server.url}/v1", api_key=ACME, max_retries=0) as client:
        yield client


def test_the_openai_package_runs_a_job_from_upload_to_checkpoints(api: openai.OpenAI, served_jobs: JobsServer) -> None:
    """Upload, create, retrieve, pause, resume, watch, read checkpoints and cancel: every answer parses as OpenAI's."""
    file = api.files.create(file=("data.jsonl", io.BytesIO(DATA)), purpose="fine-tune")
    job = api.fine_tuning.jobs.create(
        model=MODEL,
        training_file=file.id,
        suffix="faq",
        seed=7,
        metadata={"who": "me"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
        extra_body={"trilithon": {"tuning": {"kind": "lora", "rank": 8}}},
    )
    worker = Worker(served_jobs.jobs)
    worker.validated(job.id)
    paused = api.fine_tuning.jobs.pause(job.id)
    resumed = api.fine_tuning.jobs.resume(job.id)
    claim = worker.running(job.id)
    worker.step(claim, 1, train_loss=2.5)
    worker.checkpoint(claim, 1, {"train_loss": 2.5, "valid_loss": 2.0, "grad_norm": 1.0})
    running = api.fine_tuning.jobs.retrieve(job.id)
    events = api.fine_tuning.jobs.list_events(job.id, limit=3)
    checkpoints = api.fine_tuning.jobs.checkpoints.list(job.id)
    cancelled = api.fine_tuning.jobs.cancel(job.id)

    assert (file.object, file.filename, file.bytes, file.purpose) == ("file", "data.jsonl", len(DATA), "fine-tune")
    assert (job.status, job.seed, job.model, job.training_file) == ("validating_files", 7, MODEL, file.id)
    assert (job.organization_id, job.metadata, job.fine_tuned_model) == (ACME_TENANT, {"who": "me"}, None)
    assert job.method is not None
    assert job.method.type == "supervised"
    assert job.hyperparameters.n_epochs == 2
    assert (paused.status, resumed.status, running.status) == ("paused", "queued", "running")
    assert [event.message for event in events.data] == ["Checkpoint 1.", "Step 1.", "Running."]
    assert events.data[1].type == "metrics"
    assert events.has_more
    assert [item.step_number for item in checkpoints.data] == [1]
    assert checkpoints.data[0].metrics.valid_loss == 2.0
    assert checkpoints.data[0].fine_tuned_model_checkpoint.endswith(":step-1")
    assert cancelled.id == job.id
    assert served_jobs.jobs.get(job.id, tenant=ACME_TENANT).desired == "cancel"


def test_lists_are_paged_by_the_openai_package(api: openai.OpenAI, served_jobs: JobsServer) -> None:
    """Auto-paging walks every job, file and event once, newest first, whatever the page size."""
    made = [served_jobs.job().id for _ in range(5)]
    events = [f"ftevent-{made[-1].removeprefix('ftjob-')}-{seq}" for seq in range(3, 0, -1)]
    worker = Worker(served_jobs.jobs)
    worker.claim(made[-1], JobState.VALIDATING)
    served_jobs.jobs.cancel(made[-1], tenant=ACME_TENANT)

    listed = [job.id for job in api.fine_tuning.jobs.list(limit=2)]
    files = [file.id for file in api.files.list(limit=2)]
    told = [event.id for event in api.fine_tuning.jobs.list_events(made[-1], limit=1)]

    assert listed[:5] == made[::-1]
    assert len(set(listed)) == len(listed)
    assert len(set(files)) == len(files) >= 5
    assert told == events[-len(told) :]
    assert len(told) >= 2


def test_files_can_be_read_and_removed_by_the_openai_package(api: openai.OpenAI) -> None:
    """Content comes back byte by byte; a removed file is gone."""
    data = bytes(range(256)) * 2048
    file = api.files.create(file=("rows.jsonl.gz", io.BytesIO(data)), purpose="fine-tune")

    content = api.files.content(file.id).read()
    deleted = api.files.delete(file.id)

    assert content == data
    assert (deleted.id, deleted.deleted) == (file.id, True)
    with pytest.raises(openai.NotFoundError):
        api.files.retrieve(file.id)


def test_what_is_refused_is_the_openai_packages_error(api: openai.OpenAI, served_jobs: JobsServer) -> None:
    """A method that we do not have is a 400 with its code, a strange id a 404."""
    with pytest.raises(openai.BadRequestError) as refused:
        api.fine_tuning.jobs.create(model=MODEL, training_file=served_jobs.file(), method={"type": "reinforcement"})
    with pytest.raises(openai.NotFoundError) as strange:
        api.fine_tuning.jobs.retrieve("ftjob-" + "0" * 20)

    assert refused.value.code == "unsupported_method"
    assert refused.value.param == "method.type"
    assert strange.value.code == "job_not_found"
