"""The executor on several ranks against one process. Ranks start once per world size; cases: pipeline_cases.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import LIMIT_S, load_script, run_ranks

from trilithon_parallel.grid import Axis
from trilithon_parallel.p2p import split

SCRIPT = Path(__file__).with_name("pipeline_cases.py")


CASES = load_script(SCRIPT).CASES


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, str]]]:
    """A function from a number of ranks to what each rank reports of each case."""

    @functools.cache
    def run(world_size: int) -> list[dict[str, str]]:
        return run_ranks(SCRIPT, world_size, tmp_path_factory.mktemp(f"world{world_size}"), "cases")

    return run


@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize(
    ("world_size", "case"),
    [pytest.param(size, name, id=f"{size}ranks-{name}") for size, names in CASES.items() for name in names],
)
def test_E8_pipeline(world_size: int, case: str, outcomes: Callable[[int], list[dict[str, str]]]) -> None:
    """
    Losses and gradients are those of one process, bit for bit without tensor parallelism; and what the case adds.

    Inverse: backwards of GPipe in another order turn `gpipe-*` red, keeping outputs or graphs turns every case with
    backwards red, announcing a chunk after each backward turns `hooks` red, sending the same part from every tp rank
    turns `tp2-*` red, receives that stand right before their ops turn `order-*` red.
    """
    reports = outcomes(world_size)

    assert len(reports) == world_size
    assert [report.get(case, "never ran") for report in reports] == ["ok"] * world_size


@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize("num_microbatches", [4, 5])
def test_E8_two_ranks_with_two_chunks(num_microbatches: int, outcomes: Callable[[int], list[dict[str, str]]]) -> None:
    """
    Where the rank before is the rank after, gradients are never taken for activations; also with 5 micro-batches.

    Users' report 11 (Megatron-LM#1586, torchtitan#771). With tags, and by order alone in blocking channels.
    """
    for case in (f"interleaved-p2v2m{num_microbatches}", f"order-p2v2m{num_microbatches}"):
        assert [report.get(case, "never ran") for report in outcomes(2)] == ["ok"] * 2


def test_swapped_messages_are_an_error_and_no_hang(tmp_path: Path) -> None:
    """
    In debug mode the rank that gets another message than it expects says so; its peer learns that it left.

    Inverse: without the comparison of headers the step ends with a wrong loss, and this is red.
    """
    sender, receiver = run_ranks(SCRIPT, 2, tmp_path, "swapped", limit_s=60)

    assert receiver["outcome"].startswith(
        "PipelineError: pipeline rank 1 expected the activation of micro-batch 0 for stage 1 with 96 elements from "
        "rank 0. Given: the activation of micro-batch 1 for stage 1 with 96 elements."
    )
    assert sender["outcome"].startswith("CollectiveError")


@given(rows=st.integers(0, 9), hidden=st.integers(1, 5), tp=st.integers(1, 8))
def test_parts_join_to_the_whole(rows: int, hidden: int, tp: int) -> None:
    """Every tp rank's part has the same size; joined, they are the tensor; where rows divide, a part is whole rows."""
    x = torch.arange(rows * hidden, dtype=torch.float32).view(rows, hidden)
    parts = [split(x, Axis("tp", rank, tp, tuple(range(tp)))) for rank in range(tp)]

    assert len({part.shape for part in parts}) == 1
    assert torch.equal(torch.cat(parts)[: x.numel()].view(x.shape), x)
    if rows % tp == 0:
        assert all(torch.equal(part.view(-1, hidden), rows_) for part, rows_ in zip(parts, x.chunk(tp), strict=False))
