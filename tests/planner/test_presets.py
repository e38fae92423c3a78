"""Recipes: the papers' models, MT-NLG's utilisation, ramp and blend, and GPTs of any size."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilithon_parallel.config import ModelError
from trilithon_parallel.costs import achieved, num_parameters
from trilithon_parallel.data.errors import DataError
from trilithon_parallel.init import default_sigma
from trilithon_parallel.placement import check_layout
from trilithon_parallel.presets import (
    GPT3_175B,
    MT_NLG_530B,
    MT_NLG_BLEND,
    RECIPES,
    find_recipe,
    parse_count,
    recipe_of_size,
)

PRINTED_EPOCHS = {
    "Books3": 1.5, "OpenWebText2": 3.6, "Stack Exchange": 1.4, "PubMed Abstracts": 1.8, "Wikipedia": 3.2,
    "Gutenberg (PG-19)": 0.9, "BookCorpus2": 1.8, "NIH ExPorter": 1.9, "ArXiv": 0.2, "GitHub": 0.2, "Pile-CC": 0.5,
    "CC-2020-50": 0.5, "CC-2021-04": 0.5, "RealNews": 1.1, "CC-Stories": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_fit_their_own_layout(name: str) -> None:
    """Every recipe's layout is one of its model, and its global batch divides over it."""
    recipe = RECIPES[name]

    assert recipe.name == name
    if recipe.layout is not None:
        assert recipe.layout.num_ranks == recipe.gpus
        check_layout(recipe.config, tp=recipe.layout.tp, pp=recipe.layout.pp)
        assert recipe.layout.microbatches(recipe.global_batch) >= 1


@pytest.mark.parametrize(
    ("dp", "microbatches", "seconds", "tflops", "hfu"),
    [(8, 240, 60.1, 126, 0.403), (10, 192, 50.2, 121, 0.386), (12, 160, 44.4, 113, 0.364)],
)
def test_mt_nlg_utilisation(dp: int, microbatches: int, seconds: float, tflops: float, hfu: float) -> None:
    """MT-NLG's three measured steps: rate and HFU with recomputation counted, within 1 %."""
    recipe = MT_NLG_530B
    got = achieved(
        recipe.config,
        batch=1920,
        seq_len=2048,
        gpus=280 * dp,
        seconds=seconds,
        peak_flops=312e12,
        recompute="full",
    )

    assert 1920 // dp == microbatches
    assert got.flops_per_s / 1e12 == pytest.approx(tflops, rel=0.01)
    assert got.hfu == pytest.approx(hfu, rel=0.01)
    if dp == 8:
        assert got.mfu == pytest.approx(0.302, rel=0.01)
        assert got.tokens_per_s == pytest.approx(65.43e3, rel=0.01)
        six_p = 6 * num_parameters(recipe.config) * 1920 * 2048 / (280 * dp * seconds * 312e12)
        assert six_p == pytest.approx(0.297, rel=0.01)


def test_mt_nlg_ramp_wants_eight_replicas() -> None:
    """32 to 1920 by 32 over 12B tokens divides over d = 8, not 10 or 12; the error names the step."""
    assert MT_NLG_530B.optimization is not None
    batches = MT_NLG_530B.optimization.batches

    assert len(batches.stages) == 60
    assert batches.batch_at(0) == 32
    assert batches.batch_at(5_859_376) == 1920
    batches.check_layout(dp=8, micro_batch=1)
    for dp in (10, 12):
        with pytest.raises(DataError, match=f"batch size 32 .* Given: {dp} x 1"):
            batches.check_layout(dp=dp, micro_batch=1)


def test_mt_nlg_optimizer() -> None:
    """Rates, decay and initialisation as published; sigma is near sqrt(1 / (3 h))."""
    optimization = MT_NLG_530B.optimization
    assert optimization is not None
    rate = optimization.learning_rate

    assert rate.warmup_samples == pytest.approx(1e9 / 2048, abs=1)
    assert rate.decay_samples == 340e9 / 2048
    assert rate.at(rate.decay_samples) == pytest.approx(0.1 * rate.peak)
    assert optimization.init_std == pytest.approx(default_sigma(MT_NLG_530B.config), rel=0.01)


def test_gpt3_recipe() -> None:
    """The 175B recipe: 95 ramp steps, warm-up, decay over 260B tokens, 300B tokens in all."""
    optimization = GPT3_175B.optimization
    assert optimization is not None

    assert len(optimization.batches.stages) == 96
    assert optimization.learning_rate.decay_samples * 2048 == pytest.approx(260e9, rel=1e-6)
    assert GPT3_175B.tokens / GPT3_175B.seq_len == 146_484_375
    assert (optimization.learning_rate.peak, optimization.learning_rate.floor) == (6e-5, 6e-6)
    assert (optimization.init_std, optimization.clip, optimization.weight_decay) == (0.006, 1.0, 0.1)


def test_mt_nlg_blend() -> None:
    """The weights sum to 100, and give the printed epochs at 270B tokens to within 0.15."""
    assert math.fsum(part.weight_percent for part in MT_NLG_BLEND) == pytest.approx(100)
    assert {part.name for part in MT_NLG_BLEND} == set(PRINTED_EPOCHS)
    for part in MT_NLG_BLEND:
        assert abs(part.epochs(270e9) - PRINTED_EPOCHS[part.name]) <= 0.15


@given(parameters=st.floats(2e6, 2e12))
def test_model_of_any_size(parameters: float) -> None:
    """A GPT of a given size has it to within 10 % (3 % from a billion on), in plausible proportions."""
    recipe = recipe_of_size(parameters)
    config = recipe.config

    tolerance = 0.03 if parameters >= 1e9 else 0.12
    if parameters >= 12e6:
        assert num_parameters(config) == pytest.approx(parameters, rel=tolerance)
    assert config.num_heads * config.head_dim == config.hidden_size
    assert config.num_layers >= 1


def test_known_sizes_are_their_papers() -> None:
    """175B is GPT-3, 1008B the largest row of Table 1; 530B is within a percent of its row."""
    assert recipe_of_size(175e9).name == "gpt3_175b"
    assert recipe_of_size(1008e9).name == "gpt_1008b"
    assert recipe_of_size(530e9).name == "gpt_529.6b"


@pytest.mark.parametrize(("text", "count"), [("175B", 175e9), ("1.5t", 1.5e12), ("300e9", 300e9), ("30M", 30e6)])
def test_counts(text: str, count: float) -> None:
    """Counts are read with K, M, B and T."""
    assert parse_count(text) == count


def test_mistakes_are_said() -> None:
    """Unknown recipes and counts that are none name what is allowed."""
    with pytest.raises(ModelError, match=r"model recipe is not known\. Given: 'gpt4'\. Allowed: gpt_1\.7b, "):
        find_recipe("gpt4")
    for text in ("many", "0B", "-1B", ""):
        with pytest.raises(ModelError, match="a count must be a positive number"):
            parse_count(text)
    with pytest.raises(ModelError, match="at least 1M"):
        recipe_of_size(1e5)
