"""What a job labels its rows by, as its options name it. Names become paths where the job will run."""

from __future__ import annotations

from dataclasses import dataclass

from trilithon_finetune.config import JobConfig

_TASKS = ("story_generator", "story_ranker")


@dataclass(frozen=True, slots=True)
class NamedSources:
    """
    Attributes:
        concepts: facts. encoder: a model.
    """

    concepts: str
    encoder: str


def named_sources(config: JobConfig) -> NamedSources | None:
    """The sources of a job that labels its rows; None for one that doesn't, or whose options are wrong."""
    concepts, encoder = config.options.get("concepts"), config.options.get("encoder")
    if config.task not in _TASKS or not isinstance(concepts, str) or not isinstance(encoder, str):
        return None
    return NamedSources(concepts, encoder)


def names_in(config: JobConfig) -> list[tuple[str, str]]:
    """Everything on the host that a configuration names: each field, and the name that it gives."""
    named = named_sources(config)
    more = [] if named is None else [("options.concepts", named.concepts), ("options.encoder", named.encoder)]
    return [("model", config.model), *more]
