"""What training computed is what is served (bar E4): the checkpoint, as it stands, beside its base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import load_script

from trilithon_parallel.backend import native, select
from trilithon_parallel.config import load_config
from trilithon_parallel.grid import Grid
from trilithon_parallel.layout import Layout
from trilithon_parallel.lora.bank import AdapterBank
from trilithon_parallel.models import CausalStage, build_stage
from trilithon_parallel.objective import log_probabilities
from trilithon_parallel.weights.loader import load_stage

runs = load_script(Path(__file__).with_name("lora_runs.py"))


@pytest.mark.skipif(bool(native.unavailable_reason()), reason="without the C kernels oneDNN packs serving's products")
@pytest.mark.parametrize("layout", ["per_projection", "fused"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_E4_served_adapters_have_the_trainers_numbers(name: str, layout: str, tmp_path: Path) -> None:
    """
    Log-probabilities of a trained adapter in a bank's slot are the training forward's, to the last bit at fp32.

    Seen red: with the scale applied after B instead of before it.
    """
    runs.make_models(tmp_path)
    config, grid = load_config(tmp_path / name), Grid.single()
    model = runs.make_model(tmp_path / name, Layout(), grid, lora={"layout": layout, "alpha": 6.5})
    runs.steps(model, 0, 2)
    runs.save(model, tmp_path / "run", step=2)
    served = build_stage(config, grid=grid, backend=select("torch"), dtype=torch.float32)
    load_stage(served, tmp_path / name, config=config, grid=grid)
    served.prepare()
    bank = AdapterBank(served, config=config, grid=grid, max_adapters=2, max_rank=16)
    bank.load(1, tmp_path / "run" / "step_00000002")
    trained = model.chunks[0].stage
    assert isinstance(trained, CausalStage)
    assert isinstance(served, CausalStage)
    (batch, *_) = runs.batches_of(config, 5, Layout(), 0)
    expected = log_probabilities(trained, batch).detach()
    with bank.batch([1], batch.cu_seqlens):
        adapted = log_probabilities(served, batch)
    with bank.batch([-1], batch.cu_seqlens):
        plain = log_probabilities(served, batch)

    assert torch.equal(adapted, expected)
    assert not torch.equal(plain, expected)
