"""The distribution: built as a user's installer builds it, installed away from the tree, and imported."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PACKAGES = {"trilithon", "trilithon_finetune", "trilithon_parallel", "trilithon_server"}

IMPORT_EVERYTHING = """
import importlib, json, pkgutil, sys
names = []
for package in %r:
    module = importlib.import_module(package)
    names.append(package)
    for info in pkgutil.walk_packages(module.__path__, package + "."):
        if not info.name.endswith("__main__"):
            importlib.import_module(info.name)
            names.append(info.name)
print(json.dumps({"names": names, "files": {n: sys.modules[n].__file__ for n in %r}}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command away from the tree and return what it printed; a failure shows its output."""
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist (`build` does so when neither is asked for by name)."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, REPO, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the wheel and its base requirements alone."""
    home = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", home / "venv", cwd=home)
    run(
        home / "venv/bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
        "--constraint", REPO / "constraints.txt", wheel, cwd=home,
    )  # fmt: skip
    return home


def test_wheel_holds_the_four_packages_and_the_playground(wheel: Path) -> None:
    """Top-level names are the four import packages; nothing like `server` or `tests` reaches site-packages."""
    names = zipfile.ZipFile(wheel).namelist()

    top_level = {n.split("/")[0] for n in names if ".dist-info/" not in n}
    assert top_level == PACKAGES
    assert "trilithon_server/web/index.html" in names
    assert {f"{p}/py.typed" for p in PACKAGES} <= set(names)
    python_files = [n for n in names if n.endswith(".py")]
    assert len(python_files) == len([p for p in tracked_sources() if p.suffix == ".py"])


def test_base_install_runs_the_command_without_torch(clean_environment: Path) -> None:
    """The base install is enough for the client and the command, and brings neither torch nor numpy."""
    python = clean_environment / "venv/bin/python"
    code = "import sys, trilithon, trilithon.cli; print([m for m in ('torch', 'numpy') if m in sys.modules])"

    assert run(python, "-c", code, cwd=clean_environment).strip() == "[]"
    assert "serve" in run(clean_environment / "venv/bin/trilithon", "--help", cwd=clean_environment)
    installed = run(python, "-m", "pip", "list", "--format", "json", cwd=clean_environment)
    assert not {"torch", "numpy"} & {p["name"].lower() for p in json.loads(installed)}


def test_every_module_of_the_wheel_imports(clean_environment: Path) -> None:
    """With the other requirements at hand, each module imports from the wheel, not from the tree."""
    site = next((clean_environment / "venv/lib").glob("python*/site-packages"))
    # A path in a .pth file is added without reading the .pth files inside it, so the editable install stays out.
    (site / "requirements.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    code = IMPORT_EVERYTHING % (sorted(PACKAGES), sorted(PACKAGES))

    report = json.loads(run(clean_environment / "venv/bin/python", "-c", code, cwd=clean_environment).splitlines()[-1])

    assert all(Path(f).is_relative_to(site) for f in report["files"].values()), report["files"]
    assert len(report["names"]) > len(PACKAGES)


def tracked_sources() -> list[Path]:
    """Files that belong in the wheel's four packages, as the tree has them."""
    roots = ["server/trilithon_server", "parallel/trilithon_parallel", "finetune/trilithon_finetune"]
    roots.append("clients/python/trilithon")
    return [p for r in roots for p in (REPO / r).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
