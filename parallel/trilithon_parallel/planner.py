"""
Which layout trains a model fastest on a cluster: the search. No torch.

Every (tp, pp, dp, micro-batch, chunks, recomputation) is either ranked by its predicted step time or rejected for one
reason. `explain.py` says in words why the winner wins. The model of time is `timing.py`, of memory `memory.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from trilithon_parallel.config import ModelConfig, ModelError
from trilithon_parallel.costs import (
    RECOMPUTE_KINDS,
    SCHEDULES,
    SECONDS_PER_DAY,
    PlannedLayout,
    Recompute,
    Schedule,
    achieved,
    bubble_fraction,
    num_iterations,
    num_microbatches,
)
from trilithon_parallel.hardware import Hardware
from trilithon_parallel.memory import Memory, Numerics, peak_memory
from trilithon_parallel.placement import layout_waste
from trilithon_parallel.timing import StepTime, Traffic, step_time, traffic

__all__ = ["Candidate", "Constraints", "Plan", "PlannedLayout", "Rejected", "Workload", "evaluate", "plan"]

# Bounds of the search: more sequences in a micro-batch, or more chunks on a rank, gain nothing that was ever measured.
MAX_MICRO_BATCH, MAX_VIRTUAL = 64, 8


@dataclass(frozen=True)
class Workload:
    """What is to be trained: a model on `gpus` devices; `tokens` of the whole run, 0 where that is not asked."""

    config: ModelConfig
    gpus: int
    global_batch: int
    seq_len: int
    numerics: Numerics
    tokens: float = 0.0

    def __post_init__(self) -> None:
        for name in ("gpus", "global_batch", "seq_len"):
            if getattr(self, name) < 1:
                raise ModelError(f"plan {name} must be at least 1. Given: {getattr(self, name)}.", code="plan_invalid")
        if self.config.is_seq2seq:
            raise ModelError(
                f"plan knows no layouts of encoder-decoders. Given: {self.config.architecture}.",
                code="model_unsupported",
                hint="Plan a decoder or an encoder.",
            )
        if self.config.position == "learned" and self.seq_len > self.config.max_context:
            raise ModelError(
                f"plan seq_len must be at most the model's {self.config.max_context} positions. Given: {self.seq_len}.",
                code="plan_invalid",
            )


@dataclass(frozen=True)
class Constraints:
    """
    What the search may not choose: None leaves it free.

    Left free, sequence parallelism and the distributed optimizer are on wherever they do something (tp or dp above
    1), since they save memory and cost no more; GPipe, which needs more memory for the same bubble, is never chosen.
    """

    tp: int | None = None
    pp: int | None = None
    dp: int | None = None
    micro_batch: int | None = None
    virtual: int | None = None
    recompute: Recompute | None = None
    schedule: Schedule | None = None
    sequence_parallel: bool | None = None
    distributed_optimizer: bool | None = None

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "dp", "micro_batch", "virtual"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ModelError(f"plan {name} must be at least 1. Given: {value}.", code="plan_invalid")
        for name, allowed in (("recompute", RECOMPUTE_KINDS), ("schedule", SCHEDULES)):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise ModelError(
                    f"plan {name} is not known. Given: {value!r}.",
                    code="plan_invalid",
                    hint=f"Allowed: {', '.join(allowed)}.",
                )


@dataclass(frozen=True)
class Candidate:
    """
    A layout that fits, and what it costs.

    `bubble`: idle over ideal time of an even pipeline, (p - 1) / (v m); `waste`: share of attention's work on zero
    heads; `flops_per_s` of one device with recomputation counted, `mfu` without.
    """

    layout: PlannedLayout
    microbatches: int
    time: StepTime
    memory: Memory
    traffic: Traffic
    bubble: float
    waste: float
    flops_per_s: float
    mfu: float
    tokens_per_s: float

    def days(self, workload: Workload) -> float:
        """Days of the whole run, at this step time throughout."""
        steps = num_iterations(workload.tokens, global_batch=workload.global_batch, seq_len=workload.seq_len)
        return steps * self.time.total / SECONDS_PER_DAY


@dataclass(frozen=True)
class Rejected:
    """A layout, or all layouts that share what is given, and the one reason why it is out."""

    tp: int
    pp: int
    reason: str
    micro_batch: int | None = None
    virtual: int | None = None
    recompute: Recompute | None = None
    memory: Memory | None = None


@dataclass(frozen=True)
class Plan:
    """The ranked candidates, fastest first, and everything that was rejected."""

    workload: Workload
    hardware: Hardware
    constraints: Constraints
    ranked: tuple[Candidate, ...]
    rejected: tuple[Rejected, ...]

    @property
    def best(self) -> Candidate:
        """
        The fastest candidate.

        Raises:
            ModelError: `plan_impossible`, nothing fits.
        """
        if self.ranked:
            return self.ranked[0]
        raise ModelError(
            f"no layout of {self.workload.gpus} {self.hardware.name} fits. {self._closest()}",
            code="plan_impossible",
            hint="Give more devices, another global batch, or fewer constraints.",
        )

    def _closest(self) -> str:
        """The rejection that misses memory by least, or any."""
        if not self.rejected:
            return f"No sizes that divide {self.workload.gpus} are left by the constraints."
        sizes = [(one.memory.total, place) for place, one in enumerate(self.rejected) if one.memory is not None]
        if sizes:
            best = self.rejected[min(sizes)[1]]
            return f"Nearest: tp {best.tp}, pp {best.pp} {best.reason}."
        first = self.rejected[0]
        return f"For example tp {first.tp}, pp {first.pp}: {first.reason}."


def plan(workload: Workload, hardware: Hardware, constraints: Constraints | None = None) -> Plan:
    """
    Search all layouts of `workload.gpus` devices.

    >>> from trilithon_parallel.hardware import PRESETS
    >>> from trilithon_parallel.presets import RECIPES
    >>> recipe = RECIPES["gpt_1.7b"]
    >>> workload = Workload(recipe.config, 32, recipe.global_batch, recipe.seq_len, recipe.numerics)
    >>> plan(workload, PRESETS["a100-80gb"]).best.layout.pp
    1

    Returns:
        Every layout once: ranked by seconds of a step (then by memory), or rejected.
    """
    constraints = constraints or Constraints()
    ranked: list[Candidate] = []
    rejected: list[Rejected] = []
    for tp, pp in _shapes(workload.gpus, constraints):
        for found in _layouts(workload, constraints, tp, pp):
            if isinstance(found, Rejected):
                rejected.append(found)
                continue
            memory = _memory(workload, found)
            if memory.total > hardware.memory_bytes:
                rejected.append(_too_big(found, memory, hardware))
            else:
                ranked.append(evaluate(workload, hardware, found, memory=memory))
    ranked.sort(key=lambda c: (c.time.total, c.memory.total, c.layout.tp, c.layout.pp, c.layout.virtual))
    return Plan(workload, hardware, constraints, tuple(ranked), tuple(rejected))


def evaluate(
    workload: Workload, hardware: Hardware, layout: PlannedLayout, *, memory: Memory | None = None
) -> Candidate:
    """
    What one layout costs, whether it fits or not.

    Raises:
        ModelError: `layout_invalid`, the global batch is no multiple of dp * micro-batch.
    """
    config, numerics, seq_len, batch = workload.config, workload.numerics, workload.seq_len, workload.global_batch
    microbatches = layout.microbatches(batch)
    time = step_time(config, layout, hardware, numerics, seq_len=seq_len, global_batch=batch)
    reached = achieved(
        config,
        batch=batch,
        seq_len=seq_len,
        gpus=layout.num_ranks,
        seconds=time.total,
        peak_flops=hardware.peak_flops,
        recompute=layout.recompute,
    )
    return Candidate(
        layout=layout,
        microbatches=microbatches,
        time=time,
        memory=memory or _memory(workload, layout),
        traffic=traffic(config, layout, numerics, seq_len=seq_len, global_batch=batch),
        bubble=bubble_fraction(pp=layout.pp, microbatches=microbatches, virtual=layout.virtual),
        waste=layout_waste(config, layout.tp),
        flops_per_s=reached.flops_per_s,
        mfu=reached.mfu,
        tokens_per_s=reached.tokens_per_s,
    )


def _memory(workload: Workload, layout: PlannedLayout) -> Memory:
    return peak_memory(
        workload.config,
        layout,
        workload.numerics,
        seq_len=workload.seq_len,
        microbatches=layout.microbatches(workload.global_batch),
    )


def _shapes(gpus: int, constraints: Constraints) -> Iterator[tuple[int, int]]:
    """(tp, pp) whose product divides the number of devices."""
    divisors = [size for size in range(1, gpus + 1) if gpus % size == 0]
    for tp in divisors:
        for pp in divisors:
            if gpus % (tp * pp) == 0 and _allows(constraints, tp=tp, pp=pp, dp=gpus // (tp * pp)):
                yield tp, pp


def _allows(constraints: Constraints, **sizes: object) -> bool:
    return all(getattr(constraints, name) in (None, size) for name, size in sizes.items())


def _layouts(workload: Workload, constraints: Constraints, tp: int, pp: int) -> Iterator[PlannedLayout | Rejected]:
    """All layouts of one (tp, pp), or why there is none."""
    config, dp = workload.config, workload.gpus // (tp * pp)
    if tp > config.num_heads:
        yield Rejected(tp, pp, f"tp {tp} is above the model's {config.num_heads} heads")
        return
    if pp > config.num_layers:
        yield Rejected(tp, pp, f"pp {pp} is above the model's {config.num_layers} layers")
        return
    if workload.global_batch % dp:
        yield Rejected(tp, pp, f"the global batch of {workload.global_batch} is no multiple of dp {dp}")
        return
    base = PlannedLayout(
        tp=tp,
        pp=pp,
        dp=dp,
        micro_batch=1,
        sequence_parallel=tp > 1 if constraints.sequence_parallel is None else constraints.sequence_parallel,
        distributed_optimizer=dp > 1
        if constraints.distributed_optimizer is None
        else constraints.distributed_optimizer,
    )
    for micro_batch in _micro_batches(workload.global_batch // dp, constraints):
        if workload.global_batch % (dp * micro_batch):
            reason = f"dp {dp} * micro-batch {micro_batch} does not divide the global batch of {workload.global_batch}"
            yield Rejected(tp, pp, reason, micro_batch=micro_batch)
            continue
        if base.sequence_parallel and micro_batch * workload.seq_len % tp:
            tokens = micro_batch * workload.seq_len
            reason = f"sequence parallelism cannot cut {tokens} tokens of a micro-batch into {tp} equal parts"
            yield Rejected(tp, pp, reason, micro_batch=micro_batch)
            continue
        yield from _schedules(workload, constraints, replace(base, micro_batch=micro_batch))


def _micro_batches(per_replica: int, constraints: Constraints) -> list[int]:
    """Powers of two up to what one replica has."""
    if constraints.micro_batch is not None:
        return [constraints.micro_batch]
    return [2**k for k in range(MAX_MICRO_BATCH.bit_length()) if 2**k <= per_replica]


def _schedules(workload: Workload, constraints: Constraints, base: PlannedLayout) -> Iterator[PlannedLayout | Rejected]:
    """Chunks, schedule and recomputation of one (tp, pp, dp, micro-batch)."""
    layers, tp, pp, micro_batch = workload.config.num_layers, base.tp, base.pp, base.micro_batch
    microbatches = num_microbatches(workload.global_batch, dp=base.dp, micro_batch=micro_batch)
    most = 1 if pp == 1 or constraints.schedule in ("1f1b", "gpipe") else min(MAX_VIRTUAL, layers // pp)
    wanted = range(1, most + 1) if constraints.virtual is None else [constraints.virtual]
    for virtual in wanted:
        reason = ""
        if virtual > 1 and pp == 1:
            reason = "interleaving needs at least 2 pipeline stages"
        elif virtual * pp > layers:
            reason = f"{virtual} chunks on each of {pp} stages are more than the model's {layers} layers"
        elif virtual > 1 and constraints.virtual is None and layers % (virtual * pp):
            # A table of equal chunks has no room for longer ones: the others would wait.
            reason = f"{layers} layers make no {virtual} equal chunks on each of {pp} stages"
        elif virtual > 1 and microbatches < pp:
            reason = f"interleaving needs at least pp = {pp} micro-batches; there are {microbatches}"
        elif virtual > 1 and constraints.schedule in ("1f1b", "gpipe"):
            reason = f"{constraints.schedule} has one chunk on each stage"
        elif virtual == 1 and constraints.schedule == "interleaved":
            reason = "the interleaved schedule has at least 2 chunks on each stage"
        if reason:
            yield Rejected(tp, pp, reason, micro_batch=micro_batch, virtual=virtual)
            continue
        schedule: Schedule = "interleaved" if virtual > 1 else constraints.schedule or "1f1b"
        for recompute in RECOMPUTE_KINDS if constraints.recompute is None else (constraints.recompute,):
            if recompute == "selective" and workload.numerics.fused_attention:
                reason = "selective recomputation saves nothing where attention is fused"
                yield Rejected(tp, pp, reason, micro_batch=micro_batch, virtual=virtual, recompute=recompute)
                continue
            yield replace(base, virtual=virtual, schedule=schedule, recompute=recompute)


def _too_big(layout: PlannedLayout, memory: Memory, hardware: Hardware) -> Rejected:
    return Rejected(
        layout.tp,
        layout.pp,
        f"needs {memory.total / 1e9:.1f} GB on the {memory.stage} stage, of {hardware.memory_bytes / 1e9:.1f}",
        micro_batch=layout.micro_batch,
        virtual=layout.virtual,
        recompute=layout.recompute,
        memory=memory,
    )
