"""The command is the composition root: verbs of the other packages are loaded here, when they are installed."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.util import find_spec
from types import ModuleType

from trilithon.cli._parser import UsageError

_NEEDS: Mapping[str, tuple[str, ...]] = {
    "client": (),  # modules of the other packages that need no more than the base install
    "serve": ("torch", "starlette", "uvicorn", "tokenizers", "safetensors", "jinja2", "prometheus_client"),
    "engine": ("torch", "tokenizers", "safetensors"),
    "train": ("torch", "tokenizers", "safetensors", "matplotlib"),
    "jobs": ("torch", "tokenizers", "safetensors", "jinja2", "starlette", "sqlalchemy", "alembic", "python_multipart"),
}


def load(module: str, *, verb: str, extra: str) -> ModuleType:
    """Import a module of the server or the core; UsageError when the extra that it needs is not installed."""
    missing = [name for name in (module.partition(".")[0], *_NEEDS[extra]) if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"trilithon {verb} needs the `{extra}` extra. Given: an installation without {', '.join(missing)}. "
            f"Install it with: pip install 'trilithon[{extra}]'"
        )
    return importlib.import_module(module)
