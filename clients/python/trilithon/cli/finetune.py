"""`trilithon finetune`: jobs that adapt a model, on a server or in the job store of this machine."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from trilithon._job_types import Job
from trilithon.cli import _extra, _finetune_compare, _finetune_logs, _finetune_results
from trilithon.cli import _finetune_arguments as arguments
from trilithon.cli import _finetune_new as new
from trilithon.cli import _finetune_text as text
from trilithon.cli._finetune_doors import Door, database_of, default_store, opened, opened_store
from trilithon.cli._output import EXIT_OK, human_bytes, print_json, print_table
from trilithon.cli._parser import Parser, UsageError


def add_arguments(parser: Parser) -> None:
    """Add the actions."""
    arguments.add(parser)


def run(args: argparse.Namespace) -> int:
    """Do what the action says."""
    return _ACTIONS[args.action](args)


# -- jobs that are there ---------------------------------------------------------------------------------------


def _ls(args: argparse.Namespace) -> int:
    with opened(args) as door:
        jobs = door.list(state=args.state)
    if args.output == "json":
        print_json([text.job_document(job) for job in jobs])
    elif not jobs:
        print("There are no jobs" + (f" that are {args.state}." if args.state else "."))
    else:
        text.print_jobs(jobs)
    return EXIT_OK


def _get(args: argparse.Namespace) -> int:
    with opened(args) as door:
        return _print_job(args, door.get(args.job))


def _pause(args: argparse.Namespace) -> int:
    with opened(args) as door:
        return _print_job(args, door.pause(args.job))


def _resume(args: argparse.Namespace) -> int:
    with opened(args) as door:
        return _print_job(args, door.resume(args.job))


def _cancel(args: argparse.Namespace) -> int:
    with opened(args) as door:
        return _print_job(args, door.cancel(args.job))


def _print_job(args: argparse.Namespace, job: Job) -> int:
    if args.output == "json":
        print_json(text.job_document(job))
    elif args.action == "get":
        text.print_job(job)
    else:
        asked = {"pause": "paused", "resume": "queued", "cancel": "cancelled"}[args.action]
        working = "" if job.state == asked else f"; it is to be {asked} as soon as it can"
        print(f"{job.id}  {job.state}{working if args.action != 'resume' else ''}")
    return EXIT_OK


def _events(args: argparse.Namespace) -> int:
    with opened(args) as door:
        for event in door.events(args.job, follow=args.follow, after_seq=args.after):
            text.print_event(event, as_json=args.output == "json")
    return EXIT_OK


def _logs(args: argparse.Namespace) -> int:
    with opened(args) as door:
        if args.follow:
            _finetune_logs.follow(door, args.job, attempt=args.attempt, rank=args.rank)
        else:
            found = door.logs(args.job, attempt=args.attempt, rank=args.rank)
            _finetune_logs.show(found, as_json=args.output == "json")
    return EXIT_OK


def _metrics(args: argparse.Namespace) -> int:
    with opened(args) as door:
        rows = text.series(door.metrics(args.job))
    if args.output == "json":
        print_json(rows)
    elif args.csv:
        text.print_csv(rows)
    else:
        text.print_series(rows)
    return EXIT_OK


def _plot(args: argparse.Namespace) -> int:
    with opened(args) as door:
        job = door.get(args.job)
        rows = text.series(door.metrics(args.job))
        steps = sorted(item.step for item in door.checkpoints(args.job))
        starts = _attempt_starts(door, job) if job.attempt > 1 else []
    if args.output == "json":
        print_json({"rows": rows, "checkpoints": steps, "attempts": starts})
        return EXIT_OK
    svg = _finetune_compare.load_plot().plot(
        rows, title=f"{job.id} ({job.model}, {job.task})", attempts=starts, checkpoints=steps
    )
    return _picture(args.output, svg)


def _attempt_starts(door: Door, job: Job) -> list[int]:
    """The first step that each attempt but the first has told of."""
    starts: dict[int, int] = {}
    for event in door.events(job.id):
        if event.kind == "step" and event.attempt > 1:
            starts.setdefault(event.attempt, int(event.data.get("step") or 0))
    return [starts[attempt] for attempt in sorted(starts)]


def _compare(args: argparse.Namespace) -> int:
    with opened(args) as door:
        jobs = _finetune_compare.compared(door, args.jobs)
    if args.output == "json":
        print_json(_finetune_compare.document(jobs))
        return EXIT_OK
    _finetune_compare.print_comparison(jobs)
    return EXIT_OK if args.output == "text" else _picture(args.output, _finetune_compare.picture(jobs))


def _picture(name: str, svg: str) -> int:
    try:
        _finetune_compare.write_picture(Path(name), svg)
    except OSError as error:
        raise UsageError(f"-o must be a file that can be written. Given: {name} ({error.strerror}).") from None
    print(name)
    return EXIT_OK


def _checkpoints(args: argparse.Namespace) -> int:
    with opened(args) as door:
        found = door.checkpoints(args.job)
    if args.output == "json":
        print_json(list(found))
    elif not found:
        print(f"{args.job} has no checkpoint yet.")
    else:
        text.print_checkpoints(found)
    return EXIT_OK


# -- results ---------------------------------------------------------------------------------------------------------


def _export(args: argparse.Namespace) -> int:
    job_id, step = args.job
    with opened(args) as door:
        job = door.get(job_id)
        made = _finetune_results.export(door, job, step=step, format=args.format, base=args.base, out=args.out)
    if args.json:
        print_json({"directory": str(args.out), "format": made, "job": job_id, "step": step})
        return EXIT_OK
    print(f"{args.out}: {made}")
    base = f" --base {args.base or job.model}" if made == "peft" else ""
    print(f"Verify it with: trilithon finetune verify {args.out}{base}")
    return EXIT_OK


def _verify(args: argparse.Namespace) -> int:
    return _finetune_results.verify(args.directory, args.base, as_json=args.output == "json")


def _deploy(args: argparse.Namespace) -> int:
    job_id, step = args.job
    with opened(args) as door:
        deployed = door.deploy(job_id, args.alias, step=step)
    if args.output == "json":
        print_json(deployed)
    else:
        before = f" (was {deployed.previous})" if deployed.previous else ""
        print(f"{deployed.alias} -> {deployed.model}{before}")
    return EXIT_OK


def _undeploy(args: argparse.Namespace) -> int:
    with opened(args) as door:
        gone = door.undeploy(args.alias, expected=args.expected)
    if args.output == "json":
        print_json(gone)
    else:
        print(f"{gone.alias} is gone; {gone.target} stays.")
    return EXIT_OK


def _worker(args: argparse.Namespace) -> int:
    runner = _extra.load("trilithon.cli._finetune_run", verb="finetune worker", extra="jobs")
    return int(runner.work(args.store or default_store(), database_of(args), slots=args.slots))


def _clean(args: argparse.Namespace) -> int:
    with opened_store(args) as door:
        gone = door.clean(dry_run=args.dry_run)
    if args.output == "json":
        print_json(gone)
        return EXIT_OK
    if gone:
        print_table(("what", "where", "size"), [(item.kind, item.name, human_bytes(item.bytes)) for item in gone])
    verb = "would go" if args.dry_run else "went"
    things = "1 thing" if len(gone) == 1 else f"{len(gone)} things"
    print(f"{things} {verb}, {human_bytes(sum(item.bytes for item in gone))}.")
    return EXIT_OK


_ACTIONS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "validate": new.validate,
    "estimate": new.estimate,
    "preview": new.preview,
    "create": new.create,
    "run": new.run,
    "ls": _ls,
    "get": _get,
    "events": _events,
    "logs": _logs,
    "metrics": _metrics,
    "plot": _plot,
    "compare": _compare,
    "pause": _pause,
    "resume": _resume,
    "cancel": _cancel,
    "checkpoints": _checkpoints,
    "export": _export,
    "verify": _verify,
    "deploy": _deploy,
    "undeploy": _undeploy,
    "worker": _worker,
    "clean": _clean,
}
