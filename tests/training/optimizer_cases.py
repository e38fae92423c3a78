"""What ranks check together about buckets and the optimizer's state. Started by test_optimizer.py."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import rank_runner
import torch
from step_cases import LLAMA, MODELS, SETTINGS, STEPS, batches_of
from torch import Tensor

from trilithon_parallel.backend import select
from trilithon_parallel.collectives import all_reduce, all_reduce_max, recording
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.grid import Grid
from trilithon_parallel.init import initialise
from trilithon_parallel.layout import Layout
from trilithon_parallel.objective import Batch, Seq2SeqBatch
from trilithon_parallel.optimizer import STATES, AdamWSettings
from trilithon_parallel.placement import global_shapes
from trilithon_parallel.recompute import Recompute
from trilithon_parallel.step import StepResult, TrainingModel

T5 = ModelConfig(
    family="t5", architecture="T5ForConditionalGeneration", vocab_size=391, hidden_size=48, num_layers=6,
    num_encoder_layers=3, num_heads=4, num_kv_heads=4, head_dim=12, ffn_size=100, max_context=64, norm="rms",
    norm_eps=1e-6, norm_order="pre", activation="relu", gated_mlp=False, position="relative", relative_buckets=8,
    relative_max_distance=16, tied_embeddings=True, scale_logits=True, decoder_start_id=0,
)  # fmt: skip


def build(
    config: ModelConfig, layout: Layout, grid: Grid, *, dtype: torch.dtype = torch.float32,
    settings: AdamWSettings = SETTINGS, **more: Any,
) -> TrainingModel:  # fmt: skip
    """A model of new weights, the same ones at every layout."""
    grid = replace(grid, sequence_parallel=layout.sequence_parallel, layer_counts=layout.layer_counts)
    model = TrainingModel(config, grid, layout, select("torch"), dtype=dtype, optimizer=settings, **more)
    for chunk in model.chunks:
        initialise(chunk.stage, config=config, grid=chunk.grid, seed=3, sigma=0.1)
    model.optimizer.adopt_weights()
    model.weights_changed()
    return model


def data(config: ModelConfig, step: int, layout: Layout, dp_rank: int) -> list[Batch]:
    """`batches_of`, with something to encode where the model does: another random text of two thirds of the length."""
    batches = batches_of(config, step, layout, dp_rank)
    if not config.is_seq2seq:
        return batches
    made: list[Batch] = []
    for batch in batches:
        size = len(batch.tokens_T) * 2 // 3
        generator = torch.Generator().manual_seed(batch.sample_ids[0])
        tokens = torch.randint(config.vocab_size, (size,), generator=generator)
        bounds = [border * 2 // 3 for border in batch.cu_seqlens]
        made.append(Seq2SeqBatch(**vars(batch), encoder_tokens_E=tokens, encoder_cu_seqlens=bounds))
    return made


def run(model: TrainingModel, first: int, stop: int) -> list[StepResult]:
    """Steps `first` to `stop`."""
    dp_rank = model.grid.dp.rank
    return [
        model.train_step(data(model.config, step, model.layout, dp_rank), learning_rate=1e-2, step=step)
        for step in range(first, stop)
    ]


def whole_state(model: TrainingModel) -> dict[str, Tensor]:
    """
    Every weight and state as one global tensor, from what all ranks give to a checkpoint.

    Raises:
        AssertionError: an element was given by no rank, or by more than one.
    """
    dtypes = {"": model.dtype}
    wide = torch.float64 if model.dtype == torch.float64 else torch.float32
    dtypes |= {} if model.dtype == wide else {".master": wide}
    dtypes |= {f".{name}": wide for name in STATES}
    sizes = {
        name + suffix: (shape, dtype)
        for name, shape in global_shapes(model.config).items()
        for suffix, dtype in dtypes.items()
    }
    values = {name: torch.zeros(shape, dtype=torch.float64) for name, (shape, _) in sizes.items()}
    counts = {name: torch.zeros(shape, dtype=torch.float64) for name, (shape, _) in sizes.items()}
    for piece in model.optimizer.pieces():
        assert piece.tensor.dtype == sizes[piece.name][1]
        values[piece.name][piece.slices] = piece.tensor.double()
        counts[piece.name][piece.slices] += 1
    flat = torch.cat([x.flatten() for x in (*counts.values(), *values.values())])  # one sum for all of it
    count, value = all_reduce(flat, model.grid.world, label="test.state").chunk(2)
    lengths = [tensor.numel() for tensor in values.values()]
    for name, part in zip(sizes, count.split(lengths), strict=True):
        assert bool((part == 1).all()), f"{name}: given {part.min()} to {part.max()} times"
    return {name: part.view(sizes[name][0]) for name, part in zip(sizes, value.split(lengths), strict=True)}


def adopt(model: TrainingModel, state: dict[str, Tensor], num_steps: int) -> None:
    """What resuming from a checkpoint does."""
    for piece in model.optimizer.targets():
        piece.tensor.copy_(state[piece.name][piece.slices])
    model.optimizer.num_steps = num_steps
    model.optimizer.publish()
    model.weights_changed()


def assert_padding_is_zero(model: TrainingModel) -> int:
    """All that belongs to no element of a global tensor is zero; how many such elements there are."""
    count = 0
    for bucket, master, states in zip(
        model.buckets.buckets, model.optimizer.masters, model.optimizer.states(), strict=True
    ):
        is_real = torch.zeros(len(bucket.data), dtype=torch.bool)
        for slot in bucket.slots:
            place = model.optimizer._place(slot)
            is_real[slot.start : slot.stop].view(slot.parameter.shape)[tuple(map(slice, place.source_shape))] = True
        assert not bucket.data[~is_real].any()
        is_padding = ~is_real[bucket.share]
        for tensor in (master.detach(), *states.values()):
            assert not tensor[is_padding].any()
        count += int((~is_real).sum())
    return count


COVERED: list[tuple[str, Layout, torch.dtype]] = [
    ("llama", Layout(tp=4), torch.float32),
    ("mqa", Layout(tp=4, sequence_parallel=True), torch.bfloat16),
    ("mqa", Layout(tp=2, dp=2), torch.float32),
    ("llama", Layout(tp=2, pp=2, sequence_parallel=True), torch.float32),
    ("llama", Layout(pp=2, dp=2, virtual=2, schedule="interleaved"), torch.bfloat16),
    ("gpt2", Layout(dp=4, distributed_optimizer=False), torch.bfloat16),
    ("bert", Layout(pp=2, dp=2, distributed_optimizer=False), torch.float32),
    ("gpt2", Layout(dp=4), torch.float32),
]


def coverage() -> None:
    """Over all ranks every element of every tensor once, with one process' values; in buckets of any size."""
    for name, layout, dtype in COVERED:
        config = MODELS[name]
        grid = Grid.build(tp=layout.tp, pp=layout.pp, dp=layout.dp)
        expected = whole_state(build(config, Layout(), Grid.single(), dtype=dtype))
        for elements in (1, 2**22):
            state = whole_state(build(config, layout, grid, dtype=dtype, bucket_elements=elements))
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[key], expected[key]) for key in state), (name, layout)


def resume() -> list[int]:
    """
    A run that goes on from what another layout's ranks gave equals the one that never stopped; padding stays zero.

    Returns the number of elements of padding of each case.
    """
    found = []
    cases = [("llama", Layout(tp=2, pp=2), Layout(tp=4)), ("mqa", Layout(tp=4), Layout(tp=2, dp=2))]
    for name, first, second in cases:
        config, dtype = MODELS[name], torch.float64
        model = build(config, first, Grid.build(tp=first.tp, pp=first.pp, dp=first.dp), dtype=dtype)
        run(model, 0, STEPS)
        found.append(assert_padding_is_zero(model))
        state = whole_state(model)
        twin, other = (
            TrainingModel(
                config, Grid.build(tp=layout.tp, pp=layout.pp, dp=layout.dp), layout, select("torch"), dtype=dtype,
                optimizer=SETTINGS,
            )
            for layout in (first, second)
        )  # fmt: skip
        for resumed in (twin, other):
            adopt(resumed, state, STEPS)
            found.append(assert_padding_is_zero(resumed))
            again = whole_state(resumed)
            assert all(torch.equal(again[key], state[key]) for key in state)
        (went_on,) = run(model, STEPS, STEPS + 1)
        assert run(twin, STEPS, STEPS + 1) == [went_on]
        (elsewhere,) = run(other, STEPS, STEPS + 1)
        assert abs(elsewhere.loss - went_on.loss) < 1e-12 * went_on.loss
        assert abs(elsewhere.grad_norm - went_on.grad_norm) < 1e-11 * went_on.grad_norm
        expected, same, close = whole_state(model), whole_state(twin), whole_state(other)
        assert all(torch.equal(expected[key], same[key]) for key in expected)
        assert all((expected[key] - close[key]).abs().max() < 1e-11 for key in expected)
    return found


def ties() -> None:
    """After 20 steps the stages' copies of one tensor are equal to the bit, each on its own stage."""
    cases = [
        (LLAMA, Layout(pp=2, dp=2), torch.float32),
        (LLAMA, Layout(tp=2, pp=2, sequence_parallel=True), torch.bfloat16),
        (T5, Layout(pp=4), torch.float32),
    ]
    for config, layout, dtype in cases:
        grid = Grid.build(tp=layout.tp, pp=layout.pp, dp=layout.dp)
        model = build(config, layout, grid, dtype=dtype)
        before = {slot.owner: slot.parameter.detach().clone() for _, slot in model.buckets.slots()}
        run(model, 0, 20)
        held = {slot.owner: slot.parameter.detach() for _, slot in model.buckets.slots()}
        assert all(not torch.equal(held[owner], weight) for owner, weight in before.items())
        shared = set(model.buckets._axes) - {"tp", "kv"}
        assert shared == (
            {"model.embed_tokens.weight", "encoder.relative_bias.weight", "decoder.relative_bias.weight"}
            if config is T5
            else {"model.embed_tokens.weight"}
        )
        for owner in sorted(shared & set(held)):
            axis, weight = model.buckets._axes[owner], held[owner].double()
            most = all_reduce_max(weight, axis, label="test.most")
            least = -all_reduce_max(-weight, axis, label="test.least")
            assert torch.equal(most, least), (owner, layout)


def seq2seq() -> None:
    """An encoder-decoder over four stages, and over tp with cut tokens, learns what one process learns; recomputed."""
    expected_model = build(T5, Layout(), Grid.single(), dtype=torch.float64)
    expected = run(expected_model, 0, STEPS)
    whole = whole_state(expected_model)
    for layout in (Layout(pp=4), Layout(tp=2, pp=2, sequence_parallel=True), Layout(pp=2, dp=2, schedule="gpipe")):
        grid = Grid.build(tp=layout.tp, pp=layout.pp, dp=layout.dp)
        model = build(T5, layout, grid, dtype=torch.float64, recompute=Recompute("full", every=2))
        results = run(model, 0, STEPS)
        for mine, theirs in zip(results, expected, strict=True):
            assert abs(mine.loss - theirs.loss) < 1e-12 * theirs.loss, layout
            assert abs(mine.grad_norm - theirs.grad_norm) < 1e-11 * theirs.grad_norm, layout
        state = whole_state(model)
        assert all((state[key] - whole[key]).abs().max() < 1e-11 for key in state), layout


def order() -> list[str]:
    """The collectives of one step at tp 2 and dp 2 with small buckets, in order."""
    layout = Layout(tp=2, dp=2)
    model = build(MODELS["gpt2"], layout, Grid.build(tp=2, pp=1, dp=2), bucket_elements=5000)
    with recording() as calls:
        run(model, 0, 1)
    return [f"{call.label} {call.op} {call.elements}" for call in calls]


def bucket_sizes() -> None:
    """
    Weights after three steps have the same bits whatever the buckets, with distributed states and without; nothing of
    it has loaded torch's compiler, which takes a second of every rank's start.
    """
    config, grid = MODELS["gpt2"], Grid.build(tp=1, pp=1, dp=2)
    settings = replace(SETTINGS, clip_norm=None)
    results = []
    for distributed in (True, False):
        for elements in (1, 7000, 2**22):
            model = build(
                config, Layout(dp=2, distributed_optimizer=distributed), grid, settings=settings,
                bucket_elements=elements,
            )  # fmt: skip
            run(model, 0, STEPS)
            results.append((len(model.buckets.buckets), whole_state(model)))
    assert len({count for count, _ in results}) == 3
    first = results[0][1]
    assert all(torch.equal(state[key], first[key]) for _, state in results for key in first)
    assert "torch._dynamo" not in sys.modules


if __name__ == "__main__":
    rank_runner.run({2: [bucket_sizes], 4: [coverage, resume, ties, seq2seq, order]})
