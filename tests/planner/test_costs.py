"""The cost model against PTD-P's tables, against the placement table, and against itself."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner.papers import A100_PEAK, RECIPE_OF, ROWS, TABLE_2

from trilithon_parallel.config import ModelConfig, ModelError
from trilithon_parallel.costs import (
    SECONDS_PER_DAY,
    achieved,
    approximate_training_s,
    best_num_checkpoints,
    bubble_fraction,
    data_elements,
    formula_parameters,
    in_flight,
    model_flops,
    num_iterations,
    num_microbatches,
    num_parameters,
    pipeline_elements,
    tensor_elements,
)
from trilithon_parallel.presets import GPT3_175B, RECIPES, gpt, llama

SEQ_LEN = 2048
BERT = replace(
    gpt(layers=12, hidden=768, heads=12, vocab=30522, seq_len=512),
    family="bert",
    architecture="BertModel",
    norm_order="post",
    token_types=2,
    tied_embeddings=False,
)


@pytest.mark.parametrize("name", ROWS)
def test_table1_row(name: str) -> None:
    """
    Every row of Table 1: parameters, replicas, micro-batches, bubble, total and relative rate, seconds of a step.

    Inverse: 4 B s^2 h left out of a layer's forward, or logits recomputed too, moves the seconds by over 0.5 %.
    """
    row, recipe = ROWS[name], RECIPE_OF[name]
    config, layout = recipe.config, recipe.layout
    assert layout is not None
    assert recipe.gpus is not None
    microbatches = num_microbatches(recipe.global_batch, dp=layout.dp, micro_batch=layout.micro_batch)
    flops = model_flops(config, batch=recipe.global_batch, seq_len=SEQ_LEN, recompute="full")
    rate = row.tflops * 1e12

    assert abs(formula_parameters(config) / 1e9 - row.parameters_b) <= 0.06
    assert num_parameters(config) == formula_parameters(config) + 2 * config.hidden_size
    assert (layout.dp, microbatches) == (row.dp, row.microbatches)
    bubble = bubble_fraction(pp=layout.pp, microbatches=microbatches, virtual=layout.virtual)
    assert bubble == pytest.approx(row.bubble, abs=5e-4)
    assert recipe.gpus * rate / 1e15 == pytest.approx(row.pflops, rel=0.005)
    assert abs(100 * rate / A100_PEAK - row.percent_of_peak) <= 0.6
    assert flops / (recipe.gpus * rate) == pytest.approx(row.step_s, rel=0.005)
    reached = achieved(
        config,
        batch=recipe.global_batch,
        seq_len=SEQ_LEN,
        gpus=recipe.gpus,
        seconds=row.step_s,
        peak_flops=A100_PEAK,
        recompute="full",
    )
    assert reached.flops_per_s == pytest.approx(rate, rel=0.005)


@pytest.mark.parametrize(("scheme", "parameters_b", "batch", "gpus", "tflops", "days"), TABLE_2)
def test_table2_days(scheme: str, parameters_b: float, batch: int, gpus: int, tflops: float, days: float) -> None:
    """Days for 300B tokens, from the FLOPs of a step and the printed rate; both schemes, all counts of GPUs."""
    config = GPT3_175B.config if parameters_b < 200 else RECIPES["gpt_529.6b"].config
    step_s = model_flops(config, batch=batch, seq_len=SEQ_LEN, recompute="full") / (gpus * tflops * 1e12)

    got = num_iterations(300e9, global_batch=batch, seq_len=SEQ_LEN) * step_s / SECONDS_PER_DAY

    assert abs(got - days) <= max(1.0, 0.01 * days)


@pytest.mark.parametrize(
    ("parameters", "tokens", "gpus", "rate", "days"),
    [(175e9, 300e9, 1024, 140e12, 33.9), (1.008e12, 450e9, 3072, 163e12, 83.9)],
    ids=["175B", "1T"],
)
def test_worked_training_times(parameters: float, tokens: float, gpus: int, rate: float, days: float) -> None:
    """The two training times that the paper works out: 34 and 84 days."""
    got_s = approximate_training_s(parameters=parameters, tokens=tokens, gpus=gpus, flops_per_s=rate)

    assert got_s / SECONDS_PER_DAY == pytest.approx(days, abs=0.2)


def test_worked_volumes() -> None:
    """The elements that the 145.6B layout sends, exactly."""
    recipe = RECIPE_OF["145.6B"]
    config = recipe.config
    size = {"micro_batch": 2, "seq_len": SEQ_LEN}
    local = (12 * config.hidden_size**2 + 13 * config.hidden_size) * 10 // 8

    assert pipeline_elements(config, **size, tp=8, scatter_gather=False) == 50_331_648
    assert pipeline_elements(config, **size, tp=8) == 6_291_456
    assert tensor_elements(config, **size, tp=8) == 352_321_536
    assert tensor_elements(config, **size, tp=8) * 10 * 48 == pytest.approx(169.1e9, rel=5e-4)
    assert tensor_elements(config, **size, tp=8, recompute="full") == 1.5 * 352_321_536
    assert local == 2_265_123_840
    assert data_elements(local, dp=24) == 2 * 23 / 24 * local


def test_bubble_in_terms_of_gpus() -> None:
    """With d = 1 the bubble is (n/t - 1) / m; with t = 1 it is (n - d) / b', b' = B / b."""
    assert bubble_fraction(pp=64 // 8, microbatches=32) == (64 / 8 - 1) / 32
    for dp in (1, 2, 4):
        got = bubble_fraction(pp=32 // dp, microbatches=num_microbatches(512, dp=dp, micro_batch=4))
        assert got == pytest.approx((32 - dp) / (512 / 4))


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (RECIPES["llama3_8b"].config, 8_030_261_248),
        (RECIPES["llama3_70b"].config, 70_553_706_496),
        (RECIPES["gpt2_small"].config, 124_439_808),
        (BERT, 108_891_648),
    ],
    ids=["llama3_8b", "llama3_70b", "gpt2", "bert"],
)
def test_parameters_of_known_models(config: ModelConfig, count: int) -> None:
    """Grouped heads, gated MLPs, RMSNorm and BERT's tables are counted as the published models have them."""
    assert num_parameters(config) == count


def test_flops_of_a_gpt_are_the_papers() -> None:
    """72 and 96 B s l h^2 (1 + s/(6h) + V/(12 or 16 l h)); selective adds 4 B s^2 h l."""
    config, batch = GPT3_175B.config, 1536
    layers, hidden, vocab = config.num_layers, config.hidden_size, config.vocab_size
    base = batch * SEQ_LEN * layers * hidden**2
    got = {
        kind: model_flops(config, batch=batch, seq_len=SEQ_LEN, recompute=kind)
        for kind in ("none", "selective", "full")
    }

    none = 72 * base * (1 + SEQ_LEN / (6 * hidden) + vocab / (12 * layers * hidden))
    assert got["none"] == pytest.approx(none, rel=1e-12)
    assert got["full"] == pytest.approx(
        96 * base * (1 + SEQ_LEN / (6 * hidden) + vocab / (16 * layers * hidden)), rel=1e-12
    )
    assert got["selective"] - got["none"] == pytest.approx(4 * batch * SEQ_LEN**2 * hidden * layers, rel=1e-9)


def test_flops_of_grouped_and_gated_layers() -> None:
    """6 FLOPs per token and weight that a product uses, 12 l s A C of attention; embeddings are looked up, not used."""
    config = RECIPES["llama3_8b"].config
    used = num_parameters(config) - config.vocab_size * config.hidden_size - config.hidden_size * (2 * 32 + 1)
    attention = 12 * config.num_layers * 128 * config.num_heads * config.head_dim

    got = model_flops(config, batch=3, seq_len=128)

    assert got == pytest.approx(3 * 128 * (6 * used + attention), rel=1e-12)


def test_flops_of_an_encoder_decoder() -> None:
    """6 FLOPs per weight and the tokens it meets: the source's in cross-attention's keys, the target's in the head."""
    t5 = replace(
        gpt(layers=5, hidden=64, heads=4, vocab=512, seq_len=512),
        family="t5",
        architecture="T5ForConditionalGeneration",
        position="relative",
        relative_buckets=32,
        relative_max_distance=128,
        num_encoder_layers=3,
        head_dim=16,
        ffn_size=256,
    )
    square, mlp = 64 * 64, 2 * 64 * 256
    products = 3 * (4 * square + mlp) * 40 + 2 * ((4 * square + mlp) * 24 + 2 * square * 24 + 2 * square * 40)
    attention = 2 * 64 * (3 * 40**2 + 2 * (24**2 + 24 * 40))

    got = model_flops(t5, batch=1, seq_len=40, target_len=24)

    assert got == pytest.approx(6 * (products + attention + 24 * 64 * 512))


def test_checkpoint_count_is_least_at_its_formula() -> None:
    """c A_input + (l / c) A_intermediate has its minimum where the formula says."""
    best = best_num_checkpoints(80, input_bytes=2.0, intermediate_bytes=34.0)

    def needed(count: float) -> float:
        return count * 2.0 + 80 / count * 34.0

    assert needed(best) <= min(needed(best * 1.01), needed(best * 0.99))


sizes = st.integers(1, 64)


@given(dp=sizes, micro_batch=sizes, count=sizes)
def test_micro_batches_divide_or_say_so(dp: int, micro_batch: int, count: int) -> None:
    """m is whole, or the error names B, d and b, and a batch that fits."""
    batch = dp * micro_batch * count

    assert num_microbatches(batch, dp=dp, micro_batch=micro_batch) == count
    if dp * micro_batch > 1:
        with pytest.raises(ModelError, match=rf"B = {batch + 1}, d = {dp}, b = {micro_batch}\.") as caught:
            num_microbatches(batch + 1, dp=dp, micro_batch=micro_batch)
        assert str(batch) in caught.value.hint
    with pytest.raises(ModelError, match="dp must be at least 1"):
        num_microbatches(batch, dp=0, micro_batch=micro_batch)


@given(pp=st.integers(2, 64), microbatches=st.integers(1, 512), virtual=st.integers(1, 8))
def test_bubble_falls_in_micro_batches_and_chunks(pp: int, microbatches: int, virtual: int) -> None:
    """More micro-batches or more chunks leave less idle time."""
    bubble = bubble_fraction(pp=pp, microbatches=microbatches, virtual=virtual)

    assert bubble_fraction(pp=pp, microbatches=microbatches + 1, virtual=virtual) < bubble
    assert bubble_fraction(pp=pp, microbatches=microbatches, virtual=virtual + 1) < bubble


@given(batch=st.integers(1, 4096), factor=st.integers(1, 9), kind=st.sampled_from(["none", "selective", "full"]))
def test_flops_are_linear_in_the_batch(batch: int, factor: int, kind: str) -> None:
    """Twice the batch is twice the FLOPs."""
    config = llama(layers=3, hidden=48, heads=6, groups=2, ffn=80, vocab=100, context=64)
    one, many = (
        model_flops(config, batch=size, seq_len=32, recompute=kind)  # type: ignore[arg-type]  # sampled from its values
        for size in (batch, factor * batch)
    )

    assert many == pytest.approx(factor * one, rel=1e-12)


def test_micro_batches_in_flight() -> None:
    """GPipe keeps all, 1F1B at most p, interleaving p + (p - 1) / v on the first rank."""
    assert in_flight("gpipe", pp=4, pp_rank=0, microbatches=32) == 32
    assert [in_flight("1f1b", pp=4, pp_rank=rank, microbatches=32) for rank in range(4)] == [4, 3, 2, 1]
    assert in_flight("1f1b", pp=4, pp_rank=0, microbatches=2) == 2
    assert in_flight("interleaved", pp=4, pp_rank=0, microbatches=28, virtual=3) == 4 + 3 / 3
    assert in_flight("interleaved", pp=4, pp_rank=0, microbatches=4, virtual=2) == 4


@pytest.mark.parametrize(
    "module",
    ["costs", "memory", "timing", "hardware", "calibration", "presets", "topology", "planner", "explain", "pictures"],
)
def test_no_torch(module: str) -> None:
    """The planner's rooms load neither torch nor numpy nor matplotlib, in a fresh interpreter."""
    code = (
        f"import sys, trilithon_parallel.{module}\n"
        "print([name for name in ('torch', 'numpy', 'matplotlib') if name in sys.modules])"
    )

    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert run.stdout.strip() == "[]"
