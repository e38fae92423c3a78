"""E10: logits of every supported family are those of `transformers` on the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import tiny_bert, tiny_gpt2, tiny_llama
from torch import Tensor

from trilithon_parallel.attention import PackedView
from trilithon_parallel.config import ModelError, load_config
from trilithon_parallel.models import CausalStage, EncoderStage

# fp32 sums in another order; the bar is 1e-4.
TOLERANCE = 1e-4

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMAS: dict[str, dict[str, Any]] = {
    "grouped": {"hidden": 72, "heads": 9, "groups": 3},
    "multi_query": {"heads": 4, "groups": 1},
    "untied": {"tied": False},
    "odd_vocab": {"vocab": 391, "ffn": 100},
    "head_dim": {"head_dim": 32},
    "llama3_rope": {"config": {"rope_scaling": LLAMA3}},
    "linear_rope": {"config": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}},
    "large_base": {"rope_theta": 500000.0},
}


def reference(model_dir: Path, tokens_T: Tensor) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: Tensor = model(tokens_T.unsqueeze(0)).logits[0]
    return logits


def ours(stage: CausalStage, tokens_T: Tensor) -> Tensor:
    num = len(tokens_T)
    with torch.no_grad():
        hidden_TH = stage(tokens_T, positions_T=torch.arange(num), view=PackedView([0, num], causal=True))
        return stage.gather_logits(hidden_TH)


@pytest.mark.parametrize("prepare", [False, True], ids=["parameters", "packed"])
@pytest.mark.parametrize("kind", LLAMAS)
def test_E10_llama_logits(kind: str, prepare: bool, tmp_path: Path, load_model: Callable[..., Any]) -> None:
    """Packed and unpacked products agree with transformers. (Inverse: swapping the halves in `rotate` fails it.)"""
    model_dir = tiny_llama(tmp_path / "model", **LLAMAS[kind])
    tokens_T = torch.randint(0, 256, (120,), generator=torch.Generator().manual_seed(3))

    error = (ours(load_model(model_dir, prepare=prepare), tokens_T) - reference(model_dir, tokens_T)).abs().max()

    assert error <= TOLERANCE


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "MistralForCausalLM"])
def test_E10_llama_like_logits(architecture: str, tmp_path: Path, load_model: Callable[..., Any]) -> None:
    """Qwen2 (biases on q, k, v alone) and Mistral without a window, written by transformers, read by us."""
    torch.manual_seed(5)
    model_dir = tiny_llama(tmp_path / "model", layers=2, hidden=64, heads=4, groups=2)
    kind = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
    window = {"use_sliding_window": False} if architecture.startswith("Qwen2") else {"sliding_window": None}
    config = kind(
        vocab_size=300,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        **window,
    )
    model = getattr(transformers, architecture)(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # biases start at zero, which would hide them
    model.save_pretrained(model_dir)
    tokens_T = torch.randint(0, 300, (70,), generator=torch.Generator().manual_seed(3))

    error = (ours(load_model(model_dir), tokens_T) - reference(model_dir, tokens_T)).abs().max()

    assert error <= TOLERANCE


@pytest.mark.parametrize("prepare", [False, True], ids=["parameters", "packed"])
def test_E10_gpt2_logits(prepare: bool, tmp_path: Path, load_model: Callable[..., Any]) -> None:
    """Learned positions, LayerNorm, biases, gelu_new. (Inverse: exact gelu fails it.)"""
    model_dir = tiny_gpt2(tmp_path / "model")
    tokens_T = torch.randint(0, 256, (60,), generator=torch.Generator().manual_seed(3))

    error = (ours(load_model(model_dir, prepare=prepare), tokens_T) - reference(model_dir, tokens_T)).abs().max()

    assert error <= TOLERANCE


@pytest.mark.parametrize("prepare", [False, True], ids=["parameters", "packed"])
def test_E10_bert_hidden_states(prepare: bool, tmp_path: Path, load_model: Callable[..., Any]) -> None:
    """Several texts packed together, with token types, equal transformers on each alone."""
    model_dir = tiny_bert(tmp_path / "model")
    stage: EncoderStage = load_model(model_dir, prepare=prepare)
    model = transformers.AutoModel.from_pretrained(model_dir, dtype=torch.float32).eval()
    bounds = [0, 7, 40, 41]
    generator = torch.Generator().manual_seed(3)
    tokens_T, types_T = (torch.randint(0, high, (41,), generator=generator) for high in (100, 2))
    positions_T = torch.cat([torch.arange(stop - start) for start, stop in pairwise(bounds)])

    with torch.no_grad():
        hidden_TH = stage(tokens_T, positions_T=positions_T, types_T=types_T, view=PackedView(bounds, causal=False))
        for start, stop in pairwise(bounds):
            expected_TH = model(tokens_T[None, start:stop], token_type_ids=types_T[None, start:stop])[0][0]

            assert (hidden_TH[start:stop] - expected_TH).abs().max() <= TOLERANCE


def test_gradients_reach_every_parameter(tmp_path: Path, load_model: Callable[..., Any]) -> None:
    """The layers that serve are those that train: gradients equal transformers' own."""
    model_dir = tiny_llama(tmp_path / "model", tied=True)
    stage: CausalStage = load_model(model_dir, prepare=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokens_T = torch.arange(40) % 250
    hidden_TH = stage(tokens_T, positions_T=torch.arange(40), view=PackedView([0, 40], causal=True))
    stage.gather_logits(hidden_TH).square().mean().backward()
    model(tokens_T[None]).logits.square().mean().backward()
    expected = dict(model.named_parameters())

    for name, parameter in stage.named_parameters():
        assert parameter.grad is not None, name
        rows = expected[name].shape[0]
        torch.testing.assert_close(parameter.grad[:rows], expected[name].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("architectures", ["MambaForCausalLM"], "Allowed: one of LlamaForCausalLM"),
        ("architectures", [], "architectures is not supported. Given: \\[\\]"),
        ("hidden_act", "relu", "hidden_act is not supported. Given: 'relu'. Allowed: 'silu'"),
        ("num_hidden_layers", 0, "num_hidden_layers must be a positive integer. Given: 0"),
        ("num_hidden_layers", True, "num_hidden_layers must be a positive integer. Given: True"),
        ("num_key_value_heads", 3, "must be a multiple of num_key_value_heads. Given: 4 and 3"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0}, "rope_type is not supported. Given: 'yarn'"),
        ("rope_scaling", "long", "rope_scaling must be an object or null. Given: 'long'"),
        ("rms_norm_eps", "small", "rms_norm_eps must be a positive number. Given: 'small'"),
        ("tie_word_embeddings", "yes", "tie_word_embeddings must be true or false. Given: 'yes'"),
    ],
)
def test_R11_a_config_that_we_do_not_compute_is_refused(
    field: str, value: object, message: str, tmp_path: Path
) -> None:
    """One sentence names the file, the field, the value and what is allowed; never a silently different model."""
    model_dir = tiny_llama(tmp_path / "model")
    raw = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(raw | {field: value}))

    with pytest.raises(ModelError, match=message):
        load_config(model_dir)


def test_R11_a_missing_or_broken_config_is_named(tmp_path: Path) -> None:
    """No directory, no config.json, and a config.json that is cut short."""
    with pytest.raises(ModelError, match="does not exist") as missing:
        load_config(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ')
    with pytest.raises(ModelError, match=r"config\.json is not readable JSON"):
        load_config(tmp_path)

    assert missing.value.code == "model_not_found"
