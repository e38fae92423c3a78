"""Transformer Engine behind the backend seam, on its stub: the import guard, wrappers, names, files."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import te_stub
import torch
from te_stub import StubLinear
from tiny import tiny_gpt2, tiny_llama

import trilithon_parallel
from trilithon_parallel.attention import PackedView
from trilithon_parallel.backend import select
from trilithon_parallel.config import ModelError, load_config
from trilithon_parallel.grid import Axis, Grid
from trilithon_parallel.models import build_stage
from trilithon_parallel.placement import stage_names
from trilithon_parallel.weights.loader import load_stage


@pytest.fixture
def fresh_guard() -> Iterator[None]:
    """Forget what the import guard found, before and after."""
    te_stub.forget()
    yield
    te_stub.forget()


@pytest.mark.usefixtures("fresh_guard")
@pytest.mark.parametrize(
    "error",
    [
        ImportError("no wheel"),
        OSError("libcuda.so.1: cannot open"),
        RuntimeError("found 0 devices"),
        AssertionError("bad install"),
        FileNotFoundError("libtransformer_engine.so"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_broken_transformer_engine_is_a_reason_not_a_crash(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "te" says why it cannot be; "auto" falls back to torch."""

    def broken(name: str) -> ModuleType:
        raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib, "import_module", broken)

    assert select("auto", device="cuda").name == "torch"
    with pytest.raises(ModelError, match=str(error)) as caught:
        select("te")
    assert type(error).__name__ in str(caught.value)


@pytest.mark.usefixtures("fresh_guard")
def test_without_a_device_transformer_engine_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """No CUDA device: the reason says so and nothing is imported."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(ModelError, match="no CUDA device is visible"):
        select("te")
    assert "transformer_engine" not in sys.modules


@pytest.fixture
def stub_te(monkeypatch: pytest.MonkeyPatch, fresh_guard: None) -> None:
    """A machine where Transformer Engine imports."""
    te_stub.install(monkeypatch)


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


@pytest.mark.usefixtures("stub_te")
@pytest.mark.parametrize("family", MODELS)
def test_E10_transformer_engine_models_load_the_same_files(family: str, tmp_path: Path) -> None:
    """
    Same keys and shapes as the torch backend's, no extra state, each loads the other's; logits agree.

    Files with it can be read nowhere else: TE#199, TE#1623.

    Inverse: without `_Stateless` the state dict holds `_extra_state` keys and this fails.
    """
    model_dir = MODELS[family](tmp_path / "model")
    config, grid = load_config(model_dir), Grid.single()
    stages = [build_stage(config, grid=grid, backend=select(name), dtype=torch.float32) for name in ("te", "torch")]
    states = [stage.state_dict() for stage in stages]

    assert {k: v.shape for k, v in states[0].items()} == {k: v.shape for k, v in states[1].items()}
    assert not any("extra_state" in name for name in states[0])
    assert set(dict(stages[0].named_parameters())) == set(stage_names(config, pp=1, pp_rank=0))

    load_stage(stages[0], model_dir, config=config, grid=grid)
    stages[1].load_state_dict(stages[0].state_dict())
    tokens_T, view = torch.arange(30), PackedView([0, 30], causal=True)
    with torch.no_grad():
        stages[0].prepare()
        logits = [stage.gather_logits(stage(tokens_T, positions_T=tokens_T, view=view)) for stage in stages]

    assert (logits[0] - logits[1]).abs().max() <= 1e-4


@pytest.mark.usefixtures("stub_te")
def test_transformer_engine_is_given_global_sizes_and_its_group(tmp_path: Path) -> None:
    """It divides by tp itself; every option that has a default of its own is passed explicitly."""
    config = load_config(tiny_llama(tmp_path / "model", hidden=64, heads=4, groups=2, ffn=96))
    single = Grid.single()
    tp = Axis("tp", 1, 2, (0, 1), None)
    grid = Grid(tp, single.pp, single.dp, Axis("world", 1, 2, (0, 1)), single.device)

    stage = build_stage(config, grid=grid, backend=select("te"), dtype=torch.bfloat16)

    sizes = {(call["in_features"], call["out_features"], call["parallel_mode"]) for call in StubLinear.calls}
    assert sizes == {(64, 64, "column"), (64, 32, "column"), (64, 64, "row"), (64, 96, "column"), (96, 64, "row")}
    for call in StubLinear.calls:
        assert (call["tp_size"], call["sequence_parallel"], call["return_bias"]) == (2, False, False)
        assert call["params_dtype"] == torch.bfloat16
    assert stage.get_parameter("model.layers.0.self_attn.q_proj.weight").shape == (32, 64)


def test_cuda_has_no_batch_invariant_mode() -> None:
    """Asking for it is an error, whichever backend, before a device is looked for."""
    with pytest.raises(ModelError, match="not available on CUDA"):
        select("torch", batch_invariant=True, device="cuda")


@pytest.mark.usefixtures("stub_te")
def test_transformer_engine_has_no_batch_invariant_mode() -> None:
    """Asking for both is refused, not ignored."""
    with pytest.raises(ModelError, match="no batch-invariant mode"):
        select("te", batch_invariant=True)


def test_only_one_module_mentions_transformer_engine_in_code() -> None:
    """
    Syntax trees: no import of it, and no string that names it for an import, outside te_ops.py.

    Elsewhere such an import broke every machine without a GPU (Megatron-LM#2715, TE#3381).
    """
    root = Path(trilithon_parallel.__file__).parent
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
            hits = [name for name in names if name.startswith("transformer_engine")]
            assert not hits or path.name == "te_ops.py", path.name
