"""The search: what wins, what is rejected and why, what the words say."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner.papers import RECIPE_OF, ROWS, TABLE_2

from trilithon_parallel.config import ModelError
from trilithon_parallel.costs import PlannedLayout, formula_parameters, model_flops
from trilithon_parallel.explain import explain, runners_up
from trilithon_parallel.hardware import PRESETS
from trilithon_parallel.memory import PAPER_NUMERICS, Numerics
from trilithon_parallel.planner import Constraints, Plan, Workload, evaluate, plan
from trilithon_parallel.presets import GPT3_175B, MT_NLG_530B, RECIPES, Recipe, gpt, llama

A100 = PRESETS["a100-80gb"]
PAPER = Constraints(recompute="full", sequence_parallel=False, distributed_optimizer=False)
SEARCH_LIMIT_S = 5.0


def workload(recipe: Recipe, **changes: object) -> Workload:
    """The recipe as its source trained it."""
    gpus = recipe.gpus or 8
    base = Workload(recipe.config, gpus, recipe.global_batch, recipe.seq_len, recipe.numerics, recipe.tokens)
    return replace(base, **changes)  # type: ignore[arg-type]  # names of fields


@pytest.fixture(scope="module")
def trillion() -> Plan:
    """1008B on 3072 A100s, plain data parallelism and full recomputation."""
    return plan(workload(RECIPE_OF["1008.0B"]), A100, PAPER)


@pytest.mark.parametrize("name", ROWS)
def test_table1_through_the_planner(name: str) -> None:
    """Parameters, FLOPs, replicas, micro-batches and bubble of every row, as the planner reports its own layout."""
    row, recipe = ROWS[name], RECIPE_OF[name]
    assert recipe.layout is not None
    candidate = evaluate(workload(recipe), A100, recipe.layout)

    assert formula_parameters(recipe.config) / 1e9 == pytest.approx(row.parameters_b, abs=0.06)
    assert (candidate.layout.dp, candidate.microbatches) == (row.dp, row.microbatches)
    assert candidate.bubble == pytest.approx(row.bubble, abs=5e-4)
    flops = model_flops(recipe.config, batch=recipe.global_batch, seq_len=2048, recompute="full")
    assert candidate.flops_per_s * candidate.time.total * recipe.layout.num_ranks == pytest.approx(flops)
    assert candidate.memory.total < A100.memory_bytes


@pytest.mark.parametrize(
    ("parameters_b", "batch", "gpus", "tflops", "days"), [row[1:] for row in TABLE_2 if row[0] == "ptdp"]
)
def test_table2_through_the_planner(parameters_b: float, batch: int, gpus: int, tflops: float, days: float) -> None:
    """Days of a run follow from the step time: scaled to the printed rate they are the printed days."""
    config = GPT3_175B.config if parameters_b < 200 else MT_NLG_530B.config
    pp = 12 if parameters_b < 200 else 35
    work = Workload(config, gpus, batch, 2048, PAPER_NUMERICS, 300e9)
    candidate = evaluate(work, A100, PlannedLayout(8, pp, gpus // (8 * pp), 1, recompute="full"))

    got = candidate.days(work) * candidate.flops_per_s / (tflops * 1e12)

    assert abs(got - days) <= max(1.0, 0.01 * days)


def test_best_layout_of_a_trillion_parameters(trillion: Plan) -> None:
    """
    1008B held to the paper's means: tp 8, pp 64 wins; pp 32 is rejected for memory.

    Inverse: twice the memory of a card lets another layout win.
    """
    best = trillion.best.layout

    assert (best.tp, best.pp, best.dp, best.micro_batch) == (8, 64, 6, 1)
    reasons = {
        one.reason for one in trillion.rejected if (one.tp, one.pp, one.micro_batch) == (8, 32, 1) and one.memory
    }
    assert reasons
    assert all(reason.startswith("needs ") and "GB on the first stage, of 80.0" in reason for reason in reasons)
    assert not [c for c in trillion.ranked if (c.layout.tp, c.layout.pp) == (8, 32)]


def test_distributed_optimizer_lets_a_smaller_pipeline_win() -> None:
    """With ZeRO-1 allowed the same model needs half of the pipeline."""
    free = plan(workload(RECIPE_OF["1008.0B"]), A100, replace(PAPER, distributed_optimizer=True))

    assert free.best.layout.pp < 64


def test_search_of_a_trillion_parameters_is_quick() -> None:
    """Everything free on 3072 devices: under 5 s of one core (it takes a quarter of a second)."""
    start_s = time.process_time()
    result = plan(workload(RECIPE_OF["1008.0B"]), A100)

    assert len(result.ranked) + len(result.rejected) > 5000
    assert time.process_time() - start_s < SEARCH_LIMIT_S


def test_530b_without_recomputation_is_rejected() -> None:
    """The 529.6B row without recomputation and without sequence parallelism does not fit, and says by how much."""
    recipe = RECIPE_OF["529.6B"]
    asked = replace(PAPER, tp=8, pp=35, micro_batch=1, virtual=3, recompute="none")
    result = plan(workload(recipe), A100, asked)

    assert not result.ranked
    (rejected,) = result.rejected
    assert rejected.memory is not None
    assert rejected.reason == f"needs {rejected.memory.total / 1e9:.1f} GB on the first stage, of 80.0"
    with pytest.raises(ModelError, match=r"no layout of 2520 a100-80gb fits\. Nearest: tp 8, pp 35 needs") as caught:
        _ = result.best
    assert caught.value.code == "plan_impossible"


def test_takeaways_of_the_paper() -> None:
    """Tensor parallelism stays in the node, and a model that fits one node takes no pipeline (PTD-P, section 3)."""
    for name in ("7.5B", "18.4B", "39.1B"):
        best = plan(workload(RECIPE_OF[name]), A100, PAPER).best.layout
        assert best.tp <= 8
    assert plan(workload(RECIPE_OF["7.5B"]), A100, PAPER).best.layout.pp == 1


@settings(max_examples=40, deadline=None)
@given(
    gpus=st.integers(1, 48),
    layers=st.integers(1, 9),
    heads=st.integers(1, 9),
    batch=st.integers(1, 48),
    fused=st.booleans(),
)
def test_every_layout_is_ranked_or_rejected_once(gpus: int, layers: int, heads: int, batch: int, fused: bool) -> None:
    """No layout is lost, none appears twice, each rejection has a reason, and what is ranked fits and adds up."""
    config = llama(layers=layers, hidden=16 * heads, heads=heads, groups=heads, ffn=24, vocab=300, context=64)
    small = replace(A100, memory_bytes=2e6, devices_per_node=4)
    work = Workload(config, gpus, batch, 64, Numerics(fused_attention=fused))
    result = plan(work, small)

    seen = [
        (c.layout.tp, c.layout.pp, c.layout.micro_batch, c.layout.virtual, c.layout.recompute) for c in result.ranked
    ] + [(r.tp, r.pp, r.micro_batch, r.virtual, r.recompute) for r in result.rejected]
    assert len(seen) == len(set(seen))
    shapes = {(tp, pp) for tp in range(1, gpus + 1) for pp in range(1, gpus + 1) if gpus % (tp * pp) == 0}
    assert {(tp, pp) for tp, pp, *_ in seen} == shapes
    assert all(one.reason for one in result.rejected)
    for candidate in result.ranked:
        layout = candidate.layout
        assert layout.num_ranks == gpus
        assert layout.virtual * layout.pp <= layers
        assert candidate.microbatches * layout.dp * layout.micro_batch == batch
        assert candidate.memory.total <= small.memory_bytes
        assert candidate.time.total > 0
    times = [candidate.time.total for candidate in result.ranked]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("constraints", "reason"),
    [
        (Constraints(tp=16), "tp 16 is above the model's 8 heads"),
        (Constraints(pp=16), "pp 16 is above the model's 8 layers"),
        (Constraints(tp=1, pp=1), "the global batch of 12 is no multiple of dp 16"),
        (Constraints(tp=4, pp=4, micro_batch=8), "dp 1 * micro-batch 8 does not divide the global batch of 12"),
        (Constraints(tp=8, pp=2, virtual=5), "5 chunks on each of 2 stages are more than the model's 8 layers"),
        (Constraints(tp=4, pp=4, virtual=2, micro_batch=4),
         "interleaving needs at least pp = 4 micro-batches; there are 3"),
        (Constraints(tp=4, pp=4, schedule="interleaved", virtual=1),
         "the interleaved schedule has at least 2 chunks on each stage"),
        (Constraints(tp=4, pp=4, schedule="1f1b", virtual=2), "1f1b has one chunk on each stage"),
        (Constraints(pp=1, tp=4, virtual=2), "interleaving needs at least 2 pipeline stages"),
    ],
)  # fmt: skip
def test_rejections_have_one_reason(constraints: Constraints, reason: str) -> None:
    """Each kind of misfit is said in one sentence with the numbers."""
    config = llama(layers=8, hidden=64, heads=8, groups=8, ffn=96, vocab=300, context=60)

    result = plan(Workload(config, 16, 12, 60, Numerics()), A100, constraints)

    assert reason in {one.reason for one in result.rejected}


def test_sequence_that_cannot_be_cut() -> None:
    """Sequence parallelism wants whole shares of a micro-batch's tokens."""
    config = llama(layers=8, hidden=64, heads=8, groups=8, ffn=96, vocab=300, context=64)

    result = plan(Workload(config, 8, 4, 63, Numerics()), A100, Constraints(tp=2, pp=4, micro_batch=1))

    assert result.rejected[0].reason == "sequence parallelism cannot cut 63 tokens of a micro-batch into 2 equal parts"


def test_waste_of_padded_heads_is_counted_and_said() -> None:
    """9 heads in 3 groups at tp 2 are 4 groups: a quarter of attention's work, in the time and in the words."""
    config = replace(RECIPES["llama_10m"].config, num_heads=9, num_kv_heads=3, head_dim=64, hidden_size=576)
    work = Workload(config, 2, 8, 512, Numerics())
    forced = plan(work, A100, Constraints(tp=2, pp=1))
    even = plan(replace(work, config=replace(config, num_heads=12, num_kv_heads=4)), A100, Constraints(tp=2, pp=1))

    assert forced.best.waste == pytest.approx(0.25)
    assert "tp 2 does not divide the heads: 25% of attention's work is padding." in explain(forced)
    # The padded layer costs what one with twelve heads does.
    assert forced.best.time.compute == pytest.approx(even.best.time.compute)
    assert forced.best.mfu < even.best.mfu


def test_words_are_about_the_winner(trillion: Plan) -> None:
    """The explanation names layout, time, memory, and what each other choice would cost or why it is out."""
    lines = explain(trillion)
    text = "\n".join(lines)

    assert "tp 8 x pp 64 x dp 6" in lines[0]
    assert "of 80 GB on the first stage" in text
    assert "pp 48 instead of 64: rejected, 128 layers make no 2 equal chunks on each of 48 stages" in text
    assert "chunks per stage 1 instead of 2: +" in text
    others = runners_up(trillion, 4)
    assert len({(c.layout.tp, c.layout.pp) for c, _ in others} | {(8, 64)}) == 5
    assert all(words.startswith("+") for _, words in others)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpus": 0}, "plan gpus must be at least 1. Given: 0"),
        ({"global_batch": 0}, "plan global_batch must be at least 1"),
        ({"seq_len": 4096}, "plan seq_len must be at most the model's 2048 positions. Given: 4096"),
        ({"config": replace(gpt(layers=2, hidden=64, heads=4), family="t5")}, "no layouts of encoder-decoders"),
    ],
)  # fmt: skip
def test_impossible_questions(change: dict[str, object], message: str) -> None:
    """Sizes below one, sequences beyond the positions, and models without a planned layout are refused."""
    with pytest.raises(ModelError, match=message):
        workload(GPT3_175B, **change)


def test_unknown_constraints_are_refused() -> None:
    """A constraint that no layout can have says what is allowed."""
    with pytest.raises(
        ModelError, match=r"plan recompute is not known\. Given: 'some'\. Allowed: none, selective, full"
    ):
        Constraints(recompute="some")  # type: ignore[arg-type]  # the point
    with pytest.raises(ModelError, match=r"plan tp must be at least 1\. Given: 0"):
        Constraints(tp=0)
