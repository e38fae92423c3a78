"""
One claimed job, walked through its phases by a worker that holds the lease.

    validating:  validate --> queued
    queued:      prepare --> train --> export --> verify --> deploy --> succeeded

Every phase is processes of their own, watched from here: what they say is tailed into the table, the lease is renewed,
the owner's wish is obeyed. No transaction is open meanwhile. Whatever ends an attempt ends in
`ends.py`, or nowhere, when the lease is lost: then nothing may be touched any more.
"""

from __future__ import annotations

import errno
import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from trilithon.errors import Unavailable
from trilithon_finetune.errors import JobError
from trilithon_finetune.estimate import compared
from trilithon_finetune.jobs.ends import give_up, release, rest
from trilithon_finetune.jobs.jobfile import LEASE_FILE, LOCK_FILE, write_job_file, write_lease
from trilithon_finetune.jobs.launch import Exit, Launcher, LaunchHandle, LaunchSpec
from trilithon_finetune.jobs.leases import Lease
from trilithon_finetune.jobs.moves import SOUND, Ending, LeaseLost, NewEvent, checked_columns
from trilithon_finetune.jobs.news import NewsDesk
from trilithon_finetune.jobs.outcome import STOPPED, AttemptFailed, bug, error_of, phase_data
from trilithon_finetune.jobs.queue import Move, Verified
from trilithon_finetune.jobs.reservations import lack
from trilithon_finetune.jobs.results import collect_results
from trilithon_finetune.jobs.service import Jobs
from trilithon_finetune.jobs.settings import WorkerSettings
from trilithon_finetune.jobs.states import WORKING, JobState
from trilithon_server.catalog import Catalog, CatalogConflict, CatalogError

_log = logging.getLogger(__name__)
S = JobState

Reason = Literal["pause", "cancel", "release", "time_limit"]
_KILL_AFTER_S = 5.0  # beyond the grace that the gang itself keeps


class Interrupted(Exception):
    """The job was asked to stop, and has."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


class JobRun:
    """
    What a worker does with one claim. Call it from a thread that lives as long as the worker.

    Args:
        stop: set when the worker is to end: the job is given back in good order.
    """

    def __init__(
        self, lease: Lease, *, jobs: Jobs, launcher: Launcher, settings: WorkerSettings, stop: threading.Event
    ) -> None:
        self._lease, self._jobs, self._launcher = lease, jobs, launcher
        self._settings, self._stop = settings, stop
        self._paths = jobs.paths.job(lease.job.id)
        self._attempt = lease.job.attempt
        self._directory = self._paths.attempt(self._attempt)
        self._news = NewsDesk(lease, jobs=jobs)

    def __call__(self) -> None:
        """Until the job is done, given back or lost."""
        try:
            try:
                self._begin()
                if self._lease.job.state is S.VALIDATING:
                    self._validate()
                else:
                    self._work()
            except Interrupted as interrupted:
                self._interrupted(interrupted.reason)
            except AttemptFailed as failed:
                names = ("report", "estimate") if self._lease.job.state is S.VALIDATING else ()
                found = {name: failed.data[name] for name in names if name in failed.data}
                give_up(self._lease, failed.error, settings=self._settings, found=found)
            except LeaseLost:
                raise
            except Exception as error:  # whatever it was, the job must not hang on it
                _log.exception("job %s: attempt %d failed", self._lease.job.id, self._attempt)
                give_up(self._lease, _of_system(error), settings=self._settings)
        except LeaseLost as lost:
            _log.warning("%s", lost)

    # -- phases -------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lease.look()
        write_lease(self._directory, self._lease.claim.token)
        catalog = Catalog(self._jobs.paths.models)
        settings = self._settings
        write_job_file(
            self._lease.job, jobs=self._jobs, catalog=catalog, models=settings.models, concepts=settings.concepts
        )

    def _validate(self) -> None:
        data = self._phase("validate")
        moves = [Move(S.QUEUED, (self._news.told("validated", SOUND),))]
        if self._lease.look() == "pause":
            moves.append(Move(S.PAUSED, (_event("paused", "The job rests until it is resumed."),)))
        self._lease.write(*moves, values={**checked_columns(data), "next_attempt": self._attempt}, release=True)

    def _work(self) -> None:
        self._phase("prepare")
        self._wait_for_room()
        self._move(S.STARTING, self._news.told("prepared", "The data is prepared."))
        self._train()
        self._move(S.EXPORTING, self._news.told("export_started", "The result is being written."))
        exported = self._phase("export")
        started = self._news.told("verify_started", "It is read back and compared with what was trained.")
        written = self._news.told("exported", "The result is written.", exported)
        needed = compared(self._lease.job.estimate, exported["peak_bytes"])
        self._lease.write(Move(S.VERIFYING, (written, started)), values={"estimate": needed})
        verified = self._phase("verify")
        served = self._serve(exported)
        files, warnings = collect_results(self._jobs, self._lease.job)
        events = (self._news.told("verified", "The result is what was trained.", verified), served, *warnings)
        done = _event("succeeded", f"The job is done; its result is {self._lease.job.name}.")
        result = {"export": exported, "verify": verified}
        self._lease.write(
            Move(S.SUCCEEDED, (*events, done)),
            values={"result": result, "result_files": list(files), "error": None},
            release=True,
            ending=Ending(outcome="succeeded"),
            verified=Verified(exported["step"], verified.get("numbers", {})),
        )

    def _wait_for_room(self) -> None:
        """A server on this host comes first. Nothing runs for the job meanwhile, and it can be paused and cancelled."""
        told = False
        while (reason := lack(self._jobs.paths, self._config, self._lease.job.estimate)) is not None:
            if not told:
                self._lease.write(Move(None, (_event("waiting", reason),)))
                told = True
            self._obey()
            time.sleep(self._settings.look_s)

    def _phase(self, name: str) -> dict[str, Any]:
        handle = self._start(name, self._settings.phase_command, name, nproc=1)
        return phase_data(self._directory, name, self._watch(name, handle))

    def _train(self) -> None:
        layout = self._config["parallel"]
        nproc = layout["tp"] * layout["pp"] * layout["dp"]
        handle = self._start("train", self._settings.train_command, nproc=nproc)
        note = functools.partial(self._lease.write, Move(), values={"launch_handle": handle.token()})
        ended = self._watch("train", handle, first=note)
        if ended.code != 0:
            raise AttemptFailed(error_of(self._directory, "train", ended))
        if self._lease.job.state is S.STARTING:
            self._move(S.RUNNING, _event("running", "Nothing is left to train."))

    def _serve(self, exported: Mapping[str, Any]) -> NewEvent:
        kind, digest, step = exported["kind"], exported["digest"], exported["step"]
        try:
            return self._news.serve(self._paths.export, kind=kind, digest=digest, step=step, checkpoint=False)
        except CatalogConflict as error:
            raise AttemptFailed(JobError(code="export_failed", message=str(error))) from None

    def _start(self, name: str, command: tuple[str, ...], *arguments: str, nproc: int) -> LaunchHandle:
        self._obey()
        return self._launcher.start(
            LaunchSpec(
                name=name,
                command=(*command, *arguments, str(self._paths.root), "--attempt", str(self._attempt)),
                nproc=nproc,
                directory=self._directory,
                lock=self._paths.root / LOCK_FILE,
                lease=self._directory / LEASE_FILE,
                token=self._lease.claim.token,
                environment={
                    "TRILITHON_JOB_ID": self._lease.job.id,
                    "TRILITHON_ATTEMPT": str(self._attempt),
                    "TRILITHON_LEASE_FILE": str(self._directory / LEASE_FILE),
                    "TRILITHON_RUN_DIR": str(self._paths.run),
                },
                grace_s=self._settings.grace_s,
            )
        )

    @property
    def _config(self) -> Mapping[str, Any]:
        return self._lease.job.resolved or self._lease.job.config

    def _move(self, to: JobState, *events: NewEvent) -> None:
        self._lease.write(Move(to, events))

    # -- watching -----------------------------------------------------------------------------------------------

    def _watch(self, name: str, handle: LaunchHandle, *, first: Callable[[], object] | None = None) -> Exit:
        """
        Until the processes have ended; whatever goes wrong here, none stays behind.

        Raises:
            Interrupted: they were asked to end. LeaseLost: they were killed.
        """
        try:
            if first is not None:
                first()
            return self._follow(name, handle)
        except BaseException:
            handle.kill()
            raise

    def _follow(self, name: str, handle: LaunchHandle) -> Exit:
        reason: Reason | None = None
        asked_at = 0.0
        while True:
            ended = handle.poll()
            caught_up = self._catch_up()
            if ended is not None and caught_up:
                if reason is None:
                    return ended
                if reason != "pause" or ended.code in (0, *STOPPED) or error_of(self._directory, name, ended).retryable:
                    raise Interrupted(reason)
                return ended
            self._lease.beat()
            wish = self._wish()
            if wish is not None and wish != reason:
                if reason is None:
                    asked_at = time.monotonic()
                    handle.stop()
                reason = wish
                self._tell(reason)
            if reason is not None and time.monotonic() - asked_at > self._settings.grace_s + _KILL_AFTER_S:
                handle.kill()
            if caught_up:
                time.sleep(self._settings.tick_s)

    def _catch_up(self) -> bool:
        try:
            return self._news.catch_up()
        except Unavailable:
            self._lease.check()
            time.sleep(self._settings.tick_s)
            return False

    def _wish(self) -> Reason | None:
        """Why the job should stop now, if it should."""
        job, hours = self._lease.job, self._config["limits"]["max_hours"]
        if self._lease.desired == "cancel":
            return "cancel"
        if self._lease.desired == "pause" and job.state in (*WORKING, S.PAUSING):
            return "pause"
        if hours is not None and self._lease.used_s > hours * 3600:
            return "time_limit"
        return "release" if self._stop.is_set() else None

    def _obey(self) -> None:
        """At a boundary between phases."""
        self._lease.beat()
        wish = self._wish()
        if wish is not None:
            self._tell(wish)
            raise Interrupted(wish)

    def _tell(self, wish: Reason) -> None:
        state = self._lease.job.state
        if wish == "pause" and state is not S.PAUSING:
            self._move(S.PAUSING, _event("pausing", "The job writes a checkpoint and will rest."))
        elif wish == "cancel" and state is not S.CANCELLING:
            self._move(S.CANCELLING, _event("cancelling", "The job is being cancelled."))

    def _interrupted(self, reason: Reason) -> None:
        if reason == "release":
            release(self._lease)
        elif reason == "time_limit":
            hours = self._config["limits"]["max_hours"]
            message = f"limits.max_hours allows {hours:g} hours, and they are over."
            hint = "The last checkpoint stays. Allow more, or train fewer steps, in a new job."
            error = JobError(code="time_limit", message=message, hint=hint, param="limits.max_hours")
            give_up(self._lease, error, settings=self._settings)
        else:
            rest(self._lease)


def _event(kind: str, message: str, data: Mapping[str, Any] | None = None) -> NewEvent:
    return NewEvent(kind=kind, message=message, data=data or {})


def _of_system(error: Exception) -> JobError:
    """The worker itself could not go on; its log has the trace."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "Free space, then resume the job."
        return JobError(code="disk_full", message="The disk of the job store is full.", hint=hint)
    if isinstance(error, OSError | CatalogError):
        return JobError(code="store_unavailable", message="The job store's directory or catalogue cannot be used.")
    return bug("The worker stopped on an error of its own.")
