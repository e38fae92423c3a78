"""The same training by PEFT and torch's AdamW: losses, gradients and what becomes of A and B."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import load_script
from safetensors.torch import load_file
from torch import Tensor

from trilithon_parallel.config import ModelConfig, load_config
from trilithon_parallel.grid import Grid
from trilithon_parallel.layout import Layout
from trilithon_parallel.lora.files import TENSORS_FILE
from trilithon_parallel.lora.peft import read_adapter, write_adapter
from trilithon_parallel.lora.spec import LoraSpec, owned_shapes
from trilithon_parallel.optimizer import AdamWSettings
from trilithon_parallel.step import TrainingModel

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
runs = load_script(Path(__file__).with_name("lora_runs.py"))

SETTINGS = AdamWSettings(eps=1e-4, weight_decay=0.1, clip_norm=None)
# fp32 on both sides, sums in other orders: relative to the largest value of a tensor. Adam divides by roots that are
# small in its first steps, so more is left of it in what it moves.
TOLERANCE, MOVED_TOLERANCE = 2e-5, 2e-4

# GPT-2's q, k and v share one A in PEFT, which has one module for them.
CASES = {"llama": {"rank_pattern": (("v_proj", 2),)}, "gpt2": {"layout": "fused"}, "bert": {"alpha": 6.0}}


def _state(config: ModelConfig, spec: LoraSpec) -> dict[str, Tensor]:
    """An adapter whose B is not zero, so that all gradients of the first step count."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in owned_shapes(config, spec).items()}


def _as_files(state: dict[str, Tensor], config: ModelConfig, spec: LoraSpec, directory: Path) -> dict[str, Tensor]:
    """Tensors of an adapter by PEFT's names."""
    write_adapter(directory, state, config=config, spec=spec, base_model="", facts={})
    found: dict[str, Tensor] = load_file(directory / TENSORS_FILE)
    return found


def _peer(model_dir: Path, adapter: Path, config: ModelConfig) -> Any:
    kind = "AutoModelForMaskedLM" if config.mlm_head else "AutoModelForCausalLM"
    base = getattr(transformers, kind).from_pretrained(model_dir)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about a name that peft still uses
        return peft.PeftModel.from_pretrained(base, adapter, is_trainable=True).eval()


def _peer_loss(peer: Any, model: TrainingModel, step: int) -> Tensor:
    """The sum over the tokens that count, by their number, of a whole global batch."""
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for batch in runs.batches_of(model.config, step, Layout(), 0):
        types = {} if batch.types_T is None else {"token_type_ids": batch.types_T.view(1, -1)}
        logits = peer(input_ids=batch.tokens_T.view(1, -1), **types).logits[0]
        losses = F.cross_entropy(logits, batch.targets_T, reduction="none")
        total, count = total + (losses * batch.weights_T).double().sum(), count + float(batch.weights_T.sum())
    return total / count


def _close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert sorted(ours) == sorted(theirs)
    for name, tensor in ours.items():
        worst = (tensor - theirs[name]).abs().max().item()
        assert worst <= tolerance * max(theirs[name].abs().max().item(), 1e-3), (name, worst)


@pytest.mark.parametrize("name", CASES)
def test_steps_equal_those_of_peft(name: str, tmp_path: Path) -> None:
    """
    Three steps of AdamW from one adapter: the losses, the first gradients and the last A and B are PEFT's.

    Seen red: with alpha in place of alpha / rank.
    """
    runs.make_models(tmp_path)
    config = load_config(tmp_path / name)
    spec = runs.spec_of(config, **CASES[name])
    start = _as_files(_state(config, spec), config, spec, tmp_path / "start")
    model = runs.make_model(
        tmp_path / name, Layout(), Grid.single(), lora=CASES[name], settings=SETTINGS,
        adapter=read_adapter(tmp_path / "start", config=config),
    )  # fmt: skip
    peer = _peer(tmp_path / name, tmp_path / "start", config)
    trained = {key.replace(".default", ""): p for key, p in peer.named_parameters() if p.requires_grad}
    adamw = torch.optim.AdamW(
        trained.values(), lr=runs.RATE, betas=(SETTINGS.beta1, SETTINGS.beta2), eps=SETTINGS.eps,
        weight_decay=SETTINGS.weight_decay,
    )  # fmt: skip

    assert sorted(trained) == sorted(start)
    for step in range(3):
        (ours,) = runs.steps(model, step, step + 1)
        adamw.zero_grad()
        loss = _peer_loss(peer, model, step)
        loss.backward()
        assert abs(ours.loss - loss.item()) <= TOLERANCE * abs(loss.item())
        if step == 0:
            made = {
                slot.owner: bucket.grad[slot.start : slot.stop].view(slot.parameter.shape)
                for bucket, slot in model.buckets.slots()
            }
            gradients = _as_files(made, config, spec, tmp_path / "gradients")
            _close(gradients, {key: p.grad for key, p in trained.items() if p.grad is not None}, TOLERANCE)
        adamw.step()
    state = {t.name: t.tensor for t in model.optimizer.targets() if ".exp_avg" not in t.name}
    end = _as_files(state, config, spec, tmp_path / "end")
    _close(end, {key: p.detach() for key, p in trained.items()}, MOVED_TOLERANCE)
    assert any(not torch.equal(end[key], start[key]) for key in start)
