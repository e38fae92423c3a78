"""Token types on decoders, an extra table that says nothing until it is trained; and positions of the caller's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from tiny import tiny_gpt2, tiny_llama
from torch import Tensor

from trilithon_parallel.attention import PackedView
from trilithon_parallel.config import load_config
from trilithon_parallel.init import extend_state
from trilithon_parallel.models import CausalStage
from trilithon_parallel.weights.export import export_model
from trilithon_parallel.weights.loader import load_state

DECODERS: dict[str, Callable[[Path], Path]] = {"llama": tiny_llama, "gpt2": tiny_gpt2}
FILE_NAMES = {"llama": "model.embed_types.weight", "gpt2": "transformer.wtt.weight"}


def logits(stage: CausalStage, types_T: Tensor | None, positions_T: Tensor) -> Tensor:
    tokens_T = torch.arange(30) * 7 % 250
    with torch.no_grad():
        hidden_TH = stage(tokens_T, positions_T=positions_T, types_T=types_T, view=PackedView([0, 30], causal=True))
        return stage.gather_logits(hidden_TH)


@pytest.mark.parametrize("family", DECODERS)
def test_zero_rows_leave_logits_as_they_are(family: str, tmp_path: Path, load_model: Callable[[Path], Any]) -> None:
    """
    A table added to a pretrained decoder: bit-identical logits at step 0 whatever the types, at any positions.

    Inverse: rows drawn from Normal(0, sigma) turn it red.
    """
    original, extended = DECODERS[family](tmp_path / "original"), tmp_path / "extended"
    config = load_config(original)
    typed = replace(config, token_types=3)
    state = extend_state(load_state(original, config=config), config, into=typed, seed=5, sigma=0.02)
    export_model(state, typed, extended, side_files_from=original)
    types_T, positions_T = torch.arange(30) % 3, torch.cat((torch.arange(12), torch.arange(18)))
    before, after = load_model(original), load_model(extended)

    assert config.token_types == 0
    assert load_config(extended) == typed
    assert torch.equal(logits(before, None, positions_T), logits(after, types_T, positions_T))
    assert torch.equal(logits(after, None, positions_T), logits(after, types_T, positions_T))
    assert FILE_NAMES[family] in safetensors.torch.load_file(extended / "model.safetensors")


@pytest.mark.parametrize("family", DECODERS)
def test_trained_rows_are_added_by_type(family: str, tmp_path: Path, load_model: Callable[[Path], Any]) -> None:
    """Rows that are not zero change what has their type; without types every token has type 0."""
    original, typed_dir = DECODERS[family](tmp_path / "original"), tmp_path / "typed"
    config = replace(load_config(original), token_types=2)
    state = load_state(original, config=load_config(original))
    rows = torch.stack((torch.zeros(64), torch.linspace(-1, 1, 64)))
    export_model(state | {"model.embed_types.weight": rows}, config, typed_dir, side_files_from=None)
    stage, positions_T = load_model(typed_dir), torch.arange(30)

    second_half_T = (torch.arange(30) >= 15).long()
    none, half = logits(stage, None, positions_T), logits(stage, second_half_T, positions_T)

    assert torch.equal(none, logits(load_model(original), None, positions_T))
    torch.testing.assert_close(none[:15], half[:15], rtol=1e-5, atol=1e-5)
    assert bool(((none[15:] - half[15:]).abs().amax(-1) > 1e-3).all())


@pytest.mark.parametrize("family", DECODERS)
def test_files_without_the_key_have_no_types(family: str, tmp_path: Path) -> None:
    """A decoder from elsewhere gets no table, and its export doesn't mention one."""
    model_dir = DECODERS[family](tmp_path / "model")
    config = load_config(model_dir)
    export_model(load_state(model_dir, config=config), config, tmp_path / "out", side_files_from=None)

    assert config.token_types == 0
    assert "type_vocab_size" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("family", DECODERS)
def test_E10_positions_are_the_callers(family: str, tmp_path: Path, load_model: Callable[[Path], Any]) -> None:
    """Positions that start anywhere, skip and start over are those of transformers. Inverse: counting them fails it."""
    model_dir = DECODERS[family](tmp_path / "model")
    positions_T = torch.cat((torch.arange(5, 15), torch.arange(0, 20, 2), torch.full((10,), 3)))
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    tokens_T = torch.arange(30) * 7 % 250
    with torch.no_grad():
        # With a mask of its own, or it takes positions that start over for the start of another text.
        expected_TV = model(tokens_T[None], position_ids=positions_T[None], attention_mask=torch.ones(1, 30)).logits[0]

    error = (logits(load_model(model_dir), None, positions_T) - expected_TV).abs().max()

    assert error <= 1e-4  # the bar
    assert (logits(load_model(model_dir), None, torch.arange(30)) - expected_TV).abs().max() > 1e-2
