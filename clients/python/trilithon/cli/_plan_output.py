"""What `trilithon plan` prints, writes and draws."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trilithon.cli._output import print_json
from trilithon.cli._output import print_table as print_plain_table
from trilithon.cli._parser import UsageError
from trilithon_parallel.costs import num_parameters
from trilithon_parallel.explain import explain, runners_up, seconds
from trilithon_parallel.hardware import PRESETS
from trilithon_parallel.pictures import Event, draw_memory, draw_timeline
from trilithon_parallel.planner import Candidate, Plan, Rejected
from trilithon_parallel.presets import RECIPES
from trilithon_parallel.schedule import schedule
from trilithon_parallel.simulate import simulate

# Micro-batches that a picture of the pipeline shows, per stage; more of the same follow.
_DRAWN_PER_STAGE = 3
_HEADINGS = ("tp", "pp", "dp", "micro", "chunks", "recompute", "s/step", "TFLOP/s", "MFU %", "bubble %", "GB", "tp GB",
             "pp GB", "dp GB", "days")  # fmt: skip
_REJECTED = ("tp", "pp", "micro", "chunks", "recompute", "reason")


def print_list(*, as_json: bool) -> None:
    """The recipes and the hardware that are known by name."""
    rows = [
        (r.name, f"{num_parameters(r.config) / 1e9:.4g}B", r.config.num_layers, r.config.hidden_size, r.gpus or "-",
         r.global_batch, r.seq_len, r.source)
        for r in RECIPES.values()
    ]  # fmt: skip
    headings = ("model", "parameters", "layers", "hidden", "gpus", "batch", "seq len", "source")
    if as_json:
        print_json({"models": [dict(zip(headings, row, strict=True)) for row in rows], "hardware": list(PRESETS)})
        return
    _table("Models", headings, rows)
    print()
    print(f"Hardware: {', '.join(PRESETS)}, here (this machine, measured), or a file of measured values.")


def print_plan(plan: Plan, *, top: int, with_rejected: bool, measured_s: float | None) -> None:
    """The explanation, the best layouts, and why each loses to the first."""
    config, workload, best = plan.workload.config, plan.workload, plan.best
    print(
        f"{num_parameters(config) / 1e9:,.4g}B parameters ({config.num_layers} layers, hidden {config.hidden_size}, "
        f"{config.num_heads} heads), batches of {workload.global_batch} x {workload.seq_len} tokens, "
        f"{workload.gpus} x {plan.hardware.name}"
    )
    print()
    for line in explain(plan):
        print(line)
    if measured_s is not None:
        share = best.time.total / measured_s
        print(f"Measured here: {seconds(measured_s)} a step; predicted {seconds(best.time.total)}, {share:.2f} of it.")
    others = runners_up(plan, top)
    print()
    rows = [_row(plan, candidate) for candidate in (best, *(candidate for candidate, _ in others))]
    _table("The best layout of each (tp, pp); GB a rank holds, and sends along each axis in a step", _HEADINGS, rows)
    if others:
        print()
        print("Against the first:")
        for candidate, words in others:
            print(f"  tp {candidate.layout.tp} x pp {candidate.layout.pp} x dp {candidate.layout.dp}: {words}.")
    if with_rejected:
        print()
        _table(f"Rejected: {len(plan.rejected)}", _REJECTED, [_rejected_row(one) for one in plan.rejected])


def document(plan: Plan, *, top: int, with_rejected: bool, measured_s: float | None) -> dict[str, Any]:
    """The same as JSON values; seconds, bytes and FLOP/s."""
    parts: dict[str, Any] = {
        "parameters": num_parameters(plan.workload.config),
        "workload": plan.workload,
        "hardware": plan.hardware,
        "best": _candidate(plan, plan.best),
        "explanation": explain(plan),
        "runners_up": [{**_candidate(plan, one), "against_best": words} for one, words in runners_up(plan, top)],
        "num_fitting": len(plan.ranked),
        "num_rejected": len(plan.rejected),
        "measured_s": measured_s,
    }
    return {**parts, "rejected": plan.rejected} if with_rejected else parts


def write(plan: Plan, path: Path) -> Path:
    """The best layout in the words of a training configuration."""
    import yaml

    layout = plan.best.layout
    sections = {
        "layout": {
            "tp": layout.tp,
            "pp": layout.pp,
            "dp": layout.dp,
            "virtual": layout.virtual,
            "micro_batch_size": layout.micro_batch,
            "schedule": layout.schedule,
            "sequence_parallel": layout.sequence_parallel,
            "recompute": layout.recompute,
            "distributed_optimizer": layout.distributed_optimizer,
        },
        "training": {"global_batch_size": plan.workload.global_batch},
    }
    try:
        path.write_text(yaml.safe_dump(sections, sort_keys=False), "utf-8")
    except OSError as error:
        raise UsageError(f"--write {path} cannot be written: {error.strerror}. Name a file of yours.") from None
    return path


def draw(plan: Plan, directory: Path, *, top: int) -> list[Path]:
    """memory.png: the best layouts' memory by part; timeline.png: the pipeline of the very best."""
    memory, timeline = directory / "memory.png", directory / "timeline.png"
    candidates = [plan.best, *(candidate for candidate, _ in runners_up(plan, top))]
    bars = [(f"{c.layout.tp}x{c.layout.pp}x{c.layout.dp}\n{c.layout.recompute}", c.memory) for c in candidates]
    draw_memory(bars, limit_bytes=plan.hardware.memory_bytes, title="Memory by layout (tp x pp x dp)", path=memory)
    layout, num_microbatches = plan.best.layout, plan.best.microbatches
    shown = min(num_microbatches, _DRAWN_PER_STAGE * layout.pp)
    chunks = f", {layout.virtual} chunks" if layout.virtual > 1 else ""
    title = f"{layout.schedule}, pp {layout.pp}{chunks}, {shown} of {num_microbatches} micro-batches"
    draw_timeline(_events(plan.best, shown), title=title, path=timeline)
    return [memory, timeline]


def _events(best: Candidate, num_microbatches: int) -> list[Event]:
    """The first micro-batches of a pipeline as the simulator times them."""
    layout = best.layout
    table = schedule(layout.schedule, layout.pp, layout.virtual, num_microbatches)
    # Backward is twice forward; full recomputation puts a forward before it.
    timeline = simulate(table, forward=1, backward=3 if layout.recompute == "full" else 2)
    unit = float(timeline.unit)
    return [
        Event(rank, s.op.kind, s.op.microbatch, s.op.chunk, s.start * unit, s.end * unit)
        for rank, spans in enumerate(timeline.spans)
        for s in spans
    ]


def _row(plan: Plan, candidate: Candidate) -> tuple[object, ...]:
    layout, sent = candidate.layout, candidate.traffic
    return (
        layout.tp,
        layout.pp,
        layout.dp,
        layout.micro_batch,
        layout.virtual,
        layout.recompute,
        _digits(candidate.time.total, 4),
        _digits(candidate.flops_per_s / 1e12),
        round(100 * candidate.mfu, 1),
        round(100 * candidate.bubble, 1),
        *(_digits(size / 1e9) for size in (candidate.memory.total, sent.tensor, sent.pipeline, sent.data)),
        _digits(candidate.days(plan.workload)),
    )


def _digits(value: float, count: int = 3) -> float:
    return float(f"{value:.{count}g}")


def _rejected_row(one: Rejected) -> tuple[object, ...]:
    parts = (one.micro_batch, one.virtual, one.recompute)
    return (one.tp, one.pp, *("any" if part is None else part for part in parts), one.reason)


def _candidate(plan: Plan, candidate: Candidate) -> dict[str, Any]:
    return {
        "layout": candidate.layout,
        "microbatches": candidate.microbatches,
        "step_s": candidate.time.total,
        "time_s": candidate.time,
        "memory_bytes": {"total": candidate.memory.total, "parts": candidate.memory},
        "sent_bytes": candidate.traffic,
        "bubble": candidate.bubble,
        "padding_waste": candidate.waste,
        "flops_per_s": candidate.flops_per_s,
        "mfu": candidate.mfu,
        "tokens_per_s": candidate.tokens_per_s,
        "days": candidate.days(plan.workload),
    }


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A rich table on a terminal, plain columns elsewhere."""
    if not sys.stdout.isatty():
        print(title)
        print_plain_table(headings, rows)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for place, heading in enumerate(headings):
        is_number = all(isinstance(row[place], int | float) for row in rows)
        table.add_column(heading, justify="right" if is_number else "left")
    for row in rows:
        table.add_row(*map(str, row))
    Console().print(table)
