"""
What several ranks check together. Started by test_ranks.py as one process per rank, never collected by pytest.

Every case runs on every rank, in the same order, and compares with one process computed on the spot (`Grid.single()`).
A rank writes {case: "ok" or the error} to `<dir>/rank<N>.json`.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trilithon_parallel import collectives, rendezvous
from trilithon_parallel.attention import PackedView, PagedBatch, PagedKVCache, PagedView
from trilithon_parallel.backend import select
from trilithon_parallel.backend.native import unavailable_reason
from trilithon_parallel.collectives import CollectiveError, copy_to_tp, recording, recv, reduce_from_tp, send
from trilithon_parallel.config import load_config
from trilithon_parallel.grid import Grid
from trilithon_parallel.models import CausalStage, EncoderStage, build_stage
from trilithon_parallel.placement import LocalSlice, global_shapes, local_slice, source_name
from trilithon_parallel.weights.loader import load_stage

TOLERANCE = 1e-5  # log-probabilities, fp32 (bar E1)
CHUNKS = (9, 1, 20, *[1] * 6)  # new tokens of each step: prefill, decode, a second chunk, decodes


def load(
    model_dir: Path,
    grid: Grid,
    *,
    dtype: torch.dtype = torch.float32,
    batch_invariant: bool = False,
    prepare: bool = True,
) -> CausalStage | EncoderStage:
    config = load_config(model_dir)
    backend = select("torch", batch_invariant=batch_invariant)
    stage = build_stage(config, grid=grid, backend=backend, dtype=dtype)
    load_stage(stage, model_dir, config=config, grid=grid)
    if prepare:
        stage.prepare()
    return stage


def through_stages(
    stage: nn.Module, x: Tensor, grid: Grid, run: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> Tensor:
    """Receive, run, hand on; the result is the last stage's hidden states."""
    if not grid.is_first_stage:
        shape = (len(x), stage.config.hidden_size)
        x = recv(torch.empty(shape, dtype=dtype), grid.pp, src=grid.prev_rank, label="hidden")
    hidden_TH = run(x)
    if not grid.is_last_stage:
        send(hidden_TH, grid.pp, dst=grid.next_rank, label="hidden")
    return hidden_TH


def generate(
    model_dir: Path, grid: Grid, *, dtype: torch.dtype = torch.float32, batch_invariant: bool = False, beside: int = 0
) -> tuple[list[int], Tensor]:
    """
    Greedy tokens and the log-probabilities [steps, V] of a paged run; on all but the last stage both are dummies.

    `beside` is the length of another sequence's prefill that shares the first step.
    """
    stage = load(model_dir, grid, dtype=dtype, batch_invariant=batch_invariant)
    assert isinstance(stage, CausalStage)
    cache = PagedKVCache(stage.config, grid, num_blocks=64, dtype=dtype)
    tables = [[5, 2, 11, 7], list(range(20, 60))]
    tokens = (torch.arange(sum(CHUNKS)) * 37 % 200).tolist()
    drawn: list[int] = []
    logprobs: list[Tensor] = []
    context = 0
    with torch.inference_mode():
        for step, new in enumerate(CHUNKS):
            others = [beside] if beside and step == 0 else []
            lens, contexts = [new, *others], [context, *[0] * len(others)]
            bounds = [0, new, *[new + other for other in others]]
            step_tables = tables[: len(lens)]
            slots_T = PagedBatch.slots(step_tables, contexts, lens)
            batch = PagedBatch(bounds, contexts, step_tables, slots_T)
            view = PagedView(cache, batch, batch_invariant=batch_invariant)
            positions_T = torch.cat([torch.arange(at, at + n) for at, n in zip(contexts, lens, strict=True)])
            x = torch.tensor(tokens[context : context + new] + list(range(sum(others))))
            hidden_TH = through_stages(
                stage, x, grid, lambda x, p=positions_T, v=view: stage(x, positions_T=p, view=v), dtype
            )
            if grid.is_last_stage:
                logprobs.append(stage.gather_logits(hidden_TH[:new]).log_softmax(-1))
                drawn.append(int(logprobs[-1][-1].argmax()))
            context += new
    return drawn, torch.cat(logprobs) if logprobs else torch.empty(0)


def same_text(model_dir: Path, grid: Grid, *, bitwise: bool = False, **mode: Any) -> None:
    tokens, logprobs = generate(model_dir, grid, **mode)
    expected_tokens, expected = generate(model_dir, Grid.single(), **mode)
    if not grid.is_last_stage:
        return
    assert tokens == expected_tokens
    error = float((logprobs - expected).abs().max())
    assert error <= TOLERANCE, f"log-probabilities differ by {error:.2e}"
    assert not bitwise or torch.equal(logprobs, expected), "not bitwise equal"


def same_encoding(model_dir: Path, grid: Grid) -> None:
    results = []
    bounds = [0, 11, 12, 30]
    positions_T = torch.cat([torch.arange(b - a) for a, b in pairwise(bounds)])
    for place in (grid, Grid.single()):
        stage = load(model_dir, place)
        assert isinstance(stage, EncoderStage)
        view = PackedView(bounds, causal=False)
        with torch.inference_mode():
            x = torch.arange(30)
            hidden_TH = through_stages(
                stage, x, place, lambda x, s=stage, v=view: s(x, positions_T=positions_T, view=v), torch.float32
            )
            results.append(stage.pool(hidden_TH, bounds))
    if grid.is_last_stage:
        assert (results[0] - results[1]).abs().max() <= TOLERANCE


def same_gradients(model_dir: Path, grid: Grid) -> None:
    """The loss is a fixed weighting of all logits; each rank's gradients are its slices of one process' gradients."""
    stages = [load(model_dir, place, dtype=torch.float64, prepare=False) for place in (Grid.single(), grid)]
    config = stages[0].config
    weights_TV = torch.randn(24, config.vocab_size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for stage in stages:
        assert isinstance(stage, CausalStage)
        first = stage.grid.tp.rank * stage.vocab_local
        hidden_TH = stage(torch.arange(24), positions_T=torch.arange(24), view=PackedView([0, 10, 24], causal=True))
        logits_TV = stage.lm_head(copy_to_tp(hidden_TH, stage.grid.tp))
        mine_TV = weights_TV[:, first : first + stage.vocab_local]
        reduce_from_tp((logits_TV[:, : mine_TV.shape[1]] * mine_TV).sum(), stage.grid.tp).backward()
    whole = dict(stages[0].named_parameters())
    shapes = global_shapes(config)
    kv_replicas = grid.tp.size > config.num_kv_heads and grid.tp.size % config.num_kv_heads == 0
    for name, parameter in stages[1].named_parameters():
        shape = shapes[source_name(name, config)]
        place = local_slice(name, shape, config=config, tp=grid.tp.size, tp_rank=grid.tp.rank)
        if kv_replicas and (".k_proj." in name or ".v_proj." in name):
            continue  # a replica has the gradient of its own query heads; training sums them
        check_slice(name, parameter.grad, whole[name].grad, place)


def check_slice(name: str, mine: Tensor | None, whole: Tensor | None, place: LocalSlice) -> None:
    assert mine is not None, name
    assert whole is not None, name
    real = tuple(slice(0, size) for size in place.source_shape)
    torch.testing.assert_close(mine[real], whole[place.slices], rtol=1e-10, atol=1e-12, msg=lambda m: f"{name}: {m}")
    padding = mine.clone()
    padding[real] = 0
    assert not padding.any(), f"{name}: padding has a gradient"


def invariant_bits(model_dir: Path, grid: Grid, *, dtype: torch.dtype) -> None:
    """E2 across ranks: beside another sequence or alone, the same bits at this layout."""
    alone = generate(model_dir, grid, dtype=dtype, batch_invariant=True)
    beside = generate(model_dir, grid, dtype=dtype, batch_invariant=True, beside=150)
    assert alone[0] == beside[0]
    assert torch.equal(alone[1], beside[1])


def check_collectives(grid: Grid) -> None:
    axis = grid.tp
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        shares = [torch.arange(24, dtype=dtype).view(4, 6) + rank for rank in range(axis.size)]
        mine, total = shares[axis.rank], torch.stack(shares).sum(0)
        before = mine.clone()
        assert torch.equal(collectives.all_reduce(mine, axis, label="t"), total)
        assert torch.equal(collectives.all_reduce_max(mine, axis, label="t"), shares[-1])
        for dim in (0, 1, -1):
            assert torch.equal(collectives.all_gather(mine, axis, dim=dim, label="t"), torch.cat(shares, dim))
        share = 4 // axis.size if axis.size != 3 else 0
        if share:
            part = collectives.reduce_scatter(mine, axis, dim=0, label="t")
            assert torch.equal(part, total[axis.rank * share : (axis.rank + 1) * share])
        assert torch.equal(mine, before), "a collective changed its input"
        sent = collectives.broadcast_(mine.clone(), axis, src=axis.ranks[-1], label="t")
        assert torch.equal(sent, shares[-1])
    collectives.barrier(grid.world, label="t", timeout_s=30)


def check_counts(model_dir: Path, grid: Grid) -> None:
    """Two all-reduces of T x H a layer forward, two backward, as the paper counts; one for the embedding."""
    stage = load(model_dir, grid, prepare=False)
    with recording() as calls:
        hidden_TH = stage(torch.arange(8), positions_T=torch.arange(8), view=PackedView([0, 8], causal=True))
        forward = len(calls)
        hidden_TH.sum().backward()
    elements = 8 * stage.config.hidden_size
    assert [call.elements for call in calls] == [elements] * len(calls)
    assert forward == 1 + 2 * stage.config.num_layers
    assert len(calls) - forward == 2 * stage.config.num_layers


def check_gradcheck(grid: Grid) -> None:
    """g after f: y = sum over ranks of x has gradient = ranks times the incoming one, by finite differences."""
    x = torch.arange(4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: copy_to_tp(reduce_from_tp(t * 2.0, grid.tp), grid.tp) / grid.tp.size, x)


def check_missing_rank(grid: Grid) -> None:
    """A rank that does not come: a typed error that names label, axis and ranks, within the limit. Ends the group."""
    if grid.rank == grid.world_size - 1:
        time.sleep(4)  # the absence itself, not a wait for a result
        return
    began = time.monotonic()
    with pytest.raises(CollectiveError, match="'roll call' over world ranks") as caught:
        collectives.barrier(grid.world, label="roll call", timeout_s=1.5)

    assert caught.value.ranks == grid.world.ranks
    assert time.monotonic() - began < 4


def check_sockets() -> None:
    """S2: this process listens on loopback alone (the kernel's table is read, for the sockets that we own)."""
    inodes = set()
    for entry in os.scandir("/proc/self/fd"):
        try:
            target = os.readlink(entry.path)
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    listening = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:] if Path(table).exists() else []:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                listening.append(fields[1].split(":")[0])
    assert listening, "no listening socket found: the check is blind"
    loopback = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")
    assert all(address in loopback for address in listening), listening


def cases(world_size: int, models: Path) -> dict[str, Callable[[], None]]:
    """Every case of this world size, by the name that test_ranks.py knows."""
    grids = {layout: Grid.build(tp=layout[0], pp=layout[1]) for layout in LAYOUTS[world_size]}
    tensor_grid = grids[(world_size, 1)]
    result: dict[str, Callable[[], None]] = {"sockets": check_sockets}
    for (tp, pp), grid in grids.items():
        at = f"tp{tp}pp{pp}"
        for model in ("llama", "gpt2", "untied"):
            # Ranks hold whole terms of `untied` (8 heads, ffn 768): with our kernels the layout shows in no bit.
            is_exact = tp == 1 or (model == "untied" and not unavailable_reason())
            result[f"text-{model}-{at}"] = lambda g=grid, m=model, b=is_exact: same_text(models / m, g, bitwise=b)
        mode = {"bitwise": True, "dtype": torch.bfloat16, "batch_invariant": True}
        result[f"text-untied-bf16-{at}"] = lambda g=grid, mode=mode: same_text(models / "untied", g, **mode)
        result[f"encoding-{at}"] = lambda g=grid: same_encoding(models / "bert", g)
        result[f"invariant-fp32-{at}"] = lambda g=grid: invariant_bits(models / "llama", g, dtype=torch.float32)
        result[f"invariant-bf16-{at}"] = lambda g=grid: invariant_bits(models / "llama", g, dtype=torch.bfloat16)
    for model in ("llama", "gpt2", "untied"):
        result[f"gradients-{model}"] = lambda m=model: same_gradients(models / m, tensor_grid)
    result["collectives"] = lambda: check_collectives(tensor_grid)
    result["counts"] = lambda: check_counts(models / "llama", tensor_grid)
    result["gradcheck"] = lambda: check_gradcheck(tensor_grid)
    result["missing_rank"] = lambda: check_missing_rank(tensor_grid)  # last: it breaks the group
    return result


LAYOUTS: dict[int, list[tuple[int, int]]] = {2: [(2, 1), (1, 2)], 3: [(3, 1)], 4: [(4, 1), (2, 2), (1, 4)]}


def case_names(world_size: int) -> list[str]:
    """The names of `cases`, without a process group."""
    names = ["sockets"]
    for tp, pp in LAYOUTS[world_size]:
        kinds = ["text-llama", "text-gpt2", "text-untied", "text-untied-bf16", "encoding"]
        kinds += ["invariant-fp32", "invariant-bf16"]
        names += [f"{kind}-tp{tp}pp{pp}" for kind in kinds]
    return [
        *names,
        "gradients-llama",
        "gradients-gpt2",
        "gradients-untied",
        "collectives",
        "counts",
        "gradcheck",
        "missing_rank",
    ]


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
