"""The package as strangers import it: light, exported on purpose, typed."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import trilithon

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "numpy", "grpc", "httpx", "pydantic", "google.protobuf", "rich", "asyncio", "yaml")


def test_import_is_light() -> None:
    """`import trilithon` loads neither torch nor numpy, nor any library that a first call can load."""
    code = f"import sys, trilithon; print([name for name in {HEAVY!r} if name in sys.modules])"

    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()

    assert loaded == "[]"


def test_http_needs_no_grpc_and_the_other_way_round() -> None:
    """A client loads the library of its own protocol only."""
    code = (
        "import sys, trilithon\n"
        "trilithon.Client('http://a').close(); assert 'grpc' not in sys.modules\n"
        "del sys.modules['httpx']\n"
        "trilithon.Client('grpc://a').close(); assert 'httpx' not in sys.modules and 'torch' not in sys.modules\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")


def test_exports_are_on_purpose() -> None:
    """`__all__` is sorted, complete and resolvable, and errors.py has no class that is not exported."""
    public = {
        name
        for name, value in vars(trilithon).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("trilithon")
    }

    assert list(trilithon.__all__) == sorted(trilithon.__all__)
    assert public | {"__version__", "EntityInput", "PromptInput"} == set(trilithon.__all__)
    tree = [name for name, value in vars(trilithon.errors).items() if isinstance(value, type)]
    assert [name for name in tree if name not in trilithon.__all__ and name[0].isupper()] in ([], ["Sequence"])


def test_version_is_the_distributions() -> None:
    """The version is written in two files, which agree."""
    assert trilithon.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_types_are_exact(checker: str) -> None:
    """The overloads give exact types under both checkers. Seen to fail with another type in the overload on `n`."""
    file = ROOT / "tests" / "typing" / "client_types.py"
    options = ["--strict", "--no-incremental"] if checker == "mypy" else ["--pythonpath", sys.executable]
    done = subprocess.run(
        [str(Path(sys.executable).with_name(checker)), *options, str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if checker == "pyright" and done.returncode not in (0, 1):
        pytest.skip(f"pyright cannot run here: {done.stderr.strip()[:200]}")

    assert done.returncode == 0, done.stdout + done.stderr
