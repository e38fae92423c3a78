"""Configurations of jobs: files in, trees out. Needs no more than the base install."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trilithon import _store
from trilithon.errors import FailedPrecondition, Internal, InvalidArgument, TrilithonError, Unavailable, Violation
from trilithon_finetune.config import JobConfig, load_config_file, override, parse_config
from trilithon_finetune.errors import FinetuneError
from trilithon_finetune.sources import sources_of


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Raise what jobs raise as the error that every other verb knows, with every finding."""
    try:
        yield
    except FinetuneError as error:
        raise as_trilithon(error) from None


def as_trilithon(error: FinetuneError) -> TrilithonError:
    """The same error in the client's tree; its details are the findings, the message first."""
    code, param = error.error.code, error.error.param
    kind: type[TrilithonError] = {"user": InvalidArgument, "infra": FailedPrecondition, "internal": Internal}[
        error.error.kind
    ]
    if code == "store_unavailable":
        kind = Unavailable
    messages = list(error.findings)
    if messages and messages[0] not in error.error.message:
        messages.insert(0, error.error.message)
    details = [Violation(field=param, code=code, message=message) for message in messages]
    return kind(error.error.message if messages else str(error), code=code, details=details)


def load(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """
    A configuration file with its overrides, as a tree of what it says; files are paths or ids.

    Raises:
        TrilithonError: with every finding.
    """
    with told():
        config = load_config_file(path, overrides=tuple(overrides))
    return config.model_dump(mode="json", exclude_unset=True)


def parsed(config: Mapping[str, Any]) -> JobConfig:
    """
    The configuration of a job of this machine: paths of models and facts become absolute, a name stays what it is.

    Raises:
        FinetuneError: `invalid_config`. NotFound: there is no directory at the path of a model.
    """
    known = parse_config(dict(config))
    options = dict(known.options)
    for source in sources_of(known):
        if source.kind == "model":
            options[source.option] = _model(source.name)
        elif source.kind == "concepts" and (facts := Path(source.name).expanduser()).exists():
            options[source.option] = str(facts.resolve())
    return known.model_copy(update={"model": _model(known.model), "options": options})


def _model(name: str) -> str:
    return str(_store.resolve(name)) if _is_path(name) else name


def _is_path(model: str) -> bool:
    stored = {item.name for item in _store.list_models()}
    return model not in stored and (os.sep in model or Path(model).is_dir())


def data_config(model: str, task: str, data: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration under which a data file alone is looked at. Raises TrilithonError."""
    tree: dict[str, Any] = {"model": model, "task": task, "training_file": str(data)}
    with told():
        override(tree, overrides)
        return parse_config(tree, where="--set").model_dump(mode="json", exclude_unset=True)


def as_yaml(config: Mapping[str, Any]) -> str:
    """A configuration as its file."""
    return yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False, allow_unicode=True, width=120)
