"""What a rank's run is made of, by a job's configuration: model, weights, saver, plan, evaluator, references."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from trilithon_finetune.data.prepared import Part
from trilithon_finetune.errors import refuse
from trilithon_finetune.estimate import EFFICIENCY
from trilithon_finetune.recipes.openqa import JointOptions, Reader, ReaderOptions
from trilithon_finetune.resolve import layout_of, lora_spec
from trilithon_finetune.setup import read_rows_of
from trilithon_finetune.train.evaluation import JobEvaluator, outputs_of
from trilithon_finetune.train.evidence import Evidence
from trilithon_finetune.train.reading import Readings, ReadingStream
from trilithon_finetune.train.reading_evaluation import ReadingEvaluator
from trilithon_finetune.train.stream import JobStream, learning_rate_of
from trilithon_finetune.train.work import Work
from trilithon_parallel.backend import select
from trilithon_parallel.checkpoint import Base, Piece, Retention, RunFacts, Saver, import_base
from trilithon_parallel.collectives import barrier
from trilithon_parallel.config import QUERY_DIR, RETRIEVER_DIR, ModelConfig, ModelError
from trilithon_parallel.costs import model_flops
from trilithon_parallel.data.publish import sync
from trilithon_parallel.grid import Grid
from trilithon_parallel.lora.peft import read_adapter
from trilithon_parallel.lora.training import begin
from trilithon_parallel.optimizer import AdamWSettings
from trilithon_parallel.shapes import STRENGTH
from trilithon_parallel.step import DropoutRates, TrainingModel
from trilithon_parallel.trainer import Costs, Goal, Plan

REFERENCES_FILE = "references.safetensors"

LEASE_VARIABLE = "TRILITHON_LEASE_FILE"
"""Names the file that the worker removes when the attempt has lost its lease."""


def build_model(work: Work, grid: Grid, dtype: torch.dtype) -> TrainingModel:
    """The training model of a job, its weights still to be filled."""
    optimizer, config = work.config.optimizer, work.config
    assert optimizer.betas is not None
    assert optimizer.weight_decay is not None
    assert optimizer.lr is not None
    assert optimizer.head_lr is not None
    assert config.seed is not None
    factor = optimizer.head_lr / optimizer.lr
    new = STRENGTH if work.recipe.head == "reading" else NEW_PARTS  # a reader's own head is its base's
    spec = lora_spec(config)

    def rate_of(name: str) -> float:
        if not work.trains_passages and not name.startswith(f"{QUERY_DIR}."):
            return 0.0
        return factor if name.startswith(new) else 1.0

    return TrainingModel(
        work.model,
        grid,
        layout_of(config),
        select("torch", device=config.parallel.device),
        dtype=dtype,
        optimizer=AdamWSettings(*optimizer.betas, optimizer.eps, optimizer.weight_decay, optimizer.clip),
        dropout=_dropout(work),
        seed=config.seed,
        lora=spec,
        rate_of=rate_of,
    )


NEW_PARTS = ("task_head.", "lm_transform.", "lm_head.")
"""Names of what an encoder's task adds to it: they learn at `optimizer.head_lr`."""


def fill_weights(work: Work, model: TrainingModel, grid: Grid) -> None:
    """
    The weights that training begins from: the base's, and new ones where the base has none.

    Raises:
        FinetuneError: `model_not_found`, they cannot be read.
    """
    assert work.config.seed is not None
    job = work.job
    try:
        if model.config.lora is not None:
            earlier = None if job.adapter_dir is None else read_adapter(job.adapter_dir, config=work.base)
            begin(model, job.model_dir, seed=work.config.seed, adapter=earlier)
            return
        targets = [target for target in model.optimizer.targets() if ".exp_avg" not in target.name]
        _fill(work, work.model, job.model_dir, targets, grid)
    except ModelError as error:
        message = f"base model {work.config.model}: {error.message}"
        raise refuse("model_not_found", message, param="model", hint=error.hint) from None
    model.optimizer.publish()
    model.weights_changed()


def _fill(work: Work, config: ModelConfig, directory: Path, targets: Sequence[Piece], grid: Grid) -> None:
    """
    A model, those beside it, each from a directory of its own, and a reader's strength, which the job begins with.

    Where a directory holds no encoder of questions, that one begins as the encoder of passages.
    """
    assert work.config.seed is not None
    for folder, model in config.beside.items():
        prefix = f"{folder}."
        inner = [replace(t, name=t.name.removeprefix(prefix)) for t in targets if t.name.startswith(prefix)]
        targets = [target for target in targets if not target.name.startswith(prefix)]
        beside = work.job.retriever_dir if folder == RETRIEVER_DIR else directory / QUERY_DIR
        assert beside is not None
        _fill(work, model, beside if beside.is_dir() else directory, inner, grid)
    own = [target for target in targets if not target.name.startswith(STRENGTH)]
    import_base(directory, own, config=config.alone(), axis=grid.world, seed=work.config.seed)
    for target in targets:
        if target.name.startswith(STRENGTH):
            options = work.context.options
            assert isinstance(options, JointOptions)
            target.tensor.detach().fill_(options.strength)


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
        retriever_files_from=job.retriever_dir,
        permit=Path(permit) if (permit := os.environ.get(LEASE_VARIABLE)) else None,
    )


def plan_of(work: Work) -> Plan:
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


def costs_of(work: Work, peak: float) -> Costs:
    """FLOPs of a token by the model's formula; of frozen weights no gradient is computed, a third less."""
    flops = _reading_flops(work) if work.recipe.head == "reading" else _flops(work)
    return Costs(flops if work.config.tuning.kind == "full" else flops * 2 / 3, 0.0, peak)


def _flops(work: Work) -> float:
    """Of a token, as if the longest sample were any; an encoder-decoder's goes through both stacks."""
    longest = max(1, work.prepared.facts.train.longest)
    return model_flops(work.base, batch=1, seq_len=longest) / longest


def _reading_flops(work: Work) -> float:
    """Of a token that a reader or its retriever reads, on average: by a question with passages as long as may be."""
    recipe, options, retriever = work.recipe, work.context.options, work.context.retriever
    assert isinstance(recipe, Reader)
    assert isinstance(options, ReaderOptions)
    train, count, length = work.prepared.train, options.top_k, work.context.max_tokens
    answer = max(1, work.prepared.facts.train.supervised // max(1, train.num_units))
    decoded = answer if recipe.kind == "individual" else -(-answer // count)  # for each passage
    flops = model_flops(work.base, batch=count, seq_len=length, target_len=decoded)
    tokens = count * (length + decoded)
    if retriever is not None:
        texts = [(1, retriever.format.max_query_tokens), (count, retriever.format.max_passage_tokens)]
        flops += sum(model_flops(retriever.model, batch=number, seq_len=size) for number, size in texts)
        tokens += sum(number * size for number, size in texts)
    return flops / tokens


def seconds_of(work: Work, tokens: int, peak: float) -> float:
    """What forward and backward of so many tokens take as a rule on a rank that reaches `peak` FLOP/s at most."""
    sizes = work.config.parallel
    _, likely, _ = EFFICIENCY[sizes.device]
    flops = _flops(work) if work.config.tuning.kind == "full" else _flops(work) * 2 / 3
    return flops * tokens / (sizes.tp * sizes.pp * likely * peak)


def stream_of(work: Work, grid: Grid) -> JobStream:
    """Where a rank's batches come from."""
    if work.recipe.head == "reading":
        return ReadingStream(work, grid, Readings(work, None if work.context.retriever is None else Evidence(work)))
    return JobStream(work, grid)


def evaluator_of(work: Work, stream: JobStream) -> JobEvaluator | ReadingEvaluator:
    """What measures the model on held-out rows."""
    config = work.config
    if isinstance(stream, ReadingStream):
        return ReadingEvaluator(work, stream.readings)
    assert config.training.micro_batch_tokens is not None
    assert config.training.batch_size is not None
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
        contrast=work.contrast,
        batch_size=config.training.batch_size,
    )


def references_of(work: Work, model: TrainingModel) -> tuple[list[float], list[float]]:
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
            sync(part_file)
            part_file.replace(path)
            sync(path.parent)
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


def _dropout(work: Work) -> DropoutRates | None:
    rate = work.config.training.dropout
    return DropoutRates(rate) if rate else None
