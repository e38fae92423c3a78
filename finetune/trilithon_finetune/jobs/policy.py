"""
How long a store keeps what nothing needs any more: `STORE/policy.yaml`, or the defaults where there is none.

    checkpoint_days: 7
    prepared_days: 30
"""

from __future__ import annotations

from typing import Annotated

import yaml
from pydantic import Field, ValidationError

from trilithon_finetune.config import Section
from trilithon_finetune.errors import FinetuneError, refuse
from trilithon_finetune.paths import StorePaths

Days = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Policy(Section):
    """What `clean` goes by. Null: for ever."""

    checkpoint_days: Days | None = 30.0
    """After a job's end: its checkpoints but the last, the best and those that are served; then also `attempts`."""
    attempts: Annotated[int, Field(ge=1)] = 3
    """Newest attempts of a job that has ended whose logs stay."""
    prepared_days: Days | None = 30.0
    """After their last use: tokenised data that no job needs which is not over. They can be made again."""
    file_days: Annotated[int, Field(ge=1)] | None = None
    """After their upload: files, unless a job reads them that is not over. Counts for files that come from now on."""


def read_policy(paths: StorePaths) -> Policy:
    """
    The policy of a store.

    Raises:
        FinetuneError: `invalid_config`, the file is not readable or has a wrong field; nothing is cleaned by guesses.
    """
    try:
        document = yaml.safe_load(paths.policy.read_text("utf-8"))
    except FileNotFoundError:
        return Policy()
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _invalid(f"it is not readable YAML: {error}") from None
    try:
        return Policy.model_validate(document or {})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise _invalid(f"{where}: {first['msg']}, given {first['input']!r}") from None


def _invalid(message: str) -> FinetuneError:
    hint = f"Allowed: {', '.join(Policy.model_fields)}."
    return refuse("invalid_config", f"policy.yaml of the job store: {message}.", hint=hint)
