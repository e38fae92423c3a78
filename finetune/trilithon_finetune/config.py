"""
What a finetuning job is told: one tree, whether it comes as a YAML file, over HTTP or over gRPC.

    model: smollm2-135m-instruct
    task: sft
    training_file: chats.jsonl
    tuning: {kind: lora, rank: 16, alpha: 32}
    training: {epochs: 2, batch_size: 16}

A value of None is chosen by the task (its published defaults) or by the data, and the resolved configuration, which
every surface shows, has none left. Config is data: no import paths, no code, unknown keys are errors with a hint.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError, model_validator

from trilithon_finetune.errors import FinetuneError, JobError

Task = Literal[
    "lm", "sft", "dpo", "mlm", "span_qa", "answer_qa", "yes_no_maybe", "ner", "relation", "classify", "dpr", "ict",
    "mss", "reader_individual", "reader_joint",
    "dialogue", "grounded_dialogue", "answer_gen", "question_gen", "story_keywords", "story_generator", "story_ranker",
]  # fmt: skip

BASE_LR = {"lora": 2e-4, "full": 2e-5}
"""What `learning_rate_multiplier` multiplies, by kind of tuning."""

PASSAGES, RETRIEVER = "passages", "retriever"
"""Options of tasks that name a file and a model besides, as `training_file` and `model` do."""

MAX_LORA_RANK = 64
"""The largest rank that the server takes, so the largest that a job may train."""


def _number(value: object) -> object:
    """YAML reads 1e-3 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, BeforeValidator(_number), Field(ge=0.0, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_number), Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """Base of every part: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Tuning(Section):
    """What is trained."""

    kind: Literal["lora", "full"] | None = None
    """`lora`: an adapter beside frozen weights. `full`: all weights. None: `lora` for decoders, `full` for encoders."""
    rank: Annotated[int, Field(ge=1, le=MAX_LORA_RANK)] = 16
    """Of the adapter's two factors."""
    alpha: Annotated[float, BeforeValidator(_number), Field(gt=0)] = 32.0
    """The adapter's product is scaled by alpha / rank."""
    dropout: Share = 0.0
    """Of the adapter's input."""
    targets: tuple[str, ...] | None = None
    """Leaf names of the adapted products. None: every product of a layer."""
    layout: Literal["per_projection", "fused"] = "per_projection"
    """`fused`: q, k and v share one A, gate and up another."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=MAX_LORA_RANK)]] = {}
    """Rank by leaf name, where it differs."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Alpha by leaf name, where it differs."""


class Optimizer(Section):
    """AdamW and its learning rate."""

    lr: Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)] | None = None
    """The largest rate, after the warm-up. None: the task's."""
    head_lr: Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)] | None = None
    """Of a new task head. None: the task's default, in proportion to `lr`."""
    schedule: Literal["constant", "linear", "cosine"] | None = None
    """After the warm-up: stay, or fall to zero at the last step."""
    warmup_ratio: Share | None = None
    """Share of all steps."""
    weight_decay: Rate | None = None
    """Of matrices and tables; norms and biases never decay."""
    betas: tuple[Share, Share] | None = None
    """Decay of the mean of gradients, and of their squares."""
    eps: Annotated[float, BeforeValidator(_number), Field(gt=0)] = 1e-8
    """Added to the root."""
    clip: Annotated[float, BeforeValidator(_number), Field(gt=0)] | None = 1.0
    """Of the gradients' global norm; null for none."""


class Training(Section):
    """How long and in which batches."""

    epochs: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Passes over the data."""
    batch_size: Count | None = None
    """Rows of one optimizer step, over all ranks."""
    micro_batch_tokens: Count | None = None
    """Tokens that a rank holds at once, at most; a row that is longer goes alone."""
    max_steps: Count | None = None
    """Stop after so many steps, whatever `epochs` says."""
    dropout: Share | None = None
    """Of the residual stream's inputs and of a head's, while training."""


class Data(Section):
    """How rows become samples."""

    max_tokens: Annotated[int, Field(ge=8)] | None = None
    """Of a sample. None: the task's, at most the model's window."""
    on_long: Literal["error", "truncate", "drop"] = "error"
    """What happens to rows beyond `max_tokens`."""
    bad_rows_allowed: Annotated[float, BeforeValidator(_number), Field(ge=0)] = 0
    """Rows with errors that are left out: a number, or a share where it is below 1."""
    train_on: Literal["assistant", "all"] = "assistant"
    """Of a chat: which turns are supervised."""
    validation_share: Share = 0.0
    """Share of the training rows that is held out where no validation file is given."""


class Parallel(Section):
    """The layout: tp * pp * dp ranks."""

    tp: Count = 1
    """Tensor-parallel ranks."""
    pp: Count = 1
    """Pipeline stages."""
    dp: Count = 1
    """Replicas, each with its share of every batch."""
    device: Literal["cpu", "cuda"] = "cpu"
    """What ranks compute on; on `cuda` each rank has a device of its own."""


class EarlyStop(Section):
    """Stop when a validation metric has not become better `patience` evaluations in a row."""

    patience: Count = 3
    """Evaluations without a better number."""
    metric: str = "valid_loss"
    """Which number; a loss is better when it is smaller, all else when it is larger."""


class Eval(Section):
    """Evaluation on the validation rows."""

    every_steps: Count | None = None
    """None: once an epoch."""
    early_stop: EarlyStop | None = None
    """None: train to the end."""


class Checkpoint(Section):
    """What is kept while training."""

    every_steps: Count | None = None
    """None: once an epoch."""
    keep: Count = 2
    """Newest checkpoints that stay; the best one and deployed ones stay besides."""


class Deploy(Section):
    """Whether and when the result is served under an alias."""

    alias: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")] | None = None
    """A name of your own that points to the newest result."""
    on: Literal["succeeded", "checkpoint", "never"] = "succeeded"
    """When the alias moves; `checkpoint` also serves every checkpoint under a name of its own."""


class Limits(Section):
    """When a job is ended."""

    max_hours: Annotated[float, BeforeValidator(_number), Field(gt=0)] | None = None
    """Of work, over all attempts."""


NO_WANDB = (
    "wandb is not written to: its client is a service of its own. Ask for tensorboard, whose files `wandb sync` reads."
)


class Integration(Section):
    """A program that shows runs."""

    type: Literal["tensorboard"]
    """`tensorboard`: event files beside the job's, and among its `result_files`."""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") == "wandb":
            raise ValueError(NO_WANDB)
        return value


class JobConfig(Section):
    """The whole configuration of a job."""

    model: Annotated[str, Field(min_length=1)]
    """A served base model, a name in the model store, or a path (command line only)."""
    task: Task = "sft"
    """What is learned."""
    training_file: Annotated[str, Field(min_length=1)]
    """A file id; on the command line also a path, relative to the configuration file."""
    validation_file: str | None = None
    """Rows to judge by, likewise."""
    suffix: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")] | None = None
    """Part of the result's name."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Of order, masks, dropout and new weights. None: from the job's id."""
    metadata: Annotated[dict[str, str], Field(max_length=16)] = {}
    """Labels of your own, 16 at most."""
    tuning: Tuning = Tuning()
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    data: Data = Data()
    parallel: Parallel = Parallel()
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights; gradients and moments are fp32."""
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    deploy: Deploy = Deploy()
    limits: Limits = Limits()
    integrations: Annotated[tuple[Integration, ...], Field(max_length=1)] = ()
    """Programs that the numbers of steps are written for."""
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    """Larger runs first."""
    options: dict[str, JsonValue] = {}
    """Of the task; its recipe checks them."""

    @property
    def passages(self) -> str | None:
        """The file of passages that the task's options name."""
        return self._named(PASSAGES)

    @property
    def retriever(self) -> str | None:
        """The second model that the task's options name."""
        return self._named(RETRIEVER)

    def _named(self, option: str) -> str | None:
        value = self.options.get(option)
        return value if isinstance(value, str) else None

    @model_validator(mode="after")
    def _cross_checks(self) -> Self:
        for key, value in self.metadata.items():
            if len(key) > 64 or len(value) > 512:
                raise ValueError(f"metadata {key[:64]!r} must have at most 64 characters, its value at most 512.")
        if self.tuning.kind == "full" and (self.tuning.targets or self.tuning.rank_pattern):
            raise ValueError("tuning targets and rank_pattern belong to kind lora. Given: kind full.")
        return self


def parse_config(document: dict[str, Any], *, where: str = "config") -> JobConfig:
    """
    Check a configuration given as a tree; every finding is reported, not only the first.

    Raises:
        FinetuneError: `invalid_config`; `findings` has one sentence for each broken rule.
    """
    try:
        return JobConfig.model_validate(document)
    except ValidationError as error:
        findings = tuple(_sentence(where, item) for item in error.errors())
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"])
        raise FinetuneError(
            JobError(code="invalid_config", message=findings[0], param=param), findings=findings
        ) from None


def load_config_file(path: Path, *, overrides: tuple[str, ...] = ()) -> JobConfig:
    """
    Read a YAML file; relative paths of data become relative to its folder.

    Args:
        overrides: `a.b=value` each, the value in YAML.
    Raises:
        FinetuneError: `invalid_config`, with every finding.
    """
    try:
        raw = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        raise _invalid(f"{path} does not exist. Name a YAML file.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _invalid(f"{path} is not readable YAML: {error}.") from None
    if not isinstance(raw, dict):
        raise _invalid(f"{path} must be a mapping. Given: {type(raw).__name__}. Keys: model, task, training_file ...")
    override(raw, overrides)
    options = raw.get("options")
    places = [(raw, "training_file"), (raw, "validation_file")]
    places += [(options, PASSAGES)] if isinstance(options, dict) else []
    for tree, name in places:
        value = tree.get(name)
        if isinstance(value, str) and not re.fullmatch(r"file-[a-z0-9]{20}", value):
            tree[name] = str(path.parent / value)
    return parse_config(raw, where=path.name)


def override(tree: dict[str, Any], items: Sequence[str]) -> None:
    """
    Set fields of a configuration's tree.

    Args:
        items: `a.b=value` each, the value in YAML.
    Raises:
        FinetuneError: `invalid_config`.
    """
    for item in items:
        name, separator, text = item.partition("=")
        if not separator:
            raise _invalid(f"--set takes NAME=VALUE. Given: {item!r}.")
        try:
            _set(tree, name.split("."), yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise _invalid(f"--set {name}: the value must be YAML. Given: {text!r} ({error}).") from None


def _set(tree: Any, names: list[str], value: Any) -> None:
    for name in names[:-1]:
        if not isinstance(tree, dict):
            raise _invalid(f"--set {'.'.join(names)} does not name a field.")
        tree = tree.setdefault(name, {})
    if not isinstance(tree, dict):
        raise _invalid(f"--set {'.'.join(names)} does not name a field.")
    tree[names[-1]] = value


def _invalid(message: str) -> FinetuneError:
    return FinetuneError(JobError(code="invalid_config", message=message))


def _sentence(where: str, item: Any) -> str:
    path = [str(part) for part in item["loc"]]
    name = ".".join(path) or "the document"
    if item["type"] == "missing":
        return f"{where} {name} is required."
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], keys_of(path[:-1]), n=1)
        hint = f" Did you mean `{near[0]}`?" if near else f" Allowed: {', '.join(keys_of(path[:-1]))}."
        return f"{where} {name} is unknown.{hint}"
    rule, given = str(item["msg"]).removeprefix("Value error, "), item["input"]
    if "Given:" in rule or isinstance(given, dict):
        return f"{where} {name}: {rule}" + ("" if rule.endswith(".") else ".")
    return f"{where} {name}: {rule}. Given: {given!r}."


def seed_of(job_id: str) -> int:
    """The seed of a job that asks for none, so that it is known as soon as the job is."""
    return int(hashlib.sha256(job_id.encode()).hexdigest()[:7], 16)


def keys_of(path: Sequence[str]) -> list[str]:
    """The fields of the section at `path`; empty where there is none."""
    section: Any = JobConfig
    for name in path:
        field = section.model_fields.get(name)
        kinds = [] if field is None else [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)
        if section is None:
            return []
    return list(section.model_fields)
