"""A job through real phases, and its result asked for over HTTP and gRPC: what is served is what was trained."""

from __future__ import annotations

import io
import json
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from front_server import MODEL
from jobs_server import ACME_TENANT, JobsServer
from safetensors.numpy import load_file
from task_rows import rows

from trilithon import Client, FailedPrecondition
from trilithon_finetune.config import JobConfig
from trilithon_finetune.jobs.records import Job
from trilithon_finetune.jobs.settings import WorkerSettings
from trilithon_finetune.jobs.states import JobState
from trilithon_finetune.jobs.worker import Worker
from trilithon_finetune.phases.verify import Values, between, loaded_stage, outputs_of_stage
from trilithon_finetune.recipes.base import IGNORE, Sample
from trilithon_finetune.setup import read_job
from trilithon_finetune.train.evaluation import probe_file
from trilithon_finetune.train.work import open_work
from trilithon_parallel.config import load_config
from trilithon_parallel.grid import Grid
from trilithon_parallel.lora.bank import AdapterBank

TOLERANCE = 1e-4  # E4, fp32
MERGED_TOLERANCE = 3e-5
"""
Merging rounds each weight once more. To move those of the merged model by half a unit of rounding at random moves what
it says by 0.7 to 1.2e-5 (measured); the distance to the adapter beside its base is of that size, by the machine.
"""

Probes = list[tuple[Sample, Values]]


@pytest.fixture(scope="module")
def trained(served_jobs: JobsServer) -> Job:
    """A LoRA job on the served model, trained, exported and verified by a worker beside the server."""
    chats = "".join(f"{json.dumps(row)}\n" for row in rows("sft", 16)).encode()
    jobs = served_jobs.jobs
    file = jobs.put_file(io.BytesIO(chats), tenant=ACME_TENANT, filename="chats.jsonl", purpose="fine-tune")
    document = {
        "model": MODEL,
        "training_file": file.id,
        "tuning": {"kind": "lora", "rank": 4},
        "training": {"epochs": 2, "batch_size": 8},
        "optimizer": {"lr": 0.01},
        "data": {"validation_share": 0.25},
        "seed": 3,
    }
    job = jobs.create(JobConfig.model_validate(document), tenant=ACME_TENANT)
    settings = WorkerSettings(look_s=0.05, tick_s=0.05, models={MODEL: served_jobs.model_dir})
    worker = Worker(jobs, settings, only=job.id)
    for state in (JobState.VALIDATING, JobState.QUEUED):
        assert worker.work_once(state, threading.Event())
    done = jobs.get(job.id, tenant=ACME_TENANT)
    assert done.state is JobState.SUCCEEDED, done.error
    return done


@pytest.fixture(scope="module")
def probes(served_jobs: JobsServer, trained: Job) -> Probes:
    """Samples that were held out, and what the trainer said of each of their tokens at the exported step."""
    paths = served_jobs.jobs.paths.job(trained.id)
    work = open_work(read_job(paths.root))
    assert trained.result is not None
    recorded = load_file(probe_file(paths.run, trained.result["export"]["step"]))
    assert work.config.seed is not None
    seed, part = work.config.seed, work.prepared.valid
    return [
        (work.recipe.dress(part.sample(int(index)), seed=seed, epoch=0), values) for index, values in recorded.items()
    ]


def _served(client: Client, model: str, probes: Probes) -> list[Values]:
    """The log-probability of each target by the server, 0 where none counts."""
    found = []
    for sample, _ in probes:
        answer = client.generate(list(sample.tokens), model=model, max_tokens=1, prompt_logprobs=0)
        _, *known = [token.logprob for token in answer.prompt_tokens]  # nothing is known of the first
        told = [0.0 if target == IGNORE else value for target, value in zip(sample.targets, [*known, 0.0], strict=True)]
        found.append(np.array(told, np.float32))
    return found


def test_E4_a_served_adapter_has_the_trainers_numbers(client: Client, trained: Job, probes: Probes) -> None:
    """
    Over both protocols the log-probabilities of held-out chats by the adapter, beside its base, are the trainer's.

    The inverse: the base's own are not, nor are the adapter's with another sample's targets.
    """
    expected = [values for _, values in probes]
    assert sum(int((values != 0).sum()) for values in expected) > 20

    worst = between("", _served(client, trained.name, probes), expected, TOLERANCE).max_abs
    base = between("", _served(client, MODEL, probes), expected, TOLERANCE).max_abs

    assert worst <= TOLERANCE
    assert base > 100 * TOLERANCE


def test_E4_echo_over_openais_route_tells_the_same(served_jobs: JobsServer, trained: Job, probes: Probes) -> None:
    """`/v1/completions` with `echo` and `logprobs` gives these numbers too."""
    (sample, expected), *_ = probes
    body = {"model": trained.name, "prompt": list(sample.tokens), "max_tokens": 0, "echo": True, "logprobs": 0}

    answer = served_jobs.http.post("/v1/completions", json=body)

    assert answer.status_code == 200, answer.text
    told = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
    learned = [i for i, target in enumerate(sample.targets) if target != IGNORE]
    assert np.abs(np.array([told[i + 1] for i in learned]) - expected[learned]).max() <= TOLERANCE


def test_an_adapter_is_exported_merged(
    client: Client, served_jobs: JobsServer, trained: Job, probes: Probes, tmp_path: Path
) -> None:
    """
    `format: model` is a model directory that says what adapter and base say together, but for rounding once more.

    The inverse: the base's own numbers are far from them.
    """
    step = served_jobs.jobs.checkpoints(trained.id, tenant=ACME_TENANT).data[0].step

    whole = client.jobs.export(trained.id, format="model")
    checkpoint = client.jobs.export(trained.id, step=step, format="model")

    client.files.download(whole.id, tmp_path / "model.zip")
    merged = tmp_path / "model"
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        archive.extractall(merged)
    adapter, base = served_jobs.jobs.paths.job(trained.id).export, served_jobs.model_dir
    config = load_config(base)
    stage = loaded_stage(config, base, dtype=torch.float32)
    stage.prepare()
    bank = AdapterBank(stage, config=config, grid=Grid.single(), max_adapters=1, max_rank=8)
    bank.load(0, adapter)
    ours = loaded_stage(load_config(merged), merged, dtype=torch.float32)
    ours.prepare()
    said = outputs_of_stage(ours, probes)
    assert between("", said, outputs_of_stage(stage, probes, bank=bank), 0.0).max_abs <= MERGED_TOLERANCE
    assert between("", said, outputs_of_stage(stage, probes), 0.0).max_abs > 100 * MERGED_TOLERANCE
    assert (whole.filename, checkpoint.filename) == (f"{trained.id}-model.zip", f"{trained.id}-step-{step}-model.zip")
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= {path.name for path in merged.iterdir()}
    assert not list(served_jobs.jobs.paths.root.glob(".merge-*"))


def test_R11_a_merge_into_another_base_is_refused(served_jobs: JobsServer, trained: Job, client: Client) -> None:
    """Where the base of the job's name is another model by now, a sentence says so, and names both digests."""
    weights = next(served_jobs.model_dir.glob("*.safetensors"))
    side = served_jobs.model_dir / "note.json"  # one file more is another model
    side.write_text("{}")
    try:
        with pytest.raises(FailedPrecondition, match=trained.base_digest[:12]) as caught:
            client.jobs.export(trained.id, format="model")
    finally:
        side.unlink()

    assert caught.value.code == "base_mismatch"
    assert str(weights.parent) not in str(caught.value)
