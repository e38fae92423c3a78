"""
What several ranks check together about task heads. Started by test_layouts.py, one process per rank.

A case compares what a layout computes with one process that learns from the same global batches, or with what
`transformers` said of the same model. A rank writes {case: "ok" or the error} to `<dir>/rank<N>.json`.
"""

from __future__ import annotations

import functools
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from task_models import CONFIGS, MODELS, batches_of, make_model, relative

from trilithon_parallel import rendezvous
from trilithon_parallel.backend import select
from trilithon_parallel.checkpoint import (
    Progress,
    Retention,
    RunFacts,
    Saver,
    import_base,
    import_model_directory,
    load,
)
from trilithon_parallel.config import load_config
from trilithon_parallel.grid import Grid
from trilithon_parallel.layout import Layout
from trilithon_parallel.optimizer import AdamWSettings
from trilithon_parallel.step import DropoutRates, StepResult, TrainingModel
from trilithon_parallel.task_head import for_masked_lm, for_task
from trilithon_parallel.weights.base import load_base

STEPS = 2
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}
DROPOUT = DropoutRates(hidden=0.1, attention=0.1)


def evenly(name: str) -> float:
    """Everything learns alike."""
    return 1.0


def faster_heads(name: str) -> float:
    """Heads learn ten times as fast, norms half as fast."""
    return 10.0 if name.startswith(("task_head.", "pooler.", "lm_head.")) else 0.5 if "norm" in name else 1.0


@dataclass(frozen=True)
class Case:
    """One model at one layout; `sizes` go to `Layout`, with two sequences a micro-batch."""

    kind: str
    sizes: tuple[tuple[str, Any], ...]
    dtype: torch.dtype = torch.float64
    dropout: DropoutRates | None = None
    rate_of: Callable[[str], float] = evenly

    @property
    def layout(self) -> Layout:
        """Where it runs."""
        return Layout(**dict(self.sizes), micro_batch_size=2)

    @property
    def name(self) -> str:
        """What the case is called in tests."""
        extra = ["rates"] if self.rate_of is faster_heads else []
        extra += ["dropout"] if self.dropout else []
        sizes = [f"{key}{value}" for key, value in self.sizes]
        return "-".join([self.kind, *sizes, str(self.dtype).removeprefix("torch."), *extra])


def _cases() -> dict[int, list[Case]]:
    f32, dropout, rates = torch.float32, {"dropout": DROPOUT}, {"rate_of": faster_heads}
    every: list[dict[str, Any]] = [{"tp": 2}, {"pp": 2}, {"tp": 3}, {"tp": 2, "pp": 2}, {"dp": 2}]
    some = [{"tp": 2}, {"tp": 3}, {"tp": 2, "pp": 2}]
    cut = {"tp": 2, "sequence_parallel": True}
    wanted: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        *[(kind, sizes, {}) for kind in MODELS for sizes in (*every, cut)],
        *[(kind, sizes, {"dtype": f32}) for kind in MODELS for sizes in some],
        *[(kind, {"tp": 2}, dropout) for kind in MODELS],
        *[(kind, {"pp": 2}, dropout) for kind in ("tokens", "sequence")],
        ("tokens", cut, dropout),
        ("sequence", {"pp": 2, "virtual": 2, "schedule": "interleaved"}, {}),
        ("span", {"dp": 2, "distributed_optimizer": False}, {"dtype": f32}),
        ("tokens", {"pp": 2, "dp": 2}, {}),
        *[("sequence", sizes, rates) for sizes in ({"tp": 2}, {"pp": 2}, {"dp": 2})],
        ("preference", {"pp": 2, "dp": 2}, rates),
        ("vectors", {"pp": 2, "dp": 2}, dropout),
        ("vectors", {"dp": 4}, {}),
        *[("margin", sizes, {}) for sizes in ({"tp": 2}, {"dp": 2}, {"pp": 2, "dp": 2})],
        *[("twins", sizes, dropout) for sizes in ({"tp": 2}, {"tp": 3}, {"pp": 2}, {"dp": 2}, {"pp": 2, "dp": 2})],
        ("twins", {"tp": 2}, {"dtype": f32}),
        ("twins", {"pp": 2, "virtual": 2, "schedule": "interleaved"}, {}),
    ]
    cases = [Case(kind, tuple(sizes.items()), **extra) for kind, sizes, extra in wanted]
    by_size: dict[int, list[Case]] = {}
    for case in cases:
        by_size.setdefault(case.layout.world_size, []).append(case)
    return by_size


CASES = _cases()
LAYOUTS = {1: [(1, 1, 1)], 2: [(2, 1, 1), (1, 2, 1), (1, 1, 2)], 4: [(2, 2, 1)]}  # tp, pp, dp
# What else is checked at the layouts above: a function's name.
CHECKS = ("logits", "begins", "saves")
SAVED = ("tokens", "sequence", "span", "twins")


def grid_of(layout: Layout) -> Grid:
    grid = Grid.build(tp=layout.tp, pp=layout.pp, dp=layout.dp)
    return replace(grid, sequence_parallel=layout.sequence_parallel)


def learn(case: Case, layout: Layout, grid: Grid) -> tuple[TrainingModel, list[StepResult]]:
    """Some steps of two sequences a micro-batch."""
    options = {"dropout": case.dropout, "rate_of": case.rate_of}
    model = make_model(CONFIGS[case.kind], grid, layout, dtype=case.dtype, **options)
    results = [
        model.train_step(batches_of(case.kind, step, layout, grid.dp.rank), learning_rate=1e-2, step=step)
        for step in range(STEPS)
    ]
    return model, results


@functools.cache
def alone(case: Case) -> tuple[TrainingModel, list[StepResult]]:
    """What one process makes of a case, whatever its sizes: give it none."""
    return learn(case, Layout(micro_batch_size=2), Grid.single())


def steps(case: Case) -> None:
    """Losses, norms, weights and predictions of a layout against one process'."""
    layout = case.layout
    layout.check(CONFIGS[case.kind], tokens_per_micro_batch=20)
    grid = grid_of(layout)
    model, results = learn(case, layout, grid)
    reference, expected = alone(replace(case, sizes=()))
    tolerance = TOLERANCE[case.dtype]
    for ours, theirs in zip(results, expected, strict=True):
        assert (ours.num_tokens, ours.accuracy) == (theirs.num_tokens, theirs.accuracy)
        assert abs(ours.loss - theirs.loss) <= tolerance * abs(theirs.loss), (ours, theirs)
        assert abs(ours.grad_norm - theirs.grad_norm) <= 10 * tolerance * theirs.grad_norm, (ours, theirs)
    whole = {piece.name: piece.tensor for piece in reference.optimizer.targets()}
    for piece in model.optimizer.targets():
        if ".exp_avg" not in piece.name:
            worst = relative(piece.tensor, whole[piece.name][piece.slices])
            assert worst <= tolerance, (piece.name, piece.slices, worst)
    batches = batches_of(case.kind, 9, layout, grid.dp.rank)
    said, expected_of = model.predict(batches), reference.predict(batches)
    for ours_T, theirs_T in zip(said, expected_of, strict=True):
        assert relative(ours_T, theirs_T) <= 1e-5
    assert model.predict([]) == []


def _model(directory: Path, layout: Layout, grid: Grid) -> TrainingModel:
    return TrainingModel(
        load_config(directory), grid, layout, select("torch"), dtype=torch.float32, optimizer=AdamWSettings()
    )  # fmt: skip


def logits(models: Path, layout: Layout, grid: Grid) -> None:
    """Files of transformers give transformers' logits."""
    for kind in ("tokens", "sequence", "span"):
        model = _model(models / kind, layout, grid)
        weights = [piece for piece in model.optimizer.targets() if ".exp_avg" not in piece.name]
        import_model_directory(models / kind, weights, config=model.config, axis=grid.world)
        model.optimizer.publish()
        model.weights_changed()
        expected = safetensors.torch.load_file(models / kind / "expected" / "logits.safetensors")["logits"]
        (said,) = model.predict(batches_of(kind, 0, Layout(micro_batch_size=8), 0))
        worst = float((said - expected).abs().max())
        assert worst <= 1e-4, (kind, worst)


def begins(models: Path, layout: Layout, grid: Grid) -> None:
    """A new model from a bare encoder's files: on every layout the numbers that one process gets, drawn ones too."""
    base = load_config(models / "base")
    wanted = {
        "sequence": (for_task(base, MODELS["sequence"].task_head), ()),  # type: ignore[arg-type]
        "joint_span": (for_task(base, MODELS["joint_span"].task_head), ()),  # type: ignore[arg-type]
        "masked": (for_masked_lm(base), ()),
        "grown": (for_masked_lm(base, vocab_size=base.vocab_size + 5), ()),
        "other": (for_masked_lm(base, vocab_size=300), ("model.embed_tokens.weight",)),
    }
    for name, (config, fresh) in wanted.items():
        alone, parts = (
            TrainingModel(config, place, lay, select("torch"), dtype=torch.bfloat16, optimizer=AdamWSettings())
            for place, lay in ((Grid.single(), Layout()), (grid, layout))
        )
        for model, axis in ((alone, Grid.single().world), (parts, grid.world)):
            weights = [piece for piece in model.optimizer.targets() if ".exp_avg" not in piece.name]
            import_base(models / "base", weights, config=config, axis=axis, seed=11, fresh=fresh)
            model.optimizer.publish()
        whole = {piece.name: piece.tensor for piece in alone.optimizer.targets()}
        for piece in parts.optimizer.targets():
            assert torch.equal(piece.tensor, whole[piece.name][piece.slices]), (name, piece.name)
        # A stage that is filled by itself, padding and all, is the one that the optimizer's rectangles fill.
        for chunk in parts.chunks:
            before = {key: value.detach().clone() for key, value in chunk.stage.named_parameters()}
            load_base(chunk.stage, models / "base", config=config, grid=chunk.grid, seed=11, fresh=fresh)
            for key, value in chunk.stage.named_parameters():
                assert torch.equal(value, before[key]), (name, key)


def saves(models: Path, layout: Layout, grid: Grid) -> None:
    """A checkpoint written here is read by `test_checkpoints`, and one that one process wrote goes on here."""
    for kind in SAVED:
        model = make_model(CONFIGS[kind], grid, layout, dtype=torch.float32)
        model.train_step(batches_of(kind, 0, layout, grid.dp.rank), learning_rate=1e-2, step=0)
        saver = Saver(
            models / f"run-{kind}-{layout.tp}-{layout.pp}-{layout.dp}", config=model.config, grid=grid,
            facts=RunFacts(seed=7, data_hash="d" * 64), dtype=torch.float32, retention=Retention(2),
            side_files_from=None,
        )  # fmt: skip
        saver.start(list(model.optimizer.pieces()), Progress(1, 8, 100, {}))
        saver.wait()
        saver.close()
        before = models / f"run-{kind}-1-1-1" / "step_00000001"
        other = make_model(CONFIGS[kind], grid, layout, dtype=torch.float32)
        load(before, list(other.optimizer.targets()), config=other.config, axis=grid.world)
        other.optimizer.num_steps = 1
        other.optimizer.publish()
        other.weights_changed()
        results = [
            each.train_step(batches_of(kind, 1, layout, grid.dp.rank), learning_rate=1e-2, step=1)
            for each in (model, other)
        ]
        assert abs(results[0].loss - results[1].loss) <= 1e-5, results


def main(work_dir: Path, models: Path) -> None:
    """Join, run every case of this world size, write what happened."""
    torch.set_num_threads(1)
    world = rendezvous.join(timeout_s=100)
    runs: dict[str, Callable[[], None]] = {
        case.name: functools.partial(steps, case) for case in CASES.get(world.world_size, [])
    }
    for tp, pp, dp in LAYOUTS.get(world.world_size, []):
        for check in CHECKS:
            layout = Layout(tp=tp, pp=pp, dp=dp, micro_batch_size=2)
            runs[f"{check}-{tp}-{pp}-{dp}"] = functools.partial(_at, globals()[check], models, layout)
    results = {}
    for name, run in runs.items():
        try:
            run()
            results[name] = "ok"
        except Exception:
            results[name] = traceback.format_exc()
        (work_dir / f"rank{world.rank}.json").write_text(json.dumps(results))
    rendezvous.leave()


def _at(check: Callable[[Path, Layout, Grid], None], models: Path, layout: Layout) -> None:
    check(models, layout, grid_of(layout))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
