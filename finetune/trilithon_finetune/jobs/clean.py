"""
Take away what nothing needs any more: of jobs that are over, of data that were prepared, of files beyond their time.

What stays whatever the policy says: a job's result, its last and its best checkpoint, every directory that a model of
the catalogue stands on, and everything of a job that is not over. What goes loses its name first and its files then,
so that a cleaning which is killed leaves a store that reads well; the next one does the rest.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sqlalchemy import RowMapping, select, update

from trilithon_finetune.jobs.policy import Policy, read_policy
from trilithon_finetune.jobs.schema import checkpoints
from trilithon_finetune.jobs.schema import jobs as job_rows
from trilithon_finetune.jobs.service import Jobs
from trilithon_finetune.jobs.states import FINAL
from trilithon_finetune.paths import JobPaths
from trilithon_server.catalog import Catalog

_STEP = re.compile(r"step_(\d{8,})")
_DAY_S = 86_400
_GONE = ".tmp-old-"  # as a run calls what it removes
_HIDDEN = "."  # directories whose names begin so were left unfinished by somebody, this cleaning included

Kind = Literal["checkpoint", "attempt", "prepared", "file", "leftover"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """
    One thing that goes.

    Attributes:
        kind: `attempt`: its logs; `leftover`: what somebody left unfinished.
        name: its place in the store; of a file, its id.
        bytes: that it takes.
    """

    kind: Kind
    name: str
    bytes: int


def clean(jobs: Jobs, *, dry_run: bool = False) -> list[Removal]:
    """
    Take away what the store's policy no longer keeps, also keys of requests that are out of date.

    Args:
        dry_run: only tell.
    Returns:
        What went, or would go.
    Raises:
        FinetuneError: `invalid_config`, of the policy. CatalogError: the catalogue cannot be read; nothing goes then.
        Unavailable: the database is away. OSError: a directory cannot be changed.
    """
    policy = read_policy(jobs.paths)
    found: list[Removal] = []
    for path, removal in _of_jobs(jobs, policy):
        if not dry_run:
            _take_away(jobs, path, removal)
        found.append(removal)
    with _nobody_prepares(jobs) as alone:
        for path, removal in _of_prepared(jobs, policy) if alone else ():
            if not dry_run:
                _remove(path)
            found.append(removal)
    for path, removal in _of_dead_fronts(jobs):
        if not dry_run:
            _remove(path)
        found.append(removal)
    files, leftovers = jobs.beyond_their_time()
    found += [Removal(kind="file", name=file.id, bytes=file.bytes) for file in files]
    found += [_removal(jobs, "leftover", path) for path in leftovers]
    if not dry_run:
        jobs.sweep()
    return found


def _of_jobs(jobs: Jobs, policy: Policy) -> Iterator[tuple[Path, Removal]]:
    if policy.checkpoint_days is None:
        return
    served = {entry.path for entry in Catalog(jobs.paths.models).entries(tenant=None)}
    final = job_rows.c.state.in_([str(state) for state in FINAL])
    old = job_rows.c.finished_at <= jobs.database.now - int(policy.checkpoint_days * _DAY_S * 1000)
    query = select(job_rows.c.id, job_rows.c.attempt, job_rows.c.result).where(final, old)
    with jobs.database.read() as connection:
        rows = connection.execute(query.order_by(job_rows.c.created_seq)).mappings().all()
    for row in rows:
        paths = jobs.paths.job(row["id"])
        for path in _checkpoints_to_go(paths, row, served):
            yield path, _removal(jobs, "checkpoint", path)
        for path in _directories(paths.root / "attempts"):
            if path.name.isdecimal() and int(path.name) <= row["attempt"] - policy.attempts:
                yield path, _removal(jobs, "attempt", path)
        for place in (paths.root, paths.run, paths.root / "attempts"):
            for path in _directories(place):
                if path.name.startswith(_HIDDEN):
                    yield path, _removal(jobs, "leftover", path)


def _checkpoints_to_go(paths: JobPaths, row: RowMapping, served: set[Path]) -> list[Path]:
    """All but the last, the best and those that are served; none where it is not known which one is the best."""
    matches = ((_STEP.fullmatch(path.name), path) for path in _directories(paths.run))
    found = {int(match[1]): path for match, path in matches if match}
    if not found:
        return []
    last = max(found)
    try:
        best = _best(found[last], row)
        pointer = (paths.run / "latest").read_text("utf-8").strip()
    except (OSError, ValueError, KeyError, TypeError):
        return []
    kept = {last, best}
    return [
        path
        for step, path in sorted(found.items())
        if step not in kept and path.name != pointer and path.resolve() not in served
    ]


def _best(last: Path, row: RowMapping) -> int | None:
    """The step that was exported, or, of a job that has not come so far, the best until its last checkpoint."""
    if row["result"] is not None:
        return int(row["result"]["export"]["step"])
    best = json.loads((last / "manifest.json").read_bytes())["state"].get("best")
    return int(best["step"]) if best else None


def _take_away(jobs: Jobs, path: Path, removal: Removal) -> None:
    """The row first: who reads it never misses the directory."""
    if removal.kind == "checkpoint":
        job_id, step = path.parent.parent.name, int(path.name.removeprefix("step_"))
        with jobs.database.write() as connection:
            gone = update(checkpoints).where(checkpoints.c.job_id == job_id, checkpoints.c.step == step)
            connection.execute(gone.values(servable=False))
    _remove(path)


def _remove(path: Path) -> None:
    if path.name.startswith(_HIDDEN):
        shutil.rmtree(path)
        return
    gone = path.with_name(f"{_GONE}{path.name}")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone)


# -- prepared data -------------------------------------------------------------------------------------------------


def _of_prepared(jobs: Jobs, policy: Policy) -> Iterator[tuple[Path, Removal]]:
    """Nobody prepares meanwhile, so what is unfinished was left, and what no job names is nobody's."""
    if policy.prepared_days is None:
        return
    live = select(job_rows.c.id).where(job_rows.c.state.not_in([str(state) for state in FINAL]))
    with jobs.database.read() as connection:
        ids = connection.execute(live).scalars().all()
    needed = {_prepared_of(jobs.paths.job(job_id)) for job_id in ids}
    before = time.time() - policy.prepared_days * _DAY_S
    for path in _directories(jobs.paths.root / "prepared"):
        if path.name.startswith(_HIDDEN):
            yield path, _removal(jobs, "leftover", path)
        elif path.name not in needed and path.stat().st_mtime <= before:
            yield path, _removal(jobs, "prepared", path)


def _prepared_of(paths: JobPaths) -> str | None:
    try:
        return str(json.loads(paths.prepared.read_bytes())["prepared"])
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _nobody_prepares(jobs: Jobs) -> Iterator[bool]:
    """Whether the block has the prepared data for itself; not where a phase works there now."""
    directory = jobs.paths.root / "prepared"
    if not directory.is_dir():
        yield False
        return
    with jobs.paths.prepared_lock.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _of_dead_fronts(jobs: Jobs) -> Iterator[tuple[Path, Removal]]:
    """Where models were merged by somebody who is gone: no merging takes a day."""
    for path in _directories(jobs.paths.root):
        if path.name.startswith(_HIDDEN) and path.stat().st_mtime <= time.time() - _DAY_S:
            yield path, _removal(jobs, "leftover", path)


# -- directories -----------------------------------------------------------------------------------------------------


def _directories(place: Path) -> list[Path]:
    if not place.is_dir():
        return []
    return sorted(path for path in place.iterdir() if path.is_dir() and not path.is_symlink())


def _removal(jobs: Jobs, kind: Kind, path: Path) -> Removal:
    return Removal(kind=kind, name=str(path.relative_to(jobs.paths.root)), bytes=_bytes(path))


def _bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(os.lstat(os.path.join(folder, name)).st_size for folder, _, names in os.walk(path) for name in names)
