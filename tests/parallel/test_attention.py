"""Paged serving against the packed forward, and batch invariance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_gpt2, tiny_llama
from torch import Tensor

from trilithon_parallel.activations import rowwise
from trilithon_parallel.attention import PackedView, PagedBatch, PagedKVCache, similar_lengths
from trilithon_parallel.config import load_config
from trilithon_parallel.grid import Grid
from trilithon_parallel.models import CausalStage

# fp32, another order of additions (bars E1, E2).
TOLERANCE = 1e-5
TOKENS = torch.randint(0, 256, (4, 400), generator=torch.Generator().manual_seed(7))
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llama": lambda path: tiny_llama(path, layers=2, hidden=72, heads=9, groups=3, head_dim=16, ffn=100, scale=0.15),
    "gpt2": lambda path: tiny_gpt2(path, context=512, hidden=48, heads=3, scale=0.3),
}


def packed(stage: CausalStage, tokens_T: Tensor) -> Tensor:
    num = len(tokens_T)
    with torch.inference_mode():
        view = PackedView([0, num], causal=True)
        return stage.gather_logits(stage(tokens_T, positions_T=torch.arange(num), view=view)).log_softmax(-1)


def served(serve: Any, plan: list[dict[int, int]]) -> dict[int, Tensor]:
    """Run steps of (sequence -> number of next tokens); log-probabilities of each sequence's every position."""
    parts: dict[int, list[Tensor]] = {}
    for step in plan:
        new = {i: TOKENS[i, serve.lens[i] : serve.lens[i] + num] for i, num in step.items()}
        for i, logits_TV in serve.step(new).items():
            parts.setdefault(i, []).append(logits_TV.log_softmax(-1))
    return {i: torch.cat(part) for i, part in parts.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_E3_paged_chunked_and_mixed_steps_equal_one_forward(
    family: str, tmp_path: Path, load_model: Callable[..., Any], server: Any
) -> None:
    """Prefill in chunks, beside decodes of other sequences, at lengths that need several decode groups."""
    stage = load_model(FAMILIES[family](tmp_path / "model"))
    plan = [{0: 5, 1: 300, 2: 17}, {0: 1, 1: 40, 2: 16}, {2: 1, 0: 1}, *[{0: 1, 1: 1, 2: 1}] * 4]

    got = served(server(stage, num_sequences=3, max_len=400), plan)

    for i, logprobs_TV in got.items():
        expected_TV = packed(stage, TOKENS[i, : len(logprobs_TV)])
        assert (logprobs_TV - expected_TV).abs().max() <= TOLERANCE


def test_E2_alone_and_in_a_batch_within_tolerance(tmp_path: Path, load_model: Callable[..., Any], server: Any) -> None:
    """fp32: a request alone = the same request among others. (Inverse: gathering a neighbour's block fails it.)"""
    stage = load_model(FAMILIES["llama"](tmp_path / "model"))
    alone = served(server(stage, num_sequences=4, max_len=400), [{0: 40}, *[{0: 1}] * 8])[0]
    batched = served(
        server(stage, num_sequences=4, max_len=400), [{1: 200, 0: 40}, {2: 3, 3: 90, 0: 1}, *[{1: 1, 0: 1, 3: 1}] * 7]
    )[0]

    assert (alone - batched).abs().max() <= TOLERANCE
    assert torch.equal(alone.argmax(-1), batched.argmax(-1))


INVARIANT_PLANS: list[list[dict[int, int]]] = [
    [{0: 60}, *[{0: 1}] * 4],
    [{0: 7}, {0: 53}, *[{0: 1}] * 4],  # chunked
    [{0: 1}] * 64,  # token by token
    [{1: 300, 0: 60}, {0: 1, 2: 31}, {2: 1, 0: 1, 1: 1}, {0: 1, 1: 2}, {3: 9, 0: 1}],  # among others
    [{3: 350, 2: 15}, {2: 1, 0: 33, 1: 100}, {2: 1, 3: 1, 0: 27}, *[{2: 1, 0: 1, 1: 1, 3: 1}] * 4],
]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_E2_E3_batch_invariant_mode_is_bitwise(
    family: str, dtype: torch.dtype, threads: int, tmp_path: Path, load_model: Callable[..., Any], server: Any
) -> None:
    """
    Alone, chunked, token by token, among others: the same bits, at any dtype and thread count.

    Inverse: a view that ignores the flag fails it with torch's attention, as the next test shows too.
    """
    torch.set_num_threads(threads)
    stage = load_model(FAMILIES[family](tmp_path / "model"), dtype=dtype, batch_invariant=True)

    results = [served(server(stage, num_sequences=4, max_len=400), plan)[0] for plan in INVARIANT_PLANS]

    for result in results[1:]:
        assert torch.equal(results[0], result)


def test_E2_without_the_mode_bits_differ_at_bf16(tmp_path: Path, load_model: Callable[..., Any], server: Any) -> None:
    """The bitwise test above can fail: with the mode off, torch's attention gives some plan other bits."""
    if server.native:
        pytest.skip("the compiled kernel adds in one order whatever the mode")
    model_dir = tiny_llama(tmp_path / "model", layers=4, hidden=72, heads=9, groups=3, ffn=100, scale=1.0)
    stage = load_model(model_dir, dtype=torch.bfloat16)

    results = [served(server(stage, num_sequences=4, max_len=400), plan)[0] for plan in INVARIANT_PLANS]

    assert not all(torch.equal(results[0], result) for result in results[1:])


def test_E2_rowwise_activations_do_not_see_their_place() -> None:
    """Each element alone, in any row: the same bits. (Inverse: plain gelu differs, which the last line checks.)"""
    x_TF = torch.randn(40, 100, generator=torch.Generator().manual_seed(1))
    whole_TF = rowwise(F.gelu, x_TF)

    assert torch.equal(torch.cat([rowwise(F.gelu, row_TF) for row_TF in torch.split(x_TF, 1)]), whole_TF)
    assert torch.equal(rowwise(F.gelu, x_TF.flip(0)).flip(0), whole_TF)
    assert not torch.equal(torch.cat([F.gelu(part) for part in x_TF.flatten().split(1)]), F.gelu(x_TF).flatten())


def test_a_poisoned_neighbour_changes_nothing(tmp_path: Path, load_model: Callable[..., Any], server: Any) -> None:
    """NaN in one sequence's blocks stays there: padding reads no other's. (Inverse: padding with block 0 fails it.)"""
    stage = load_model(FAMILIES["llama"](tmp_path / "model"))
    serve = server(stage, num_sequences=2, max_len=400)
    served(serve, [{0: 300, 1: 20}])
    for block in (0, *serve.tables[0]):  # block 0 belongs to nobody here
        serve.cache.kv_LKGNSC[:, :, :, block] = torch.nan

    logits = serve.step({0: TOKENS[0, 300:301], 1: TOKENS[1, 20:21]})

    assert not logits[0].isfinite().any()
    assert (logits[1].log_softmax(-1) - packed(stage, TOKENS[1, :21])[20:]).abs().max() <= TOLERANCE


def test_copy_block_and_its_size(tmp_path: Path) -> None:
    """Copy-on-write copies all layers, keys and values; the size is what the blocks take."""
    config, grid = load_config(FAMILIES["llama"](tmp_path / "model")), Grid.single()
    cache = PagedKVCache(config, grid, num_blocks=4, dtype=torch.float32)
    cache.kv_LKGNSC.normal_()
    cache.copy_block(1, 3)

    assert torch.equal(cache.kv_LKGNSC[:, :, :, 1], cache.kv_LKGNSC[:, :, :, 3])
    assert PagedKVCache.bytes_per_block(config, grid, torch.float32) * 4 == cache.kv_LKGNSC.nbytes


def test_slots_follow_the_block_table() -> None:
    """Token 15 ends the first block, token 16 starts the second."""
    slots_T = PagedBatch.slots([[3, 9]], [15], [3])

    assert slots_T.tolist() == [3 * 16 + 15, 9 * 16, 9 * 16 + 1]


def test_decode_groups_bound_the_padding() -> None:
    """One long sequence does not make many short ones pay for its length; together they are all members, once."""
    lens = [8000, *[100] * 31]
    groups = similar_lengths(list(range(32)), lens)

    assert groups == [[0], list(range(1, 32))]
    assert similar_lengths([0, 1, 2], [10, 300, 20]) == [[0, 1, 2]]
