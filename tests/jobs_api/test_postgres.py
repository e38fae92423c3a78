"""What holds of the fronts on SQLite holds on PostgreSQL: tests of the other modules, with that behind the server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from jobs_server import JobsServer
from postgres import Cluster
from sqlalchemy import text

from .conftest import LIMITS, serving_jobs
from .test_access import test_a_file_in_use_stays, test_another_tenants_jobs_and_files_are_not_there
from .test_client import (
    test_a_job_is_run_by_the_client,
    test_both_protocols_tell_the_same,
    test_the_asynchronous_client_is_the_same,
)
from .test_events import (
    test_a_page_goes_backwards_without_gaps,
    test_events_come_while_they_happen,
    test_last_event_id_after_a_cut_sees_each_event_once,
)
from .test_openai import (
    api,
    test_lists_are_paged_by_the_openai_package,
    test_the_openai_package_runs_a_job_from_upload_to_checkpoints,
)

__all__ = [  # collected here a second time, with this module's server
    "api",
    "test_a_file_in_use_stays",
    "test_a_job_is_run_by_the_client",
    "test_a_page_goes_backwards_without_gaps",
    "test_another_tenants_jobs_and_files_are_not_there",
    "test_both_protocols_tell_the_same",
    "test_events_come_while_they_happen",
    "test_last_event_id_after_a_cut_sees_each_event_once",
    "test_lists_are_paged_by_the_openai_package",
    "test_the_asynchronous_client_is_the_same",
    "test_the_openai_package_runs_a_job_from_upload_to_checkpoints",
]


@pytest.fixture(scope="module")
def served_jobs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobsServer]:
    """A server of this module's own, whose jobs are in PostgreSQL."""
    with serving_jobs(tmp_path_factory.mktemp("jobs"), *LIMITS, database=cluster.database()) as running:
        yield running


def test_the_jobs_are_in_postgresql(served_jobs: JobsServer) -> None:
    """What the routes create is a row there, and no SQLite file lies in the store."""
    job = served_jobs.job()

    answer = served_jobs.http.get(f"/v1/fine_tuning/jobs/{job.id}")

    with served_jobs.jobs.database.read() as connection:
        found = connection.execute(text("SELECT tenant FROM jobs WHERE id = :id"), {"id": job.id}).scalar_one()
    assert answer.json()["id"] == job.id
    assert found == "acme"
    assert not served_jobs.jobs.paths.database.exists()
