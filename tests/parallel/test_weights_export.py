"""Exported model directories: transformers computes on them what we compute, and what it computed before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny import tiny_bert, tiny_gpt2, tiny_llama

from trilithon_parallel.attention import PackedView
from trilithon_parallel.backend import select
from trilithon_parallel.config import ModelConfig, ModelError, load_config
from trilithon_parallel.grid import Grid
from trilithon_parallel.models import CausalStage, build_stage
from trilithon_parallel.weights.export import export_model, full_state
from trilithon_parallel.weights.loader import load_stage, load_state

E10_TOLERANCE = 1e-4  # max abs, fp32: sums run in another order

MODELS: dict[str, Callable[[Path], Path]] = {
    "llama": lambda p: tiny_llama(p, heads=9, groups=3, hidden=72, vocab=389),
    "llama-untied-sharded": lambda p: tiny_llama(p, tied=False, shards=2, eos_ids=(2, 0)),
    "llama-wide-heads": lambda p: tiny_llama(p, head_dim=32),
    "llama3-rope": lambda p: tiny_llama(
        p,
        config={
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "gpt2": lambda p: tiny_gpt2(p),
    "gpt2-first-names": lambda p: tiny_gpt2(p, prefix=""),
    "bert": lambda p: tiny_bert(p),
}


def stage_of(model_dir: Path) -> tuple[Any, ModelConfig]:
    config = load_config(model_dir)
    stage = build_stage(config, grid=Grid.single(), backend=select("torch"), dtype=torch.float32)
    load_stage(stage, model_dir, config=config, grid=Grid.single())
    return stage, config


@torch.no_grad()
def our_outputs(model_dir: Path, tokens_T: torch.Tensor) -> torch.Tensor:
    stage, config = stage_of(model_dir)
    view = PackedView([0, len(tokens_T)], causal=config.is_causal)
    hidden_TH = stage(tokens_T, positions_T=torch.arange(len(tokens_T)), view=view)
    return stage.gather_logits(hidden_TH) if isinstance(stage, CausalStage) else hidden_TH


@torch.no_grad()
def their_outputs(model_dir: Path, tokens_T: torch.Tensor, *, unused: set[str]) -> torch.Tensor:
    import transformers

    causal = load_config(model_dir).is_causal
    kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    loaded: Any = kind.from_pretrained(model_dir, dtype=torch.float32, output_loading_info=True)
    model, found = loaded
    assert set(found["missing_keys"]) == unused
    assert not found["unexpected_keys"]
    assert not found["mismatched_keys"]
    output = model.eval()(tokens_T[None])
    result: torch.Tensor = (output.logits if causal else output.last_hidden_state)[0]
    return result


@pytest.mark.parametrize("model", MODELS)
def test_E10_export_is_what_transformers_computes(model: str, tmp_path: Path) -> None:
    """
    Outputs of transformers on the original and on the export are equal bit for bit, and ours within 1e-4 of them.

    Inverse: leaving GPT-2's transposes out of the export (square matrices load anyway) was seen to fail.
    """
    original = MODELS[model](tmp_path / "original")
    stage, config = stage_of(original)
    exported = tmp_path / "exported"
    export_model(full_state([(stage, Grid.single())], config), config, exported, side_files_from=original)
    tokens_T = torch.arange(3, 3 + 40) * 5 % 250

    theirs = their_outputs(original, tokens_T, unused=set())

    # The pooler is not ours, so it is not exported.
    pooler = {"pooler.dense.weight", "pooler.dense.bias"} if model == "bert" else set()
    assert torch.equal(theirs, their_outputs(exported, tokens_T, unused=pooler))
    assert (theirs - our_outputs(exported, tokens_T)).abs().max() <= E10_TOLERANCE
    assert torch.equal(our_outputs(original, tokens_T), our_outputs(exported, tokens_T))


@pytest.mark.parametrize("model", MODELS)
def test_config_survives_the_round_trip(model: str, tmp_path: Path) -> None:
    """Reading, exporting and reading again gives an equal config: end tokens, rotary scaling, pooling and all."""
    original = MODELS[model](tmp_path / "original")
    config = load_config(original)

    export_model(load_state(original, config=config), config, tmp_path / "out", side_files_from=original)

    assert config == load_config(tmp_path / "out")


def test_export_splits_large_models_and_casts(tmp_path: Path) -> None:
    """Above the limit there are several files with an index; bf16 halves them; both load."""
    original = tiny_llama(tmp_path / "original")
    config = load_config(original)
    state = load_state(original, config=config)

    out = tmp_path / "out"
    export_model(state, config, out, side_files_from=None, dtype=torch.bfloat16, max_shard_bytes=60_000)

    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 1
    assert files == sorted(set(index["weight_map"].values()))
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 2 for tensor in state.values())
    assert load_config(out).dtype == "bfloat16"
    assert all(
        torch.equal(state[name].bfloat16(), tensor) for name, tensor in load_state(out, config=load_config(out)).items()
    )


def test_exported_names_are_those_of_transformers(tmp_path: Path) -> None:
    """A GPT-2 with the first published names is exported under the names that transformers writes today."""
    original = tiny_gpt2(tmp_path / "original", prefix="")
    config = load_config(original)
    export_model(load_state(original, config=config), config, tmp_path / "out", side_files_from=None)

    names = set(safetensors.torch.load_file(tmp_path / "out" / "model.safetensors"))

    expected = set(safetensors.torch.load_file(tiny_gpt2(tmp_path / "today") / "model.safetensors"))
    assert expected == names


def test_R10_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export that breaks off leaves no directory, whole or half, and no temporary one."""
    original = tiny_llama(tmp_path / "original")
    config = load_config(original)
    state = load_state(original, config=config)

    class FullDisk(OSError):
        pass

    def fail(fd: int) -> None:
        raise FullDisk

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(FullDisk):
        export_model(state, config, tmp_path / "out", side_files_from=None)

    assert [original] == list(tmp_path.iterdir())


def test_R11_export_of_something_else_is_refused(tmp_path: Path) -> None:
    """An existing directory, a missing, an extra and a padded tensor are each named."""
    original = tiny_llama(tmp_path / "original")
    config = load_config(original)
    state = load_state(original, config=config)
    norm = state["model.norm.weight"]
    cases: list[tuple[dict[str, torch.Tensor], Path, str]] = [
        (state, original, "original exists already"),
        ({name: t for name, t in state.items() if t is not norm}, tmp_path / "a", "lacks tensor model.norm.weight"),
        (state | {"lm_head.weight": norm}, tmp_path / "b", "tensor lm_head.weight has no place"),
        (state | {"model.norm.weight": torch.ones(80)}, tmp_path / "c", r"must have shape \[64\]. Given: \[80\]"),
    ]

    for given, out, words in cases:
        with pytest.raises(ModelError, match=words):
            export_model(given, config, out, side_files_from=None)
