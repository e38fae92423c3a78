"""One rank of a job's training, under the environment of `torchrun`: join, agree, build, resume, try out, train."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from trilithon_finetune.data.prepared import Part
from trilithon_finetune.errors import FinetuneError, JobError, refuse
from trilithon_finetune.phases.outcome import Events, write_outcome
from trilithon_finetune.resolve import layout_of, lora_spec
from trilithon_finetune.setup import read_job, read_rows_of
from trilithon_finetune.train.evaluation import JobEvaluator, outputs_of
from trilithon_finetune.train.journal import Journal
from trilithon_finetune.train.stream import JobStream, learning_rate_of
from trilithon_finetune.train.threads import threads_of_a_rank
from trilithon_finetune.train.work import Work, export_digest, open_work
from trilithon_parallel import rendezvous
from trilithon_parallel.backend import select
from trilithon_parallel.checkpoint import (
    Base,
    CheckpointError,
    Found,
    Retention,
    RunFacts,
    Saver,
    find_latest,
    import_base,
)
from trilithon_parallel.collectives import CollectiveError, barrier
from trilithon_parallel.config import ModelError
from trilithon_parallel.costs import model_flops
from trilithon_parallel.grid import Grid
from trilithon_parallel.health import HealthError, Signals, agree
from trilithon_parallel.lora.peft import read_adapter
from trilithon_parallel.lora.training import begin
from trilithon_parallel.optimizer import AdamWSettings
from trilithon_parallel.peak import measured_peak
from trilithon_parallel.rendezvous import RendezvousError
from trilithon_parallel.step import DropoutRates, TrainingModel
from trilithon_parallel.trainer import Costs, Ended, Goal, Plan, Trainer
from trilithon_parallel.watchdog import Watchdog

EXIT_OK, EXIT_FAILED, EXIT_PEER_LOST = 0, 1, 6

TIMEOUT_S, FIRST_TIMEOUT_S = 120.0, 600.0
"""Seconds without progress that are a hang; the longer one until the second step."""

REFERENCES_FILE = "references.safetensors"

LEASE_VARIABLE = "TRILITHON_LEASE_FILE"
"""Names the file that the worker removes when the attempt has lost its lease."""


def main(directory: Path, attempt: int) -> int:
    """
    Train this rank's part to the end, and write in words why, where it ends otherwise.

    Returns:
        0 done; 143 stopped in good order after a checkpoint; 6 a peer was lost; 1 failed, see `train-RANK.json`.
    """
    rank = int(os.environ.get("RANK", "0"))
    outcome = directory / "attempts" / str(attempt) / f"train-{rank}.json"
    try:
        with Signals() as signals:
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
    code, hint = "bug", ""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
        code = "out_of_memory"
        hint = "Lower training.micro_batch_tokens or data.max_tokens, or use more ranks."
    elif isinstance(error, CheckpointError):
        code = {"checkpoint_disk_full": "disk_full", "checkpoint_busy": "lease_lost"}.get(
            error.code, "checkpoint_corrupt"
        )
        hint = error.hint
    elif isinstance(error, ModelError | HealthError):
        code = "invalid_config"
        hint = error.hint
    return JobError(
        code=code, message=f"{type(error).__name__}: {error}"[:2000] if code == "bug" else str(error), hint=hint
    )


def run_rank(directory: Path, attempt: int, signals: Signals) -> Ended:
    """Everything between the rendezvous and the end of the run."""
    job = read_job(directory)
    work, events = open_work(job), Events(job.paths.attempt(attempt))
    layout = layout_of(job.config)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != layout.world_size:
        raise refuse("bug", f"{layout.world_size} ranks are needed. Given: {world_size}.", param="parallel")
    torch.set_num_threads(threads_of_a_rank(job.config))
    dtype: torch.dtype = getattr(torch, job.config.dtype)
    peak = measured_peak(dtype, num_threads=torch.get_num_threads(), device="cpu")
    rendezvous.join(device="cpu", timeout_s=FIRST_TIMEOUT_S)
    grid = Grid.build(tp=layout.tp, pp=layout.pp, dp=layout.dp, device="cpu")
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            Watchdog(
                rank=grid.rank,
                world_size=grid.world_size,
                run_dir=job.paths.run,
                timeout_s=TIMEOUT_S,
                first_timeout_s=FIRST_TIMEOUT_S,
            )
        )
        agree(
            grid,
            {"job": repr(job.config), "prepared": job.prepared, "base": job.base_digest, "torch": torch.__version__},
        )
        if grid.rank == 0:
            events.tell("gang_started", f"{grid.world_size} ranks have met.", data={"ranks": grid.world_size})
        model = build_model(work, grid, dtype)
        stream = JobStream(
            work.prepared.train, work.recipe, work.schedule, grid, config=job.config, beta=work.beta
        )  # fmt: skip
        evaluator = _evaluator(work)
        saver = open_saver(work, model, dtype)
        stack.callback(saver.close)
        trainer = Trainer(
            model, stream, _plan(work), _costs(work, peak), saver=saver, signals=signals, watchdog=None,
            evaluator=evaluator,
        )  # fmt: skip
        fill_weights(work, model, grid)
        found = find_latest(job.paths.run, axis=grid.world)
        if grid.rank == 0:
            events.tell("weights_loaded", f"The weights of {job.config.model} are loaded.")
        if work.recipe.head == "preference":
            stream.references, evaluator.references = _references(work, model)
        _try_out(model, stream, events)
        if found is not None:
            _check_same(work, found)
            trainer.resume(found, base_digest=job.base_digest if model.config.lora is not None else None)
        if grid.rank == 0:
            cursor = trainer.cursor
            journal = Journal(
                job.paths.run,
                events,
                stream=stream,
                schedule=work.schedule,
                evaluator=evaluator,
                digest_of=functools.partial(export_digest, work),
                resume_step=cursor.step,
                resume_tokens=cursor.consumed_tokens,
            )
            trainer.reporter = stack.enter_context(journal)
            message = f"Training from step {cursor.step} of {work.schedule.num_steps}."
            events.tell("running", message, data={"step": cursor.step, "total_steps": work.schedule.num_steps})
        return _train(trainer, stream)


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


def build_model(work: Work, grid: Grid, dtype: torch.dtype) -> TrainingModel:
    """The training model of a job, its weights still to be filled."""
    optimizer, config = work.config.optimizer, work.config
    assert optimizer.betas is not None
    assert optimizer.weight_decay is not None
    assert optimizer.lr is not None
    assert optimizer.head_lr is not None
    assert config.seed is not None
    factor = optimizer.head_lr / optimizer.lr
    spec = lora_spec(config)
    return TrainingModel(
        work.model,
        grid,
        layout_of(config),
        select("torch", device="cpu"),
        dtype=dtype,
        optimizer=AdamWSettings(*optimizer.betas, optimizer.eps, optimizer.weight_decay, optimizer.clip),
        dropout=_dropout(work),
        seed=config.seed,
        lora=spec,
        rate_of=lambda name: factor if name.startswith(NEW_PARTS) else 1.0,
    )


NEW_PARTS = ("task_head.", "lm_transform.", "lm_head.")
"""Names of what an encoder's task adds to it: they learn at `optimizer.head_lr`."""


def fill_weights(work: Work, model: TrainingModel, grid: Grid) -> None:
    """The weights that training begins from: the base's, and new ones where the base has none."""
    assert work.config.seed is not None
    job = work.job
    if model.config.lora is not None:
        earlier = None if job.adapter_dir is None else read_adapter(job.adapter_dir, config=work.base)
        begin(model, job.model_dir, seed=work.config.seed, adapter=earlier)
        return
    targets = [target for target in model.optimizer.targets() if ".exp_avg" not in target.name]
    import_base(job.model_dir, targets, config=work.model, axis=grid.world, seed=work.config.seed)
    model.optimizer.publish()
    model.weights_changed()


def open_saver(work: Work, model: TrainingModel, dtype: torch.dtype) -> Saver:
    """What writes the job's checkpoints; where each is served, none goes."""
    config, job = work.config, work.job
    assert config.seed is not None
    told = {"job": job.job_id, "data_digest": job.data_digest, "template_digest": job.template_digest}
    base = Base(config.model, job.base_digest, told) if model.config.lora is not None else None
    return Saver(
        job.paths.run,
        config=model.config,
        grid=model.grid,
        facts=RunFacts(config.seed, job.prepared, base=base),
        dtype=dtype,
        retention=Retention(config.checkpoint.keep, keep_every=1 if config.deploy.on == "checkpoint" else 0),
        side_files_from=job.model_dir,
        permit=Path(permit) if (permit := os.environ.get(LEASE_VARIABLE)) else None,
    )


def _plan(work: Work) -> Plan:
    config = work.config
    assert config.eval.every_steps is not None
    assert config.checkpoint.every_steps is not None
    _, units = work.schedule.whole_run()
    return Plan(
        train_samples=units,
        batches=work.schedule,
        learning_rate=learning_rate_of(config, units),
        checkpoint_every=config.checkpoint.every_steps,
        evaluate_every=config.eval.every_steps,
        max_skipped=0,
        goal=_goal(work) if len(work.prepared.valid) else None,
    )


def _goal(work: Work) -> Goal:
    """What the best checkpoint is the best at: what early stopping watches, else the task's own number."""
    metric, direction = work.recipe.best_metric
    stop = work.config.eval.early_stop
    if stop is None:
        return Goal(metric, direction)
    if stop.metric != metric:
        direction = "min" if stop.metric.endswith("loss") else "max"
    return Goal(stop.metric, direction, stop.patience)


def _costs(work: Work, peak: float) -> Costs:
    """FLOPs of a token by the model's formula; of frozen weights no gradient is computed, a third less."""
    longest = max(1, work.prepared.facts.train.longest)
    flops = model_flops(work.base, batch=1, seq_len=longest) / longest
    return Costs(flops if work.config.tuning.kind == "full" else flops * 2 / 3, 0.0, peak)


def _evaluator(work: Work) -> JobEvaluator:
    config = work.config
    assert config.training.micro_batch_tokens is not None
    assert config.seed is not None
    valid = work.prepared.valid
    lines = {valid.sample(index).row for index in range(len(valid))}
    rows = read_rows_of(work.job, work.recipe, lines) if lines else {}
    return JobEvaluator(
        work.recipe,
        work.context,
        valid,
        valid if len(valid) else work.prepared.train,
        rows=rows,
        micro_batch_tokens=config.training.micro_batch_tokens,
        seed=config.seed,
        beta=work.beta,
    )


def _references(work: Work, model: TrainingModel) -> tuple[list[float], list[float]]:
    """
    Log-probabilities of all answers by the model that training begins from: made once, kept for every attempt.

    The model must hold the weights that it begins from.
    """
    path, grid = work.job.paths.run / REFERENCES_FILE, model.grid
    parts = {"train": work.prepared.train, "valid": work.prepared.valid}
    if not path.exists():  # all ranks see the same file system; rank 0 writes it behind a barrier
        made = {name: _sums(work, model, part) for name, part in parts.items()}
        barrier(grid.world, label="references")
        if grid.rank == 0:
            part_file = path.with_suffix(".part")
            save_file(made, part_file)
            part_file.replace(path)
    barrier(grid.world, label="references")
    found = load_file(path)
    return found["train"].tolist(), found["valid"].tolist()


def _sums(work: Work, model: TrainingModel, part: Part) -> torch.Tensor:
    assert work.config.training.micro_batch_tokens is not None
    assert work.config.seed is not None
    found = outputs_of(
        model,
        part,
        work.recipe,
        micro_batch_tokens=work.config.training.micro_batch_tokens,
        seed=work.config.seed,
    )
    return torch.tensor([float(values[0]) for _, values in found.values()])


def _try_out(model: TrainingModel, stream: JobStream, events: Events) -> None:
    """
    One step on the largest micro-batch, whose effect is taken back: trouble with memory shows at once, not after hours.

    At a rate of zero no weight moves, whatever the gradients; the moments are cleared.
    """
    model.train_step(stream.micro_batches_at(stream.heaviest()), learning_rate=0.0, step=0)
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


def _dropout(work: Work) -> DropoutRates | None:
    rate = work.config.training.dropout
    return DropoutRates(rate) if rate else None
