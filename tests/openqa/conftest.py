"""One server for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from open_questions import Open, serving_open


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """Tests give their indexes names of their own."""
    with serving_open(tmp_path_factory.mktemp("open")) as running:
        yield running
