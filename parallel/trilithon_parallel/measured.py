"""
This machine as the planner's hardware, and real training steps on it for predictions to be held against.

CPU only, in one process; torch is imported when measuring.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import replace

from trilithon_parallel.config import ModelConfig, ModelError
from trilithon_parallel.costs import PlannedLayout
from trilithon_parallel.hardware import Hardware
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


def measure_products(threads: int, *, size: int = 1024, seconds: float = 0.3) -> float:
    """
    FLOP/s of fp32 products of `size` x `size` on this machine's CPU with so many threads: the best of many.

    The number of threads of this process is as before afterwards. Needs torch.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = torch.ones(size, size), torch.ones(size, size)
        out = torch.empty(size, size)
        best_s, end_s = math.inf, time.monotonic() + seconds
        while best_s == math.inf or time.monotonic() < end_s:
            start_s = time.perf_counter()
            torch.mm(a, b, out=out)
            best_s = min(best_s, time.perf_counter() - start_s)
    finally:
        torch.set_num_threads(before)
    return 2.0 * size**3 / best_s


def measure_memory(threads: int, *, megabytes: int = 64, seconds: float = 0.3) -> float:
    """Bytes/s of `c = a + b` over arrays far larger than the caches (three transfers an element). Needs torch."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b, c = (torch.ones(megabytes * 2**18) for _ in range(3))
        best_s, end_s = math.inf, time.monotonic() + seconds
        while best_s == math.inf or time.monotonic() < end_s:
            start_s = time.perf_counter()
            torch.add(a, b, out=c)
            best_s = min(best_s, time.perf_counter() - start_s)
    finally:
        torch.set_num_threads(before)
    return 3.0 * 4 * a.numel() / best_s


def measure_this_machine(num_ranks: int = 1, *, seconds: float = 0.3) -> Hardware:
    """
    This machine as `num_ranks` devices that share its cores and memory: measured products and memory, about a second.

    A rank has cores / num_ranks threads (at least one), 1 / num_ranks of memory and of its bandwidth. Links are copies
    through memory by gloo, whose speed at two ranks was measured once; no scaling should be read off them. Products
    reach their measured rate, and both efficiencies can be fitted to measured steps (`timing.fit_efficiencies`).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // num_ranks)
    share = min(1.0, cores / (num_ranks * threads))
    return Hardware(
        name=f"this machine ({cores} cores, {threads} for a rank)",
        peak_flops=share * measure_products(threads, seconds=seconds),
        memory_bytes=_memory_bytes() / num_ranks,
        memory_bandwidth=measure_memory(min(cores, threads * num_ranks), seconds=seconds) / num_ranks,
        devices_per_node=max(1, num_ranks),
        intra_node_bandwidth=2e9,
        inter_node_bandwidth=2e9,
        intra_node_latency_s=150e-6,
        inter_node_latency_s=150e-6,
        product_efficiency=1.0,
        memory_efficiency=1.0,
        link_efficiency=1.0,
        half_tokens=16,
    )


def _memory_bytes() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
