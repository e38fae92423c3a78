"""A job whose phases are the real ones, from an upload to an adapter in the catalogue."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import reader_facts as facts
from task_rows import rows
from tiny import tiny_bert, tiny_llama

from trilithon_finetune.jobs.states import JobState
from trilithon_server.catalog import Catalog
from trilithon_server.encoders import QUESTIONS_SUFFIX
from trilithon_server.engine.identity import model_digest

from .conftest import TENANT, Store, check_history

REAL = {
    "phase_command": (sys.executable, "-m", "trilithon_finetune.phases"),
    "train_command": (sys.executable, "-m", "trilithon_finetune.train"),
}


def test_uploaded_chats_become_a_served_adapter(make_store: Callable[..., Store], tmp_path: Path) -> None:
    """Validated, prepared, trained, exported and verified by the product's own processes; every number in its place."""
    store = make_store(None)
    model = tiny_llama(tmp_path / "m", scale=0.1)
    chats = "".join(f"{json.dumps(row)}\n" for row in rows("sft", 16)).encode()
    file = store.jobs.put_file(io.BytesIO(chats), tenant=TENANT, filename="chats.jsonl", purpose="fine-tune")
    job = store.create(
        model="tiny",
        training_file=file.id,
        tuning={"kind": "lora", "rank": 4},
        training={"epochs": 2, "batch_size": 8},
        deploy={"alias": "faq"},
        integrations=[{"type": "tensorboard"}],
    )
    store.work(models={"tiny": model}, **REAL)

    done = store.get(job)
    assert done.state is JobState.SUCCEEDED, (done.error, [event.message for event in store.events(job)][-3:])
    kinds = store.kinds(job)
    entry = Catalog(store.jobs.paths.models).get("faq", tenant=TENANT)
    warnings = [event.message for event in store.events(job) if event.kind == "warning"]
    check_history(store, job)
    assert entry is not None
    assert (entry.name, entry.kind) == (job.name, "adapter")
    assert (done.progress.step, done.progress.total_steps, done.progress.fraction) == (4, 4, 1.0)
    assert done.progress.supervised_tokens > 0
    assert done.estimate is not None
    assert store.jobs.checkpoints(job.id, tenant=TENANT).data[0].step == 4
    assert len(store.jobs.metrics(job.id, tenant=TENANT)) == 4
    assert {kind for kind in kinds if kinds.count(kind) > 1} <= {
        "claimed",
        "step",
        "checkpoint_saved",
        "prepare_progress",
    }
    assert warnings == []
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = loader.EventAccumulator(str(store.jobs.paths.job(job.id).tensorboard))
    board.Reload()
    losses = [(event.step, event.value) for event in board.Scalars("train_loss")]
    assert losses == [
        (row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in store.jobs.metrics(job.id, tenant=TENANT)
    ]
    names = [store.jobs.get_file(file_id, tenant=TENANT).filename for file_id in done.result_files]
    assert any(name.startswith("events.out.tfevents.") for name in names)


def test_answers_that_an_export_writes_reach_the_table(make_store: Callable[..., Store], tmp_path: Path) -> None:
    """What verification measures of a task's own words is an event and a result like what training measured."""
    store = make_store(None)
    model = tiny_llama(tmp_path / "m", scale=0.1)
    lines = "".join(f"{json.dumps(row)}\n" for row in rows("answer_qa", 16)).encode()
    held = "".join(f"{json.dumps(row)}\n" for row in rows("answer_qa", 20)[16:]).encode()
    files = [
        store.jobs.put_file(io.BytesIO(part), tenant=TENANT, filename=name, purpose="fine-tune")
        for name, part in (("train.jsonl", lines), ("valid.jsonl", held))
    ]
    job = store.create(
        model="tiny",
        task="answer_qa",
        training_file=files[0].id,
        validation_file=files[1].id,
        tuning={"kind": "lora", "rank": 4},
        training={"epochs": 1, "batch_size": 8},
    )
    store.work(models={"tiny": model}, **REAL)

    done = store.get(job)
    assert done.state is JobState.SUCCEEDED, (done.error, [event.message for event in store.events(job)][-3:])
    (trained, written) = [event for event in store.events(job) if event.kind == "eval"]
    assert (trained.data["step"], written.data["step"]) == (2, 2)
    assert "exact_match" not in trained.data
    assert (written.data["written_answers"], written.type) == (4.0, trained.type)
    assert store.jobs.metrics(job.id, tenant=TENANT)[-1]["validation"]["f1"] == written.data["f1"]


def test_two_encoders_of_a_job_have_two_names(make_store: Callable[..., Store], tmp_path: Path) -> None:
    """The encoder of questions is served under the job's name with an ending; each entry tells its own digest."""
    store = make_store(None)
    model = tiny_bert(tmp_path / "m", scale=0.1)
    lines = "".join(f"{json.dumps(row)}\n" for row in rows("dpr", 16)).encode()
    file = store.jobs.put_file(io.BytesIO(lines), tenant=TENANT, filename="dpr.jsonl", purpose="fine-tune")
    job = store.create(
        model="tiny",
        task="dpr",
        training_file=file.id,
        options={"shared": False},
        training={"epochs": 1, "batch_size": 8},
    )
    store.work(models={"tiny": model}, **REAL)

    done = store.get(job)
    assert done.state is JobState.SUCCEEDED, (done.error, [event.message for event in store.events(job)][-3:])
    assert served(store, done.name, done.name + QUESTIONS_SUFFIX) == ["export", "query"]


def test_the_encoders_of_a_reader_have_names(make_store: Callable[..., Store], tmp_path: Path) -> None:
    """Of two beside a reader each is served under the job's name with an ending: that is what builds its index."""
    store = make_store(None)
    two = facts.write_model(tmp_path / "two", facts.RETRIEVER, seed=2, sigma=0.2)
    shutil.copytree(two, two / "query")
    models = {"tiny": facts.new_reader(tmp_path / "reader"), "encoder": two}
    lines = {"questions": facts.questions()[:8], "passages": facts.passages()}
    files = {
        name: store.jobs.put_file(
            io.BytesIO("".join(f"{json.dumps(row)}\n" for row in some).encode()),
            tenant=TENANT, filename=f"{name}.jsonl", purpose="fine-tune" if name == "questions" else "evidence",
        ).id
        for name, some in lines.items()
    }  # fmt: skip
    job = store.create(
        model="tiny",
        task="reader_joint",
        training_file=files["questions"],
        options={"retriever": "encoder", "passages": files["passages"], "top_k": 2, **facts.OPTIONS},
        data={"max_tokens": 32},
        training={"epochs": 1, "batch_size": 4},
    )
    store.work(models=models, **REAL)

    done = store.get(job)
    assert done.state is JobState.SUCCEEDED, (done.error, [event.message for event in store.events(job)][-3:])
    names = (done.name, f"{done.name}-retriever", f"{done.name}-retriever-questions")
    assert served(store, *names) == ["export", "retriever", "query"]


def served(store: Store, *names: str) -> list[str]:
    """The folders of what the catalogue knows by these names, each told with its own digest."""
    catalog = Catalog(store.jobs.paths.models)
    found = [catalog.get(name, tenant=TENANT) for name in names]
    paths = [entry.path for entry in found if entry is not None]
    assert [entry.digest for entry in found if entry is not None] == [model_digest(path) for path in paths]
    return [path.name for path in paths]
