"""Where the parameters of encoder-decoders and of masked-LM heads live, and which stages hold copies."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import tiny_configs
import torch
from hypothesis import given
from hypothesis import strategies as st

from trilithon_parallel.config import ModelConfig, TaskHead
from trilithon_parallel.models.seq2seq import boundary_rows
from trilithon_parallel.placement import (
    COPY_RULES,
    MASKED_LM_RULES,
    RULES,
    SEQ2SEQ_RULES,
    TASK_RULES,
    global_shapes,
    local_sizes,
    local_slice,
    placement_of,
    shared_stages,
    source_name,
    stage_layers,
    stage_names,
)
from trilithon_parallel.task_head import for_task

T5 = replace(
    tiny_configs.T5,
    vocab_size=32128,
    hidden_size=512,
    num_layers=12,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    ffn_size=2048,
    max_context=512,
    norm_eps=1e-06,
    num_encoder_layers=6,
    relative_buckets=32,
    relative_max_distance=128,
)
T5_1_1 = replace(T5, gated_mlp=True, activation="gelu_tanh", tied_embeddings=False, scale_logits=False)
MASKED_LM = replace(
    T5,
    family="bert",
    architecture="BertForMaskedLM",
    num_encoder_layers=0,
    norm="layer",
    norm_order="post",
    position="learned",
    activation="gelu",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    token_types=2,
    scale_logits=False,
    mlm_head=True,
)
TASK = for_task(MASKED_LM, TaskHead("sequence", ("a", "b", "c")))
ALL_RULES = (*RULES, *MASKED_LM_RULES, *TASK_RULES, *SEQ2SEQ_RULES, *COPY_RULES)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Small models of odd sizes; an encoder-decoder has at least one layer of each kind."""
    base, heads = draw(st.sampled_from([T5, T5_1_1, MASKED_LM, TASK])), draw(st.integers(1, 6))
    layers = draw(st.integers(2, 7))
    return replace(
        base,
        vocab_size=draw(st.integers(1, 700)),
        hidden_size=8,
        num_layers=layers,
        num_encoder_layers=draw(st.integers(1, layers - 1)) if base.is_seq2seq else 0,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=2,
        ffn_size=draw(st.integers(1, 40)),
        max_context=16,
    )


@st.composite
def stagings(draw: st.DrawFn, config: ModelConfig) -> tuple[int, tuple[int, ...]]:
    """(pp, layers of each stage): even or not."""
    pp = draw(st.integers(1, config.num_layers))
    cuts = sorted(draw(st.sets(st.integers(1, config.num_layers - 1), min_size=pp - 1, max_size=pp - 1)))
    borders = [0, *cuts, config.num_layers]
    return pp, tuple(stop - start for start, stop in pairwise(borders))


def test_every_name_matches_one_rule_and_every_rule_a_name() -> None:
    """No name is covered twice or not at all, copies included, and no rule is dead."""
    names = {name for config in (T5, T5_1_1, MASKED_LM, TASK) for name in global_shapes(config)}
    names |= {
        name for config in (T5, MASKED_LM) for rank in range(4) for name in stage_names(config, pp=4, pp_rank=rank)
    }
    for name in names:
        assert sum(rule.pattern.fullmatch(name) is not None for rule in ALL_RULES) == 1, name
    for rule in (*MASKED_LM_RULES, *TASK_RULES, *SEQ2SEQ_RULES, *COPY_RULES):
        assert any(rule.pattern.fullmatch(name) for name in names), rule.pattern


@given(config=configs(), data=st.data())
def test_shards_tile_each_tensor_exactly_once(config: ModelConfig, data: st.DataObject) -> None:
    """
    Every element is on one tp rank, or on all where the tensor is not cut.

    Inverse: cutting the table of distances by `tp_rank * heads + 1` turns it red.
    """
    tp = data.draw(st.integers(1, config.num_heads))
    for name, shape in global_shapes(config).items():
        owners = torch.zeros(shape, dtype=torch.int64)
        for tp_rank in range(tp):
            place = local_slice(name, shape, config=config, tp=tp, tp_rank=tp_rank)
            owners[place.slices] += 1
            assert all(have <= room for have, room in zip(place.source_shape, place.shape, strict=True))
        assert bool((owners == (tp if placement_of(name).cut is None else 1)).all()), name


@given(config=configs(), data=st.data())
def test_a_bias_sits_with_its_head(config: ModelConfig, data: st.DataObject) -> None:
    """A rank's columns of the table of distances are those of its query heads."""
    if not config.is_seq2seq:
        return
    tp = data.draw(st.integers(1, config.num_heads))
    shapes = global_shapes(config)
    for tp_rank in range(tp):
        queries, table = (
            local_slice(name, shapes[name], config=config, tp=tp, tp_rank=tp_rank)
            for name in ("encoder.layers.0.self_attn.q_proj.weight", "encoder.relative_bias.weight")
        )
        assert table.shape[1] == local_sizes(config, tp).heads
        assert (table.slices[1].start, table.slices[1].stop) == (
            queries.slices[0].start // config.head_dim,
            queries.slices[0].stop // config.head_dim,
        )


@given(config=configs(), data=st.data())
def test_stages_hold_every_tensor_once_and_copies_beside(config: ModelConfig, data: st.DataObject) -> None:
    """
    Over the stages each tensor has one owner; every other holder has a copy under a name that no file has.

    And what a stage computes with is there: the distances where a stack's layers are, the embedding where tokens enter
    or leave. Inverse: leaving out the copy of `relative_bias` on later stages turns it red.
    """
    pp, counts = data.draw(stagings(config))
    shapes = global_shapes(config)
    held = [stage_names(config, pp=pp, pp_rank=stage, counts=counts) for stage in range(pp)]
    everywhere = [name for names in held for name in names]
    owned = [name for name in everywhere if name in shapes]
    copies = {
        (stage, name): source_name(name, config)
        for stage, names in enumerate(held)
        for name in names
        if name not in shapes
    }

    assert sorted(owned) == sorted(shapes)
    assert {source_name(name, config) for name in everywhere} == set(shapes)
    shared = shared_stages(config, pp=pp, counts=counts)
    assert copies == {place: owner for owner, places in shared.items() for place in places[1:]}
    assert all(places[0][1] == owner for owner, places in shared.items())
    for stage, layers in enumerate(stage_layers(config.num_layers, pp, counts)):
        sources = {source_name(name, config) for name in held[stage]}
        if config.is_seq2seq:
            encodes, decodes = layers.start < config.num_encoder_layers, layers.stop > config.num_encoder_layers
            assert ("encoder.relative_bias.weight" in sources) == encodes
            assert ("decoder.relative_bias.weight" in sources) == decodes
        starts = stage == 0 or (config.is_seq2seq and layers.start <= config.num_encoder_layers < layers.stop)
        ends = stage == pp - 1 and config.tied_embeddings
        assert ("model.embed_tokens.weight" in sources) == (starts or ends)


def test_copies_of_t5() -> None:
    """6 + 6 layers on 4 stages: the decoder begins on the third; each table is copied to its stack's second stage."""
    assert dict(shared_stages(T5, pp=4)) == {
        "model.embed_tokens.weight": (
            (0, "model.embed_tokens.weight"),
            (2, "decoder.embed_tokens.weight"),
            (3, "lm_head.weight"),
        ),
        "encoder.relative_bias.weight": ((0, "encoder.relative_bias.weight"), (1, "encoder.relative_bias_copy.weight")),
        "decoder.relative_bias.weight": ((2, "decoder.relative_bias.weight"), (3, "decoder.relative_bias_copy.weight")),
    }
    assert dict(shared_stages(T5, pp=1)) == {}


@pytest.mark.parametrize(
    ("counts", "rows"), [(None, [30, 30, 37]), ((6, 1, 1, 4), [30, 37, 37]), ((7, 3, 1, 1), [37] * 3)]
)
def test_rows_that_cross(counts: tuple[int, ...] | None, rows: list[int]) -> None:
    """The encoder's 30 tokens cross alone up to its end; the decoder's 7 join where it has begun."""
    given_rows = [
        boundary_rows(T5, pp=4, stage=stage, num_encoder_tokens=30, num_decoder_tokens=7, counts=counts)
        for stage in range(3)
    ]

    assert rows == given_rows


def test_size_of_t5_small() -> None:
    """The published model has 60,506,624 parameters."""
    assert sum(math.prod(shape) for shape in global_shapes(T5).values()) == 60_506_624
