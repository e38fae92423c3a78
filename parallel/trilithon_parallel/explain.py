"""Why a plan's winner wins, in sentences: where its time and memory go, and what each other choice would cost."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from trilithon_parallel.costs import PlannedLayout
from trilithon_parallel.planner import Candidate, Plan, Rejected
from trilithon_parallel.timing import StepTime

_TIME_NAMES = {
    "compute": "compute",
    "tensor": "tensor-parallel traffic",
    "pipeline": "messages between stages",
    "imbalance": "waiting for the slowest stage",
    "bubble": "pipeline bubble",
    "data": "data-parallel traffic",
    "optimizer": "optimizer",
}
_MEMORY_NAMES = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "working": "recomputed layer",
    "ends": "embedding and logits",
}
_KNOB_NAMES = {
    "tp": "tp",
    "pp": "pp",
    "micro_batch": "micro-batch",
    "virtual": "chunks per stage",
    "recompute": "recomputation",
}


def describe(layout: PlannedLayout) -> str:
    """A layout in one line."""
    parts = [f"tp {layout.tp} x pp {layout.pp} x dp {layout.dp}", f"micro-batch {layout.micro_batch}"]
    parts.append(layout.schedule + (f" with {layout.virtual} chunks" if layout.virtual > 1 else ""))
    parts.append({"none": "no", "selective": "selective", "full": "full"}[layout.recompute] + " recomputation")
    parts += ["sequence parallelism"] * layout.sequence_parallel
    parts += ["distributed optimizer"] * layout.distributed_optimizer
    return ", ".join(parts)


def explain(plan: Plan) -> list[str]:
    """
    The winner, where its time and memory go, and its neighbours: one sentence each.

    Raises:
        ModelError: `plan_impossible`, nothing fits.
    """
    best = plan.best
    limit = plan.hardware.memory_bytes
    lines = [
        f"Best of {len(plan.ranked)} layouts that fit ({len(plan.rejected)} rejected): {describe(best.layout)}.",
        f"A step takes {seconds(best.time.total)} at {_rate(best.flops_per_s)} a device "
        f"({best.mfu:.1%} MFU), {best.tokens_per_s:,.0f} tokens/s{_whole_run(plan, best)}.",
        f"Its time: {_shares(best)}.",
        f"Its memory: {best.memory.total / 1e9:.3g} of {limit / 1e9:.3g} GB on the {best.memory.stage} stage: "
        f"{_memory_parts(best)}.",
    ]
    if best.waste:
        lines.append(f"tp {best.layout.tp} does not divide the heads: {best.waste:.0%} of attention's work is padding.")
    return lines + [line for knob in _KNOB_NAMES for line in _neighbours(plan, knob)]


def runners_up(plan: Plan, count: int) -> list[tuple[Candidate, str]]:
    """The best layouts of other (tp, pp), each with what it loses to the winner and what it gains."""
    best = plan.best
    found: list[tuple[Candidate, str]] = []
    seen = {(best.layout.tp, best.layout.pp)}
    for candidate in plan.ranked:
        shape = (candidate.layout.tp, candidate.layout.pp)
        if len(found) < count and shape not in seen:
            seen.add(shape)
            found.append((candidate, difference(best.time, candidate.time)))
    return found


def difference(winner: StepTime, other: StepTime) -> str:
    """What makes `other` slower or faster than `winner`: the parts of a step that differ most."""
    deltas = {name: getattr(other, name) - getattr(winner, name) for name in _TIME_NAMES}
    order = sorted(deltas, key=lambda name: -abs(deltas[name]))
    told = [name for name in order[:3] if abs(deltas[name]) >= 0.002 * winner.total]
    total = other.total - winner.total
    parts = ", ".join(f"{_TIME_NAMES[name]} {_signed(deltas[name])}" for name in told)
    return f"{_signed(total)} ({total / winner.total:+.1%})" + (f": {parts}" if parts else "")


def seconds(value: float) -> str:
    """
    A duration for people.

    >>> seconds(0.0123), seconds(20.29)
    ('12.3 ms', '20.3 s')
    """
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _rate(flops_per_s: float) -> str:
    return f"{flops_per_s / 1e12:.4g} TFLOP/s" if flops_per_s >= 1e12 else f"{flops_per_s / 1e9:.3g} GFLOP/s"


def _signed(value: float) -> str:
    return ("-" if value < 0 else "+") + seconds(abs(value))


def _whole_run(plan: Plan, best: Candidate) -> str:
    tokens = plan.workload.tokens
    if not tokens:
        return ""
    count = f"{tokens / 1e12:.4g}T" if tokens >= 1e12 else f"{tokens / 1e9:.4g}B"
    return f"; {count} tokens take {best.days(plan.workload):.3g} days"


def _shares(candidate: Candidate) -> str:
    time = candidate.time
    parts = [(getattr(time, field.name) / time.total, field.name) for field in fields(time)]
    return ", ".join(f"{_TIME_NAMES[name]} {share:.1%}" for share, name in sorted(parts, reverse=True) if share >= 5e-4)


def _memory_parts(candidate: Candidate) -> str:
    parts = [(getattr(candidate.memory, name), text) for name, text in _MEMORY_NAMES.items()]
    return ", ".join(f"{text} {size / 1e9:.3g}" for size, text in sorted(parts, reverse=True) if size >= 5e6)


def _neighbours(plan: Plan, knob: str) -> list[str]:
    """The next smaller and larger value of one knob, all else (but dp) as the winner has it."""
    best = plan.best.layout
    values = _values(plan, knob)
    place = values.index(getattr(best, knob))
    lines = []
    for value in values[max(0, place - 1) : place] + values[place + 1 : place + 2]:
        changes: dict[str, Any] = {knob: value}
        if knob == "virtual":
            changes["schedule"] = "interleaved" if value > 1 else "1f1b"
        layout = replace(best, **changes)
        layout = replace(layout, dp=plan.workload.gpus // (layout.tp * layout.pp))
        lines += _compared(plan, layout, f"{_KNOB_NAMES[knob]} {value} instead of {getattr(best, knob)}")
    return lines


def _values(plan: Plan, knob: str) -> list[Any]:
    """Every value of a knob that the search met, in order; of chunks those that divide the winner's layers."""
    met = {getattr(candidate.layout, knob) for candidate in plan.ranked}
    if knob != "virtual":
        met |= {getattr(rejected, knob) for rejected in plan.rejected} - {None}
    else:
        layers, best = plan.workload.config.num_layers, plan.best.layout
        met = {v for v in met if v == best.virtual or layers % (v * best.pp) == 0}
    return sorted(met, key=("none", "selective", "full").index) if knob == "recompute" else sorted(met)


def _compared(plan: Plan, layout: PlannedLayout, words: str) -> list[str]:
    for candidate in plan.ranked:
        if _key(candidate.layout) == _key(layout):
            return [f"{words}: {difference(plan.best.time, candidate.time)}."]
    for rejected in plan.rejected:
        if _covers(rejected, layout):
            return [f"{words}: rejected, {rejected.reason}."]
    return []


def _key(layout: PlannedLayout) -> tuple[object, ...]:
    return layout.tp, layout.pp, layout.micro_batch, layout.virtual, layout.recompute


def _covers(rejected: Rejected, layout: PlannedLayout) -> bool:
    given = (rejected.tp, rejected.pp, rejected.micro_batch, rejected.virtual, rejected.recompute)
    return all(have in (None, want) for have, want in zip(given, _key(layout), strict=True))
