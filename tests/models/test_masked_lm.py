"""BERT with its masked-LM head: logits of `transformers`, exports, gradients; and BERT without one, as before."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from tiny import tiny_bert
from torch import Tensor

from trilithon_parallel.attention import PackedView
from trilithon_parallel.config import ModelError, load_config
from trilithon_parallel.grid import Grid
from trilithon_parallel.models import EncoderStage
from trilithon_parallel.weights.export import export_model, full_state
from trilithon_parallel.weights.loader import load_state

TOLERANCE = 1e-4  # fp32 sums in another order
BOUNDS = [0, 7, 40, 41]

LoadModel = Callable[[Path], EncoderStage]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens_T, types_T = (torch.randint(0, high, (BOUNDS[-1],), generator=generator) for high in (200, 2))
    # Not token 0: transformers gives the padding token's row no gradient.
    return tokens_T + 1, types_T, torch.cat([torch.arange(stop - start) for start, stop in pairwise(BOUNDS)])


def ours(stage: EncoderStage) -> Tensor:
    tokens_T, types_T, positions_T = inputs()
    hidden_TH = stage(tokens_T, positions_T=positions_T, types_T=types_T, view=PackedView(BOUNDS, causal=False))
    return stage.gather_logits(hidden_TH)


def theirs(model: Any) -> Tensor:
    tokens_T, types_T, _ = inputs()
    texts = [slice(start, stop) for start, stop in pairwise(BOUNDS)]
    return torch.cat([model(tokens_T[None, text], token_type_ids=types_T[None, text]).logits[0] for text in texts])


def reference(model_dir: Path) -> Any:
    loaded: Any = transformers.BertForMaskedLM.from_pretrained(model_dir, dtype=torch.float32, output_loading_info=True)
    model, found = loaded
    assert not found["missing_keys"]
    assert not found["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("shape", [{}, {"heads": 3, "hidden": 60, "ffn": 50, "vocab": 251}], ids=["even", "odd"])
def test_E10_masked_lm_logits_and_export(shape: dict[str, int], tmp_path: Path, load_model: LoadModel) -> None:
    """
    Logits are transformers' on the original and on our export, whose names are those that it writes itself.

    Inverse: leaving the head's bias out, or its norm, fails it.
    """
    original = tiny_bert(tmp_path / "original", mlm_head=True, pooler=False, **shape)
    config, stage = load_config(original), load_model(original)
    exported = tmp_path / "exported"
    export_model(full_state([(stage, Grid.single())], config), config, exported, side_files_from=original)

    with torch.no_grad():
        assert (ours(stage) - theirs(reference(original))).abs().max() <= TOLERANCE
        assert (ours(load_model(exported)) - theirs(reference(exported))).abs().max() <= TOLERANCE
    names = [set(safetensors.torch.load_file(path / "model.safetensors")) for path in (original, exported)]
    assert names[0] == names[1]
    assert config == load_config(exported)


def test_masked_lm_gradients(tmp_path: Path, load_model: LoadModel) -> None:
    """The head's gradients and, through it, the embedding's are transformers' own."""
    model_dir = tiny_bert(tmp_path / "model", mlm_head=True)
    stage, model = load_model(model_dir), reference(model_dir)
    ours(stage).square().mean().backward()
    theirs(model).square().mean().backward()
    parameters = dict(model.named_parameters())
    pairs = {
        "model.embed_tokens.weight": "bert.embeddings.word_embeddings.weight",
        "lm_transform.dense.weight": "cls.predictions.transform.dense.weight",
        "lm_transform.norm.bias": "cls.predictions.transform.LayerNorm.bias",
        "lm_head.bias": "cls.predictions.bias",
        "model.layers.1.mlp.up_proj.weight": "bert.encoder.layer.1.intermediate.dense.weight",
    }
    mine = dict(stage.named_parameters())

    for name, file_name in pairs.items():
        gradient, expected = mine[name].grad, parameters[file_name].grad
        assert gradient is not None
        torch.testing.assert_close(gradient[: len(expected)], expected, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ["LayerNorm.gamma", "decoder.weight", "seq_relationship"])
def test_published_masked_lm_files_are_read(name: str, tmp_path: Path, load_model: LoadModel) -> None:
    """The first files' names for gain and shift, a copy of the embedding as the head's matrix, the other head."""
    original = tiny_bert(tmp_path / "original", mlm_head=True)
    older = tiny_bert(tmp_path / "older", mlm_head=True)
    tensors = safetensors.torch.load_file(older / "model.safetensors")
    if name == "LayerNorm.gamma":
        older_names = {"LayerNorm.weight": name, "LayerNorm.bias": "LayerNorm.beta"}
        for new, old in older_names.items():
            tensors = {key.replace(new, old): tensor for key, tensor in tensors.items()}
    elif name == "decoder.weight":
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
        tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
    else:
        tensors |= {"cls.seq_relationship.weight": torch.ones(2, 64), "cls.seq_relationship.bias": torch.ones(2)}
    safetensors.torch.save_file(tensors, older / "model.safetensors")

    with torch.no_grad():
        assert torch.equal(ours(load_model(original)), ours(load_model(older)))


def test_the_head_is_part_of_the_model(tmp_path: Path, load_model: LoadModel) -> None:
    """A BertForMaskedLM without its head is refused; a BertModel has none, holds none, and loads from either trunk."""
    with_head, without = tiny_bert(tmp_path / "with", mlm_head=True), tiny_bert(tmp_path / "without")
    raw = json.loads((without / "config.json").read_text())
    assert not any(name.startswith("lm_") for name, _ in load_model(without).named_parameters())
    (without / "config.json").write_text(json.dumps(raw | {"architectures": ["BertForMaskedLM"]}))
    with pytest.raises(ModelError, match=r"tensor cls\.predictions\.transform\.dense\.weight is missing"):
        load_model(without)
    trunk = json.loads((with_head / "config.json").read_text()) | {"architectures": ["BertModel"]}
    whole = load_state(with_head, config=load_config(with_head))
    (with_head / "config.json").write_text(json.dumps(trunk))

    state = load_state(with_head, config=load_config(with_head))

    assert set(whole) - set(state) == {
        "lm_head.bias",
        *(f"lm_transform.{part}.{kind}" for part in ("dense", "norm") for kind in ("weight", "bias")),
    }
    assert all(torch.equal(tensor, whole[name]) for name, tensor in state.items())


def test_R11_an_untied_masked_lm_is_refused(tmp_path: Path) -> None:
    """Its head would be another matrix than the one that we train."""
    with pytest.raises(ModelError, match=r"tie_word_embeddings is not supported\. Given: False\. Allowed: True"):
        load_config(tiny_bert(tmp_path / "model", mlm_head=True, config={"tie_word_embeddings": False}))


def test_a_masked_lm_is_packed_like_any_encoder(tmp_path: Path, load_model: LoadModel) -> None:
    """Packing for serving leaves hidden states, and the head beside them, as they are."""
    model_dir = tiny_bert(tmp_path / "model", mlm_head=True)
    packed = load_model(model_dir)
    packed.prepare()

    with torch.no_grad():
        assert (ours(packed) - ours(load_model(model_dir))).abs().max() <= TOLERANCE
