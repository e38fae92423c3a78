"""Cases that several ranks check together: a script is started once for all tests that look at its results."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks


@pytest.fixture(scope="session")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int, str], list[Any]]:
    """
    `on_ranks(script, world_size, case)`: what the case's function returned, rank by rank.

    A failure on any rank fails the test with that rank's traceback.
    """

    @functools.cache
    def reports(script: str, world_size: int) -> list[dict[str, Any]]:
        directory = tmp_path_factory.mktemp(f"{Path(script).stem}{world_size}")
        return run_ranks(Path(__file__).with_name(script), world_size, directory)

    def values(script: str, world_size: int, case: str) -> list[Any]:
        found = [report.get(case, {"error": "never ran"}) for report in reports(script, world_size)]
        errors = [f"rank {rank}: {result['error']}" for rank, result in enumerate(found) if "error" in result]
        assert not errors, "\n".join(errors)
        return [result["value"] for result in found]

    return values
