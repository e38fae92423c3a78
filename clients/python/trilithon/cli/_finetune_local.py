"""What the command does with data on this machine, without a store: check a file, estimate a job, show a row."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trilithon import _store
from trilithon.cli._finetune_config import parsed, told
from trilithon.cli._finetune_doors import Checked
from trilithon.errors import InvalidArgument
from trilithon_finetune.config import JobConfig
from trilithon_finetune.data.check import check_file
from trilithon_finetune.data.findings import Finding, line_form
from trilithon_finetune.data.judging import with_labels
from trilithon_finetune.data.reading import read_rows
from trilithon_finetune.data.report import Report
from trilithon_finetune.errors import FinetuneError
from trilithon_finetune.labelling import label_source
from trilithon_finetune.paths import JobPaths, StorePaths
from trilithon_finetune.phases import validate
from trilithon_finetune.phases.outcome import Events
from trilithon_finetune.probe import probe as measured
from trilithon_finetune.recipes.base import IGNORE, Context, Recipe, Sample
from trilithon_finetune.resolve import resolve_choices
from trilithon_finetune.setup import Base, JobFile, open_base
from trilithon_finetune.sources import sources_of
from trilithon_server.catalog import Catalog

TENANT = "local"
"""Whose jobs are made here: whom a server without keys takes its callers for (`trilithon_server.auth.LOCAL`)."""

_NO_JOB = "ftjob-" + "0" * 20


@dataclass(frozen=True)
class DataFile:
    """A data file: where it lies, and what its owner calls it."""

    path: Path
    name: str


@dataclass(frozen=True)
class Token:
    """One token of a sample: its text, whether it is learned, and what the model should say there (empty: nothing)."""

    id: int
    text: str
    learned: bool
    label: str = ""


@dataclass(frozen=True)
class Shown:
    """
    One sample of a row.

    Attributes:
        pieces: its text in order, and whether each piece is learned.
        answer: what is learned of it as a whole; empty where tokens are learned.
    """

    line: int
    part: int
    num_learned: int
    pieces: tuple[tuple[str, bool], ...]
    tokens: tuple[Token, ...]
    answer: str = ""


def check(
    config: Mapping[str, Any],
    training: DataFile,
    validation: DataFile | None,
    *,
    store: Path,
    passages: DataFile | None = None,
    probe: bool = False,
) -> Checked:
    """
    The phase `validate` of such a job, here.

    Args:
        passages: what the task's options name, of tasks that have them.
        probe: the job's ranks are started for a few steps, and what they take is measured.
    Raises:
        TrilithonError: the configuration is wrong, or the data; with every finding.
    """
    with told(), _job_file(config, training, validation, store=store, passages=passages) as job:
        try:
            found = validate.run(job, Events(job.paths.attempt(1)), measure=measured if probe else None)
        except FinetuneError as error:
            if error.error.code != "estimate_exceeded":
                raise
            found = error.data
    return Checked(found["estimate"], found["report"], found["resolved"], found)


def validated(
    config: Mapping[str, Any], training: DataFile, validation: DataFile | None, *, store: Path, max_findings: int
) -> Report:
    """Everything about a data file. Raises TrilithonError."""
    with told(), _opened(config, training, validation, store=store) as (job, base):
        source = label_source(job)
        return check_file(
            training.path,
            recipe=base.recipe,
            context=base.context if source is None else replace(base.context, label=source.counted()),
            file=training.name,
            validation=None if validation is None else validation.path,
            validation_file="" if validation is None else validation.name,
            bad_rows_allowed=job.config.data.bad_rows_allowed,
            max_findings=max_findings,
        )


def preview(config: Mapping[str, Any], training: DataFile, line: int, *, store: Path) -> list[Shown] | list[str]:
    """
    The samples of one row as the model sees them, or what is wrong with the row, a sentence each.

    Raises:
        TrilithonError: the file has no such line, or the configuration is wrong.
    """
    with told(), _opened(config, training, None, store=store) as (job, base), contextlib.ExitStack() as stack:
        context = with_labels(base.context, base.recipe, training.path, file=training.name)
        if (source := label_source(job)) is not None:
            context = replace(context, label=stack.enter_context(source.opened()))
        last = 0
        for item in read_rows(training.path, recipe=base.recipe, file=training.name):
            last = item.line
            if isinstance(item, Finding):
                if item.line in (0, line):
                    return [line_form(item)]
            elif item.line == line:
                return _shown(item.value, line, base.recipe, context, training.name, seed=job.config.seed or 0)
        raise InvalidArgument(f"--row must be a line of {training.name} that holds a row, up to {last}. Given: {line}.")


def _shown(
    row: Mapping[str, Any], line: int, recipe: Recipe, context: Context, file: str, *, seed: int
) -> list[Shown] | list[str]:
    form = recipe.detect(row) or recipe.formats[0]
    wrong = recipe.check(row, form, file=file, line=line)
    encoded = [] if wrong else recipe.encode(row, line, context, file=file)
    samples = [item for item in encoded if isinstance(item, Sample)]
    if not samples:
        return [line_form(item) for item in [*wrong, *(item for item in encoded if isinstance(item, Finding))]]
    return [_sample(recipe.dress(sample, seed=seed, epoch=0), recipe, context) for sample in samples]


def _sample(sample: Sample, recipe: Recipe, context: Context) -> Shown:
    """A token is learned where its own target counts, or, of a text that is gone on with, that of the one before."""
    if recipe.head == "reading":  # what its retriever reads is of another vocabulary
        behind = sample.columns["query"]
        sample = replace(sample, tokens=sample.tokens[behind:], targets=sample.targets[behind:])
    targets = sample.targets or (IGNORE,) * len(sample.tokens)
    shift = recipe.head in ("vocabulary", "preference") and context.model.is_causal
    counts = [target != IGNORE for target in ((IGNORE, *targets[:-1]) if shift else targets)]
    labels = [""] * len(targets)
    if recipe.head == "tokens":
        labels = ["" if target == IGNORE else context.labels[target] for target in targets]
    elif not shift and sample.targets:  # masked tokens: what stood there
        labels = ["" if target == IGNORE else _text(context, [target]) for target in targets]
    tokens = tuple(
        Token(token, _text(context, [token]), learned, label)
        for token, learned, label in zip(sample.tokens, counts, labels, strict=True)
    )
    groups = itertools.groupby(tokens, key=lambda token: token.learned)
    pieces = tuple((_text(context, [token.id for token in group]), learned) for learned, group in groups)
    answer = _answer(sample, recipe, context)
    return Shown(sample.row, sample.part, sample.num_supervised, pieces, tokens, answer)


def _answer(sample: Sample, recipe: Recipe, context: Context) -> str:
    if recipe.head == "sequence":
        return context.labels[sample.columns["label"]]
    if recipe.head == "span":
        start, end = sample.columns["start"], sample.columns["end"]
        return _text(context, sample.tokens[start : end + 1]) if end else "no answer"
    return ""


def _text(context: Context, tokens: Sequence[int]) -> str:
    raw = b"".join(context.tokenizer.token_bytes(token) for token in tokens)
    return raw.decode("utf-8", errors="replace")


@contextlib.contextmanager
def _job_file(
    config: Mapping[str, Any],
    training: DataFile,
    validation: DataFile | None,
    *,
    store: Path,
    passages: DataFile | None = None,
) -> Iterator[JobFile]:
    """A job that is in no store. Raises FinetuneError, NotFound: its model is not here."""
    job_config = parsed(config)
    paths = StorePaths(store)
    model_dir, adapter_dir = _model(job_config.model, Catalog(paths.models))
    with tempfile.TemporaryDirectory(prefix="trilithon-check-") as scratch:
        yield JobFile(
            job_id=_NO_JOB,
            tenant=TENANT,
            name="",
            config=job_config,
            model_dir=model_dir,
            adapter_dir=adapter_dir,
            passages_name="" if passages is None else passages.name,
            **_named(job_config, passages, Catalog(paths.models)),
            training_path=training.path,
            validation_path=None if validation is None else validation.path,
            store=paths,
            paths=JobPaths(Path(scratch)),
            training_name=training.name,
            validation_name="" if validation is None else validation.name,
        )


def _named(config: JobConfig, passages: DataFile | None, catalog: Catalog) -> dict[str, Any]:
    """The places of what the task's options name."""
    found = {}
    for source in sources_of(config):
        if source.kind == "model":
            found[source.key] = _model(source.name, catalog)[0]
        elif source.kind == "concepts":
            found[source.key] = Path(source.name)
        elif passages is not None:
            found[source.key] = passages.path
    return found


def _model(name: str, catalog: Catalog) -> tuple[Path, Path | None]:
    """The directory of a model, and of the adapter that is gone on from: what a job of the store made, or a model."""
    entry = catalog.get(name, tenant=TENANT)
    if entry is None:
        return _store.resolve(name), None
    return (entry.path, None) if entry.kind == "model" else (_store.resolve(entry.base), entry.path)


@contextlib.contextmanager
def _opened(
    config: Mapping[str, Any], training: DataFile, validation: DataFile | None, *, store: Path
) -> Iterator[tuple[JobFile, Base]]:
    """A job and its base with every choice made that does not depend on the data."""
    with _job_file(config, training, validation, store=store) as job:
        base = open_base(job)
        job = replace(job, config=resolve_choices(job.config, base.recipe, base.model, job_id=job.job_id))
        yield job, open_base(job)
