"""
Small models with adapters, and training steps of them: what the tests of this folder and their ranks share.

Imported by the scripts that run as ranks; test files load it with `ranks.load_script`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_bert, tiny_gpt2, tiny_llama

from trilithon_parallel.backend import select
from trilithon_parallel.checkpoint import Base, Progress, Retention, RunFacts, Saver, find_latest, load
from trilithon_parallel.config import ModelConfig, load_config
from trilithon_parallel.grid import Grid
from trilithon_parallel.layout import Layout
from trilithon_parallel.lora.peft import AdapterFiles
from trilithon_parallel.lora.spec import LoraSpec, targets_of
from trilithon_parallel.lora.training import begin
from trilithon_parallel.objective import Batch
from trilithon_parallel.optimizer import AdamWSettings
from trilithon_parallel.recompute import Recompute
from trilithon_parallel.step import StepResult, TrainingModel

STEPS, SAMPLES, LENGTH = 3, 8, 24
SETTINGS = AdamWSettings(eps=1e-4, clip_norm=0.7)
RATE = 1e-2

# 3 groups of 2 heads and 100 ffn channels, which tp = 2 and 4 pad; one group, which they replicate.
MODELS = {
    "llama": partial(tiny_llama, layers=4, hidden=48, heads=6, groups=3, head_dim=16, ffn=100),
    "mqa": partial(tiny_llama, layers=2, hidden=48, heads=4, groups=1, head_dim=16, ffn=96, tied=False),
    "gpt2": partial(tiny_gpt2, layers=2, hidden=48),
    "bert": partial(tiny_bert, layers=2, hidden=48, mlm_head=True, pooler=False),
}


def make_models(directory: Path) -> None:
    """A model directory of each kind."""
    for name, make in MODELS.items():
        make(directory / name)


def spec_of(config: ModelConfig, **changes: Any) -> LoraSpec:
    """An adapter of rank 4 on every product."""
    return replace(LoraSpec(4, 8.0, targets=targets_of(config)), **changes)


@dataclass(frozen=True)
class Case:
    """One layout and what goes with it: `sizes` go to `Layout`, `lora` to `LoraSpec`."""

    model: str
    sizes: dict[str, Any]
    lora: dict[str, Any] = field(default_factory=dict)
    recompute: Recompute = field(default_factory=Recompute)
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """What the case is called in tests."""
        sizes = "-".join(f"{key}{value}" for key, value in self.sizes.items())
        extra = [f"{key}={value}" for key, value in self.lora.items() if key in ("layout", "dropout")]
        extra += ["some"] if "targets" in self.lora else []
        extra += [self.recompute.kind] if self.recompute.kind != "none" else []
        return "-".join([self.model, sizes, *extra, str(self.dtype).removeprefix("torch.")])


def _cases() -> dict[int, list[Case]]:
    full, f64 = Recompute("full"), torch.float64
    fused, drop = {"layout": "fused"}, {"dropout": 0.2}
    some = {"targets": ("k_proj", "down_proj"), "rank_pattern": (("down_proj", 2),)}
    cases = [
        Case("llama", {"tp": 1}, drop, recompute=full),
        Case("llama", {"tp": 2}),
        Case("llama", {"tp": 2, "sequence_parallel": True}, drop | fused, dtype=f64),
        Case("mqa", {"tp": 2}, fused, recompute=full),
        Case("gpt2", {"tp": 2}, drop, dtype=f64),
        Case("bert", {"tp": 2, "sequence_parallel": True}, dtype=f64),
        Case("llama", {"pp": 2, "virtual": 2, "schedule": "interleaved"}, drop, dtype=f64),
        Case("llama", {"dp": 2}, drop),
        Case("gpt2", {"dp": 2, "distributed_optimizer": False}, fused),
        Case("llama", {"tp": 4, "sequence_parallel": True}, fused, dtype=f64),
        Case("mqa", {"tp": 4}, some, dtype=f64),
        Case("bert", {"tp": 2, "pp": 2}, drop),
        Case("llama", {"pp": 2, "dp": 2}, fused, recompute=full),
        Case("llama", {"tp": 2, "pp": 2, "dp": 2, "sequence_parallel": True}, drop, dtype=f64),
    ]
    by_size: dict[int, list[Case]] = {}
    for case in cases:
        by_size.setdefault(Layout(**case.sizes).world_size, []).append(case)
    return by_size


CASES = _cases()


def batches_of(config: ModelConfig, step: int, layout: Layout, dp_rank: int) -> list[Batch]:
    """The micro-batches of one dp rank in a global batch that depends on the step alone; loss masks are uneven."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(config.vocab_size, (SAMPLES, LENGTH + 1), generator=generator)
    keep = torch.rand(SAMPLES, LENGTH, generator=generator) < 0.6
    keep[0] = False  # a sample, so with dp a whole micro-batch, without any token that counts
    types = torch.randint(max(config.token_types, 1), (SAMPLES, LENGTH), generator=generator)
    made = []
    for index in range(layout.micro_batches(SAMPLES)):
        row = index * layout.dp + dp_rank
        made.append(
            Batch(
                tokens_T=tokens[row, :-1],
                targets_T=tokens[row, 1:],
                weights_T=keep[row].float(),
                positions_T=torch.arange(LENGTH),
                cu_seqlens=[0, LENGTH],
                sample_ids=[step * SAMPLES + row],
                lengths=[LENGTH],
                types_T=types[row] if config.token_types else None,
            )
        )
    return made


def make_model(
    model_dir: Path,
    layout: Layout,
    grid: Grid,
    *,
    lora: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    recompute: Recompute | None = None,
    settings: AdamWSettings = SETTINGS,
    adapter: AdapterFiles | None = None,
) -> TrainingModel:
    """A model whose adapter is new, or the given one."""
    config = load_config(model_dir)
    layout.check(config, tokens_per_micro_batch=LENGTH)
    grid = replace(grid, sequence_parallel=layout.sequence_parallel, layer_counts=layout.layer_counts)
    model = TrainingModel(
        config, grid, layout, select("torch"), dtype=dtype, optimizer=settings, recompute=recompute, seed=5,
        lora=spec_of(config, **lora),
    )  # fmt: skip
    begin(model, model_dir, seed=3, adapter=adapter)
    return model


def steps(model: TrainingModel, first: int, last: int) -> list[StepResult]:
    """The steps from `first` to before `last`."""
    batches = [batches_of(model.config, step, model.layout, model.grid.dp.rank) for step in range(first, last)]
    return [
        model.train_step(batch, learning_rate=RATE, step=step)
        for step, batch in zip(range(first, last), batches, strict=True)
    ]


BASE_DIGEST = "b" * 64
# Models and what their adapters are like, of which checkpoints go from layout to layout.
CHECKPOINTED: dict[str, dict[str, Any]] = {"llama": {"layout": "fused"}, "gpt2": {}, "mqa": {}}
RUN_STEPS, SAVE_EVERY = 6, 2


def saver_of(model: TrainingModel, run_dir: Path, *, base_digest: str = BASE_DIGEST) -> Saver:
    """What writes the run's checkpoints."""
    return Saver(
        run_dir, config=model.config, grid=model.grid, facts=RunFacts(3, "d", base=Base("some/base", base_digest)),
        dtype=model.dtype, retention=Retention(2), side_files_from=None, max_shard_bytes=20_000,
    )  # fmt: skip


def save(model: TrainingModel, run_dir: Path, *, step: int) -> None:
    """One checkpoint, published."""
    saver = saver_of(model, run_dir)
    saver.start(list(model.optimizer.pieces()), Progress(step, step * SAMPLES, 0, {}))
    saver.close()


def resume(model: TrainingModel, run_dir: Path, *, base_digest: str | None = BASE_DIGEST) -> int:
    """Fill the model from the newest checkpoint, if there is one; its step, or 0."""
    found = find_latest(run_dir, axis=model.grid.world)
    if found is None:
        return 0
    load(
        found.directory, list(model.optimizer.targets()), config=model.config, axis=model.grid.world,
        verified=found.manifest, base_digest=base_digest,
    )  # fmt: skip
    model.optimizer.num_steps = found.manifest.step
    model.optimizer.publish()
    model.weights_changed()
    return found.manifest.step


def begin_run(models: Path, run_dir: Path) -> tuple[TrainingModel, Saver, int]:
    """A run with dropout in one process, where it begins or goes on."""
    model = make_model(models / "llama", Layout(), Grid.single(), lora={"dropout": 0.2, "layout": "fused"})
    saver = saver_of(model, run_dir)
    return model, saver, resume(model, run_dir)


def run_on(model: TrainingModel, saver: Saver, first: int, last: int) -> Iterator[tuple[int, float]]:
    """Each step with its loss; a checkpoint every other step, published before the next one begins."""
    for step in range(first, last):
        (result,) = steps(model, step, step + 1)
        if (step + 1) % SAVE_EVERY == 0:
            saver.start(list(model.optimizer.pieces()), Progress(step + 1, (step + 1) * SAMPLES, 0, {}))
            saver.wait()
        yield step, result.loss
    saver.close()
