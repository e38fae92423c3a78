"""Encoder-decoders: logits and gradients of `transformers` on the same files, encoding apart from decoding, exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import tiny_t5
from torch import Tensor

from trilithon_parallel.backend import select
from trilithon_parallel.config import ModelError, load_config
from trilithon_parallel.grid import Grid
from trilithon_parallel.models import Seq2SeqStage, build_stage
from trilithon_parallel.models.t5 import distance_buckets
from trilithon_parallel.weights.export import export_model, full_state
from trilithon_parallel.weights.loader import load_state

# fp32 sums in another order; the bar is 1e-4.
TOLERANCE = 1e-4

MODELS: dict[str, dict[str, Any]] = {
    "1.0": {},
    "1.1": {"gated": True, "tied": False, "scale": 0.3},
    "unscaled": {"config": {"scale_decoder_outputs": False}, "scale": 0.3},
    "odd": {"heads": 3, "head_dim": 10, "ffn": 50, "vocab": 251, "buckets": 8, "decoder_layers": 3},
    "short-reach": {"config": {"relative_attention_max_distance": 20}},
}
ENCODER_BOUNDS, DECODER_BOUNDS = [0, 150, 157, 164, 165], [0, 9, 12, 15, 70]

LoadModel = Callable[[Path], Seq2SeqStage]


def tokens(high: int = 240) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randint(0, high, (n,), generator=generator) for n in (ENCODER_BOUNDS[-1], DECODER_BOUNDS[-1]))  # type: ignore[return-value]  # two of them


def ours(stage: Seq2SeqStage) -> Tensor:
    encoder_E, decoder_T = tokens()
    hidden_TH = stage(
        None,
        encoder_tokens_E=encoder_E,
        encoder_cu_seqlens=ENCODER_BOUNDS,
        decoder_tokens_T=decoder_T,
        decoder_cu_seqlens=DECODER_BOUNDS,
    )
    return stage.gather_logits(hidden_TH)


def theirs(model: Any) -> Tensor:
    encoder_E, decoder_T = tokens()
    rows = []
    for (start, stop), (first, last) in zip(pairwise(ENCODER_BOUNDS), pairwise(DECODER_BOUNDS), strict=True):
        given = {"input_ids": encoder_E[None, start:stop], "decoder_input_ids": decoder_T[None, first:last]}
        rows.append(model(**given).logits[0])
    return torch.cat(rows)


def reference(model_dir: Path) -> Any:
    loaded: Any = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        model_dir, dtype=torch.float32, output_loading_info=True
    )
    model, found = loaded
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert not found["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("kind", MODELS)
def test_E10_t5_logits(kind: str, tmp_path: Path, load_model: LoadModel) -> None:
    """
    Several pairs packed together equal transformers on each alone, sequences beyond the last bucket included.

    Inverse: scaling the scores by 1 / sqrt(head_dim), one-way buckets in the encoder, and a head without its scale
    each fail it.
    """
    model_dir = tiny_t5(tmp_path / "model", **MODELS[kind])

    with torch.no_grad():
        error = (ours(load_model(model_dir)) - theirs(reference(model_dir))).abs().max()

    assert error <= TOLERANCE


@pytest.mark.parametrize("kind", MODELS)
def test_E10_t5_export_is_what_transformers_computes(kind: str, tmp_path: Path, load_model: LoadModel) -> None:
    """Original and export hold equal bits for transformers and for us, compute alike, and so do their configs."""
    original, exported = tiny_t5(tmp_path / "original", **MODELS[kind]), tmp_path / "exported"
    config = load_config(original)
    export_model(full_state([(load_model(original), Grid.single())], config), config, exported, side_files_from=None)

    models = [reference(path) for path in (original, exported)]
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    with torch.no_grad():
        # Not bit by bit: where a file's header ends decides how its tensors lie in memory.
        assert (theirs(models[0]) - theirs(models[1])).abs().max() <= TOLERANCE
        assert (theirs(models[1]) - ours(load_model(exported))).abs().max() <= TOLERANCE
        assert torch.equal(ours(load_model(original)), ours(load_model(exported)))
    assert config == load_config(exported)


def test_E10_t5_saved_by_transformers(tmp_path: Path, load_model: LoadModel) -> None:
    """What transformers writes is read: its copies of the embedding, its keys, a head of its own."""
    for tied in (True, False):
        theirs_dir = tmp_path / f"theirs{tied}"
        reference(tiny_t5(tmp_path / f"ours{tied}", tied=tied, gated=not tied)).save_pretrained(theirs_dir)
        raw = json.loads((theirs_dir / "config.json").read_text())
        # It says "tied" of every T5; of one that isn't we are told to mend the config.
        if not tied:
            with pytest.raises(ModelError, match="must equal the embedding"):
                load_model(theirs_dir)
            (theirs_dir / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": False}))

        with torch.no_grad():
            error = (ours(load_model(theirs_dir)) - theirs(reference(tmp_path / f"ours{tied}"))).abs().max()
        assert error <= TOLERANCE


@pytest.mark.parametrize("kind", ["1.0", "1.1"])
def test_t5_gradients(kind: str, tmp_path: Path, load_model: LoadModel) -> None:
    """Every parameter's gradient is transformers' own, through the table of distances and both attentions."""
    model_dir = tiny_t5(tmp_path / "model", **MODELS[kind])
    stage, model = load_model(model_dir), reference(model_dir)
    ours(stage).square().mean().backward()
    theirs(model).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    config = load_config(model_dir)
    # The loader reads a directory of gradients as it reads weights.
    export_like = tmp_path / "gradients"
    model.load_state_dict({name: gradients.get(name, tensor) for name, tensor in model.state_dict().items()})
    model.save_pretrained(export_like)
    expected = load_state(export_like, config=config)

    for name, parameter in stage.named_parameters():
        assert parameter.grad is not None, name
        rows = expected[name].shape[0]
        torch.testing.assert_close(parameter.grad[:rows], expected[name], rtol=1e-3, atol=1e-6, msg=name)


def test_decoding_from_several_passages(tmp_path: Path, load_model: LoadModel) -> None:
    """Passages encoded one by one are one memory: `passages` in training, `encode` and `decode` apart; equal bits."""
    stage = load_model(tiny_t5(tmp_path / "model"))
    encoder_E, decoder_T = tokens()
    decoder_bounds = [0, 30, 70]

    with torch.no_grad():
        together_TH = stage(
            None,
            encoder_tokens_E=encoder_E,
            encoder_cu_seqlens=ENCODER_BOUNDS,
            decoder_tokens_T=decoder_T,
            decoder_cu_seqlens=decoder_bounds,
            passages=2,
        )
        parts = [stage.encode(encoder_E[a:b], cu_seqlens=[0, b - a]) for a, b in pairwise(ENCODER_BOUNDS)]
        memory_EH = torch.cat(parts)
        apart_TH = stage.decode(decoder_T, memory_EH, cu_seqlens=decoder_bounds, encoder_cu_seqlens=ENCODER_BOUNDS[::2])
        flat_TH = stage.decode(decoder_T, memory_EH, cu_seqlens=decoder_bounds, encoder_cu_seqlens=[0, 150, 165])

    torch.testing.assert_close(together_TH, apart_TH, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(apart_TH, flat_TH, atol=1e-3), "another split of the memory must show"


def test_cross_bias_weighs_what_is_read(tmp_path: Path, load_model: LoadModel) -> None:
    """A bias of 0 changes nothing, one of -inf hides a passage as if it weren't there, and its scale has a gradient."""
    stage = load_model(tiny_t5(tmp_path / "model"))
    encoder_E, decoder_T = tokens()
    bounds, only = [0, len(decoder_T)], slice(150, 165)
    with torch.no_grad():
        memory_EH = stage.encode(encoder_E, cu_seqlens=ENCODER_BOUNDS)

    def decode(memory_EH: Tensor, bias_E: Tensor | None) -> Tensor:
        return stage.decode(
            decoder_T, memory_EH, cu_seqlens=bounds, encoder_cu_seqlens=[0, len(memory_EH)], cross_bias_E=bias_E
        )

    hidden_E = torch.full((165,), -torch.inf)
    hidden_E[only] = 0.0
    with torch.no_grad():
        torch.testing.assert_close(decode(memory_EH, None), decode(memory_EH, torch.zeros(165)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(decode(memory_EH, hidden_E), decode(memory_EH[only], None), rtol=1e-5, atol=1e-5)
    scale = torch.tensor(0.5, requires_grad=True)
    scores_E = torch.linspace(-1, 1, 165)
    loss = decode(memory_EH, scale * scores_E).square().sum()
    loss.backward()
    with torch.no_grad():
        around = [decode(memory_EH, (0.5 + step) * scores_E).double().square().sum() for step in (-0.01, 0.01)]

    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx(float(around[1] - around[0]) / 0.02, rel=0.02)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (4, 3)])
def test_distance_buckets(bidirectional: bool, num_buckets: int, max_distance: int) -> None:
    """One bucket a distance while near, wider ones that never go back, one for all beyond the reach, all in range."""
    past = distance_buckets(
        torch.arange(0, -400, -1), bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
    )
    future = distance_buckets(
        torch.arange(1, 400), bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
    )
    per_side = num_buckets // 2 if bidirectional else num_buckets

    assert past[: per_side // 2].tolist() == list(range(per_side // 2))
    assert bool((past.diff() >= 0).all())
    assert bool((past[max_distance:] == per_side - 1).all())
    assert torch.equal(future, past[1:] + per_side if bidirectional else torch.zeros(399, dtype=torch.int64))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("feed_forward_proj", "gated-silu", "feed_forward_proj is not supported. Given: 'gated-silu'. Allowed: 'relu'"),
        ("is_encoder_decoder", False, "is_encoder_decoder is not supported. Given: False"),
        ("relative_attention_num_buckets", 30, "must be a multiple of 4 and below twice .* Given: 30 and 128"),
        ("relative_attention_max_distance", 16, "must be a multiple of 4 and below twice .* Given: 32 and 16"),
        ("d_kv", None, "d_kv must be a positive integer. Given: None"),
    ],
)
def test_R11_a_t5_that_we_do_not_compute_is_refused(field: str, value: object, message: str, tmp_path: Path) -> None:
    """One sentence names the file, the field, the value and what is allowed."""
    with pytest.raises(ModelError, match=message):
        load_config(tiny_t5(tmp_path / "model", config={field: value}))


def test_R11_an_encoder_decoder_is_no_decoder(tmp_path: Path) -> None:
    """Whoever needs one stream of tokens, as serving does, is told so."""
    config = load_config(tiny_t5(tmp_path / "model"))

    with pytest.raises(ModelError, match="is an encoder-decoder") as caught:
        build_stage(config, grid=Grid.single(), backend=select("torch"), dtype=torch.float32)
    assert caught.value.code == "model_unsupported"
