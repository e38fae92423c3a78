"""
What a job will need, before it is queued: tokens, steps, memory of a rank by part, disk, time. No torch.

On CPUs products read packed copies of the weights, and a checkpoint's copies are beside what it is made of; on CUDA the
weights are read as they are, and the copies lie on the host, which is not counted. Activations are those of the planner
(`trilithon_parallel.memory`) for the largest micro-batch. An estimate is meant to be a little too large, never too
small.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from trilithon_finetune.config import JobConfig
from trilithon_finetune.data.batches import Heaviest
from trilithon_finetune.data.evidence import KEPT_TOKENS, NO_EVIDENCE, EvidenceSize
from trilithon_finetune.resolve import lora_spec
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.costs import PlannedLayout, model_flops
from trilithon_parallel.lora.spec import owned_shapes
from trilithon_parallel.memory import Numerics, layer_parts, stage_parameters
from trilithon_parallel.placement import global_shapes, local_sizes

# The constants below are fitted to peaks of short jobs: MiniLM and SmolLM2, 512 to 4,096 tokens at once.

FRAMEWORK_BYTES = 270 << 20
"""What a rank's process holds before it has a model: the interpreter, torch, communication."""

TOKENIZER_BYTES = 1365
"""Of an id of the vocabulary, in the tokenizer."""

KEPT = {"cpu": {"full": 1.25, "lora": 1.7}, "cuda": {"full": 1.7, "lora": 1.5}}
"""What a layer keeps for the backward pass, of what the planner counts; besides, one layer is always at work."""

LOGITS = 1.1
"""What is held of the logits at once: their gradient takes their place."""

SPAN_PARTS = 3
"""Of each span: the sum of its ends, its activation, and the gradient of one of them."""

PACKED = 1.3
"""Packed copies of weights, and what is left of making them."""

SUPERVISED_MARGIN = 1.1
"""By how much more than the data's mean of a micro-batch's tokens may count."""

PASSAGE_BYTES = 450
"""Of a passage beside its texts: the object, and the rows that are found by its id and by its text."""

REMEMBERED = 2
"""Bytes of remembered tokens, of reader and retriever, by byte of the texts; and for each passage what holds them."""

REMEMBERED_BYTES = 450

INDICES = {"cpu": 2.5, "cuda": 1.5}
"""Vectors of all passages that are held at once: the index, that of an evaluation, and the share that is gathered."""

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}

CONTEXT_BYTES = 600 << 20
"""What a rank takes of a CUDA device before it has a model: the context, the libraries' workspaces."""

EFFICIENCY = {"cpu": (0.2, 0.45, 0.8), "cuda": (0.02, 0.2, 0.6)}
"""
Share of the peak that training reaches: at worst, as a rule, at best.

A GPU's worst is a small model's, whose kernels take less time than it takes to start them.
"""

EVALUATION_COST = 1 / 3
"""Of a token that is only read, in tokens that are learned from."""

MEASURED_SPREAD = (0.9, 1.25)
"""What a run takes of what its first steps promise."""

ALLOCATOR_SHARE = 0.1
"""Of all else: what the allocator holds and does not use. It grows with the number of shapes that a run has seen."""

GROWTH_SHARE = 0.04
"""The same, of what some steps were measured to take: what it grows by in a run."""

DISK_MARGIN = 1.05


@dataclass(frozen=True)
class Workload:
    """
    What a job's data come to.

    Attributes:
        tokens, supervised: of one epoch. longest: of one sample.
        units: samples, or pairs, of one epoch.
        valid_tokens: of one evaluation.
        steps: of the whole run.
        heaviest: the largest micro-batch of the run.
        evidence: what a reader's retriever finds; nothing without one.
    """

    tokens: int
    supervised: int
    longest: int
    units: int
    valid_tokens: int
    steps: int
    heaviest: Heaviest
    evidence: EvidenceSize = NO_EVIDENCE


@dataclass(frozen=True)
class Machine:
    """What is there: bytes that a rank may use, bytes on the disk, FLOP/s of a rank."""

    rank_bytes: int
    disk_bytes: int
    peak_flops: float


@dataclass(frozen=True)
class Estimate:
    """
    The answer; `memory` by part, of the fullest rank. `problems`: why it is not allowed, each with what would help.

    `evaluated_tokens` are those of all evaluations. `seconds` is what is likely, between `seconds_low` and
    `seconds_high`; `measured`: by steps of the job itself (`probe`), rather than by the machine's peak.
    """

    train_tokens: int
    supervised_tokens: int
    evaluated_tokens: int
    steps: int
    memory: Mapping[str, int]
    rank_bytes: int
    disk_bytes: int
    disk_free_bytes: int
    seconds: float
    seconds_low: float
    seconds_high: float
    problems: tuple[str, ...]
    measured: bool = False

    @property
    def peak_bytes(self) -> int:
        """Of the fullest rank."""
        return sum(self.memory.values())

    @property
    def allowed(self) -> bool:
        """Whether the job fits."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """With the names of `trilithon.api.v1.Estimate`."""
        return {
            "train_tokens": self.train_tokens,
            "supervised_tokens": self.supervised_tokens,
            "steps": self.steps,
            "peak_bytes_per_rank": self.peak_bytes,
            "available_bytes_per_rank": self.rank_bytes,
            "memory_parts": dict(self.memory),
            "disk_bytes": self.disk_bytes,
            "disk_free_bytes": self.disk_free_bytes,
            "seconds": self.seconds,
            "seconds_low": self.seconds_low,
            "seconds_high": self.seconds_high,
            "measured": self.measured,
            "allowed": self.allowed,
            "findings": [
                {"code": "estimate_exceeded", "severity": "error", "message": problem} for problem in self.problems
            ],
        }


def estimate(config: JobConfig, model: ModelConfig, work: Workload, machine: Machine) -> Estimate:
    """
    Args:
        config: resolved.
        model: with the task's head.
    """
    memory = rank_memory(config, model, work)
    disk = disk_bytes(config, model, work)
    passes = config.training.epochs or 1
    share = work.steps / max(1, passes * math.ceil(work.units / (config.training.batch_size or 1)))
    train_tokens = round(work.tokens * passes * min(1.0, share))
    evaluated = work.valid_tokens * max(1, work.steps // (config.eval.every_steps or work.steps or 1))
    flops = _flops_per_token(config, model, work.longest) * (train_tokens + EVALUATION_COST * evaluated)
    ranks = config.parallel.tp * config.parallel.pp * config.parallel.dp
    slow, likely, fast = (
        flops / (machine.peak_flops * ranks * share_of_peak) for share_of_peak in EFFICIENCY[config.parallel.device]
    )
    problems = []
    if (needed := sum(memory.values())) > machine.rank_bytes:
        problems.append(_memory_problem(config, model, work, needed, machine.rank_bytes))
    problems += _disk_problems(disk, machine.disk_bytes)
    return Estimate(
        train_tokens=train_tokens,
        supervised_tokens=round(work.supervised * passes * min(1.0, share)),
        evaluated_tokens=evaluated,
        steps=work.steps,
        memory=memory,
        rank_bytes=machine.rank_bytes,
        disk_bytes=disk,
        disk_free_bytes=machine.disk_bytes,
        seconds=likely,
        seconds_low=fast,
        seconds_high=slow,
        problems=tuple(problems),
    )


def by_measurement(estimate: Estimate, *, peak_bytes: int, tokens_per_s: float) -> Estimate:
    """
    The estimate with what steps of the job have taken.

    Args:
        peak_bytes: of the fullest rank, no checkpoint in the making and no index made.
        tokens_per_s: of training, all ranks together.
    """
    later = {name: estimate.memory[name] for name in ("checkpoints", "index") if name in estimate.memory}
    memory = {"measured": peak_bytes, **later}
    memory["allocator"] = round(GROWTH_SHARE * sum(memory.values()))
    seconds = (estimate.train_tokens + EVALUATION_COST * estimate.evaluated_tokens) / tokens_per_s
    needed = sum(memory.values())
    problems = _disk_problems(estimate.disk_bytes, estimate.disk_free_bytes)
    if needed > estimate.rank_bytes:
        problems.append(
            f"a rank needs {_gib(needed)} of memory, as measured. Given: {_gib(estimate.rank_bytes)}. "
            "Lower training.micro_batch_tokens, or use more ranks (parallel.tp, parallel.pp)."
        )
    low, high = (seconds * share for share in MEASURED_SPREAD)
    return replace(
        estimate,
        memory=memory,
        seconds=seconds,
        seconds_low=low,
        seconds_high=high,
        problems=tuple(problems),
        measured=True,
    )


def compared(estimate: Mapping[str, Any] | None, peak_bytes: int) -> dict[str, Any] | None:
    """
    An estimate as JSON, with what the run took and by which share of it the estimate was above.

    >>> compared({"peak_bytes_per_rank": 110}, 100)
    {'peak_bytes_per_rank': 110, 'measured_peak_bytes': 100, 'error': 0.1}
    """
    if estimate is None or not peak_bytes:
        return None if estimate is None else dict(estimate)
    error = round(estimate["peak_bytes_per_rank"] / peak_bytes - 1, 4)
    return {**estimate, "measured_peak_bytes": peak_bytes, "error": error}


def rank_memory(config: JobConfig, model: ModelConfig, work: Workload) -> dict[str, int]:
    """Bytes of the fullest rank, by part."""
    tp, pp, dp = config.parallel.tp, config.parallel.pp, config.parallel.dp
    element = ELEMENT_BYTES[config.dtype]
    layers = -(-model.num_layers // pp)
    # The first stage holds the embedding, the last one the head; where there is one stage, it holds both.
    ends = [(True, pp == 1), (pp == 1, True)]
    base = replace(model, task_head=None)
    weights = max(
        stage_parameters(base, tp=tp, num_layers=layers, is_first=first, is_last=last) for first, last in ends
    )
    weights *= 2 if model.has_twin else 1
    embedding = local_sizes(model, tp).vocab * model.hidden_size
    is_full = config.tuning.kind == "full"
    trained = weights if is_full else trained_parameters(config, model) / (tp * pp)
    layout = PlannedLayout(tp, pp, dp, 1, 1, "none", False, True, "1f1b")
    layer, _ = layer_parts(model, layout, Numerics(config.dtype, bool(config.training.dropout)), 1)
    kept = KEPT[config.parallel.device][config.tuning.kind or "full"]
    in_flight = min(pp, work.heaviest.micro_batches) * layers
    learned, read = work.heaviest.tokens, min(_capacity(config, work), work.valid_tokens)
    # An evaluation has full micro-batches and keeps nothing; the larger of the two is what memory must hold.
    if (beside := model.retriever) is not None:  # each passage goes through both
        layer += layer_parts(beside, layout, Numerics(config.dtype), 1)[0] * beside.num_layers / layers
    activations, head = max(
        (learned * layer * (in_flight * kept + 1), _head_bytes(model, work, learned, tp)),
        (read * layer * 2, _head_bytes(model, work, read, tp)),
        key=sum,
    )
    states = 8 if config.dtype == "float32" else 12
    packed = PACKED * element * (weights - (0 if pp > 1 else embedding if not model.has_head else 0))
    parts = {
        "framework": FRAMEWORK_BYTES + TOKENIZER_BYTES * model.vocab_size,
        "weights": element * weights,
        "packed": packed,
        "gradients": 4 * trained,
        "optimizer": states * trained / dp,
        "activations": activations,
        "head": head,
        "checkpoints": (element + states) * trained / dp,
    }
    if beside is not None:
        parts |= {
            "passages": _passage_bytes(work.evidence),
            "index": INDICES[config.parallel.device] * 4 * work.evidence.passages * beside.hidden_size,
        }
    if config.parallel.device == "cuda":
        parts |= {"framework": CONTEXT_BYTES, "packed": 0, "checkpoints": 0}
        parts |= {"passages": 0} if beside is not None else {}
    parts["allocator"] = ALLOCATOR_SHARE * sum(parts.values())
    return {name: round(size) for name, size in parts.items()}


def _passage_bytes(evidence: EvidenceSize) -> float:
    """Passages as every rank holds them, with the tokens that it remembers."""
    kept = min(1.0, KEPT_TOKENS / max(1, evidence.passages))
    held = evidence.text_bytes + PASSAGE_BYTES * evidence.passages
    return held + kept * (REMEMBERED * evidence.text_bytes + REMEMBERED_BYTES * evidence.passages)


def _capacity(config: JobConfig, work: Workload) -> int:
    """Tokens of a full micro-batch."""
    return max(config.training.micro_batch_tokens or 0, work.longest)


def _head_bytes(model: ModelConfig, work: Workload, tokens: int, tp: int) -> float:
    """
    Logits in fp32 and what is made of them, of the tokens that count, where the vocabulary is a head; of joint spans
    what is kept of each span's MLP.
    """
    if (head := model.task_head) is not None:
        return 4.0 * SPAN_PARTS * tokens * len(head.labels) * model.hidden_size if head.kind == "joint_span" else 0.0
    counted = min(tokens, SUPERVISED_MARGIN * tokens * work.supervised / max(1, work.tokens))
    return 4.0 * LOGITS * counted * local_sizes(model, tp).vocab if model.has_head else 0.0


def trained_parameters(config: JobConfig, model: ModelConfig) -> int:
    """How many numbers the optimizer moves."""
    spec = lora_spec(config)
    shapes = global_shapes(model) if spec is None else owned_shapes(model, spec)
    return sum(math.prod(shape) for shape in shapes.values())


def disk_bytes(config: JobConfig, model: ModelConfig, work: Workload) -> int:
    """Checkpoints (those that are kept, the best one, one in the making), the export, and the prepared data."""
    trained = trained_parameters(config, model)
    element = ELEMENT_BYTES[config.dtype]
    states = 8 if config.dtype == "float32" else 12
    checkpoint = trained * (element + states)
    prepared = 12 * (work.tokens + work.valid_tokens)
    return round(DISK_MARGIN * (checkpoint * (config.checkpoint.keep + 2) + trained * element + prepared))


def _flops_per_token(config: JobConfig, model: ModelConfig, longest: int) -> float:
    length = max(1, longest)
    flops = model_flops(replace(model, task_head=None), batch=1, seq_len=length) / length
    return flops if config.tuning.kind == "full" else flops * 2 / 3


def _disk_problems(needed: int, free: int) -> list[str]:
    if needed <= free:
        return []
    return [f"the disk must have {_gib(needed)} free. Given: {_gib(free)}. Lower checkpoint.keep, or make room."]


def _memory_problem(config: JobConfig, model: ModelConfig, work: Workload, needed: int, available: int) -> str:
    """What is missing, and the smallest change that would fit, if one of these does."""
    said = f"a rank needs {_gib(needed)} of memory. Given: {_gib(available)}."
    tokens = config.training.micro_batch_tokens or work.longest
    while tokens // 2 >= work.longest:
        tokens //= 2
        training = config.training.model_copy(update={"micro_batch_tokens": tokens})
        smaller = replace(work, heaviest=replace(work.heaviest, tokens=min(tokens, work.heaviest.tokens)))
        fits = sum(rank_memory(config.model_copy(update={"training": training}), model, smaller).values())
        if fits <= available:
            return f"{said} training.micro_batch_tokens {tokens} would need {_gib(fits)}."
    if config.tuning.kind == "full":
        return f"{said} Use tuning.kind lora, shorter rows, or more ranks (parallel.tp, parallel.pp)."
    return f"{said} Use shorter rows (data.max_tokens) or more ranks (parallel.tp, parallel.pp)."


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
