"""The reshard planner, by properties: every element once, from who has it, and back again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_configs import GPT2, LLAMA

from trilithon_parallel.checkpoint.plan import Move, holdings, plan
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.layout import Layout
from trilithon_parallel.placement import global_shapes, local_slice

State = dict[tuple[int, str], npt.NDArray[np.int64]]  # (rank, parameter) -> its tensor, padding included


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Small models of both kinds whose sizes ranks need not divide."""
    groups = draw(st.integers(1, 3))
    heads = groups * draw(st.integers(1, 3))
    return replace(
        draw(st.sampled_from([LLAMA, GPT2])),
        vocab_size=draw(st.integers(1, 12)),
        hidden_size=4,
        num_layers=draw(st.integers(4, 6)),
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=2,
        ffn_size=draw(st.integers(1, 9)),
        max_context=5,
        tied_embeddings=draw(st.booleans()),
    )


layouts = st.builds(Layout, tp=st.integers(1, 4), pp=st.integers(1, 2), dp=st.integers(1, 2), virtual=st.integers(1, 2))


def filled(layout: Layout, config: ModelConfig) -> State:
    """Every rank's tensors: element i of the whole model is the number i + 1, padding is 0."""
    state: State = {}
    first = 1
    for (name, shape), held in zip(global_shapes(config).items(), holdings(layout, config).values(), strict=True):
        size = int(np.prod(shape))
        whole = np.arange(first, first + size).reshape(shape)
        first += size
        for item in held:
            tp_rank = item.rank % layout.tp
            place = local_slice(name, shape, config=config, tp=layout.tp, tp_rank=tp_rank)
            local = np.zeros(place.shape, dtype=np.int64)
            local[tuple(slice(0, n) for n in place.source_shape)] = whole[place.slices]
            state[item.rank, item.parameter] = local
    return state


def carried_out(moves: list[Move], source: State, target: State) -> State:
    """`target`, emptied, after the moves; an element that comes twice adds up and so shows."""
    result = {key: np.zeros_like(tensor) for key, tensor in target.items()}
    for move in moves:
        block = source[move.src_rank, move.src_name][move.src_slices]
        assert block.size, "an empty move"
        assert (block > 0).all(), "padding was sent"
        result[move.dst_rank, move.dst_name][move.dst_slices] += block
    return result


@settings(deadline=None)
@given(configs(), layouts, layouts)
def test_E7_each_element_arrives_exactly_once_and_returns(config: ModelConfig, source: Layout, target: Layout) -> None:
    """
    plan(a, b) fills b from a, replicas and tied copies and all, padding left zero; plan(b, a) brings back the same.

    Inverse: seen to fail with all replicas of a source sending, and with positions left global.
    """
    before, expected = filled(source, config), filled(target, config)

    there = carried_out(plan(source, target, config), before, expected)
    back = carried_out(plan(target, source, config), there, before)

    assert all(np.array_equal(expected[key], there[key]) for key in expected)
    assert all(np.array_equal(before[key], back[key]) for key in before)


@settings(deadline=None)
@given(configs(), layouts, layouts)
def test_nothing_is_sent_that_a_rank_has(config: ModelConfig, source: Layout, target: Layout) -> None:
    """What a rank already holds comes from itself; between equal layouts nothing is sent at all."""
    held = {
        (item.rank, name): item.place.slices
        for name, items in holdings(source, config).items()
        for item in items
        if item.parameter == name
    }
    for move in plan(source, target, config):
        if move.is_local or (move.dst_rank, move.name) not in held:
            continue
        own, theirs = held[move.dst_rank, move.name], held.get((move.src_rank, move.name))
        assert own != theirs, "sent although the same part was there"
    assert all(move.is_local for move in plan(source, source, config))


def test_replicas_take_turns() -> None:
    """Two data-parallel replicas feed two servers each: neither sends everything."""
    moves = plan(Layout(dp=2), Layout(dp=4), _config())

    assert {(move.src_rank, move.dst_rank) for move in moves} == {(0, 0), (1, 1), (0, 2), (1, 3)}


def _config() -> ModelConfig:
    return replace(
        LLAMA, vocab_size=7, hidden_size=4, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=2, ffn_size=5,
        max_context=8, tied_embeddings=False,
    )  # fmt: skip
