"""One training step at every kind of layout against one process (bar E8); the cases are in step_cases.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import LIMIT_S, load_script, run_ranks

SCRIPT = Path(__file__).with_name("step_cases.py")


CASES = load_script(SCRIPT).CASES


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, str]]]:
    """A function from a number of ranks to what each rank reports of each case."""

    @functools.cache
    def run(world_size: int) -> list[dict[str, str]]:
        return run_ranks(SCRIPT, world_size, tmp_path_factory.mktemp(f"world{world_size}"))

    return run


@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize(
    ("world_size", "case"),
    [pytest.param(size, case.name, id=f"{size}ranks-{case.name}") for size, cases in CASES.items() for case in cases],
)
def test_E8_steps_equal_one_process(
    world_size: int, case: str, outcomes: Callable[[int], list[dict[str, str]]]
) -> None:
    """
    Losses, gradient norms and weights of three steps are those of one process, at every layout, and so is afterwards
    how many tokens the model is right about.

    Asked for at Megatron-LM#1736 and Megatron-LM#445. Inverse check: with the counts of every tp rank added up, the
    layouts with tp fail.
    """
    reports = outcomes(world_size)

    assert [report.get(case, "never ran") for report in reports] == ["ok"] * world_size
