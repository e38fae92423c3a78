"""Task heads, preferences and learning rates at every layout (bars E7, E8, E10); the cases are in head_cases.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_heads import CLASSES
from ranks import LIMIT_S, load_script, run_ranks

from trilithon_parallel.config import load_config
from trilithon_parallel.weights.loader import check_weights

SCRIPT = Path(__file__).with_name("head_cases.py")
CASES, LAYOUTS = (getattr(load_script(SCRIPT), name) for name in ("CASES", "LAYOUTS"))
WORLDS = sorted({*CASES, *LAYOUTS})
Outcomes = Callable[[int], list[dict[str, str]]]


@pytest.fixture(scope="module")
def outcomes(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """A function from a number of ranks to what each rank reports; one process comes before all others."""

    @functools.cache
    def run(world_size: int) -> list[dict[str, str]]:
        if world_size > 1:
            run(1)
        return run_ranks(SCRIPT, world_size, tmp_path_factory.mktemp(f"heads{world_size}"), models)

    return run


@pytest.mark.timeout(2 * LIMIT_S)
@pytest.mark.parametrize(
    ("world_size", "case"),
    [pytest.param(size, case.name, id=case.name) for size, cases in CASES.items() for case in cases],
)
def test_E8_heads_learn_as_in_one_process(world_size: int, case: str, outcomes: Outcomes) -> None:
    """
    Losses, gradient norms, weights and predictions of three steps are those of one process, for every head, for
    preferences, and with learning rates of their own for some parameters.

    Inverses seen red: gradients of a head summed over tp under sequence parallelism; its dropout drawn as if it were
    the stage's first layer.
    """
    assert [report.get(case, "never ran") for report in outcomes(world_size)] == ["ok"] * world_size


def at(check: str) -> pytest.MarkDecorator:
    """Every layout as (number of ranks, the case's name)."""
    cases = [(size, f"{check}-{'-'.join(map(str, layout))}") for size, found in LAYOUTS.items() for layout in found]
    return pytest.mark.parametrize(("world_size", "case"), cases, ids=[case for _, case in cases])


@pytest.mark.timeout(2 * LIMIT_S)
@at("logits")
def test_E10_files_of_transformers_give_its_logits(world_size: int, case: str, outcomes: Outcomes) -> None:
    """What transformers saved is read at every layout, and `predict` says what it says."""
    assert [report.get(case, "never ran") for report in outcomes(world_size)] == ["ok"] * world_size


@pytest.mark.timeout(2 * LIMIT_S)
@at("begins")
def test_new_models_begin_alike_at_every_layout(world_size: int, case: str, outcomes: Outcomes) -> None:
    """
    A bare encoder gets a task head, a masked-LM head, more rows or another vocabulary: the same bits everywhere.

    Inverse seen red: a rank that draws its slice from a seed of its own.
    """
    assert [report.get(case, "never ran") for report in outcomes(world_size)] == ["ok"] * world_size


@pytest.mark.timeout(2 * LIMIT_S)
@at("saves")
def test_E7_task_models_resume_at_every_layout(world_size: int, case: str, models: Path, outcomes: Outcomes) -> None:
    """A checkpoint of one process goes on at the layout, and the layout's own opens in transformers and in ours."""
    assert [report.get(case, "never ran") for report in outcomes(world_size)] == ["ok"] * world_size

    for kind, opened in CLASSES.items():
        directory = models / f"run-{kind}-{case.removeprefix('saves-')}" / "step_00000001"
        _, found = opened.from_pretrained(directory, output_loading_info=True)
        assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        check_weights(directory, config=load_config(directory))
