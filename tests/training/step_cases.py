"""
What several ranks check together about training steps. Started by test_steps.py, one process per rank.

Every case trains a tiny model for three steps at its layout and compares losses, gradient norms and all weights with
one process that computes the same global batches. A rank writes {case: "ok" or the error} to `<dir>/rank<N>.json`.
"""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from trilithon_parallel import rendezvous
from trilithon_parallel.backend import select
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.grid import Grid
from trilithon_parallel.init import initialise
from trilithon_parallel.layout import Layout
from trilithon_parallel.models import CausalStage, EncoderStage
from trilithon_parallel.objective import Batch
from trilithon_parallel.optimizer import AdamWSettings
from trilithon_parallel.recompute import Recompute
from trilithon_parallel.step import DropoutRates, TrainingModel

STEPS, SAMPLES, LENGTH = 3, 8, 24
# Relative to the largest value, after three steps of Adam, whose first ones divide by tiny roots.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}
SETTINGS = AdamWSettings(eps=1e-4, clip_norm=0.7)

LLAMA = ModelConfig(
    family="llama", architecture="LlamaForCausalLM", vocab_size=391, hidden_size=48, num_layers=4, num_heads=6,
    num_kv_heads=3, head_dim=16, ffn_size=100, max_context=64, norm="rms", norm_eps=1e-5, norm_order="pre",
    activation="silu", gated_mlp=True, position="rope", tied_embeddings=True,
)  # fmt: skip
MODELS: dict[str, ModelConfig] = {
    "llama": LLAMA,
    "mqa": replace(LLAMA, num_heads=4, num_kv_heads=1, head_dim=16, tied_embeddings=False, qkv_bias=True),
    "gpt2": ModelConfig(
        family="gpt2", architecture="GPT2LMHeadModel", vocab_size=391, hidden_size=48, num_layers=4, num_heads=4,
        num_kv_heads=4, head_dim=12, ffn_size=192, max_context=64, norm="layer", norm_eps=1e-5, norm_order="pre",
        activation="gelu_tanh", gated_mlp=False, position="learned", qkv_bias=True, out_bias=True, mlp_bias=True,
        tied_embeddings=True,
    ),
    "bert": ModelConfig(
        family="bert", architecture="BertForMaskedLM", vocab_size=391, hidden_size=48, num_layers=4, num_heads=4,
        num_kv_heads=4, head_dim=12, ffn_size=192, max_context=64, norm="layer", norm_eps=1e-12, norm_order="post",
        activation="gelu", gated_mlp=False, position="learned", qkv_bias=True, out_bias=True, mlp_bias=True,
        tied_embeddings=True, token_types=2, mlm_head=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One layout and what goes with it. `sizes` go to `Layout`."""

    model: str
    sizes: dict[str, Any]
    recompute: Recompute = field(default_factory=Recompute)
    dropout: DropoutRates | None = None
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """What the case is called in tests."""
        sizes = "-".join(f"{key}{value}" for key, value in self.sizes.items())
        extra = [str(self.dtype).removeprefix("torch.")]
        extra += [self.recompute.kind + str(self.recompute.every)] if self.recompute.kind != "none" else []
        extra += ["dropout"] if self.dropout else []
        return "-".join([self.model, sizes, *extra])


def _cases() -> dict[int, list[Case]]:
    full, selective = Recompute("full", every=2), Recompute("selective")
    first = Recompute("full", first=1)
    drop, f64 = DropoutRates(hidden=0.1, attention=0.1), torch.float64
    cases = [
        Case("llama", {"tp": 1}, recompute=full),
        Case("llama", {"micro_batch_size": 2}, recompute=selective, dropout=drop),
        Case("llama", {"tp": 2}),
        Case("llama", {"tp": 2, "sequence_parallel": True}, dtype=f64),
        Case("gpt2", {"tp": 2, "sequence_parallel": True}, recompute=full, dropout=drop),
        Case("mqa", {"tp": 2, "sequence_parallel": True}, dtype=f64),
        Case("bert", {"tp": 2}, dropout=drop),
        Case("bert", {"tp": 2, "sequence_parallel": True}, dtype=f64),
        Case("llama", {"pp": 2}, dtype=f64),
        Case("gpt2", {"pp": 2, "schedule": "gpipe", "layer_counts": (3, 1)}),
        Case("llama", {"pp": 2, "virtual": 2, "schedule": "interleaved"}, recompute=first),
        Case("bert", {"pp": 2, "virtual": 2, "schedule": "interleaved"}),
        Case("llama", {"dp": 2}, dtype=f64),
        Case("gpt2", {"dp": 2, "distributed_optimizer": False}, dropout=drop),
        Case("mqa", {"tp": 4}, dtype=f64),
        Case("llama", {"tp": 4, "sequence_parallel": True}, recompute=selective),
        Case("llama", {"tp": 2, "pp": 2, "sequence_parallel": True}, dtype=f64),
        Case("gpt2", {"tp": 2, "pp": 2}, recompute=full),
        Case("llama", {"pp": 2, "dp": 2, "virtual": 2, "schedule": "interleaved"}, dtype=f64),
        Case("mqa", {"tp": 2, "dp": 2}),
        Case("bert", {"tp": 2, "dp": 2, "distributed_optimizer": False}, dtype=f64),
        Case("llama", {"pp": 4}),
        Case("llama", {"dp": 4, "micro_batch_size": 2}),
        Case("llama", {"tp": 2, "pp": 2, "dp": 2, "virtual": 2, "schedule": "interleaved", "sequence_parallel": True}),
        Case("gpt2", {"tp": 2, "pp": 2, "dp": 2, "schedule": "gpipe"}, dtype=f64, dropout=drop),
        Case("mqa", {"tp": 4, "dp": 2, "sequence_parallel": True, "distributed_optimizer": False}, dtype=f64),
        Case("llama", {"pp": 4, "dp": 2}, recompute=full),
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
    b, made = layout.micro_batch_size, []
    for index in range(layout.micro_batches(SAMPLES)):
        first = index * b * layout.dp + dp_rank * b
        rows = slice(first, first + b)
        made.append(
            Batch(
                tokens_T=tokens[rows, :-1].flatten(),
                targets_T=tokens[rows, 1:].flatten(),
                weights_T=keep[rows].flatten().float(),
                positions_T=torch.arange(LENGTH).repeat(b),
                cu_seqlens=[i * LENGTH for i in range(b + 1)],
                sample_ids=[step * SAMPLES + i for i in range(first, first + b)],
                lengths=[LENGTH] * b,
                types_T=types[rows].flatten() if config.token_types else None,
            )
        )
    return made


def train(case: Case, layout: Layout, grid: Grid) -> tuple[TrainingModel, list[tuple[float, float, int]]]:
    """Three steps; the model and (loss, gradient norm, tokens) of each."""
    config = MODELS[case.model]
    layout.check(config, tokens_per_micro_batch=LENGTH * layout.micro_batch_size)
    grid = replace(grid, sequence_parallel=layout.sequence_parallel, layer_counts=layout.layer_counts)
    model = TrainingModel(
        config, grid, layout, select("torch"), dtype=case.dtype, optimizer=SETTINGS, recompute=case.recompute,
        dropout=case.dropout, seed=5,
    )  # fmt: skip
    for chunk in model.chunks:
        initialise(chunk.stage, config=config, grid=chunk.grid, seed=3, sigma=0.1)
    model.optimizer.adopt_weights()
    model.weights_changed()
    results = []
    for step in range(STEPS):
        batches = batches_of(config, step, layout, grid.dp.rank)
        result = model.train_step(batches, learning_rate=1e-2, step=step)
        assert not result.is_skipped
        results.append((result.loss, result.grad_norm, result.num_tokens))
    return model, results


def check(case: Case) -> None:
    """The layout's run against one process'."""
    layout = Layout(**case.sizes)
    grid = Grid.build(tp=layout.tp, pp=layout.pp, dp=layout.dp)
    model, results = train(case, layout, grid)
    reference, expected = train(replace(case, recompute=Recompute()), Layout(), Grid.single())
    tolerance = TOLERANCE[case.dtype]
    for (loss, norm, tokens), (loss_1, norm_1, tokens_1) in zip(results, expected, strict=True):
        assert tokens == tokens_1
        assert abs(loss - loss_1) <= tolerance * abs(loss_1), (loss, loss_1)
        assert abs(norm - norm_1) <= 10 * tolerance * norm_1, (norm, norm_1)
    # One process keeps every tensor whole; of its dp share's rectangles each rank compares the weights.
    whole = {piece.name: piece.tensor for piece in reference.optimizer.targets()}
    for piece in model.optimizer.targets():
        if ".exp_avg" in piece.name:
            continue
        theirs = whole[piece.name][piece.slices]
        worst = (piece.tensor - theirs).abs().max().item()
        assert worst <= tolerance * max(1.0, theirs.abs().max().item()), (piece.name, piece.slices, worst)
    check_accuracy(model, grid, layout, reference)


def check_accuracy(model: TrainingModel, grid: Grid, layout: Layout, reference: TrainingModel) -> None:
    """Tokens that are right: as many as argmax over one process' whole logits says, at this layout as there."""
    whole = [with_right_tokens(reference, batch) for batch in batches_of(model.config, 9, Layout(), 0)]
    mine = [with_right_tokens(reference, batch) for batch in batches_of(model.config, 9, layout, grid.dp.rank)]
    right = sum(num_right for _, num_right in whole)
    judged = sum(batch.num_targets for batch, _ in whole)
    assert judged // 4 < right < judged
    found = model.evaluate([batch for batch, _ in mine])
    assert (found.num_correct, found.num_judged) == (right, judged), found
    said = model.predict([batch for batch, _ in mine])
    assert [int(said_B2[:, 1].sum()) for said_B2 in said] == [num_right for _, num_right in mine]
    step = model.train_step([batch for batch, _ in mine], learning_rate=0.0, step=9)
    assert model.dropout is not None or step.accuracy == right / judged


def with_right_tokens(reference: TrainingModel, batch: Batch) -> tuple[Batch, int]:
    """A batch in which the model is right about every other target at least, and about how many that count."""
    (chunk,) = reference.chunks
    with torch.no_grad():
        hidden_TH = batch.run(chunk.stage, None, dropout=None)
        assert isinstance(chunk.stage, CausalStage | EncoderStage)
        likeliest_T = chunk.stage.gather_logits(hidden_TH).argmax(-1)
    is_mended_T = torch.arange(len(likeliest_T)) % 2 == 0
    mended = replace(batch, targets_T=torch.where(is_mended_T, likeliest_T, batch.targets_T))
    return mended, int(((mended.targets_T == likeliest_T) & (mended.weights_T > 0)).sum())


def main(work_dir: Path) -> None:
    """Join, run every case of this world size, write what happened."""
    torch.set_num_threads(1)
    world = rendezvous.join(timeout_s=100)
    results = {}
    for case in CASES[world.world_size]:
        try:
            check(case)
            results[case.name] = "ok"
        except Exception:
            results[case.name] = traceback.format_exc()
        (work_dir / f"rank{world.rank}.json").write_text(json.dumps(results))
    rendezvous.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
