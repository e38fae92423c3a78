"""Several ranks against one process. Ranks start once for all cases of a world size; the cases are in rank_cases.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import LIMIT_S, load_script, run_ranks
from tiny import tiny_bert, tiny_gpt2, tiny_llama

SCRIPT = Path(__file__).with_name("rank_cases.py")


CASES = load_script(SCRIPT)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models whose sizes ranks don't divide (3 groups of 3 heads, 5 heads, odd vocabulary), and one, `untied`."""
    root = tmp_path_factory.mktemp("ranks") / "models"
    tiny_llama(root / "llama", layers=4, hidden=72, heads=9, groups=3, ffn=100, vocab=391, scale=0.3)
    whole = {"heads": 8, "groups": 2, "head_dim": 16, "ffn": 768}
    tiny_llama(root / "untied", layers=5, hidden=64, tied=False, scale=0.3, **whole)
    tiny_gpt2(root / "gpt2", layers=4, hidden=60, heads=5, scale=0.3)
    tiny_bert(root / "bert", layers=4, hidden=60, heads=5, ffn=90)
    return root


@pytest.fixture(scope="module")
def outcomes(models: Path) -> Callable[[int], list[dict[str, str]]]:
    """A function from a number of ranks to what each rank reports of each case."""

    @functools.cache
    def run(world_size: int) -> list[dict[str, str]]:
        work_dir = models.parent / f"world{world_size}"
        work_dir.mkdir()
        (work_dir / "models").symlink_to(models)
        return run_ranks(SCRIPT, world_size, work_dir)

    return run


BARS = {"text": "E1", "encoding": "E1", "invariant": "E2", "sockets": "S2"}
ALL = [
    pytest.param(size, name, id=f"{BARS.get(name.split('-')[0], 'core')}-{size}ranks-{name}")
    for size in CASES.LAYOUTS
    for name in CASES.case_names(size)
]


@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize(("world_size", "case"), ALL)
def test_E1_E2_S2_ranks(world_size: int, case: str, outcomes: Callable[[int], list[dict[str, str]]]) -> None:
    """
    Each case holds on each rank; what a case checks is said in rank_cases.py.

    Inverse: leaving out the paper's f turns `gradients-*` red, adding the row bias on every rank before the sum turns
    `text-gpt2-tp*` red, rounding each rank's share to fp32 before the sum turns `text-untied-tp*` red, `env://` turns
    `sockets` red.
    """
    reports = outcomes(world_size)

    assert len(reports) == world_size
    assert [report.get(case, "never ran") for report in reports] == ["ok"] * world_size
