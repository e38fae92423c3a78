"""What our source must not contain: unpickling (S1), fetching what a request names, running a model's code (S6)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "clients/python/trilithon",
    "server/trilithon_server",
    "parallel/trilithon_parallel",
    "finetune/trilithon_finetune",
)
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

BANNED_MODULES = (
    "pickle",
    "cPickle",
    "_pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "torch.distributed.rpc",
)
BANNED_CALLS = (
    "eval",
    "exec",
    "compile",
    "broadcast_object_list",
    "all_gather_object",
    "gather_object",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
)
FETCHERS = ("requests", "urllib.request", "aiohttp", "httpx", "urllib3", "ftplib", "http.client")


def findings(source: str) -> Iterator[str]:
    """What a file does that bar S1 forbids."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{name}" for name in names)]
            yield from (f"imports {name}" for name in names if _within(name, BANNED_MODULES))
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            own_method = isinstance(node.func, ast.Attribute)
            builtin = name in ("eval", "exec", "compile")
            if name in BANNED_CALLS and not (builtin and own_method):
                yield f"calls {name}"
            where = ast.unparse(node.func)
            if where in (
                "torch.load",
                "torch.jit.load",
                "np.load",
                "numpy.load",
                "torch.save",
                "importlib.import_module",
            ):
                allowed = where.endswith("import_module") or _keyword(node, "allow_pickle") == "False"
                if not allowed:
                    yield f"calls {where}"
            if _keyword(node, "trust_remote_code") == "True" or _keyword(node, "allow_pickle") == "True":
                yield f"{where} trusts what it reads"


def _within(name: str, banned: tuple[str, ...]) -> bool:
    return any(name == item or name.startswith(item + ".") for item in banned)


def _keyword(node: ast.Call, name: str) -> str | None:
    return next((ast.unparse(item.value) for item in node.keywords if item.arg == name), None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_S1_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    """No pickle in any spelling, no torch.load, no object collectives, no eval or exec, in any of our packages."""
    assert list(findings(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from marshal import loads",
        "import dill.source",
        "torch.load(f)",
        "torch.load(f, weights_only=True)",
        "np.load(f, allow_pickle=True)",
        "dist.broadcast_object_list(x)",
        "all_gather_object(a, b)",
        "eval('1')",
        "AutoModel.from_pretrained(d, trust_remote_code=True)",
    ],
)
def test_S1_the_walk_finds_what_it_looks_for(source: str) -> None:
    """The inverse check: each forbidden thing is found when it is there."""
    assert list(findings(source))


def test_S6_the_server_has_nothing_to_fetch_with() -> None:
    """Serving imports no HTTP client, so no URL of a request can be followed; pulling is a person's command."""
    for path in sorted((ROOT / "server/trilithon_server").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert not any(_within(name, FETCHERS) for name in names), f"{path.name} imports {names}"
