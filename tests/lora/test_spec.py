"""What an adapter is told to be: what is refused, its tensors' names and shapes, and where tp cuts them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_configs import BERT, GPT2, LLAMA, T5

from trilithon_parallel.config import ModelConfig, ModelError
from trilithon_parallel.lora.files import file_layout
from trilithon_parallel.lora.spec import (
    ROW_PARALLEL,
    LoraSpec,
    lora_shapes,
    owned_shapes,
    owner_name,
    parse_name,
    targets_of,
)
from trilithon_parallel.placement import global_shapes, local_slice, stage_names
from trilithon_parallel.weights.names import file_slices

CONFIGS = {"llama": LLAMA, "gpt2": GPT2, "bert": BERT}


def _spec(config: ModelConfig, **changes: Any) -> LoraSpec:
    return replace(LoraSpec(4, 8.0, targets=targets_of(config)), **changes)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (LLAMA, {"targets": ("q_porj",)}, r"lora target is unknown\. Given: 'q_porj'\. Did you mean q_proj\?"),
        (LLAMA, {"targets": ("lm_head",)}, r"lora target is unknown\. Given: 'lm_head'\. Allowed: q_proj, k_proj"),
        (GPT2, {"targets": ("gate_proj",)}, r"not a product of a GPT2LMHeadModel\. Given: 'gate_proj'\. Allowed: q_p"),
        (LLAMA, {"targets": ()}, r"targets must name each product once, at least one\. Given: \(\)"),
        (LLAMA, {"targets": ("q_proj", "q_proj")}, r"targets must name each product once"),
        (LLAMA, {"rank": 0}, r"rank of q_proj must be a whole number from 1\. Given: 0"),
        (LLAMA, {"rank_pattern": (("down_proj", 0),)}, r"rank of down_proj must be a whole number from 1\. Given: 0"),
        (LLAMA, {"rank": 2.5}, r"rank of q_proj must be a whole number from 1\. Given: 2\.5"),
        (LLAMA, {"alpha": 0.0}, r"alpha of q_proj must be a number above 0\. Given: 0\.0"),
        (LLAMA, {"alpha": float("nan")}, r"alpha of q_proj must be a number above 0\. Given: nan"),
        (LLAMA, {"dropout": 1.0}, r"dropout must be from 0 to below 1\. Given: 1\.0"),
        (LLAMA, {"layout": "joint"}, r"layout is unknown\. Given: 'joint'\. Allowed: per_projection, fused"),
        (LLAMA, {"targets": ("q_proj",), "rank_pattern": (("v_proj", 2),)}, r"rank_pattern must name targets.*v_pr"),
        (LLAMA, {"layout": "fused", "rank_pattern": (("v_proj", 2),)}, r"layout fused gives q_proj, k_proj, v_proj on"),
        (GPT2, {"alpha_pattern": (("v_proj", 2.0),)}, r"of a GPT-2 are one product in files"),
        (T5, {}, r"model must be a decoder or an encoder\. Given: 'T5ForConditionalGeneration'"),
    ],
)  # fmt: skip
def test_R11_a_bad_description_is_one_sentence(config: ModelConfig, changes: dict[str, Any], message: str) -> None:
    """An adapter that the model cannot have is refused with what, the value given, what is allowed and what to do."""
    with pytest.raises(ModelError, match=message) as caught:
        _spec(config, **changes).check(config)

    assert caught.value.code == "lora_invalid"
    assert caught.value.hint


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("layout", ["per_projection", "fused"])
def test_shapes_are_those_of_the_products(family: str, layout: str) -> None:
    """A has a product's inputs, B its outputs; with `fused` a shared A is one tensor, its first target's."""
    config = CONFIGS[family]
    spec = _spec(config, layout=layout, targets=tuple(leaf for leaf in targets_of(config) if leaf != "q_proj"))
    spec.check(config)
    base, shapes = global_shapes(config), lora_shapes(config, spec)
    with_lora = global_shapes(replace(config, lora=spec))

    for name, shape in shapes.items():
        parsed = parse_name(name)
        assert parsed is not None
        outputs, inputs = base[f"{parsed[0]}.weight"]
        assert shape == ((4, inputs) if parsed[2] == "A" else (outputs, 4))
        owner = owner_name(name, spec)
        assert shapes[owner] == shape
        assert (owner != name) == (layout == "fused" and ("v_proj.lora_A" in name or (
            "up_proj.lora_A" in name and config.gated_mlp)))  # fmt: skip
    assert {name: shape for name, shape in with_lora.items() if name not in base} == owned_shapes(config, spec)


@given(
    family=st.sampled_from(sorted(CONFIGS)), tp=st.integers(1, 4), layout=st.sampled_from(["per_projection", "fused"]),
    pp=st.integers(1, 4),
)  # fmt: skip
def test_halves_are_cut_like_their_products(family: str, tp: int, layout: str, pp: int) -> None:
    """At every tp each rank's half is what its share of the product needs, and every stage has its layers' halves."""
    config = CONFIGS[family]
    config = replace(config, lora=_spec(config, layout=layout))
    shapes = global_shapes(config)
    assert config.lora is not None
    names = owned_shapes(config, config.lora)
    for rank in range(tp):
        for name in names:
            parsed = parse_name(name)
            assert parsed is not None
            product, leaf, half = parsed
            weight = f"{product}.weight"
            whole = local_slice(weight, shapes[weight], config=config, tp=tp, tp_rank=rank)
            place = local_slice(name, shapes[name], config=config, tp=tp, tp_rank=rank)
            dim = 1 if half == "A" else 0
            is_cut = (leaf in ROW_PARALLEL) == (half == "A")
            assert place.slices[dim] == (whole.slices[dim] if is_cut else slice(0, shapes[name][dim]))
            assert place.shape[dim] == (whole.shape[dim] if is_cut else shapes[name][dim])
            assert place.shape[1 - dim] == 4
    held = [name for stage in range(pp) for name in stage_names(config, pp=pp, pp_rank=stage) if name in names]
    assert sorted(held) == sorted(names)


@given(
    targets=st.sets(st.sampled_from(["q_proj", "k_proj", "v_proj", "o_proj"]), min_size=1),
    ranks=st.dictionaries(st.sampled_from(["q_proj", "k_proj", "v_proj"]), st.integers(1, 5)),
)
def test_blocks_of_a_shared_file_tensor_are_disjoint(targets: set[str], ranks: dict[str, int]) -> None:
    """GPT-2's q, k and v lie side by side in one module's tensors: no two take one element, whatever their ranks."""
    order = tuple(leaf for leaf in targets_of(GPT2) if leaf in targets)
    chosen = tuple((leaf, rank) for leaf, rank in ranks.items() if leaf in targets)
    alphas = tuple((leaf, 2.0 * rank) for leaf, rank in chosen)
    spec = LoraSpec(4, 8.0, targets=order, rank_pattern=chosen, alpha_pattern=alphas)
    spec.check(GPT2)
    layout, shapes = file_layout(GPT2, spec), lora_shapes(GPT2, spec)
    taken: set[tuple[str, int, int]] = set()
    for name, shape in shapes.items():
        (rows, columns), _ = file_slices(layout.places[name], shape, tuple(slice(0, size) for size in shape))
        file_name = layout.places[name].file_name
        assert rows.stop <= layout.shapes[file_name][0]
        assert columns.stop <= layout.shapes[file_name][1]
        mine = {
            (file_name, row, column)
            for row in range(rows.start, rows.stop)
            for column in range(columns.start, columns.stop)
        }
        assert not mine & taken
        taken |= mine
