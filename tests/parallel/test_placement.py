"""Where parameters live: every one by exactly one rule, every element on exactly one rank."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import accumulate

import pytest
import tiny_configs
import torch
from hypothesis import given
from hypothesis import strategies as st

from trilithon_parallel.config import ModelConfig, ModelError
from trilithon_parallel.placement import (
    RULES,
    SUM_TERMS,
    check_layout,
    global_shapes,
    layout_waste,
    local_sizes,
    local_slice,
    placement_of,
    source_name,
    stage_layers,
    stage_names,
    sum_terms,
)

SMOLLM2 = replace(
    tiny_configs.LLAMA, vocab_size=49152, hidden_size=576, num_layers=30, head_dim=64, ffn_size=1536, max_context=8192
)
GPT2 = replace(
    tiny_configs.GPT2,
    vocab_size=50257,
    hidden_size=768,
    num_layers=12,
    num_heads=12,
    num_kv_heads=12,
    head_dim=64,
    ffn_size=3072,
    max_context=1024,
)
BERT = replace(GPT2, family="bert", vocab_size=30522, norm_order="post", token_types=2, tied_embeddings=False)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Small models of odd sizes."""
    base = draw(st.sampled_from([SMOLLM2, GPT2, BERT]))
    groups = draw(st.integers(1, 6))
    return replace(
        base,
        vocab_size=draw(st.integers(1, 700)),
        hidden_size=8,
        num_layers=draw(st.integers(1, 5)),
        num_kv_heads=groups,
        num_heads=groups * draw(st.integers(1, 4)),
        head_dim=2,
        ffn_size=draw(st.integers(1, 40)),
        max_context=16,
        tied_embeddings=draw(st.booleans()),
    )


@pytest.mark.parametrize("config", [SMOLLM2, GPT2, BERT], ids=["llama", "gpt2", "bert"])
def test_every_parameter_matches_exactly_one_rule(config: ModelConfig) -> None:
    """No name is covered twice or not at all."""
    for name in global_shapes(config):
        assert sum(rule.pattern.fullmatch(name) is not None for rule in RULES) == 1, name


def test_every_rule_covers_something() -> None:
    """No rule is dead."""
    names = [n for c in (SMOLLM2, GPT2, BERT, replace(SMOLLM2, tied_embeddings=False)) for n in global_shapes(c)]
    for rule in RULES:
        assert any(rule.pattern.fullmatch(name) for name in names), rule.pattern


@given(config=configs(), data=st.data())
def test_shards_tile_each_tensor_exactly_once(config: ModelConfig, data: st.DataObject) -> None:
    """
    Over the ranks of the tp axis every element is held once, or by all (replicated), or by each of the kv replicas.

    Inverse: starting a rank's slice one row late, or forgetting `kv_replicas`, turns it red.
    """
    tp = data.draw(st.integers(1, config.num_heads))
    sizes = local_sizes(config, tp)
    for name, shape in global_shapes(config).items():
        owners = torch.zeros(shape, dtype=torch.int64)
        for tp_rank in range(tp):
            place = local_slice(name, shape, config=config, tp=tp, tp_rank=tp_rank)
            owners[place.slices] += 1
            assert all(have <= room for have, room in zip(place.source_shape, place.shape, strict=True))
        cut = placement_of(name).cut
        expected = tp if cut is None else sizes.kv_replicas if cut == "kv" else 1
        assert bool((owners == expected).all()), name


@given(config=configs(), data=st.data())
def test_a_query_head_sits_with_its_own_group(config: ModelConfig, data: st.DataObject) -> None:
    """Every rank's real query heads find their key/value group at the same local place as on one rank."""
    tp = data.draw(st.integers(1, config.num_heads))
    sizes, per_group = local_sizes(config, tp), config.heads_per_group
    name_q, name_k = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qk")
    shapes = global_shapes(config)
    for tp_rank in range(tp):
        q, k = (
            local_slice(name, shapes[name], config=config, tp=tp, tp_rank=tp_rank).slices[0]
            for name in (name_q, name_k)
        )
        for local_head, head in enumerate(range(q.start // config.head_dim, q.stop // config.head_dim)):
            local_group = local_head // (sizes.heads // sizes.groups)
            assert k.start // config.head_dim + local_group == head // per_group


@given(config=configs(), data=st.data())
def test_E1_ranks_share_the_terms_of_one_rank(config: ModelConfig, data: st.DataObject) -> None:
    """
    Over the ranks the terms of a sum have the borders that they have on one rank, and the ranks' own; none is lost.

    Inverse: cutting a rank's share into equal terms of its own turns it red at three heads and tp = 2.
    """
    tp = data.draw(st.integers(1, config.num_heads))
    for cut, size in (("q", config.num_heads * config.head_dim), ("ffn", config.ffn_size)):
        whole = set(accumulate(sum_terms(cut, config, tp=1, tp_rank=0)))
        shares = [sum_terms(cut, config, tp=tp, tp_rank=rank) for rank in range(tp)]
        borders = set(accumulate(term for share in shares for term in share))
        ends = set(accumulate(sum(share) for share in shares))
        assert all(term > 0 for share in shares for term in share)
        assert max(whole) == size
        assert {at for at in borders if at <= size} - ends <= whole <= borders
        if cut == "ffn" and size % (tp * SUM_TERMS) == 0:
            assert ends <= whole


@given(config=configs(), data=st.data())
def test_stages_hold_every_parameter_once(config: ModelConfig, data: st.DataObject) -> None:
    """Over the stages each tensor appears once, and a tied head once more where the embedding is elsewhere."""
    pp = data.draw(st.integers(1, config.num_layers))
    held = [name for stage in range(pp) for name in stage_names(config, pp=pp, pp_rank=stage)]
    extra = ["lm_head.weight"] if config.is_causal and config.tied_embeddings and pp > 1 else []

    assert sorted(held) == sorted([*global_shapes(config), *extra])
    assert {source_name(name, config) for name in held} == set(global_shapes(config))


@pytest.mark.parametrize(("tp", "padded"), [(1, 50304), (2, 50432), (4, 50688), (8, 51200)])
def test_vocabulary_padding(tp: int, padded: int) -> None:
    """V = 50257 is padded to the sizes of the specification (51,200 at 8 is the paper's)."""
    assert local_sizes(GPT2, tp).vocab * tp == padded


@pytest.mark.parametrize(
    ("tp", "heads", "groups", "waste"),
    [(1, 9, 3, 0.0), (2, 6, 2, 0.25), (3, 3, 1, 0.0), (4, 3, 1, 0.25), (9, 1, 1, 0.0)],
)
def test_smollm2_at_any_tp(tp: int, heads: int, groups: int, waste: float) -> None:
    """9 heads in 3 groups: zero groups at 2 and 4, replicated groups at 9."""
    sizes = local_sizes(SMOLLM2, tp)

    assert (sizes.heads, sizes.groups, sizes.kv_replicas) == (heads, groups, 3 if tp == 9 else 1)
    assert layout_waste(SMOLLM2, tp) == waste


def test_stage_sizes_differ_by_at_most_one() -> None:
    """30 layers over 4 stages: 8, 8, 7, 7."""
    assert [len(layers) for layers in stage_layers(30, 4)] == [8, 8, 7, 7]


@pytest.mark.parametrize(
    ("tp", "pp", "allowed"),
    [(0, 1, "Allowed: 1 to 9"), (10, 1, "Allowed: 1 to 9"), (1, 31, "Allowed: 1 to 30"), (1, 0, "Allowed: 1 to 30")],
)
def test_R11_a_layout_that_does_not_fit_is_refused(tp: int, pp: int, allowed: str) -> None:
    """The message names the axis, the value given and the values allowed."""
    with pytest.raises(ModelError, match=allowed) as caught:
        check_layout(SMOLLM2, tp=tp, pp=pp)

    assert caught.value.code == "layout_invalid"


def test_config_and_placement_need_no_torch() -> None:
    """The front reads configs and checks layouts without loading torch."""
    probe = "import sys, trilithon_parallel.config, trilithon_parallel.placement; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", probe], check=False, timeout=60).returncode == 0
