"""What a server keeps for itself on a host: who is heard, and what a worker does about it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from trilithon_finetune.jobs.gang import identity
from trilithon_finetune.jobs.reservations import lack, reserve
from trilithon_finetune.jobs.states import JobState
from trilithon_finetune.paths import StorePaths
from trilithon_finetune.train.threads import cores

from .conftest import TENANT, Store, wait_until

S = JobState
ONE_RANK = {"parallel": {"tp": 1, "pp": 1, "dp": 1}}
SMALL = {"peak_bytes_per_rank": 1 << 20}
HUGE = 1 << 60  # more than any host has


def _ranks(count: int) -> dict[str, dict[str, int]]:
    return {"parallel": {"tp": 1, "pp": 1, "dp": count}}


def test_a_host_without_a_server_is_free(tmp_path: Path) -> None:
    """Nothing is held back where nobody serves."""
    assert lack(StorePaths(tmp_path), _ranks(10_000), {"peak_bytes_per_rank": HUGE}) is None


def test_memory_and_cores_are_left_to_the_server(tmp_path: Path) -> None:
    """Ranks that fit beside it may start; one always may, as far as cores go; what is missing is told in numbers."""
    paths = StorePaths(tmp_path)

    path = reserve(paths, memory_bytes=0, cores=cores() - 1)
    assert lack(paths, ONE_RANK, SMALL) is None
    assert "2 cores at least, and a server on this host leaves" in str(lack(paths, _ranks(2), SMALL))
    reserve(paths, memory_bytes=0, cores=10_000)
    assert lack(paths, ONE_RANK, SMALL) is None
    assert lack(paths, ONE_RANK, None) is None
    reserve(paths, memory_bytes=HUGE, cores=0)
    assert "leaves 0.00 GiB" in str(lack(paths, ONE_RANK, SMALL))
    path.unlink()
    assert lack(paths, ONE_RANK, SMALL) is None


@pytest.mark.parametrize("what", ["dead", "other process", "other host", "no reservation"])
def test_who_is_gone_or_elsewhere_counts_for_nothing(tmp_path: Path, what: str) -> None:
    """A dead pid, one that another process has by now, another host, half a file; a new server removes the dead."""
    paths = StorePaths(tmp_path)
    path = reserve(paths, memory_bytes=HUGE, cores=0)
    host, pid, start = identity(os.getpid()).split()
    assert lack(paths, ONE_RANK, SMALL) is not None
    holder = {
        "dead": f"{host} {2**22 + 1} {start}",
        "other process": f"{host} {pid} {int(start) + 1}",
        "other host": f"not-{host} {pid} {start}",
        "no reservation": None,
    }[what]
    document = json.loads(path.read_text()) | {"holder": holder}
    stale = path.with_name("stale.json")
    stale.write_text(json.dumps(document) if holder else '{"holder": ')
    path.unlink()

    found = lack(paths, ONE_RANK, SMALL)
    reserve(paths, memory_bytes=0, cores=0)

    assert found is None
    assert stale.exists() is (what in ("other host", "no reservation"))
    assert socket.gethostname() == host


@pytest.mark.parametrize("end", ["the server ends", "cancelled"])
def test_a_worker_waits_for_the_server(make_store: Callable[..., Store], end: str) -> None:
    """
    Before it starts the ranks, with one event that says so; nothing runs meanwhile, and the job can be cancelled.

    Seen red without the wait: the job succeeds while the server holds everything.
    """
    store = make_store(None)
    path = reserve(store.jobs.paths, memory_bytes=HUGE, cores=0)
    job = store.create(options={"steps": 2})
    with store.working():
        wait_until(lambda: "waiting" in store.kinds(job), "the job waits")
        assert store.get(job).state is S.PREPARING
        assert not [mark for mark in store.marks(job) if mark[1] == "train"]
        if end == "cancelled":
            store.jobs.cancel(job.id, tenant=TENANT)
        else:
            path.unlink()
        done = store.wait(job)

    assert done.state is (S.CANCELLED if end == "cancelled" else S.SUCCEEDED)
    assert store.kinds(job).count("waiting") == 1
