"""Mixed precision on two ranks: whose memory holds what, and steps that overflow. Started by test_precision.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import rank_runner
import torch
from step_cases import LLAMA, MODELS, batches_of
from torch import Tensor

from trilithon_parallel.backend import select
from trilithon_parallel.config import ModelConfig, ModelError
from trilithon_parallel.grid import Grid
from trilithon_parallel.init import initialise
from trilithon_parallel.layout import Layout
from trilithon_parallel.objective import Batch
from trilithon_parallel.optimizer import AdamWSettings
from trilithon_parallel.precision import LossScale
from trilithon_parallel.step import TrainingModel

# Large enough that buckets' padding is less than a percent; its vocabulary has no padding.
LARGE = replace(LLAMA, vocab_size=1024, hidden_size=96, num_heads=6, ffn_size=256)


def _build(layout: Layout, dtype: torch.dtype, config: ModelConfig = MODELS["mqa"]) -> TrainingModel:
    grid = Grid.build(tp=layout.tp, pp=layout.pp, dp=layout.dp)
    model = TrainingModel(config, grid, layout, select("torch"), dtype=dtype, optimizer=AdamWSettings(eps=1e-4))
    for chunk in model.chunks:
        initialise(chunk.stage, config=config, grid=chunk.grid, seed=3, sigma=0.1)
    model.optimizer.adopt_weights()
    model.weights_changed()
    return model


def _batches(model: TrainingModel, step: int) -> list[Batch]:
    return batches_of(model.config, step, model.layout, model.grid.dp.rank)


def bytes_per_parameter() -> dict[str, float]:
    """What weights, gradients, masters and moments take on this rank, over the parameters that it computes with."""
    found = {}
    for is_distributed in (False, True):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            model = _build(Layout(dp=2, distributed_optimizer=is_distributed), dtype, LARGE)
            model.train_step(_batches(model, 0), learning_rate=1e-3, step=0)
            tensors: list[Tensor] = []
            for bucket, master, states in zip(
                model.buckets.buckets, model.optimizer.masters, model.optimizer.states(), strict=True
            ):
                assert len(master) == len(bucket.data) // (2 if is_distributed else 1)
                tensors += [bucket.data, bucket.grad, master.detach(), *states.values()]
            storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
            count = sum(parameter.numel() for parameter in model.chunks[0].stage.parameters())
            kind = str(dtype).removeprefix("torch.")
            found[f"{kind} {'distributed' if is_distributed else 'replicated'}"] = sum(storages.values()) / count
    return found


def _step(model: TrainingModel, number: int, *, is_poisoned: bool) -> None:
    """One step that must move everything, or must be skipped and move nothing."""
    before = [bucket.data.clone() for bucket in model.buckets.buckets]
    before += [x.clone() for states in model.optimizer.states() for x in states.values()]
    num_steps = model.optimizer.num_steps
    result = model.train_step(_batches(model, number), learning_rate=1e-3, step=number)
    assert result.is_skipped == is_poisoned, result
    assert model.optimizer.num_steps == num_steps + (not is_poisoned)
    after = [bucket.data for bucket in model.buckets.buckets]
    after += [x for states in model.optimizer.states() for x in states.values()]
    same = [torch.equal(x, y) for x, y in zip(before, after, strict=True)]
    assert all(same) if is_poisoned else not any(same), number


def overflow() -> None:
    """fp16: one rank's infinite gradient skips the step on every rank; the scale follows and nothing else moves."""
    for layout in (Layout(dp=2), Layout(dp=2, distributed_optimizer=False), Layout(tp=2), Layout(pp=2)):
        model = _build(layout, torch.float16)
        model.optimizer.loss_scale = LossScale(value=1024.0, interval=3)
        target = next(p for name, p in model.chunks[0].stage.named_parameters() if name.endswith("q_proj.weight"))
        scales = []
        for number, is_poisoned in enumerate((False, True, True, True, False, False, False)):
            hook = None
            if is_poisoned and model.grid.rank == 1:
                hook = target.register_hook(lambda grad: grad * torch.inf)
            _step(model, number, is_poisoned=is_poisoned)
            if hook is not None:
                hook.remove()
            scales.append(model.optimizer.loss_scale.value)
        assert scales == [1024.0, 1024.0, 512.0, 256.0, 256.0, 256.0, 512.0], layout


def empty() -> None:
    """A global batch without a token that counts is refused on every rank, and the model goes on with the next."""
    for layout in (Layout(dp=2), Layout(pp=2)):
        model = _build(layout, torch.float32)
        before = [bucket.data.clone() for bucket in model.buckets.buckets]
        batches = [replace(batch, weights_T=torch.zeros_like(batch.weights_T)) for batch in _batches(model, 0)]
        with pytest.raises(ModelError, match="Given: 0") as error:
            model.train_step(batches, learning_rate=1e-3, step=0)
        assert error.value.code == "batch_empty"
        with pytest.raises(ModelError, match="Given: 0"):
            model.evaluate(batches)
        assert all(torch.equal(x, bucket.data) for x, bucket in zip(before, model.buckets.buckets, strict=True))
        assert not model.train_step(_batches(model, 1), learning_rate=1e-3, step=1).is_skipped


if __name__ == "__main__":
    rank_runner.run({2: [bytes_per_parameter, overflow, empty]})
