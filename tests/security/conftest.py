"""One server for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from front_server import Front, fronted


@pytest.fixture(scope="session")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    folder = tmp_path_factory.mktemp("front")
    with fronted(folder, "--set", f"server.store={folder / 'store'}") as running:
        yield running
