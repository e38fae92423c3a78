"""New weights: the same model at every layout, with the spread that each kind of tensor should have."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import tiny_configs
import torch

from trilithon_parallel import init
from trilithon_parallel.backend import select
from trilithon_parallel.config import ModelConfig, ModelError
from trilithon_parallel.grid import Axis, Grid
from trilithon_parallel.init import default_sigma, extend_state, initialise, tensor_seed
from trilithon_parallel.models import build_seq2seq, build_stage
from trilithon_parallel.placement import global_shapes, local_slice, source_name
from trilithon_parallel.weights.export import full_state

LLAMA = replace(tiny_configs.LLAMA, hidden_size=24, num_layers=8, head_dim=4, ffn_size=50, max_context=16)
GPT2 = replace(
    tiny_configs.GPT2,
    hidden_size=24,
    num_layers=8,
    num_heads=6,
    num_kv_heads=6,
    head_dim=4,
    ffn_size=50,
    max_context=16,
)
BERT = replace(
    tiny_configs.BERT,
    hidden_size=24,
    num_layers=8,
    num_heads=6,
    num_kv_heads=6,
    head_dim=4,
    ffn_size=50,
    max_context=16,
)
T5 = replace(
    tiny_configs.T5,
    hidden_size=24,
    num_layers=8,
    num_heads=6,
    num_kv_heads=6,
    head_dim=4,
    ffn_size=50,
    max_context=16,
    num_encoder_layers=3,
)
FAMILIES = {
    "llama": LLAMA,
    "llama-untied": replace(LLAMA, tied_embeddings=False, num_kv_heads=1, num_heads=4),
    "gpt2": GPT2,
    "gpt2-types": replace(GPT2, token_types=3),
    "bert": BERT,
    "bert-masked-lm": replace(BERT, architecture="BertForMaskedLM", mlm_head=True, tied_embeddings=True),
    "t5": T5,
    "t5-untied": replace(T5, tied_embeddings=False, gated_mlp=True, activation="gelu_tanh", num_encoder_layers=6),
}


def grids(tp: int, pp: int, virtual: int) -> Iterator[Grid]:
    """Every place of a layout as its rank sees it, without any process group."""
    for tp_rank in range(tp):
        for pp_rank in range(pp):
            axes = [Axis("tp", tp_rank, tp, tuple(range(tp))), Axis("pp", pp_rank, pp, tuple(range(pp)))]
            grid = Grid(*axes, Axis("dp", 0, 1, (0,)), Axis("world", 0, 1, (0,)), torch.device("cpu"))
            yield from (grid.chunk(index, virtual) for index in range(virtual))


def new_model(
    config: ModelConfig,
    *,
    tp: int = 1,
    pp: int = 1,
    virtual: int = 1,
    seed: int = 7,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """The whole state of a model that its ranks initialised, put together again."""
    backend = select("torch")
    stages = []
    for grid in grids(tp, pp, virtual):
        build = build_seq2seq if config.is_seq2seq else build_stage
        stage = build(config, grid=grid, backend=backend, dtype=dtype)
        for parameter in stage.parameters():
            parameter.detach().fill_(torch.nan)  # whatever is left out shows
        initialise(stage, config=config, grid=grid, seed=seed, sigma=default_sigma(config))
        assert all(bool(parameter.isfinite().all()) for parameter in stage.parameters())
        stages.append((stage, grid))
    state = full_state(stages, config)
    for stage, grid in stages:
        for name, parameter in stage.named_parameters():
            owner = source_name(name, config)
            place = local_slice(name, state[owner].shape, config=config, tp=grid.tp.size, tp_rank=grid.tp.rank)
            corner = tuple(slice(0, size) for size in place.source_shape)
            assert torch.equal(parameter.detach()[corner], state[owner][place.slices]), f"{name} is not {owner}"
    return state


@pytest.mark.parametrize("virtual", [1, 2])
@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_the_same_at_every_layout(
    family: str, tp: int, pp: int, virtual: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Put together again, the ranks' weights are bit for bit those of one process.

    Inverse: a seed that takes the rank's own first row in, and a copy drawn under its own name, turn it red.
    """
    monkeypatch.setattr(init, "BLOCK_ELEMENTS", 700)  # several blocks a tensor, the last one short
    config = FAMILIES[family]
    expected = new_model(config)

    actual = new_model(config, tp=tp, pp=pp, virtual=virtual)

    assert list(expected) == list(global_shapes(config))
    assert set(expected) == set(actual)
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name


def test_padding_is_zero_and_dtype_is_a_cast() -> None:
    """Zero heads, ffn and vocabulary rows hold zeros; bf16 weights are the fp32 ones rounded."""
    whole, rounded = new_model(LLAMA), new_model(LLAMA, dtype=torch.bfloat16)
    for grid in grids(2, 1, 1):
        stage = build_stage(LLAMA, grid=grid, backend=select("torch"), dtype=torch.float32)
        initialise(stage, config=LLAMA, grid=grid, seed=7, sigma=0.02)
        total = sum(int(parameter.count_nonzero()) for parameter in stage.parameters())
        assert total <= sum(tensor.numel() for tensor in whole.values())
        if grid.tp.rank == 1:
            q_AH = dict(stage.named_parameters())["model.layers.0.self_attn.q_proj.weight"]
            # 3 groups of 3 heads at tp = 2: the second rank has one real group of its two.
            assert bool(q_AH[: 3 * LLAMA.head_dim].ne(0).all())
            assert not q_AH[3 * LLAMA.head_dim :].any()

    assert all(torch.equal(whole[name].bfloat16(), tensor) for name, tensor in rounded.items())


WIDE = {"hidden_size": 128, "num_heads": 4, "num_kv_heads": 4, "head_dim": 32, "ffn_size": 512}


@pytest.mark.parametrize("family", ["gpt2-types", "bert-masked-lm", "t5"])
def test_each_kind_of_tensor_has_its_spread(family: str) -> None:
    """sigma for matrices and tables, less where the residual stream is written or scores aren't scaled; ones, zeros."""
    config = replace(FAMILIES[family], **WIDE)
    state, sigma = new_model(config), default_sigma(config)
    writes = {"model": 16, "encoder": 6, "decoder": 15}  # 2 a layer, 3 with cross-attention
    for name, tensor in state.items():
        if name.endswith("norm.weight"):
            assert bool((tensor == 1).all()), name
        elif name.endswith(".bias") or (family == "gpt2-types" and name == "model.embed_types.weight"):
            assert not tensor.any(), name
        else:
            expected = sigma
            if "o_proj" in name or "down_proj" in name:
                expected = sigma / math.sqrt(writes[name.split(".")[0]])
            elif family == "t5" and "q_proj" in name:
                expected = sigma / math.sqrt(32)
            # The standard error of a deviation from n numbers is sigma / sqrt(2 n): five of them.
            assert abs(float(tensor.std()) - expected) < 5 * expected / math.sqrt(2 * tensor.numel()), name

    assert sigma == pytest.approx(math.sqrt(1 / 384))


def test_seeds_differ_by_run_name_and_block() -> None:
    """Another seed, tensor or block has other numbers; the seed of one block is pinned, for it is in checkpoints."""
    assert len({tensor_seed(0, "a", 0), tensor_seed(1, "a", 0), tensor_seed(0, "b", 0), tensor_seed(0, "a", 1)}) == 4
    assert 0 <= tensor_seed(2**63, "a", 0) < 2**63
    assert tensor_seed(1234, "model.embed_tokens.weight", 0) == 1244447373570591714
    first, second = new_model(LLAMA, seed=1), new_model(LLAMA, seed=2)
    assert not torch.equal(first["model.embed_tokens.weight"], second["model.embed_tokens.weight"])


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
def test_R11_a_spread_that_is_none_is_refused(sigma: float) -> None:
    """The message gives the value and one that would do."""
    stage = build_stage(LLAMA, grid=Grid.single(), backend=select("torch"), dtype=torch.float32)

    with pytest.raises(ValueError, match=r"sigma must be a positive number\. Given: .*Use sqrt"):
        initialise(stage, config=LLAMA, grid=Grid.single(), seed=0, sigma=sigma)


def test_a_model_goes_on_as_another_one() -> None:
    """
    What both have is kept, new rows and heads are those of a new model, types are zero, a freed head is the embedding.

    Inverse: drawing only the added rows (they'd depend on how many there were) turns it red.
    """
    state, fresh = new_model(BERT), new_model(replace(FAMILIES["bert-masked-lm"], vocab_size=450), seed=9)
    grown = replace(FAMILIES["bert-masked-lm"], vocab_size=450)
    extended = extend_state(state, BERT, into=grown, seed=9, sigma=default_sigma(BERT))
    smaller = extend_state(extended, grown, into=replace(BERT, vocab_size=300), seed=9, sigma=0.02)
    typed = extend_state(
        new_model(LLAMA), LLAMA, into=replace(LLAMA, token_types=2, tied_embeddings=False), seed=9, sigma=0.02
    )

    assert list(extended) == list(global_shapes(grown))
    for name, tensor in extended.items():
        if name == "model.embed_tokens.weight":
            assert torch.equal(tensor[:391], state[name])
            assert torch.equal(tensor[391:], fresh[name][391:])
        else:
            assert torch.equal(tensor, state.get(name, fresh[name])), name
    assert set(smaller) == set(state)
    assert torch.equal(smaller["model.embed_tokens.weight"], state["model.embed_tokens.weight"][:300])
    assert not typed["model.embed_types.weight"].any()
    assert torch.equal(typed["lm_head.weight"], typed["model.embed_tokens.weight"])


def test_R11_a_model_of_another_shape_is_no_start() -> None:
    """Only rows of vocabulary and types may differ; the message names the tensor and both shapes."""
    with pytest.raises(ModelError, match=r"gate_proj.weight must have shape \[60, 24\].* Given: \[50, 24\]") as caught:
        extend_state(new_model(LLAMA), LLAMA, into=replace(LLAMA, ffn_size=60), seed=0, sigma=0.02)

    assert caught.value.code == "weights_shape"
