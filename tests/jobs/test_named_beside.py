"""Jobs whose options name a second model and a file besides: who may, and where phases find them."""

from __future__ import annotations

import io
import json

import pytest

from trilithon.errors import Conflict, InvalidArgument
from trilithon_finetune.jobs.records import File
from trilithon_finetune.jobs.states import JobState

from .conftest import TENANT, Store


def passages(store: Store, tenant: str = TENANT) -> File:
    """A file of passages, as an owner uploads it."""
    content = io.BytesIO(b'{"id": "a", "title": "", "text": "b"}\n')
    return store.jobs.put_file(content, tenant=tenant, filename="passages.jsonl", purpose="fine-tune")


def test_the_job_file_says_where_they_lie(store: Store) -> None:
    """The retriever's directory, and the passages with the name that their owner gave them."""
    file = passages(store)
    job = store.create(options={"steps": 2, "retriever": "base", "passages": file.id})
    store.work()
    document = json.loads(store.jobs.paths.job(job.id).spec.read_text())

    assert store.get(job).state is JobState.SUCCEEDED
    assert document["retriever_dir"] == str(store.jobs.paths.root / "base")
    assert document["passages_path"] == str(store.jobs.file_path(file.id, tenant=TENANT))
    assert document["passages_name"] == "passages.jsonl"


def test_a_retriever_that_is_not_there_ends_the_job(store: Store) -> None:
    """As a base that is not there does."""
    job = store.create(options={"retriever": "bse"})
    store.work()
    error = store.get(job).error

    assert error is not None
    assert (error.code, error.hint) == ("model_not_found", "Did you mean 'base'?")


def test_passages_in_use_stay(store: Store) -> None:
    """While a live job reads them they are not deleted, and no cleaning takes them. Inverse seen: not looked for."""
    file = passages(store)
    job = store.create(options={"passages": file.id})
    with pytest.raises(Conflict, match=f"is read by the job {job.id}"):
        store.jobs.delete_file(file.id, tenant=TENANT)
    store.jobs.cancel(job.id, tenant=TENANT)
    store.jobs.delete_file(file.id, tenant=TENANT)


def test_S10_a_request_names_no_path_and_nobody_elses_file(store: Store) -> None:
    """A retriever is a name, passages are the tenant's own; refusals name the option. Inverse seen: not checked."""
    theirs = passages(store, "somebody")
    options = [{"retriever": "/etc"}, {"retriever": "../base"}, {"passages": theirs.id}, {"passages": "/etc/passwd"}]
    refused = []
    for item in options:
        with pytest.raises(InvalidArgument) as caught:
            store.create(options=item)
        refused.append((caught.value.code, caught.value.details[0].field))

    assert refused == [
        ("invalid_model", "options.retriever"),
        ("invalid_model", "options.retriever"),
        ("file_not_found", "options.passages"),
        ("file_not_found", "options.passages"),
    ]
