"""
Where jobs live: a server, or the job store of this machine. Verbs see one door, which answers with the client's
records.

A server needs nothing beyond the base install. The store needs the `jobs` extra, and its door is loaded only then.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trilithon import Client, DeletedAlias, _store
from trilithon._job_types import Checkpoint, Deployed, Job, JobEvent, MetricsRow
from trilithon.cli import _extra
from trilithon.cli._connect import add_server_arguments, connect
from trilithon.cli._output import plain
from trilithon.cli._parser import UsageError
from trilithon.errors import TrilithonError

FILE_FIELDS = ("training_file", "validation_file")
PASSAGES = "passages"
"""The option of a task that names a file."""
_FILE_ID = re.compile(r"file-[a-z0-9]{20}")
_JOB_ID = re.compile(r"ftjob-[a-z0-9]{20}")


@dataclass(frozen=True)
class Checked:
    """
    What a check of a job found: `report` and `resolved` are None where a server made it and keeps them.

    `outcome` is all of it, where it was made here: a job that this machine runs needs no other check.
    """

    estimate: Mapping[str, Any]
    report: Mapping[str, Any] | None = None
    resolved: Mapping[str, Any] | None = None
    outcome: Mapping[str, Any] | None = None


class Door(Protocol):
    """Jobs, wherever they are. Raises what the client raises."""

    def check(self, config: Mapping[str, Any], /, *, probe: bool = False) -> Checked:
        """What such a job would take; its files are ids. `probe`: by steps of the job, on this machine alone."""
        ...

    def create(self, config: Mapping[str, Any], /, *, idempotency_key: str | None = None) -> Job:
        """Queue a job; its files are ids."""
        ...

    def upload(self, path: Path, /) -> str:
        """Store a data file; its id."""
        ...

    def forget(self, file_id: str, /) -> None:
        """Remove an uploaded file."""
        ...

    def get(self, job_id: str, /) -> Job:
        """One job."""
        ...

    def list(self, *, state: str | None = None) -> Sequence[Job]:
        """Every job, newest first, or those in one state."""
        ...

    def cancel(self, job_id: str, /) -> Job:
        """End a job."""
        ...

    def pause(self, job_id: str, /) -> Job:
        """Let a job write a checkpoint and rest."""
        ...

    def resume(self, job_id: str, /) -> Job:
        """Let a job go on from its last checkpoint."""
        ...

    def events(self, job_id: str, /, *, follow: bool = False, after_seq: int = 0) -> Iterator[JobEvent]:
        """Events in their order; `follow`: until the final one."""
        ...

    def checkpoints(self, job_id: str, /) -> Sequence[Checkpoint]:
        """Newest first."""
        ...

    def metrics(self, job_id: str, /) -> Sequence[MetricsRow]:
        """The numbers of every step."""
        ...

    def logs(self, job_id: str, /, *, attempt: int | None, rank: int) -> str:
        """The end of what a rank printed."""
        ...

    merges: bool
    """Whether `fetch` also gives an adapter merged into its base."""

    def fetch(self, job_id: str, /, *, step: int | None, into: Path, merged: bool = False) -> None:
        """Write what a job made, or a checkpoint, into an empty directory."""
        ...

    def deploy(self, job_id: str, alias: str, /, *, step: int | None) -> Deployed:
        """Point an alias at what a job made, or at a checkpoint."""
        ...

    def undeploy(self, alias: str, /, *, expected: str | None) -> DeletedAlias:
        """Take an alias away; `expected`: only where it points to this."""
        ...


class ServerDoor:
    """Jobs of a server."""

    merges = True

    def __init__(self, client: Client) -> None:
        self._jobs, self._files, self._models = client.jobs, client.files, client.models
        self.create, self.get, self.list = self._jobs.create, self._jobs.get, self._jobs.list
        self.cancel, self.pause, self.resume = self._jobs.cancel, self._jobs.pause, self._jobs.resume
        self.events, self.checkpoints, self.metrics = self._jobs.events, self._jobs.checkpoints, self._jobs.metrics
        self.logs, self.deploy = self._jobs.logs, self._jobs.deploy

    def undeploy(self, alias: str, *, expected: str | None) -> DeletedAlias:
        return self._models.delete_alias(alias, expected_target=expected)

    def check(self, config: Mapping[str, Any], *, probe: bool = False) -> Checked:
        assert not probe, "a server is not measured from here"
        return Checked(plain(self._jobs.estimate(config)))

    def upload(self, path: Path) -> str:
        return self._files.upload(path).id

    def forget(self, file_id: str) -> None:
        self._files.delete(file_id)

    def fetch(self, job_id: str, *, step: int | None, into: Path, merged: bool = False) -> None:
        made = self._jobs.export(job_id, step=step, format="model" if merged else None)
        try:
            with tempfile.TemporaryDirectory(dir=into.parent) as scratch:
                archive = Path(scratch) / "export.zip"
                self._files.download(made.id, archive)
                with zipfile.ZipFile(archive) as files:
                    files.extractall(into)
        finally:
            self._files.delete(made.id)  # it was made for this


def add_door_arguments(parser: argparse.ArgumentParser, *, local: bool = False) -> None:
    """Add `--url` and its kin, and `--store`; `local`: the store is the default."""
    add_server_arguments(parser, model=False)
    add_store_arguments(parser, note="the default here" if local else "instead of a server")


def add_store_arguments(parser: argparse.ArgumentParser, *, note: str = "") -> None:
    """Add `--store` and `--database`."""
    group = parser.add_argument_group("job store")
    path = default_store()
    words = f"directory of the jobs of this machine{f', {note}' if note else ''}; alone: {path}"
    group.add_argument("--store", type=Path, metavar="DIR", nargs="?", const=path, help=words)
    group.add_argument("--database", metavar="URL", help="postgresql://HOST/NAME [SQLite in the store]")


def default_store() -> Path:
    """The job store that verbs use unless told otherwise, and `trilithon serve --jobs` too."""
    return _store.home() / "finetune"


@contextlib.contextmanager
def opened(args: argparse.Namespace, *, local: bool = False) -> Iterator[Door]:
    """The door that the arguments name."""
    if args.store is not None and args.url is not None:
        raise UsageError("--store and --url name two places for jobs. Given: both. Choose one.")
    if args.store is not None or (local and args.url is None):
        with opened_store(args) as door:
            yield door
        return
    if args.database is not None:
        raise UsageError("--database goes with --store. Given: a server.")
    with connect(args) as client:
        yield ServerDoor(client)


@contextlib.contextmanager
def opened_store(args: argparse.Namespace) -> Iterator[Any]:
    """The door to the store of this machine."""
    database = database_of(args)
    module = _extra.load("trilithon.cli._finetune_store", verb="finetune --store", extra="jobs")
    with module.open_store(args.store or default_store(), database) as door:
        yield door


def database_of(args: argparse.Namespace) -> str | None:
    """The database's URL; None for SQLite. Raises UsageError: it holds a password."""
    url: str | None = args.database
    who, at, _ = (url or "").partition("://")[2].partition("@")
    if at and ":" in who:
        raise UsageError("--database must hold no password: others can read it there. Put it into ~/.pgpass.")
    return url


class Uploads:
    """Files that a configuration names by their paths, stored and replaced by their ids; removed unless kept."""

    def __init__(self, door: Door, config: Mapping[str, Any]) -> None:
        self._door, self._given = door, dict(config)
        self._new: list[str] = []
        self.kept = False

    def __enter__(self) -> tuple[dict[str, Any], Uploads]:
        try:
            for name in FILE_FIELDS:
                value = self._given.get(name)
                if value is not None and not is_file_id(value):
                    self._given[name] = self._upload(name, Path(value))
            options = dict(self._given.get("options") or {})
            passages = options.get(PASSAGES)
            if isinstance(passages, str) and not is_file_id(passages):
                options[PASSAGES] = self._upload(f"options.{PASSAGES}", Path(passages))
                self._given["options"] = options
        except BaseException:
            self._remove()
            raise
        return self._given, self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and not self.kept:
            self._remove()
        elif not self.kept:
            # A request that was cut off may have made its job all the same, which then reads them.
            with contextlib.suppress(TrilithonError):
                self._remove()

    def _upload(self, name: str, path: Path) -> str:
        if not path.is_file():
            raise UsageError(f"{name} must be a file, or the id of one. Given: {path}, which is not there.")
        file_id = self._door.upload(path)
        self._new.append(file_id)
        return file_id

    def _remove(self) -> None:
        while self._new:
            self._door.forget(self._new.pop())


def is_file_id(text: str) -> bool:
    """
    >>> is_file_id("file-0k2j4h5g6f7d8s9a0q1w"), is_file_id("file-1.jsonl")
    (True, False)
    """
    return _FILE_ID.fullmatch(text) is not None


def is_job_id(text: str) -> bool:
    """
    >>> is_job_id("ftjob-0k2j4h5g6f7d8s9a0q1w"), is_job_id("job.yaml")
    (True, False)
    """
    return _JOB_ID.fullmatch(text) is not None


def job_and_step(text: str) -> tuple[str, int | None]:
    """
    A job, or a checkpoint of it.

    >>> job_and_step("ftjob-0k2j4h5g6f7d8s9a0q1w@40")
    ('ftjob-0k2j4h5g6f7d8s9a0q1w', 40)

    Raises:
        ArgumentTypeError: it is neither.
    """
    job_id, at, step = text.partition("@")
    if not is_job_id(job_id) or (at and not (step.isascii() and step.isdigit() and int(step) > 0)):
        raise argparse.ArgumentTypeError(f"must be a job's id, ftjob-..., or ID@STEP. Given: {text!r}")
    return job_id, int(step) if at else None


def job_id(text: str) -> str:
    """A job's id. Raises ArgumentTypeError."""
    if not is_job_id(text):
        raise argparse.ArgumentTypeError(f"must be a job's id, ftjob- and 20 letters and digits. Given: {text!r}")
    return text
