"""
What requests of the jobs routes look like: pydantic models of the bodies, in OpenAI's shapes, with ours in one object.

What `trilithon` may hold is `JobConfig` without the fields that stand beside it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from trilithon_finetune.config import JobConfig, Task

OUTER = ("model", "training_file", "validation_file", "suffix", "seed", "metadata", "integrations")
"""Fields of `JobConfig` that OpenAI's shape has at the top."""


def _inner_schema() -> dict[str, Any]:
    """The schema of the `trilithon` object, with every definition in its place."""
    schema = JobConfig.model_json_schema()
    definitions = schema.pop("$defs")

    def inlined(node: Any) -> Any:
        if isinstance(node, list):
            return [inlined(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return inlined(definitions[node["$ref"].rpartition("/")[2]])
        return {key: inlined(value) for key, value in node.items() if key != "default"}

    properties = {name: inlined(part) for name, part in schema["properties"].items() if name not in OUTER}
    return {"type": "object", "properties": properties, "additionalProperties": False}


class Body(BaseModel):
    """Base of the bodies: unknown keys are errors, and nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True)


Auto = Literal["auto"]
Number = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Hyperparameters(Body):
    """OpenAI's few; `auto` leaves the choice to the task."""

    n_epochs: Annotated[int, Field(ge=1, le=1000)] | Auto | None = None
    batch_size: Annotated[int, Field(ge=1)] | Auto | None = None
    learning_rate_multiplier: Number | Auto | None = Field(
        None, description="Times the published rate of the kind of tuning: 2e-4 for lora, 2e-5 for full."
    )


class DpoHyperparameters(Hyperparameters):
    """Those of preferences."""

    beta: Number | Auto | None = Field(None, description="How strongly the answer is held to the base model's.")


class Supervised(Body):
    """The method `supervised`."""

    hyperparameters: Hyperparameters | None = None


class Dpo(Body):
    """The method `dpo`."""

    hyperparameters: DpoHyperparameters | None = None


class Method(Body):
    """How the rows are learned."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: dict[str, Any] | None = Field(None, description="Not supported; refused.")


class CreateJobBody(Body):
    """A new job, in OpenAI's shape."""

    model: Annotated[str, Field(min_length=1, max_length=256)] = Field(description="A base model that is served here.")
    training_file: Annotated[str, Field(min_length=1, max_length=64)]
    validation_file: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = Field(None, description="Older place of the method's.")
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    suffix: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    integrations: list[dict[str, Any]] | None = Field(None, description='`[{"type": "tensorboard"}]`, or none.')
    trilithon: Annotated[dict[str, Any], WithJsonSchema(_inner_schema())] | None = None


class ValidateBody(Body):
    """What a data file is checked for."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    task: Task = "sft"
    max_findings: Annotated[int, Field(ge=1, le=1000)] = 20


class ExportBody(Body):
    """What is exported."""

    step: Annotated[int, Field(ge=1)] | None = Field(None, description="Of which checkpoint; unset: the job's result.")
    format: Literal["peft", "model"] | None = Field(
        None, description="An adapter as it is, or a model directory, merged if need be; unset: as the job made it."
    )


class DeployBody(Body):
    """Where an alias is to point."""

    alias: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    step: Annotated[int, Field(ge=1)] | None = Field(None, description="Of which checkpoint; unset: the job's result.")
