"""From what a configuration leaves open to what a run does: every automatic choice is made here, once. No torch."""

from __future__ import annotations

from dataclasses import replace

from trilithon_finetune.config import MAX_LORA_RANK, JobConfig, Tuning, seed_of
from trilithon_finetune.errors import refuse
from trilithon_finetune.recipes.base import Recipe
from trilithon_finetune.setup import task_options
from trilithon_parallel.config import ModelConfig, ModelError
from trilithon_parallel.layout import Layout
from trilithon_parallel.lora.spec import LoraSpec, targets_of
from trilithon_parallel.task_head import TaskHead, for_masked_lm, for_task, for_vectors

MICRO_BATCH_TOKENS = {
    "vocabulary": 2048,
    "preference": 2048,
    "tokens": 4096,
    "sequence": 4096,
    "span": 4096,
    "joint_span": 1024,
    "vectors": 4096,
    "reading": 4096,
}
"""Tokens of a micro-batch by head: logits of a vocabulary, and what is between tokens and scores of spans, take
memory that labels don't."""

MIN_LORA_TOKENS = 8


def resolve_choices(config: JobConfig, recipe: Recipe, model: ModelConfig, *, job_id: str) -> JobConfig:
    """
    Fill in what the configuration leaves open and does not depend on the data's size.

    Args:
        model: of the base.
        job_id: gives the seed where none is asked for, so that a job is repeatable from its record.
    Raises:
        FinetuneError: `invalid_config`, `lora_not_servable`.
    """
    _check_kind(config, recipe, model)
    defaults, tuning = recipe.defaults, _tuning(config, model)
    optimizer = config.optimizer
    lr = optimizer.lr if optimizer.lr is not None else defaults.lr_lora if tuning.kind == "lora" else defaults.lr_full
    window = min(defaults.max_tokens, model.max_context)
    max_tokens = config.data.max_tokens if config.data.max_tokens is not None else window
    if max_tokens > model.max_context:
        raise refuse(
            "invalid_config",
            f"data.max_tokens must be at most the model's window of {model.max_context}. Given: {max_tokens}.",
            param="data.max_tokens",
        )
    chosen = {
        "lr": lr,
        "head_lr": optimizer.head_lr if optimizer.head_lr is not None else lr * defaults.head_lr_factor,
        "schedule": optimizer.schedule or defaults.schedule,
        "warmup_ratio": defaults.warmup_ratio if optimizer.warmup_ratio is None else optimizer.warmup_ratio,
        "weight_decay": defaults.weight_decay if optimizer.weight_decay is None else optimizer.weight_decay,
        "betas": optimizer.betas or defaults.betas,
    }
    training = config.training
    resolved = config.model_copy(
        update={
            "seed": seed_of(job_id) if config.seed is None else config.seed,
            "tuning": tuning,
            "optimizer": optimizer.model_copy(update=chosen),
            "training": training.model_copy(
                update={
                    "epochs": training.epochs or defaults.epochs,
                    "batch_size": training.batch_size or defaults.batch_size,
                    "dropout": defaults.dropout if training.dropout is None else training.dropout,
                    "micro_batch_tokens": training.micro_batch_tokens or MICRO_BATCH_TOKENS[recipe.head],
                }
            ),
            "data": config.data.model_copy(update={"max_tokens": max_tokens}),
        }
    )
    check_fit(resolved, recipe, model)
    return resolved


def _check_kind(config: JobConfig, recipe: Recipe, model: ModelConfig) -> None:
    """Whether the base is of the kind that the task is for."""
    kind = "a decoder" if model.is_causal else "an encoder-decoder" if model.is_seq2seq else "an encoder"
    needed = "an encoder"
    if recipe.head == "reading":
        needed = "an encoder-decoder"
    elif recipe.head in ("vocabulary", "preference") and config.task != "mlm":
        needed = "a decoder"
    if needed != kind:
        raise refuse(
            "invalid_config",
            f"task {config.task} needs {needed}. Given: {config.model}, a {model.architecture}.",
            param="task",
            hint="Choose another base model or another task.",
        )
    if recipe.head == "reading" and config.training.dropout:
        raise refuse(
            "invalid_config",
            f"training.dropout must be 0 for the task {config.task}. Given: {config.training.dropout}.",
            param="training.dropout",
            hint="Leave it out.",
        )


def resolve_intervals(config: JobConfig, *, steps_per_epoch: int) -> JobConfig:
    """Evaluations and checkpoints: once an epoch where nothing else is asked for."""
    return config.model_copy(
        update={
            "eval": config.eval.model_copy(update={"every_steps": config.eval.every_steps or steps_per_epoch}),
            "checkpoint": config.checkpoint.model_copy(
                update={"every_steps": config.checkpoint.every_steps or steps_per_epoch}
            ),
        }
    )


def _tuning(config: JobConfig, model: ModelConfig) -> Tuning:
    kind = config.tuning.kind or ("lora" if model.is_causal else "full")
    if kind == "full":
        return config.tuning.model_copy(update={"kind": kind})
    return config.tuning.model_copy(update={"kind": kind, "targets": config.tuning.targets or targets_of(model)})


def lora_spec(config: JobConfig) -> LoraSpec | None:
    """The adapter that a resolved configuration trains; None with full finetuning."""
    tuning = config.tuning
    if tuning.kind == "full":
        return None
    assert tuning.targets is not None
    return LoraSpec(
        rank=tuning.rank,
        alpha=tuning.alpha,
        dropout=tuning.dropout,
        targets=tuning.targets,
        layout=tuning.layout,
        rank_pattern=tuple(sorted(tuning.rank_pattern.items())),
        alpha_pattern=tuple(sorted(tuning.alpha_pattern.items())),
    )


def task_model(config: JobConfig, recipe: Recipe, base: ModelConfig, labels: tuple[str, ...]) -> ModelConfig:
    """The base with the task's head in place of its own and token types enough; else a decoder stays as it is."""
    base = replace(base, token_types=max(base.token_types, recipe.needs(task_options(recipe, config)).token_types))
    match recipe.head:
        case "tokens" | "sequence" | "joint_span":
            return for_task(base, TaskHead(recipe.head, labels))
        case "span":
            return for_task(base, TaskHead("span", ("start", "end")))
        case "vectors":
            return for_vectors(base)
        case "vocabulary" if config.task == "mlm":
            return for_masked_lm(base)
        case _:
            return base


def layout_of(config: JobConfig) -> Layout:
    """The layout of a run. Micro-batches are cut by tokens, so their number of samples is not part of it."""
    sizes = config.parallel
    return Layout(tp=sizes.tp, pp=sizes.pp, dp=sizes.dp)


def check_fit(config: JobConfig, recipe: Recipe, model: ModelConfig) -> None:
    """
    Refuse an adapter that could not be served and a layout that the model does not fit.

    Raises:
        FinetuneError: `lora_not_servable`, `invalid_config`.
    """
    if config.tuning.kind == "lora" and recipe.head not in ("vocabulary", "preference"):
        raise refuse(
            "lora_not_servable",
            f"task {config.task} ends in a head of its own, and adapters are served on decoders alone. Given: lora.",
            param="tuning.kind",
            hint="Use full: the whole encoder is trained and served.",
        )
    try:
        layout_of(config).check(model, tokens_per_micro_batch=config.data.max_tokens or MIN_LORA_TOKENS)
        if (spec := lora_spec(config)) is not None:
            spec.check(model)
    except ModelError as error:
        param = "tuning" if error.code == "lora_invalid" else "parallel"
        raise refuse("invalid_config", error.message, param=param, hint=error.hint) from None
    types = recipe.needs(task_options(recipe, config)).token_types
    if config.tuning.kind == "lora" and types > model.token_types:
        raise refuse(
            "lora_not_servable",
            f"the task has {types} token types and the base {model.token_types}: an adapter has no place for new ones. "
            "Given: lora.",
            param="tuning.kind",
            hint="Use full, set options.roles to markers, or begin with a base that has them.",
        )
    ranks = {config.tuning.rank, *config.tuning.rank_pattern.values()}
    if config.tuning.kind == "lora" and max(ranks) > MAX_LORA_RANK:
        raise refuse(
            "lora_not_servable",
            f"tuning.rank must be at most {MAX_LORA_RANK}, the server's limit. Given: {max(ranks)}.",
            param="tuning.rank",
        )
