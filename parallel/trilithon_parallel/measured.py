"""
Real training steps on this machine, timed, for the planner's predictions to be held against. One process on the CPU.

torch is imported when measuring.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

from trilithon_parallel.config import ModelConfig, ModelError
from trilithon_parallel.costs import PlannedLayout
from trilithon_parallel.hardware import Hardware, measure_this_machine
from trilithon_parallel.memory import Numerics
from trilithon_parallel.presets import llama
from trilithon_parallel.timing import MeasuredStep, predicted_s

# Two shapes whose steps divide differently into products and elementwise work: wide and short, narrow and long.
_WIDE = llama(layers=2, hidden=768, heads=12, groups=12, ffn=2048, vocab=1024, context=256, tied=True)
_NARROW = llama(layers=6, hidden=128, heads=4, groups=4, ffn=384, vocab=1024, context=256, tied=True)


def measure_step(
    config: ModelConfig,
    layout: PlannedLayout,
    numerics: Numerics,
    *,
    seq_len: int,
    global_batch: int,
    seconds: float = 3.0,
) -> MeasuredStep:
    """
    The fastest of the training steps on random tokens that `seconds` have room for, two at least, after one to warm up.

    Raises:
        ModelError: `layout_invalid`, the layout has more than one rank; `model_unsupported`, not a decoder, or numerics
            that this measure does not run.
    """
    if layout.num_ranks != 1:
        raise ModelError(f"a measured step has one rank. Given: {layout.num_ranks}.", code="layout_invalid")
    if not config.is_causal or numerics.dropout or not numerics.fused_attention:
        raise ModelError(
            "a measured step needs a decoder, fused attention and no dropout. "
            f"Given: {config.architecture}, {numerics}.",
            code="model_unsupported",
        )
    import torch

    from trilithon_parallel.backend import select
    from trilithon_parallel.grid import Grid
    from trilithon_parallel.init import default_sigma, initialise
    from trilithon_parallel.layout import Layout
    from trilithon_parallel.objective import Batch
    from trilithon_parallel.optimizer import AdamWSettings
    from trilithon_parallel.recompute import Recompute
    from trilithon_parallel.step import TrainingModel

    model = TrainingModel(
        config,
        Grid.single(),
        Layout(micro_batch_size=layout.micro_batch, distributed_optimizer=False),
        select("torch"),
        dtype={"float32": torch.float32, "bfloat16": torch.bfloat16}[numerics.dtype],
        optimizer=AdamWSettings(),
        recompute=Recompute(layout.recompute),
    )
    for chunk in model.chunks:
        initialise(chunk.stage, config=config, grid=chunk.grid, seed=0, sigma=default_sigma(config))
    model.weights_changed()
    tokens = torch.randint(
        config.vocab_size, (layout.micro_batch * seq_len,), generator=torch.Generator().manual_seed(0)
    )
    batch = Batch(
        tokens_T=tokens,
        targets_T=tokens.roll(-1),
        weights_T=torch.ones(len(tokens)),
        positions_T=torch.arange(seq_len).repeat(layout.micro_batch),
        cu_seqlens=range(0, len(tokens) + 1, seq_len),
        sample_ids=range(layout.micro_batch),
        lengths=[seq_len] * layout.micro_batch,
    )
    batches = [batch] * layout.microbatches(global_batch)
    model.train_step(batches, learning_rate=1e-4, step=0)
    best_s, step, end_s = math.inf, 0, time.perf_counter() + seconds
    while step < 2 or time.perf_counter() < end_s:
        step, start_s = step + 1, time.perf_counter()
        model.train_step(batches, learning_rate=1e-4, step=step)
        best_s = min(best_s, time.perf_counter() - start_s)
    return MeasuredStep(config, layout, numerics, seq_len, global_batch, best_s)


def calibrate_this_machine(num_ranks: int = 1) -> Hardware:
    """
    This machine as `num_ranks` devices: measured peak and memory, scaled to what two small steps of one rank reached.

    Takes about ten seconds. One number is fitted, the mean share of the roofline that the steps reached: on a busy
    machine two would fit its noise.
    """
    alone, numerics = measure_this_machine(seconds=1.0), Numerics(dtype="float32")
    layout = PlannedLayout(tp=1, pp=1, dp=1, micro_batch=4)
    shares = []
    for config in (_WIDE, _NARROW):
        step = measure_step(config, layout, numerics, seq_len=128, global_batch=4)
        shares.append(predicted_s(step, alone) / step.seconds)
    share = math.sqrt(math.prod(shares))
    # The share of peaks that were measured as well can come out above 1: then the peaks were low.
    lift = max(1.0, share)
    hardware = alone if num_ranks == 1 else measure_this_machine(num_ranks, seconds=1.0)
    return replace(
        hardware,
        peak_flops=lift * hardware.peak_flops,
        memory_bandwidth=lift * hardware.memory_bandwidth,
        product_efficiency=share / lift,
        memory_efficiency=share / lift,
    )
