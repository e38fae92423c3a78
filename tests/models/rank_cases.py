"""
What several ranks check of encoder-decoders and masked-LM heads. Started by test_ranks.py, one process per rank.

Logits are compared with those of `transformers`, which the starter wrote beside each model; gradients with one process
computed on the spot. A rank writes {case: "ok" or the error} to `<dir>/rank<N>.json`.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from trilithon_parallel import rendezvous
from trilithon_parallel.attention import PackedView
from trilithon_parallel.backend import select
from trilithon_parallel.collectives import all_reduce, recv, reduce_from_tp, send
from trilithon_parallel.config import ModelConfig, load_config
from trilithon_parallel.grid import Grid
from trilithon_parallel.models import Seq2SeqStage, build_seq2seq, build_stage
from trilithon_parallel.models.head import HeadStage
from trilithon_parallel.models.seq2seq import boundary_rows
from trilithon_parallel.placement import global_shapes, local_slice, placement_of, shared_stages, source_name
from trilithon_parallel.recompute import Recompute
from trilithon_parallel.weights.loader import load_stage

TOLERANCE = 1e-4  # logits, fp32 (bar E10)
ENCODER_BOUNDS, DECODER_BOUNDS, PASSAGES = [0, 20, 23, 31, 32], [0, 12, 16], 2
MODELS = ("t5", "t5-gated", "masked-lm")


class Step(NamedTuple):
    """The inputs of one micro-batch, the same on every rank."""

    tokens: Tensor
    decoder_tokens: Tensor
    cross_bias: Tensor


def inputs(dtype: torch.dtype) -> Step:
    generator = torch.Generator().manual_seed(3)
    tokens_E, tokens_T = (torch.randint(1, 240, (n,), generator=generator) for n in (32, 16))
    bias_E = torch.randn(32, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return Step(tokens_E, tokens_T, bias_E)


def load(model_dir: Path, grid: Grid, dtype: torch.dtype) -> HeadStage:
    config = load_config(model_dir)
    build = build_seq2seq if config.is_seq2seq else build_stage
    stage = build(config, grid=grid, backend=select("torch"), dtype=dtype)
    load_stage(stage, model_dir, config=config, grid=grid)
    assert isinstance(stage, HeadStage)
    return stage


def forward(stage: HeadStage, x: Tensor | None, step: Step, **options: Any) -> Tensor:
    """One stage's part: all of a step's calls have this one form."""
    if isinstance(stage, Seq2SeqStage):
        result: Tensor = stage(
            x,
            encoder_tokens_E=step.tokens,
            encoder_cu_seqlens=ENCODER_BOUNDS,
            decoder_tokens_T=step.decoder_tokens,
            decoder_cu_seqlens=DECODER_BOUNDS,
            passages=PASSAGES,
            **options,
        )
        return result
    positions_T = torch.cat([torch.arange(stop - start) for start, stop in pairwise(ENCODER_BOUNDS)])
    view = PackedView(ENCODER_BOUNDS, causal=False)
    return stage(step.tokens if x is None else x, positions_T=positions_T, view=view)


def receive(config: ModelConfig, grid: Grid, dtype: torch.dtype) -> Tensor | None:
    """What the stage before hands on; None on the first."""
    if grid.is_first_stage:
        return None
    share = grid.tp.size if grid.sequence_parallel else 1
    rows = 32 // share
    if config.is_seq2seq:
        rows = boundary_rows(
            config,
            pp=grid.pp.size,
            stage=grid.pp.rank - 1,
            num_encoder_tokens=32 // share,
            num_decoder_tokens=16 // share,
            counts=grid.layer_counts,
        )
    x = torch.empty(rows, config.hidden_size, dtype=dtype)
    return recv(x, grid.pp, src=grid.prev_rank, label="hidden").requires_grad_()


def same_logits(model_dir: Path, grid: Grid) -> None:
    """E10 at this layout: what transformers computes of the same files."""
    stage, step = load(model_dir, grid, torch.float32), inputs(torch.float32)
    with torch.no_grad():
        x = receive(stage.config, grid, torch.float32)
        y = forward(stage, None if x is None else x.detach(), step)
        if not grid.is_last_stage:
            send(y, grid.pp, dst=grid.next_rank, label="hidden")
            return
        expected = safetensors.torch.load_file(model_dir / "expected" / "logits.safetensors")["logits"]
        error = float((stage.gather_logits(y) - expected).abs().max())
    assert error <= TOLERANCE, f"logits differ by {error:.2e}"


def loss_of(stage: HeadStage, hidden: Tensor) -> Tensor:
    """A fixed weighting of all logits, in whatever way they are cut."""
    rows = 16 if stage.config.is_seq2seq else 32
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(rows, stage.config.vocab_size, generator=generator, dtype=torch.float64)
    first, logits = stage.grid.tp.rank * stage.vocab_local, stage.local_logits(hidden)
    mine = weights[:, first : first + stage.real_columns]
    return reduce_from_tp((logits[:, : stage.real_columns] * mine).sum(), stage.grid.tp)


def backward(stage: HeadStage, grid: Grid, step: Step, **options: Any) -> None:
    """Forward and backward through all stages."""
    x = receive(stage.config, grid, torch.float64)
    y = forward(stage, x, step, **options)
    if grid.is_last_stage:
        loss_of(stage, y).backward()
    else:
        send(y.detach(), grid.pp, dst=grid.next_rank, label="hidden")
        y.backward(recv(torch.empty_like(y), grid.pp, src=grid.next_rank, label="gradient"))
    if x is not None:
        assert x.grad is not None
        send(x.grad, grid.pp, dst=grid.prev_rank, label="gradient")


def same_gradients(model_dir: Path, grid: Grid, *, recompute: Recompute | None = None) -> None:
    """
    Each rank's gradients are its slices of one process' gradients.

    A tensor that several stages hold has the sum of their gradients, and one that is not cut, under sequence
    parallelism, the sum of the ranks'.
    """
    config, single = load_config(model_dir), Grid.single()
    stages = [load(model_dir, place, torch.float64) for place in (single, grid)]
    biases = []
    for stage, place in zip(stages, (single, grid), strict=True):
        step = inputs(torch.float64)
        options = {"cross_bias_E": step.cross_bias} if config.is_seq2seq else {}
        if recompute is not None and isinstance(stage, Seq2SeqStage) and place is grid:
            stage.encoder.recompute = stage.decoder.recompute = recompute
        backward(stage, place, step, **options)
        biases.append(step.cross_bias.grad if step.cross_bias.grad is not None else torch.zeros(32).double())
    shapes, whole = global_shapes(config), dict(stages[0].named_parameters())
    gradients: dict[str, Tensor] = {}
    for name, parameter in stages[1].named_parameters():
        assert parameter.grad is not None, name
        gradients[source_name(name, config)] = parameter.grad
    shared = shared_stages(config, pp=grid.pp.size, counts=grid.layer_counts)
    for owner in sorted(shared):
        place = local_slice(owner, shapes[owner], config=config, tp=grid.tp.size, tp_rank=grid.tp.rank)
        mine = gradients.get(owner, torch.zeros(place.shape, dtype=torch.float64))
        total = all_reduce(mine, grid.pp, label="copies")
        if owner in gradients:
            gradients[owner] = total
    for owner in sorted(gradients):
        place = local_slice(owner, shapes[owner], config=config, tp=grid.tp.size, tp_rank=grid.tp.rank)
        gradient = gradients[owner]
        if grid.sequence_parallel and placement_of(owner).cut is None:
            gradient = all_reduce(gradient, grid.tp, label="replicated")
        expected = whole[owner].grad
        assert expected is not None
        corner = tuple(slice(0, size) for size in place.source_shape)
        torch.testing.assert_close(
            gradient[corner], expected[place.slices], rtol=1e-9, atol=1e-11, msg=lambda m, name=owner: f"{name}: {m}"
        )
        padding = gradient.clone()
        padding[corner] = 0
        assert not padding.any(), f"{owner}: padding has a gradient"
    torch.testing.assert_close(all_reduce(biases[1], grid.pp, label="bias"), biases[0], rtol=1e-9, atol=1e-11)


LAYOUTS: dict[int, list[tuple[int, int]]] = {2: [(2, 1), (1, 2)], 4: [(2, 2), (1, 4)]}


def cases(world_size: int, models: Path) -> dict[str, Callable[[], None]]:
    """Every case of this world size, by the name that test_ranks.py knows."""
    result: dict[str, Callable[[], None]] = {}
    for tp, pp in LAYOUTS[world_size]:
        grid = Grid.build(tp=tp, pp=pp)
        at = f"tp{tp}pp{pp}"
        for model in MODELS:
            path = models / model
            result[f"logits-{model}-{at}"] = lambda p=path, g=grid: same_logits(p, g)
            result[f"gradients-{model}-{at}"] = lambda p=path, g=grid: same_gradients(p, g)
            if tp > 1:
                cut = replace(grid, sequence_parallel=True)
                result[f"logits-{model}-{at}-sp"] = lambda p=path, g=cut: same_logits(p, g)
                result[f"gradients-{model}-{at}-sp"] = lambda p=path, g=cut: same_gradients(p, g)
        again = Recompute("full")
        result[f"recompute-t5-{at}"] = lambda p=models / "t5", g=grid, r=again: same_gradients(p, g, recompute=r)
        if pp == 2:
            # The encoder ends within a stage, and the decoder begins there.
            uneven = replace(grid, layer_counts=(4, 2))
            result[f"gradients-t5-{at}-uneven"] = lambda p=models / "t5", g=uneven: same_gradients(p, g)
    return result


def case_names(world_size: int) -> list[str]:
    """The names of `cases`, without a process group."""
    names = []
    for tp, pp in LAYOUTS[world_size]:
        at = f"tp{tp}pp{pp}"
        for model in MODELS:
            for suffix in ("", "-sp") if tp > 1 else ("",):
                names += [f"logits-{model}-{at}{suffix}", f"gradients-{model}-{at}{suffix}"]
        names.append(f"recompute-t5-{at}")
        if pp == 2:
            names.append(f"gradients-t5-{at}-uneven")
    return names


def main(work_dir: Path) -> None:
    """Join, run every case, write what happened."""
    torch.set_num_threads(1)
    world = rendezvous.join(timeout_s=60)
    results = {}
    todo = cases(world.world_size, work_dir / "models")
    assert list(todo) == case_names(world.world_size)
    for name, case in todo.items():
        try:
            case()
            results[name] = "ok"
        except Exception:
            results[name] = traceback.format_exc()
        (work_dir / f"rank{world.rank}.json").write_text(json.dumps(results))
    rendezvous.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
