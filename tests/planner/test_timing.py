"""The time model against what PTD-P (arXiv 2104.04473) measured on A100s: its tables and figures."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner.papers import RECIPE_OF, ROWS

from trilithon_parallel.config import ModelConfig
from trilithon_parallel.costs import PlannedLayout, model_flops, tensor_elements
from trilithon_parallel.hardware import PRESETS, HardwareError
from trilithon_parallel.memory import PAPER_NUMERICS
from trilithon_parallel.presets import GPT3_175B, MT_NLG_530B, gpt
from trilithon_parallel.timing import MeasuredStep, all_reduce_s, fit_efficiencies, predicted_s, step_time, traffic

A100 = PRESETS["a100-80gb"]
SEQ_LEN = 2048
# How far the rows that were not fitted may lie from the prediction; the farthest is 7.5B, 6.2 %.
TABLE_TOLERANCE = 0.07
FIG_14 = gpt(layers=32, hidden=3840, heads=32)


def tflops(config: ModelConfig, layout: PlannedLayout, batch: int, *, scatter_gather: bool = True) -> float:
    """Predicted TFLOP/s of one A100, recomputation counted."""
    time = step_time(
        config, layout, A100, PAPER_NUMERICS, seq_len=SEQ_LEN, global_batch=batch, scatter_gather=scatter_gather
    )
    flops = model_flops(config, batch=batch, seq_len=SEQ_LEN, recompute=layout.recompute)
    return flops / layout.num_ranks / time.total / 1e12


def full(tp: int, pp: int, dp: int, *, micro_batch: int = 1, virtual: int = 1) -> PlannedLayout:
    """A layout of the papers: full recomputation, no sequence parallelism, plain data parallelism."""
    schedule = "interleaved" if virtual > 1 else "1f1b"
    return PlannedLayout(tp, pp, dp, micro_batch, virtual=virtual, recompute="full", schedule=schedule)  # type: ignore[arg-type]  # a literal


@pytest.mark.parametrize("name", ROWS)
def test_table1_rates_are_predicted(name: str) -> None:
    """
    All ten measured rates within 7 %, of which two were fitted.

    Inverse: hiding tensor-parallel traffic turns six rows from 18.4B on red.
    """
    recipe = RECIPE_OF[name]
    assert recipe.layout is not None

    got = tflops(recipe.config, recipe.layout, recipe.global_batch)

    assert got == pytest.approx(ROWS[name].tflops, rel=TABLE_TOLERANCE)


def test_preset_is_what_two_rows_fit() -> None:
    """The A100's efficiencies are those that explain the rows 1.7B and 529.6B."""
    steps = []
    for name in ("1.7B", "529.6B"):
        recipe = RECIPE_OF[name]
        assert recipe.layout is not None
        assert recipe.gpus is not None
        flops = model_flops(recipe.config, batch=recipe.global_batch, seq_len=SEQ_LEN, recompute="full")
        seconds = flops / recipe.gpus / (ROWS[name].tflops * 1e12)
        steps.append(MeasuredStep(recipe.config, recipe.layout, PAPER_NUMERICS, SEQ_LEN, recipe.global_batch, seconds))

    fitted = fit_efficiencies(replace(A100, product_efficiency=0.5, memory_efficiency=0.5), steps)

    assert fitted.product_efficiency == pytest.approx(A100.product_efficiency, abs=0.005)
    assert fitted.memory_efficiency == pytest.approx(A100.memory_efficiency, abs=0.005)


def test_fit_recovers_what_made_the_steps() -> None:
    """Efficiencies that made three steps come out again; steps that cannot be explained are refused with the reason."""
    hidden = replace(A100, product_efficiency=0.61, memory_efficiency=0.43)
    steps = []
    for recipe in (RECIPE_OF["1.7B"], RECIPE_OF["18.4B"], RECIPE_OF["1008.0B"]):
        assert recipe.layout is not None
        step = MeasuredStep(recipe.config, recipe.layout, PAPER_NUMERICS, SEQ_LEN, recipe.global_batch, 1.0)
        steps.append(replace(step, seconds=predicted_s(step, hidden)))

    fitted = fit_efficiencies(A100, steps)

    assert (fitted.product_efficiency, fitted.memory_efficiency) == pytest.approx((0.61, 0.43))
    with pytest.raises(HardwareError, match=r"at least two\. Given: 1"):
        fit_efficiencies(A100, steps[:1])
    with pytest.raises(HardwareError, match="too alike"):
        fit_efficiencies(A100, [steps[0], steps[0]])
    with pytest.raises(HardwareError, match="not explained by efficiencies from 0 to 1"):
        fit_efficiencies(A100, [replace(step, seconds=step.seconds / 50) for step in steps])


@pytest.mark.parametrize(("batch", "low", "high"), [(12, 1.4, 1.6), (60, 1.05, 1.15)])
def test_fig12_gain_of_interleaving(batch: int, low: float, high: float) -> None:
    """GPT-3 175B on 96 GPUs: four chunks a stage gain half at 12 sequences, a tenth at 60."""
    plain = tflops(GPT3_175B.config, full(8, 12, 1), batch)
    interleaved = tflops(GPT3_175B.config, full(8, 12, 1, virtual=4), batch)

    assert low <= interleaved / plain <= high


@pytest.mark.parametrize(
    ("batch", "plain", "interleaved"), [(12, 82, 119), (24, 109, 134), (48, 130, 143), (60, 135, 146)]
)
def test_fig12_rates(batch: int, plain: float, interleaved: float) -> None:
    """Both curves within 7 % of the plot, which was read to 3 TFLOP/s."""
    assert tflops(GPT3_175B.config, full(8, 12, 1), batch) == pytest.approx(plain, rel=0.07)
    assert tflops(GPT3_175B.config, full(8, 12, 1, virtual=4), batch) == pytest.approx(interleaved, rel=0.07)


@pytest.mark.parametrize(("batch", "first", "last"), [(8, 165, 88), (128, 178, 163)])
def test_fig11_weak_scaling_of_the_pipeline(batch: int, first: float, last: float) -> None:
    """
    From what one stage reaches to what eight do: within 2 % of the plot at 8 sequences and at 128.

    Inverse: leaving out that the head slows its stage turns 128 sequences red.
    """
    rates = [tflops(gpt(layers=3 * pp, hidden=20480, heads=128), full(8, pp, 1), batch) for pp in (1, 2, 4, 8)]

    assert first * rates[-1] / rates[0] == pytest.approx(last, rel=0.02)
    assert sorted(rates, reverse=True) == rates


@pytest.mark.parametrize(("batch", "rate"), [(32, 142), (128, 165)])
def test_fig13_best_tensor_size_is_the_node(batch: int, rate: float) -> None:
    """162.2B on 64 GPUs: tp 8 is the best of all (tp, pp), at the measured rate."""
    rates = {
        tp: tflops(gpt(layers=32, hidden=20480, heads=128), full(tp, 64 // tp, 1), batch) for tp in (2, 4, 8, 16, 32)
    }

    assert max(rates, key=lambda tp: rates[tp]) == 8
    assert rates[8] == pytest.approx(rate, rel=0.05)


@pytest.mark.parametrize("batch", [32, 512])
def test_fig14_more_data_beats_more_pipeline(batch: int) -> None:
    """5.9B on 64 GPUs: each halving of the pipeline for twice the replicas is faster."""
    rates = [tflops(FIG_14, full(1, pp, 64 // pp), batch) for pp in (2, 4, 8, 16, 32)]

    assert sorted(rates, reverse=True) == rates


@pytest.mark.parametrize("batch", [32, 128, 512])
def test_fig15_more_data_beats_more_tensor(batch: int) -> None:
    """5.9B on 64 GPUs: beyond a node tensor parallelism collapses, and fewer tensor ranks are at least as fast."""
    rates = [tflops(FIG_14, full(tp, 1, 64 // tp), batch) for tp in (2, 4, 8, 16, 32)]

    # At one micro-batch (32 sequences on 32 replicas) tp 2 and 4 are a tie: 73.4 and 73.8.
    assert rates[0] >= (0.99 if batch == 32 else 1.0) * rates[1]
    assert sorted(rates[1:], reverse=True) == rates[1:]
    assert rates[0] > 2 * rates[-1]


def test_fig16_best_micro_batch() -> None:
    """91B on (8, 8): two sequences a micro-batch are best at a large batch, and the choice is worth at most 15 %."""
    rates = {
        b: tflops(gpt(layers=32, hidden=15360, heads=120), full(8, 8, 1, micro_batch=b), 512) for b in (1, 2, 4, 8)
    }

    assert max(rates, key=lambda b: rates[b]) == 2
    assert min(rates.values()) > 0.85 * max(rates.values())


@pytest.mark.parametrize("batch", [12, 24, 36, 48, 60])
def test_fig18_scatter_gather(batch: int) -> None:
    """Without scatter/gather the interleaved schedule of Fig 18 loses 5 to 15 %."""
    layout = full(8, 12, 1, virtual=4)
    with_it, without = (tflops(GPT3_175B.config, layout, batch, scatter_gather=on) for on in (True, False))

    assert 0.05 <= 1 - without / with_it <= 0.15


@pytest.mark.parametrize(("dp", "rate"), [(4, 153), (8, 149), (16, 141)])
def test_table2_rates_of_ptdp_175b(dp: int, rate: float) -> None:
    """PTD-P's 175B rows at 384, 768 and 1536 GPUs, within 3 %: what more replicas cost is predicted too."""
    assert tflops(GPT3_175B.config, full(8, 12, dp), 1536) == pytest.approx(rate, rel=0.03)


def test_mt_nlg_scaling() -> None:
    """MT-NLG's loss from 8 to 12 replicas is predicted; its level, of another code base, lies 16 to 21 % lower."""
    rates = [tflops(MT_NLG_530B.config, full(8, 35, dp), 1920) for dp in (8, 10, 12)]

    assert rates[2] / rates[0] == pytest.approx(113 / 126, abs=0.05)
    assert 126 / rates[0] == pytest.approx(0.82, abs=0.03)


def test_parts_sum_to_the_step() -> None:
    """Without a head the step is (m + (p - 1) / v) stage times, and the parts say what of it is bubble."""
    encoder = replace(FIG_14, family="bert", tied_embeddings=False)
    layout = full(8, 4, 1, virtual=2)
    time = step_time(encoder, layout, A100, PAPER_NUMERICS, seq_len=SEQ_LEN, global_batch=16)

    working = time.compute + time.tensor + time.pipeline
    assert time.bubble == pytest.approx(working * 3 / (2 * 16))
    assert time.total == pytest.approx(working + time.imbalance + time.bubble + time.data + time.optimizer)


@given(tp=st.sampled_from([1, 2, 4, 8]), pp=st.sampled_from([1, 2, 4]), dp=st.sampled_from([1, 2, 4]),
       micro_batch=st.sampled_from([1, 2]), virtual=st.sampled_from([1, 2]))  # fmt: skip
def test_traffic_is_the_volumes(tp: int, pp: int, dp: int, micro_batch: int, virtual: int) -> None:
    """Bytes per axis are section 3's volumes: elements of every layer, message and gradient, times their bytes."""
    layout = full(tp, pp, dp, micro_batch=micro_batch, virtual=virtual if pp > 1 else 1)
    sent = traffic(FIG_14, layout, PAPER_NUMERICS, seq_len=SEQ_LEN, global_batch=32)
    microbatches = 32 // (dp * micro_batch)
    per_layer = tensor_elements(FIG_14, micro_batch=micro_batch, seq_len=SEQ_LEN, tp=tp, recompute="full")

    assert sent.tensor == pytest.approx(2 * microbatches * 32 / pp * per_layer)
    messages = 0 if pp == 1 else 2 * layout.virtual - (pp == 2)
    assert sent.pipeline == pytest.approx(2 * microbatches * messages * micro_batch * SEQ_LEN * 3840 / tp)
    assert (sent.data == 0) == (dp == 1)


def test_links_of_a_group() -> None:
    """In a node at its bandwidth; between nodes a group has one link for each of its members on a node."""
    gigabyte = 1e9
    in_node = all_reduce_s(gigabyte, 8, hardware=A100, stride=1)
    across = all_reduce_s(gigabyte, 16, hardware=A100, stride=1)
    replicas = all_reduce_s(gigabyte, 16, hardware=A100, stride=8)

    assert in_node == pytest.approx(2 * 7 / 8 / (300 * 0.8) + 2 * 7 * 4e-6)
    assert across == pytest.approx(2 * 15 / 16 / (8 * 25 * 0.8) + 2 * (7 * 4e-6 + 12e-6))
    assert replicas == pytest.approx(2 * 15 / 16 / (25 * 0.8) + 2 * 15 * 12e-6)
    assert all_reduce_s(gigabyte, 1, hardware=A100, stride=1) == 0
