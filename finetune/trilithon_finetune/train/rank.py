"""One rank of a job's training, under the environment of `torchrun`: join, agree, build, resume, try out, train."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from trilithon_finetune.errors import FinetuneError, JobError, refuse
from trilithon_finetune.peaks import remember_peak
from trilithon_finetune.phases.outcome import Events, write_outcome
from trilithon_finetune.resolve import layout_of
from trilithon_finetune.setup import read_job
from trilithon_finetune.train.building import (
    build_model,
    costs_of,
    evaluator_of,
    fill_weights,
    open_saver,
    plan_of,
    references_of,
    seconds_of,
    stream_of,
)
from trilithon_finetune.train.evaluation import JobEvaluator
from trilithon_finetune.train.journal import Journal
from trilithon_finetune.train.reading import ReadingStream
from trilithon_finetune.train.stream import JobStream
from trilithon_finetune.train.threads import threads_of_a_rank
from trilithon_finetune.train.tracking import open_trackers
from trilithon_finetune.train.work import Work, export_digest, open_work
from trilithon_parallel import rendezvous
from trilithon_parallel.checkpoint import (
    CheckpointError,
    Found,
    find_latest,
)
from trilithon_parallel.collectives import CollectiveError
from trilithon_parallel.config import ModelError
from trilithon_parallel.grid import Grid
from trilithon_parallel.health import HealthError, Signals, agree
from trilithon_parallel.peak import measured_peak
from trilithon_parallel.rendezvous import RendezvousError
from trilithon_parallel.step import TrainingModel
from trilithon_parallel.trainer import Ended, Trainer, peak_bytes
from trilithon_parallel.watchdog import Watchdog

EXIT_OK, EXIT_FAILED, EXIT_PEER_LOST = 0, 1, 6

TIMEOUT_S, FIRST_TIMEOUT_S = 120.0, 600.0
"""Seconds without progress that are a hang, at least; the longer one until the second step."""

PATIENCE = 10.0
"""A pass of a micro-batch may take so many times what it should."""


def main(directory: Path, attempt: int, *, probe: bool = False) -> int:
    """
    Train this rank's part to the end, and write in words why, where it ends otherwise.

    Args:
        probe: only measure what a step takes.
    Returns:
        0 done; 143 stopped in good order after a checkpoint; 6 a peer was lost; 1 failed, see `train-RANK.json`.
    """
    rank = int(os.environ.get("RANK", "0"))
    outcome = directory / "attempts" / str(attempt) / f"train-{rank}.json"
    try:
        with Signals() as signals:
            if probe:
                probe_rank(directory, attempt)
            else:
                run_rank(directory, attempt, signals)
            return signals.exit_code
    except (CollectiveError, RendezvousError) as error:
        print(f"rank {rank}: {error}", file=sys.stderr)
        return EXIT_PEER_LOST
    except Exception as error:
        job_error = _as_job_error(error)
        print(f"rank {rank}: {job_error.message}", file=sys.stderr)
        if job_error.code == "bug":
            traceback.print_exc()
        write_outcome(outcome, error=replace(job_error, attempt=attempt, rank=rank))
        return EXIT_FAILED
    finally:
        rendezvous.leave()


def _as_job_error(error: Exception) -> JobError:
    """What the job's owner is told of an exception."""
    if isinstance(error, FinetuneError):
        return error.error
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
        hint = "Lower training.micro_batch_tokens or data.max_tokens, or use more ranks."
        return JobError(code="out_of_memory", message=str(error), hint=hint)
    if isinstance(error, CheckpointError):
        known = {"checkpoint_disk_full": "disk_full", "checkpoint_busy": "lease_lost"}
        return JobError(code=known.get(error.code, "checkpoint_corrupt"), message=error.message, hint=error.hint)
    if isinstance(error, ModelError | HealthError):
        return JobError(code="invalid_config", message=error.message, hint=error.hint)
    return JobError(code="bug", message=f"{type(error).__name__}: {error}"[:2000])


def run_rank(directory: Path, attempt: int, signals: Signals) -> Ended:
    """Everything between the rendezvous and the end of the run."""
    job = read_job(directory)
    work, events = open_work(job), Events(job.paths.attempt(attempt))
    with contextlib.ExitStack() as stack:
        meeting = stack.enter_context(_meet(work, events))
        grid, model, stream = meeting.grid, meeting.model, meeting.stream
        evaluator = evaluator_of(work, stream)
        saver = open_saver(work, model, getattr(torch, job.config.dtype))
        stack.callback(saver.close)
        trainer = Trainer(
            model, stream, plan_of(work), costs_of(work, meeting.peak), saver=saver, signals=signals,
            watchdog=meeting.watchdog, evaluator=evaluator,
        )  # fmt: skip
        fill_weights(work, model, grid)
        found = find_latest(job.paths.run, axis=grid.world)
        if grid.rank == 0:
            events.tell("weights_loaded", f"The weights of {job.config.model} are loaded.")
        if isinstance(evaluator, JobEvaluator) and work.recipe.head == "preference":
            stream.references, evaluator.references = references_of(work, model)
        _try_out(model, stream, events)
        if found is not None:
            _check_same(work, found)
            trainer.resume(found, base_digest=job.base_digest if model.config.lora is not None else None)
        if grid.rank == 0:
            cursor, plan = trainer.cursor, trainer.plan
            journal = Journal(
                job.paths.run,
                events,
                stream=stream,
                schedule=work.schedule,
                evaluator=evaluator,
                evaluate_every=plan.evaluate_every,
                digest_of=functools.partial(export_digest, work),
                resume_step=cursor.step,
                resume_tokens=cursor.consumed_tokens,
                trackers=open_trackers(job.config, job.paths.tensorboard, resume_step=cursor.step),
            )
            trainer.reporter = stack.enter_context(journal)
            message = f"Training from step {cursor.step} of {work.schedule.num_steps}."
            events.tell("running", message, data={"step": cursor.step, "total_steps": work.schedule.num_steps})
        return _train(trainer, stream)


def probe_rank(directory: Path, attempt: int) -> None:
    """
    Instead of a run: the largest micro-batch once, two steps of the middle timed, and what both took, in a file.

    Nothing is learned and nothing saved; see `trilithon_finetune.probe`.
    """
    job = read_job(directory)
    work, events = open_work(job), Events(job.paths.attempt(attempt))
    with _meet(work, events) as meeting:
        grid, model, stream = meeting.grid, meeting.model, meeting.stream
        fill_weights(work, model, grid)
        if work.recipe.head == "preference":
            stream.references = [0.0] * len(work.prepared.train)  # what a preference is compared with changes no cost
        _try_out(model, stream, events)
        steps = stream.typical(PROBED_STEPS)
        seconds = []
        for step in steps:
            began = time.perf_counter()
            model.train_step(stream.micro_batches_at(step), learning_rate=0.0, step=0)
            seconds.append(time.perf_counter() - began)
        tokens = sum(map(stream.tokens_at, steps))
        told = {"peak_bytes": peak_bytes(grid.device), "seconds": sum(seconds), "tokens": tokens}
        write_outcome(job.paths.attempt(attempt) / f"probe-{grid.rank}.json", data=told)


PROBED_STEPS = 2


@dataclass(frozen=True)
class _Meeting:
    """A rank among the others, with what it trains: the weights are still to be filled. `peak` in FLOP/s."""

    grid: Grid
    watchdog: Watchdog
    model: TrainingModel
    stream: JobStream
    peak: float


@contextlib.contextmanager
def _meet(work: Work, events: Events) -> Iterator[_Meeting]:
    """Join the other ranks, watched; all have the same job before them."""
    job, layout = work.job, layout_of(work.config)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != layout.world_size:
        raise refuse("bug", f"{layout.world_size} ranks are needed. Given: {world_size}.", param="parallel")
    torch.set_num_threads(threads_of_a_rank(job.config))
    dtype: torch.dtype = getattr(torch, job.config.dtype)
    device = job.config.parallel.device
    peak = measured_peak(dtype, num_threads=torch.get_num_threads(), device=device)
    rendezvous.join(device=device, timeout_s=FIRST_TIMEOUT_S)
    grid = Grid.build(tp=layout.tp, pp=layout.pp, dp=layout.dp, device=device)
    stream = stream_of(work, grid)
    patience_s = PATIENCE * seconds_of(work, stream.silent_tokens, peak)
    with Watchdog(
        rank=grid.rank,
        world_size=grid.world_size,
        run_dir=job.paths.run,
        timeout_s=max(TIMEOUT_S, patience_s),
        first_timeout_s=max(FIRST_TIMEOUT_S, patience_s),
    ) as watchdog:
        agree(
            grid,
            {"job": repr(job.config), "prepared": job.prepared, "base": job.base_digest, "torch": torch.__version__},
        )
        if grid.rank == 0:
            events.tell("gang_started", f"{grid.world_size} ranks have met.", data={"ranks": grid.world_size})
            with contextlib.suppress(OSError):  # for estimates to come; this run needs no room for it
                remember_peak(
                    job.store.root, job.config.dtype, peak, num_threads=torch.get_num_threads(), device=device
                )
        model = build_model(work, grid, dtype)
        if isinstance(stream, ReadingStream):
            stream.model = model
        yield _Meeting(grid, watchdog, model, stream, peak)


def _train(trainer: Trainer, stream: JobStream) -> Ended:
    """Run to the end; a step that is not finite ends the job, and says which rows it saw."""
    try:
        return trainer.run()
    except ModelError as error:
        if error.code != "training_diverged":
            raise
        step = trainer.cursor.step
        rows = stream.rows(step)
        shown = ", ".join(map(str, rows[:16])) + (f" and {len(rows) - 16} more" if len(rows) > 16 else "")
        raise refuse(
            "nan_loss",
            f"step {step + 1} has gradients that are not finite; first in {_first_bad(trainer.model)}. "
            f"It saw lines {shown} of the training file.",
            param="optimizer.lr",
            hint="Lower the learning rate, or look at these rows.",
        ) from None


def _first_bad(model: TrainingModel) -> str:
    """The first parameter of this rank whose gradient is not finite."""
    for bucket, slot in model.buckets.slots():
        if not bool(torch.isfinite(bucket.grad[slot.start : slot.stop]).all()):
            return slot.owner
    return "a parameter of another rank"


def _try_out(model: TrainingModel, stream: JobStream, events: Events) -> None:
    """
    One step on the largest micro-batch, whose effect is taken back: trouble with memory shows at once, not after hours.

    At a rate of zero no weight moves, whatever the gradients; the moments are cleared.
    """
    model.train_step(stream.micro_batches_at(stream.heaviest().step), learning_rate=0.0, step=0)
    for state in model.optimizer.states():
        for tensor in state.values():
            tensor.zero_()
    model.optimizer.num_steps = 0
    if model.grid.rank == 0:
        events.tell("worst_batch_ok", "The largest micro-batch fits.")


def _check_same(work: Work, found: Found) -> None:
    if found.manifest.data_hash != work.job.prepared:
        raise refuse(
            "checkpoint_corrupt",
            f"{found.directory.name} was trained on other data than the job's.",
            hint="Begin a new job.",
        )
