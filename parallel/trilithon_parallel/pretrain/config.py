"""
The file that `trilithon pretrain` reads: one YAML document, every field checked, unknown ones refused.

    model:     {preset: llama_30m}                    or config: or weights: DIRECTORY
    data:      {tokenizer: vocabulary, seq_len: 512, train: [{prefix: corpus}]}
    layout:    {tp: 2, pp: 2}
    training:  {tokens: 2e7, global_batch_size: 16, learning_rate: {peak: 1e-3}}
    run:       {directory: runs/first}

Paths are relative to the file's own folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from trilithon_parallel.config import ModelError
from trilithon_parallel.fp8 import Fp8Recipe

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


def _whole(value: object) -> object:
    """YAML reads 2e7 as text and 2.0e7 as a number with a point: both are whole numbers."""
    try:
        number = float(value) if isinstance(value, str | float) else None
    except ValueError:
        return value
    return int(number) if number is not None and number.is_integer() else value


def _decimal(value: object) -> object:
    """YAML reads 1e-3 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Count = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
Rate = Annotated[float, BeforeValidator(_decimal), Field(ge=0.0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelSection(_Section):
    """What is trained: exactly one of the first three."""

    preset: str | None = None
    """A named recipe (`trilithon plan --list`); vocabulary and context follow the data."""
    config: Path | None = None
    """A directory with the config.json of a supported architecture; a new model is made."""
    weights: Path | None = None
    """A model directory or a checkpoint; training begins with its weights."""
    init_std: Annotated[Rate, Field(gt=0)] | None = None
    """Standard deviation of a new model's weights; sqrt(1 / (3 hidden_size)) if not given."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in ("preset", "config", "weights") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"must have exactly one of preset, config, weights. Given: {', '.join(given) or 'none'}")
        return self


class SourceSection(_Section):
    """One token file of a blend."""

    prefix: Path
    """Path without `.bin` and `.idx`."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the samples, of any scale."""


class DataSection(_Section):
    """What is learned from."""

    tokenizer: Path
    """Directory of the tokenizer that the token files were made with; checkpoints carry it along."""
    seq_len: Positive
    """Tokens of a sample."""
    train: Annotated[list[SourceSection], Field(min_length=1)]
    """Token files to learn from."""
    valid: list[SourceSection] = []
    """Token files that are held out whole; without any, the second share of `split` is."""
    split: Annotated[list[float], Field(min_length=3, max_length=3)] = [1.0, 0.0, 0.0]
    """Shares of each training file's documents: for training, validation, and neither."""
    objective: Literal["causal", "masked", "spans"] | None = None
    """Next token, masked tokens (BERT), corrupted spans (T5). What the architecture is for, if not given."""
    reset_positions: bool = False
    """Count positions from 0 again in every document of a sample."""
    reset_attention: bool = False
    """A document does not attend to those before it."""
    mask_document_ends: bool = False
    """The last token of a document predicts nothing."""
    sentence_pairs: bool = False
    """For masked tokens: cut each sample in two segments with token types 0 and 1."""


class LayoutSection(_Section):
    """How the run is laid out over ranks; see `layout.Layout` and `recompute.Recompute`."""

    tp: Positive = 1
    """Tensor-parallel ranks."""
    pp: Positive = 1
    """Pipeline stages."""
    dp: Positive = 1
    """Replicas, each with its share of every batch."""
    virtual: Positive = 1
    """Model chunks of each pipeline rank; above 1 with the interleaved schedule."""
    micro_batch_size: Positive = 1
    """Samples that go through a stage together."""
    schedule: Literal["gpipe", "1f1b", "interleaved"] = "1f1b"
    """Order of forward and backward passes."""
    sequence_parallel: bool = False
    """Cut norms, dropout and the residual stream over tp, by tokens."""
    distributed_optimizer: bool = True
    """Cut fp32 masters and moments over dp (ZeRO-1)."""
    layer_counts: list[Positive] | None = None
    """Layers of each of the pp * virtual stages; as even as possible, if not given."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping it."""
    recompute_every: Positive = 1
    """With full: layers from one kept input to the next."""
    recompute_first: Positive | None = None
    """With full: only so many layers of each stage."""


class LearningRateSection(_Section):
    """The learning rate by consumed samples; shares are of the whole run."""

    peak: Annotated[Rate, Field(gt=0)]
    """The largest rate."""
    floor: Rate | None = None
    """A tenth of the peak, if not given."""
    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """How it falls after the warm-up."""
    warmup: Share = 0.02
    """Share over which it rises from 0."""
    cooldown: Share = 0.2
    """Share over which `wsd` falls."""


class RampSection(_Section):
    """Grow the batch from `start` by `increment` over the first `samples` samples."""

    start: Positive
    """First batch, in samples."""
    increment: Positive
    """By which it grows."""
    samples: Count
    """Over which it grows."""


class TrainingSection(_Section):
    """How it is learned: exactly one of `samples`, `tokens`, `steps` says how long."""

    global_batch_size: Positive
    """Samples of a step, over all ranks."""
    samples: Count | None = None
    """How long: samples,"""
    tokens: Count | None = None
    """or tokens,"""
    steps: Count | None = None
    """or optimizer steps."""
    batch_ramp: RampSection | None = None
    """A batch that grows at first."""
    learning_rate: LearningRateSection
    """Peak, warm-up and decay."""
    beta1: Share = 0.9
    """AdamW: decay of the mean of gradients."""
    beta2: Share = 0.95
    """AdamW: decay of the mean of their squares."""
    eps: Annotated[Rate, Field(gt=0)] = 1e-8
    """AdamW: added to the root."""
    weight_decay: Rate = 0.1
    """AdamW: of matrices and tables; norms and biases never decay."""
    clip_norm: Annotated[Rate, Field(gt=0)] | None = 1.0
    """Largest global norm of a gradient; null for none."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the parameters; gradients, masters and moments are fp32."""
    fp8: Fp8Recipe | None = None
    """Multiply in 8 bits, on GPUs that can: scaled by past steps ("delayed"), by the tensor itself ("current"), or in
    blocks of 32 elements ("mxfp8")."""
    dropout: Share = 0.0
    """Share of the residual inputs that is dropped."""
    attention_dropout: Share = 0.0
    """Share of the attention weights that is dropped."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of weights, order of data, masks and dropout."""
    max_skipped: Annotated[int, Field(ge=0)] = 20
    """Steps in a row whose gradients are not finite, after which the run gives up."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in ("samples", "tokens", "steps") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"must have exactly one of samples, tokens, steps. Given: {', '.join(given) or 'none'}")
        if self.steps is not None and self.batch_ramp is not None:
            raise ValueError("must have samples or tokens, not steps, where there is a batch_ramp. Given: both")
        return self


class RunSection(_Section):
    """Where the run keeps what it makes, and how it behaves."""

    directory: Path
    """Checkpoints, metrics, curves; a run that is started again goes on from what is there."""
    checkpoint_every: Positive = 1000
    """Steps between checkpoints."""
    keep_last: Positive = 2
    """Newest checkpoints that stay."""
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Checkpoints of every so many steps stay too; 0 for none."""
    evaluate_every: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations; 0 for the last step alone."""
    evaluate_samples: Positive = 256
    """Held-out samples that an evaluation uses at most."""
    device: Literal["cpu", "cuda"] = "cpu"
    """What ranks compute on."""
    backend: Literal["torch", "te", "auto"] = "auto"
    """torch, Transformer Engine, or whichever is there."""
    num_threads: Positive | None = None
    """Of each rank; the host's cores shared out, if not given."""
    deterministic: bool = False
    """Refuse operations whose bits depend on timing (GPUs); on CPUs there are none."""
    timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """Seconds without progress that are a hang."""
    first_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """The same until the second step."""
    max_restarts: Annotated[int, Field(ge=0)] = 0
    """How often lost ranks are started again, from the newest checkpoint (local launch)."""


class SlurmSection(_Section):
    """What Slurm is told with `--launch slurm`; see `launch.slurm.SlurmJob`."""

    nodes: Positive = 1
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    time_limit: str
    cpus_per_node: Positive | None = None
    partition: str | None = None
    account: str | None = None
    requeue: bool = True
    setup: list[str] = []
    directives: list[str] = []
    environment: dict[str, str] = {}
    python: str = "python"


class KubernetesSection(_Section):
    """What Kubernetes is told with `--launch kubernetes`; see `launch.kubernetes.KubernetesJob`."""

    image: str
    claim: str
    """PersistentVolumeClaim that pods mount at /run/trilithon: configuration, data and run directory lie there."""
    config: str = "/run/trilithon/config.yaml"
    """Where pods find the run's YAML file."""
    nodes: Positive = 1
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    cpu: str = "8"
    memory: str = "32Gi"
    namespace: str | None = None
    environment: dict[str, str] = {}
    node_selector: dict[str, str] = {}


class LaunchSection(_Section):
    """Clusters that the run may be launched on."""

    slurm: SlurmSection | None = None
    kubernetes: KubernetesSection | None = None


class PretrainConfig(_Section):
    """The whole document."""

    model: ModelSection
    data: DataSection
    layout: LayoutSection = LayoutSection()
    training: TrainingSection
    run: RunSection
    launch: LaunchSection = LaunchSection()


def load_pretrain_config(path: Path) -> PretrainConfig:
    """
    Read the file; relative paths become relative to its folder.

    Raises:
        ModelError: `config_invalid`, with every finding: field, rule, value given.
    """
    try:
        raw = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist.", code="config_invalid", hint="Name a YAML file.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ModelError(f"{path} is not readable YAML: {error}.", code="config_invalid") from None
    if not isinstance(raw, dict):
        raise ModelError(
            f"{path} must be a mapping of sections. Given: {type(raw).__name__}.",
            code="config_invalid",
            hint=f"Sections: {', '.join(PretrainConfig.model_fields)}.",
        )
    try:
        return _under(path.parent, PretrainConfig.model_validate(raw))
    except ValidationError as error:
        raise ModelError(
            " ".join(_sentence(path, item) for item in error.errors()[:20]), code="config_invalid"
        ) from None


def _sentence(path: Path, item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"]) or "the document"
    rule, given = str(item["msg"]).removeprefix("Value error, "), item["input"]
    if item["type"] == "extra_forbidden":
        rule = "is unknown"
    elif item["type"] == "missing":
        return f"{path.name} {where} is required."
    shown = "" if "Given:" in rule or isinstance(given, dict) else f" Given: {given!r}"
    return f"{path.name} {where}: {rule}.{shown}{'.' if shown else ''}"


def _under(folder: Path, config: PretrainConfig) -> PretrainConfig:
    def place(path: Path) -> Path:
        return path if path.is_absolute() else folder / path

    model, data = config.model, config.data
    sources = {
        name: [source.model_copy(update={"prefix": place(source.prefix)}) for source in getattr(data, name)]
        for name in ("train", "valid")
    }
    paths = {name: place(value) for name in ("config", "weights") if (value := getattr(model, name)) is not None}
    return config.model_copy(
        update={
            "model": model.model_copy(update=paths),
            "data": data.model_copy(update={"tokenizer": place(data.tokenizer), **sources}),
            "run": config.run.model_copy(update={"directory": place(config.run.directory)}),
        }
    )
