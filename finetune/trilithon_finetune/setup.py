"""
What every phase of a job works with, read from the job's directory: the same for checking, training and export.

    JOB/job.json    {"job_id", "tenant", "config", "model_dir", "training_path", "validation_path", "store", "name"}

No torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trilithon_finetune.config import JobConfig, Section, parse_config
from trilithon_finetune.data.reading import Row, read_rows
from trilithon_finetune.data.untrained import untrained_tokens
from trilithon_finetune.errors import refuse
from trilithon_finetune.paths import JobPaths, StorePaths
from trilithon_finetune.recipes import RECIPES
from trilithon_finetune.recipes.base import Context, Recipe, Retriever
from trilithon_parallel.config import QUERY_DIR, ModelConfig, ModelError, load_config
from trilithon_parallel.task_head import for_vectors
from trilithon_parallel.tokenizer import Tokenizer, load_tokenizer
from trilithon_server.engine.identity import model_digest
from trilithon_server.tasks import read_task
from trilithon_server.tasks.retrieval import RetrievalFormat
from trilithon_server.text.template import TemplateError, load_template

_PATHS = (
    "model_dir", "training_path", "validation_path", "adapter_dir", "retriever_dir", "passages_path", "concepts_path",
    "encoder_dir",
)  # fmt: skip


@dataclass(frozen=True)
class JobFile:
    """
    One job, as its directory tells it.

    Attributes:
        model_dir: of the base.
        adapter_dir: the adapter that the job goes on from; None where it begins anew.
        retriever_dir, passages_path, concepts_path, encoder_dir: what the task's options name; None where they don't.
        prepared: digest of the tokenised data; empty before `prepare`.
        base_digest, data_digest, template_digest: empty before `validate`.
        training_name, validation_name, passages_name: the files' names, as their owner knows them.
        max_findings: that a check tells; 0 for the usual number.
    """

    job_id: str
    tenant: str
    name: str
    config: JobConfig
    model_dir: Path
    training_path: Path
    validation_path: Path | None
    store: StorePaths
    paths: JobPaths
    adapter_dir: Path | None = None
    retriever_dir: Path | None = None
    passages_path: Path | None = None
    concepts_path: Path | None = None
    encoder_dir: Path | None = None
    prepared: str = ""
    base_digest: str = ""
    data_digest: str = ""
    template_digest: str = ""
    training_name: str = ""
    validation_name: str = ""
    passages_name: str = ""
    max_findings: int = 0

    @property
    def prepared_dir(self) -> Path:
        """Where the tokenised data lie."""
        return self.store.prepared(self.prepared)


def read_job(directory: Path) -> JobFile:
    """
    Read `job.json`.

    Raises:
        FinetuneError: `bug`, the file is not what the worker writes.
    """
    try:
        raw: dict[str, Any] = json.loads((directory / "job.json").read_text("utf-8"))
        if (prepared := JobPaths(directory).prepared).is_file():
            raw |= json.loads(prepared.read_text("utf-8"))
        known = {item.name for item in dataclasses.fields(JobFile)}
        given = {name: value for name, value in raw.items() if name in known and value is not None}
        paths = {name: Path(given[name]) for name in _PATHS if given.get(name)}
        rest = {"validation_path": None, **given, **paths}
        return JobFile(
            **{
                **rest,
                "config": parse_config(raw["config"], where="job.json"),
                "store": StorePaths(Path(raw["store"])),
                "paths": JobPaths(directory),
            }
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise refuse("bug", f"job.json of {directory.name} cannot be read: {error}.") from None


@dataclass(frozen=True)
class Base:
    """The base model of a job and the recipe that adapts it; `context` has no labels yet."""

    recipe: Recipe
    model: ModelConfig
    context: Context


def open_base(job: JobFile, *, max_tokens: int | None = None) -> Base:
    """
    Read what rows are encoded with.

    Args:
        max_tokens: of a sample, while the configuration is not resolved; else its own.
    Raises:
        FinetuneError: `invalid_config` (options of the task), `model_not_found`.
    """
    recipe, config = RECIPES[config_task(job)], job.config
    try:
        model = load_pair(job.model_dir)
        tokenizer = load_tokenizer(job.model_dir)
        template = load_template(job.model_dir) if model.is_causal else None
    except (ModelError, TemplateError) as error:
        raise refuse("model_not_found", f"base model {config.model}: {error}", param="model") from None
    options = task_options(recipe, config)
    retriever = None if job.retriever_dir is None else _open_retriever(job.retriever_dir, config)
    model = recipe.trained(model, options, None if retriever is None else retriever.model)
    if missing := [token for token in recipe.needs(options).special_tokens if not _is_special(token, tokenizer)]:
        raise refuse(
            "invalid_config",
            f"options: the task's sequences need special tokens that the tokenizer of {config.model} lacks. "
            f"Missing: {', '.join(missing)}.",
            param="options",
            hint="Use markers: text, or a base whose tokenizer was made with them.",
        )
    context = Context(
        tokenizer=tokenizer,
        template=template,
        model=model,
        max_tokens=config.data.max_tokens or max_tokens or min(recipe.defaults.max_tokens, model.max_context),
        labels=(),
        options=options,
        train_on=config.data.train_on,
        on_long=config.data.on_long,
        untrained_ids=_untrained(job, model, tokenizer),
        retriever=retriever,
    )
    return Base(recipe, model, context)


def load_pair(model_dir: Path) -> ModelConfig:
    """What a directory holds: `has_twin` where there is an encoder of questions beside that of passages."""
    return replace(load_config(model_dir), has_twin=(model_dir / QUERY_DIR / "config.json").is_file())


def base_digest(model_dir: Path) -> str:
    """The identity of what training begins from: of one model its own, of two encoders that of both."""
    digest = model_digest(model_dir)
    if not load_pair(model_dir).has_twin:
        return digest
    return hashlib.sha256(f"{digest} {model_digest(model_dir / QUERY_DIR)}".encode()).hexdigest()


def _open_retriever(model_dir: Path, config: JobConfig) -> Retriever:
    """
    The encoder beside a reader.

    Raises:
        FinetuneError: `model_not_found`, it cannot be read or is no encoder; `invalid_config`, it reads questions.
    """
    try:
        model, tokenizer, task = load_pair(model_dir), load_tokenizer(model_dir), read_task(model_dir)
        vectors = for_vectors(model)
    except ModelError as error:
        message = f"options.retriever {config.retriever}: {error.message}"
        raise refuse("model_not_found", message, param="options.retriever", hint=error.hint) from None
    format_ = task if isinstance(task, RetrievalFormat) else None
    if format_ is None:
        format_ = RetrievalFormat.for_encoder(
            normalize=model.normalize, hidden_size=model.hidden_size, max_context=model.max_context
        )
    if format_.reads == "questions":
        raise refuse(
            "invalid_config",
            f"options.retriever must read passages. Given: {config.retriever}, which reads questions alone.",
            param="options.retriever",
            hint=f"Name the directory that holds both encoders: this one is its {QUERY_DIR}/.",
        )
    return Retriever(tokenizer, replace(format_, reads="passages" if model.has_twin else "both"), vectors)


def _is_special(token: str, tokenizer: Tokenizer) -> bool:
    ids = tokenizer.encode(token, add_special_tokens=False)
    return len(ids) == 1 and ids[0] in tokenizer.special_ids


def _untrained(job: JobFile, model: ModelConfig, tokenizer: Tokenizer) -> frozenset[int]:
    """Special tokens that the base never learned and an adapter, which leaves the vocabulary alone, can't learn."""
    if not model.is_causal or job.config.tuning.kind == "full":
        return frozenset()
    return untrained_tokens(job.model_dir, tokenizer.special_ids)


def config_task(job: JobFile) -> str:
    """The job's task, which must have a recipe."""
    task = job.config.task
    if task not in RECIPES:
        raise refuse(
            "invalid_config", f"task {task} has no recipe.", param="task", hint=f"Allowed: {', '.join(RECIPES)}."
        )
    return task


def task_options(recipe: Recipe, config: JobConfig) -> Section:
    """
    The task's own options, checked.

    Raises:
        FinetuneError: `invalid_config`, with the first broken rule.
    """
    try:
        return recipe.Options.model_validate(config.options)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["options", *map(str, first["loc"])])
        allowed = ", ".join(recipe.Options.model_fields) or "none"
        raise refuse(
            "invalid_config",
            f"{where}: {str(first['msg']).removeprefix('Value error, ')}. Given: {first['input']!r}.",
            param=where,
            hint=f"Options of {config.task}: {allowed}.",
        ) from None


def read_rows_of(job: JobFile, recipe: Recipe, lines: Collection[int]) -> dict[int, Mapping[str, Any]]:
    """The validation rows of these lines, from the file that they came from."""
    path = job.validation_path or job.training_path
    name = job.validation_name if job.validation_path is not None else job.training_name
    found = read_rows(path, recipe=recipe, file=name or path.name)
    return {row.line: row.value for row in found if isinstance(row, Row) and row.line in lines}
