"""
Short trainings on any backend, to compare backends with each other; as a script, what two ranks compare.

`te_runs.py DIR cpu` trains at two tensor-parallel ranks with torch's products and with the stub's (`te_stub.py`), with
and without sequence parallelism; `cuda` does so with real devices and one process. Each rank writes
{case: "ok" or the error} to `DIR/rank<N>.json`.
"""

from __future__ import annotations

import itertools
import json
import sys
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import te_stub
import torch
import torch.distributed as dist
from torch import Tensor

from trilithon_parallel import rendezvous
from trilithon_parallel.backend import Backend, select, te_ops
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.grid import Grid
from trilithon_parallel.init import initialise
from trilithon_parallel.layout import Layout
from trilithon_parallel.objective import Batch
from trilithon_parallel.optimizer import AdamWSettings
from trilithon_parallel.step import TrainingModel

SAMPLES, LENGTH = 4, 32
LLAMA = ModelConfig(
    family="llama", architecture="LlamaForCausalLM", vocab_size=384, hidden_size=64, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=16, ffn_size=96, max_context=64, norm="rms", norm_eps=1e-5, norm_order="pre",
    activation="silu", gated_mlp=True, position="rope", tied_embeddings=True,
)  # fmt: skip
GPT2 = replace(
    LLAMA, family="gpt2", architecture="GPT2LMHeadModel", num_kv_heads=4, norm="layer", activation="gelu_tanh",
    gated_mlp=False, position="learned", qkv_bias=True, out_bias=True, mlp_bias=True,
)  # fmt: skip
MODELS = {"llama": LLAMA, "gpt2": GPT2}


@dataclass(frozen=True)
class Trained:
    """A model after its steps, and what each step said."""

    model: TrainingModel
    losses: list[float]
    norms: list[float]

    def tensors(self, *, gradients: bool = False) -> dict[str, Tensor]:
        """This rank's parameters by name, or the summed gradients of the last step (clipped)."""
        slots = [slot for _, slot in self.model.buckets.slots()]
        return {slot.name: slot.parameter.main_grad if gradients else slot.parameter.detach() for slot in slots}  # type: ignore[attr-defined]  # the buckets make it


def batches(step: int, device: torch.device, *, noise: float = 0.0, vocab: int = LLAMA.vocab_size) -> list[Batch]:
    """
    The micro-batches of a step: sequences that count upwards, so that they can be learned.

    `noise`: share of tokens that are random instead, below which no loss can fall.
    """
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(vocab, (SAMPLES, 1), generator=generator)
    tokens = (starts + torch.arange(LENGTH + 1)) % vocab
    is_noise = torch.rand(tokens.shape, generator=generator) < noise
    tokens = torch.where(is_noise, torch.randint(vocab, tokens.shape, generator=generator), tokens).to(device)
    ones_T, positions_T = torch.ones(LENGTH, device=device), torch.arange(LENGTH, device=device)
    return [
        Batch(
            tokens_T=row[:-1],
            targets_T=row[1:],
            weights_T=ones_T,
            positions_T=positions_T,
            cu_seqlens=[0, LENGTH],
            sample_ids=[step * SAMPLES + i],
            lengths=[LENGTH],
        )
        for i, row in enumerate(tokens)
    ]


def train(
    backend: Backend,
    *,
    config: ModelConfig = LLAMA,
    dtype: torch.dtype = torch.float32,
    layout: Layout | None = None,
    grid: Grid | None = None,
    steps: int = 3,
    learning_rate: float = 1e-2,
    noise: float = 0.0,
) -> Trained:
    """A few steps from the same weights on the same data, whatever computes them."""
    grid = grid or Grid.single()
    settings = AdamWSettings(eps=1e-4, clip_norm=1.0)
    model = TrainingModel(config, grid, layout or Layout(), backend, dtype=dtype, optimizer=settings)
    for chunk in model.chunks:
        initialise(chunk.stage, config=config, grid=chunk.grid, seed=3, sigma=0.1)
    model.optimizer.adopt_weights()
    model.weights_changed()
    results = [
        model.train_step(batches(step, grid.device, noise=noise), learning_rate=learning_rate, step=step)
        for step in range(steps)
    ]
    return Trained(model, [result.loss for result in results], [result.grad_norm for result in results])


def assert_near(found: Trained, expected: Trained, tolerance: float) -> None:
    """Losses, norms and every parameter agree, relative to the largest of each."""
    for ours, theirs in ((found.losses, expected.losses), (found.norms, expected.norms)):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=tolerance, atol=0.0)
    others = expected.tensors()
    for name, tensor in found.tensors().items():
        worst = (tensor - others[name]).abs().max().item()
        assert worst <= tolerance * max(1.0, others[name].abs().max().item()), (name, worst)


def check_stub(family: str, *, sequence_parallel: bool) -> None:
    """Two ranks with the stub against two ranks with torch."""
    found, expected = (
        _train_on_ranks(backend, family, sequence_parallel=sequence_parallel)
        for backend in (select("te", fp8="delayed"), select("torch"))
    )
    assert_near(found, expected, 1e-5)


def check_nccl(family: str, *, sequence_parallel: bool) -> None:
    """Two devices against one in fp32; with Transformer Engine, where it is, against torch in bf16."""
    backend = select("torch", device="cuda")
    ranks = _train_on_ranks(backend, family, sequence_parallel=sequence_parallel, device="cuda")
    alone = train(backend, config=MODELS[family], grid=Grid.single("cuda"))
    torch.testing.assert_close(ranks.losses, alone.losses, rtol=1e-4, atol=0.0)
    if not te_ops.unavailable_reason():
        losses = [
            _train_on_ranks(
                select(name, device="cuda"), family, sequence_parallel=sequence_parallel, device="cuda",
                dtype=torch.bfloat16,
            ).losses
            for name in ("te", "torch")
        ]  # fmt: skip
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-2, atol=0.0)


def _train_on_ranks(
    backend: Backend,
    family: str,
    *,
    sequence_parallel: bool,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Trained:
    grid = replace(Grid.build(tp=2, pp=1, device=device), sequence_parallel=sequence_parallel)
    layout = Layout(tp=2, sequence_parallel=sequence_parallel)
    return train(backend, config=MODELS[family], layout=layout, grid=grid, dtype=dtype)


def main(work_dir: Path, device: str) -> None:
    """Join, run every case, write what happened."""
    torch.set_num_threads(1)
    world = rendezvous.join(device=device, timeout_s=100)
    results: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        regions = te_stub.install(monkeypatch) if device == "cpu" else te_stub.Regions()
        for family, is_cut in itertools.product(MODELS, (False, True)):
            check = check_stub if device == "cpu" else check_nccl
            try:
                check(family, sequence_parallel=is_cut)
                outcome = "ok"
            except Exception:
                outcome = traceback.format_exc()
            results[f"{family}{'-sp' if is_cut else ''}"] = outcome
        sizes = {dist.get_world_size(region["amax_reduction_group"]) for region in regions.entered}
        results["ranks that scale alike"] = str(sorted(sizes))
    (work_dir / f"rank{world.rank}.json").write_text(json.dumps(results))
    rendezvous.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
