"""What a task's options name beside model and data: models, facts, a file. Names become paths where a job runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from trilithon_finetune.config import PASSAGES, RETRIEVER, JobConfig

Kind = Literal["model", "concepts", "file"]

_KINDS: Mapping[str, Kind] = {"concepts": "concepts", "encoder": "model", RETRIEVER: "model", PASSAGES: "file"}
"""By option: it means the same in every task that has it."""

_KEYS: Mapping[Kind, str] = {"model": "dir", "concepts": "path", "file": "path"}


@dataclass(frozen=True, slots=True)
class Source:
    """
    Something that an option names.

    Attributes:
        name: as the configuration gives it: of a model or of facts, or the id of a file.
    """

    option: str
    kind: Kind
    name: str

    @property
    def field(self) -> str:
        """The option, as messages name it."""
        return f"options.{self.option}"

    @property
    def key(self) -> str:
        """Its place in `job.json`."""
        return f"{self.option}_{_KEYS[self.kind]}"


def sources_of(config: JobConfig) -> list[Source]:
    """All that the options of a configuration name; what is no name is for the recipe to refuse."""
    options = config.options
    return [Source(name, kind, value) for name, kind in _KINDS.items() if isinstance(value := options.get(name), str)]


def names_in(config: JobConfig) -> list[tuple[str, str]]:
    """Every model and all facts that a configuration names: the field, and the name that it gives."""
    more = [(source.field, source.name) for source in sources_of(config) if source.kind != "file"]
    return [("model", config.model), *more]
