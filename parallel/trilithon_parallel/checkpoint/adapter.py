"""
A run that trains an adapter writes adapter directories: PEFT's two files in place of the weights, and optimizer state
beside them. The base's weights are in none of its checkpoints; each says by a digest which base it belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import JsonValue

from trilithon_parallel.checkpoint.errors import CheckpointError
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.lora.described import own_spec
from trilithon_parallel.lora.files import CONFIG_FILE, FACTS_FILE, TEMPLATE_FILE, small_files
from trilithon_parallel.lora.peft_config import parse_config, read_document


@dataclass(frozen=True)
class Base:
    """
    What an adapter's checkpoints say of the model beneath.

    Attributes:
        name: by which PEFT's users load it.
        digest: of its weights, as the run's owner computes it: a resume with another one is refused.
        facts: what trilithon.json says besides: the job, digests of data and template.
    """

    name: str
    digest: str
    facts: Mapping[str, JsonValue] = field(default_factory=dict)


def adapter_files(
    config: ModelConfig, *, base: Base, facts: Mapping[str, JsonValue], side_files_from: Path | None
) -> dict[str, bytes]:
    """
    File name -> content of an adapter's small files; `side_files_from` may have a chat template, which goes along.

    `facts` are the checkpoint's own: its step, its layout.
    """
    assert config.lora is not None
    told = {"base_digest": base.digest, **base.facts, **facts}
    files = small_files(config, config.lora, base_model=base.name, facts=told)
    if side_files_from is not None and (side_files_from / TEMPLATE_FILE).is_file():
        files[TEMPLATE_FILE] = (side_files_from / TEMPLATE_FILE).read_bytes()
    return files


def check_adapter(directory: Path, config: ModelConfig) -> None:
    """
    Compare the adapter that a directory's small files describe to the run's.

    Raises:
        CheckpointError: `checkpoint_mismatch`, naming both.
        ModelError: `adapter_...`, the files are broken.
    """
    plain = config.without_lora()
    if not (directory / FACTS_FILE).is_file():
        raise CheckpointError(
            f"{directory.name}/{FACTS_FILE} is missing: the checkpoint is of a run that trains all weights.",
            code="checkpoint_mismatch",
            hint="Resume without an adapter, or begin a new run.",
        )
    facts = read_document(directory / FACTS_FILE)
    saved = own_spec(facts.get("lora"), parse_config(read_document(directory / CONFIG_FILE), plain), plain)
    if saved != config.lora:
        raise CheckpointError(
            f"{directory.name}/{FACTS_FILE} is of another adapter: lora must be {config.lora!r} for this run. "
            f"Given: {saved!r}.",
            code="checkpoint_mismatch",
            hint="Resume with the adapter's own description, or begin a new run from the adapter.",
        )
