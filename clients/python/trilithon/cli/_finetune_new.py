"""The verbs that come before a job and make one: validate, estimate, preview, create, run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from trilithon._job_types import FINAL_STATES, Job, JobFailure
from trilithon.cli import _extra
from trilithon.cli import _finetune_text as text
from trilithon.cli._connect import connect
from trilithon.cli._finetune_doors import (
    Checked,
    Door,
    Uploads,
    default_store,
    is_file_id,
    is_job_id,
    opened,
    opened_store,
)
from trilithon.cli._finetune_follow import Follow, duration
from trilithon.cli._output import (
    EXIT_ENGINE_LOST,
    EXIT_INTERRUPTED,
    EXIT_INVALID_DATA,
    EXIT_JOB_FAILED,
    EXIT_OK,
    EXIT_USAGE,
    explain,
    print_json,
    printable,
)
from trilithon.cli._parser import UsageError
from trilithon.errors import FailedPrecondition, InvalidArgument, TrilithonError

_DATA_CODES = ("invalid_training_file", "invalid_validation_file")
_USAGE_CODES = ("invalid_config", "model_not_found", "estimate_exceeded", "lora_not_servable", "unsupported_method")
_LOST_CODES = ("rank_lost", "rank_hung", "rendezvous_failed", "lease_lost", "store_unavailable")


# -- before a job ---------------------------------------------------------------------------------------------


def validate(args: argparse.Namespace) -> int:
    if args.url is not None:
        return _validate_there(args)
    local = _local("validate")
    config = _reader().data_config(args.model, args.task, args.data, args.set)
    validation = None if args.validation is None else _data_file(local, args.validation, "--validation")
    data = _data_file(local, args.data, "DATA")
    store = args.store or default_store()
    report = local.validated(config, data, validation, store=store, max_findings=args.max_errors)
    if args.output == "json":
        print_json(report.to_json())
    else:
        print("\n".join(map(printable, report.text(most=args.max_errors).splitlines())))
    return EXIT_OK if report.ok else EXIT_INVALID_DATA


def _validate_there(args: argparse.Namespace) -> int:
    if args.set or args.validation:
        raise UsageError("--set and --validation are for checks on this machine. Given: --url too.")
    with connect(args) as client:
        known = is_file_id(str(args.data))
        file_id = str(args.data) if known else client.files.upload(_existing(args.data, "DATA")).id
        try:
            most = args.max_errors or 1000
            report = client.files.validate(file_id, model=args.model, task=args.task, max_findings=most)
        finally:
            if not known:
                client.files.delete(file_id)
    if args.output == "json":
        print_json(report)
    else:
        text.print_report(report)
    return EXIT_OK if report.ok else EXIT_INVALID_DATA


def estimate(args: argparse.Namespace) -> int:
    if args.probe and args.url is not None:
        raise UsageError("--probe measures on this machine. Given: --url too.")
    config = _config(args)
    with opened(args, local=True) as door, Uploads(door, config) as (taken, _):
        checked = door.check(taken, probe=args.probe)
    _print_checked(args, checked, config)
    return EXIT_OK if checked.estimate.get("allowed") else EXIT_USAGE


def preview(args: argparse.Namespace) -> int:
    local = _local("preview")
    config = _reader().data_config(args.model, args.task, args.data, args.set)
    found = local.preview(config, _data_file(local, args.data, "DATA"), args.row, store=args.store or default_store())
    if isinstance(found[0], str):
        details = "; ".join(found[1:])
        error = InvalidArgument(f"{found[0]}{f' ({details})' if details else ''}", code="invalid_training_file")
        return explain(error, as_json=args.output == "json")
    if args.output == "json":
        print_json(found)
    else:
        _extra.load("trilithon.cli._finetune_preview", verb="finetune preview", extra="client").show(found)
    return EXIT_OK


# -- a job --------------------------------------------------------------------------------------------------------


def create(args: argparse.Namespace) -> int:
    asks = not (args.yes or args.dry_run or args.print_config)
    if asks and not sys.stdin.isatty():
        raise UsageError("create asks before it queues a job, and there is no terminal. Given: no -y.")
    config = _config(args)
    with opened(args) as door:
        with Uploads(door, config) as (taken, uploads):
            checked = door.check(taken)
            if args.print_config:
                print(_reader().as_yaml(_with_paths(checked.resolved or config, config)), end="")
                return EXIT_OK
            if args.dry_run or not checked.estimate.get("allowed"):
                _print_checked(args, checked, config)
                return EXIT_OK if checked.estimate.get("allowed") else EXIT_USAGE
            if asks and not _confirmed(checked, config):
                print("Nothing was queued.", file=sys.stderr)
                return EXIT_OK
            job = door.create(taken, idempotency_key=args.idempotency_key)
            uploads.kept = True
        if args.wait:
            return _wait(args, door, job)
    if args.output == "json":
        print_json(text.job_document(job))
    else:
        print(f"{job.id}  {job.state}")
        print(f"Watch it with: trilithon finetune events {job.id} -f{_where(args)}")
    return EXIT_OK


def _confirmed(checked: Checked, config: Mapping[str, Any]) -> bool:
    """Show what the job takes and ask."""
    text.print_checked(checked, config)
    print("Queue this job? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _wait(args: argparse.Namespace, door: Door, job: Job) -> int:
    """Follow a job to its end; Ctrl-C leaves it running."""
    print(job.id, file=sys.stderr)
    try:
        with Follow() as follow:
            for event in door.events(job.id, follow=True):
                follow(event)
    except KeyboardInterrupt:
        state = door.get(job.id).state
        print(
            f"{job.id} goes on ({state}). Watch it with: trilithon finetune events {job.id} -f{_where(args)}",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    return _ended(args, door.get(job.id))


def run(args: argparse.Namespace) -> int:
    with opened_store(args) as door:
        runner = _extra.load("trilithon.cli._finetune_run", verb="finetune run", extra="jobs")
        if is_job_id(str(args.config)):
            if args.set:
                raise UsageError("--set is for a new job; one that is run again keeps its configuration. Given: both.")
            job = _again(door, str(args.config))
            seen = job.last_seq
            job = door.resume(job.id)
        else:
            config = _config(args)
            with Uploads(door, config) as (taken, uploads):
                checked = door.check(taken)
                if not checked.estimate.get("allowed"):
                    _print_checked(args, checked, config)
                    return EXIT_USAGE
                if args.output == "text":
                    text.print_checked(checked, config)
                job, seen = door.create(taken, checked=checked.outcome), 0
                uploads.kept = True
        print(job.id, file=sys.stderr)
        job, interrupted = runner.in_foreground(door, job, after_seq=seen)
        attempts = door.paths.job(job.id).root / "attempts"
    code = _ended(args, job)
    if job.state == "failed" and args.output == "text":
        print(f"           What its processes said: {attempts}", file=sys.stderr)
    return EXIT_INTERRUPTED if interrupted and job.state != "succeeded" else code


def _again(door: Door, job_id: str) -> Job:
    job = door.get(job_id)
    if job.finished:
        raise FailedPrecondition(f"{job_id} is {job.state}, which is final. Run its configuration as a new job.")
    return job


def _ended(args: argparse.Namespace, job: Job) -> int:
    """Say how a job ended or rests, and what to do next; the exit code."""
    if args.output == "json":
        print_json(text.job_document(job))
    if job.state == "succeeded":
        if args.output == "text":
            took = f" in {duration(job.finished_at - job.started_at)}" if job.started_at else ""
            print(f"{job.id} succeeded{took}: {job.progress.step} steps, {job.progress.trained_tokens:,} tokens.")
            print(f"  result   {job.fine_tuned_model}")
            print(f"  serve    {_serve(args, job)}")
            print(f"  ask for  {job.fine_tuned_model}, or a name of your own:")
            print(f"           trilithon finetune deploy {job.id} --as NAME{_where(args)}")
        return EXIT_OK
    if job.state not in FINAL_STATES:
        print(f"{job.id} is {job.state}; its last checkpoint stays.", file=sys.stderr)
        if job.error is not None and job.error.code:
            print(f"  {printable(job.error.message)} {printable(job.error.hint)}".rstrip(), file=sys.stderr)
        print(f"Go on with: trilithon finetune run {job.id}{_where(args)}", file=sys.stderr)
        return EXIT_JOB_FAILED
    if job.state == "cancelled" or job.error is None:
        print(f"{job.id} is {job.state}; its last checkpoint stays.", file=sys.stderr)
        return EXIT_JOB_FAILED
    error = job.error
    described = TrilithonError(f"{job.id} failed: {error.message} {error.hint}".rstrip(), code=error.code)
    return explain(described, _failure_code(error), as_json=args.output == "json")


def _failure_code(error: JobFailure) -> int:
    """A failed job's exit code: that of the same mistake found before it was queued, else 4, or 6 for lost ranks."""
    codes = {
        **dict.fromkeys(_DATA_CODES, EXIT_INVALID_DATA),
        **dict.fromkeys(_USAGE_CODES, EXIT_USAGE),
        **dict.fromkeys(_LOST_CODES, EXIT_ENGINE_LOST),
    }
    return codes.get(error.code, EXIT_JOB_FAILED)


def _serve(args: argparse.Namespace, job: Job) -> str:
    """How the result is served: a server that has the store's jobs serves what they make."""
    if args.store is None and args.action != "run":
        return "it is served already, by the server that made it"
    store = args.store or default_store()
    return f"trilithon serve {job.model} --jobs{'' if store == default_store() else f' {store}'}"


def _where(args: argparse.Namespace) -> str:
    """The flag that names the same door to another verb."""
    if args.store is None and args.action != "run":
        return f" --url {args.url}" if args.url else ""
    store = args.store or default_store()
    return " --store" if store == default_store() else f" --store {store}"


# -- what several share ----------------------------------------------------------------------------------------


def _config(args: argparse.Namespace) -> dict[str, Any]:
    """The configuration file, its overrides made."""
    config: dict[str, Any] = _reader().load(args.config, args.set)
    return config


def _reader() -> ModuleType:
    return _extra.load("trilithon.cli._finetune_config", verb="finetune", extra="client")


def _print_checked(args: argparse.Namespace, checked: Checked, config: Mapping[str, Any]) -> None:
    if args.output == "json":
        print_json(text.checked_document(checked))
    else:
        text.print_checked(checked, config)


def _with_paths(resolved: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved configuration with its files as the user named them."""
    named = {name: config[name] for name in ("training_file", "validation_file") if config.get(name)}
    passages = config.get("options", {}).get("passages")
    options = {**resolved.get("options", {}), **({} if passages is None else {"passages": passages})}
    return {**resolved, **named, **({"options": options} if options else {})}


def _local(verb: str) -> ModuleType:
    return _extra.load("trilithon.cli._finetune_local", verb=f"finetune {verb}", extra="jobs")


def _data_file(local: ModuleType, path: Path, what: str) -> Any:
    return local.DataFile(_existing(path, what), path.name)


def _existing(path: Path, what: str) -> Path:
    if not path.is_file():
        raise UsageError(f"{what} must be a file. Given: {path}, which is not there.")
    return path
