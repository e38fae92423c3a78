"""
The local model store, read-only: where models lie and what is there. Needs no torch.

    >>> from trilithon import _store
    >>> [model.name for model in _store.list_models()]  # doctest: +SKIP
    ['smollm2-135m-instruct']

`trilithon pull` fills it (`trilithon_parallel.weights.pull`); this module only looks.
"""

from __future__ import annotations

import difflib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trilithon.errors import NotFound

MANIFEST_FILE = "trilithon.json"

KNOWN_MODELS = ("all-minilm-l6-v2", "smollm2-135m-instruct")
"""Short names that `trilithon pull` takes; `trilithon_parallel.weights.pull` has their sources (a test compares)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredModel:
    """
    One model of the store.

    Attributes:
        digest: SHA-256 over the model's files, in hex.
        licence: as its publisher states it; "unknown" where nothing says.
        size_bytes: of all files.
        created: when it was pulled: UTC, ISO 8601.
        problem: empty, or why the model cannot be used as it is (a file is gone or has another size).
    """

    name: str
    path: Path
    source: str
    digest: str
    licence: str
    dtype: str | None
    size_bytes: int
    created: str
    problem: str = ""


def home() -> Path:
    """Where everything of this user lies: `$TRILITHON_HOME`, by default `~/.cache/trilithon`."""
    configured = os.environ.get("TRILITHON_HOME")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "trilithon"


def models_dir() -> Path:
    """The directory of models; it may not exist yet."""
    return home() / "models"


def list_models() -> list[StoredModel]:
    """Every model of the store, by name; damaged ones say what is wrong with them."""
    root = models_dir()
    if not root.is_dir():
        return []
    paths = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [model for path in paths if (model := _read(path)) is not None]


def resolve(name_or_path: str | os.PathLike[str]) -> Path:
    """
    The model directory that a name or path means.

    A path is anything with a separator in it, or a directory that exists; a bare word is a name of the store.

    Args:
        name_or_path: `smollm2-135m-instruct`, `./model`, `/data/model`, `~/model`.
    Returns:
        The directory, absolute.
    Raises:
        NotFound: `model_not_found`; the message names the nearest model and how to fetch it.
    """
    text = os.fspath(name_or_path)
    path = Path(text).expanduser()
    is_name = path.name == text and text not in (".", "..")
    if is_name and (models_dir() / text / MANIFEST_FILE).is_file():
        model = _read(models_dir() / text)
        if model is not None and model.problem:
            raise NotFound(
                f"model {text!r} in the store is damaged: {model.problem}.",
                code="model_not_found",
                hint=f"Run `trilithon pull {model.source} --name {text}` to fetch it again.",
            )
        return (models_dir() / text).resolve()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise NotFound(
            f"model must be a directory or a name in the store. Given: the file {text!r}.",
            code="model_not_found",
            hint=f"For a GGUF file, run `trilithon pull file:{text}` first.",
        )
    raise NotFound(_unknown(text, is_name=is_name), code="model_not_found", hint=_advice(text))


def _unknown(text: str, *, is_name: bool) -> str:
    if not is_name:
        return f"model directory {text!r} does not exist."
    held = [model.name for model in list_models()]
    return f"model {text!r} is not in the store. There: {', '.join(held) if held else 'nothing yet'}."


def _advice(text: str) -> str:
    if text in KNOWN_MODELS:
        return f"Run `trilithon pull {text}` first."
    held = [model.name for model in list_models()]
    names = [*held, *(name for name in KNOWN_MODELS if name not in held)]
    # People type the first word of a name: both it and the whole count as near.
    spellings = {spelling: name for name in reversed(names) for spelling in (name.split("-")[0], name)}
    found = difflib.get_close_matches(text.lower(), spellings, n=1)
    if not found:
        return "Give the path of a model directory, or fetch a model with `trilithon pull`."
    near = spellings[found[0]]
    return f"Did you mean {near!r}?" if near in held else f"Did you mean {near!r}? Run `trilithon pull {near}` first."


def _read(path: Path) -> StoredModel | None:
    """A model from its manifest; None for directories that are none of ours."""
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
        files = {name: int(record["num_bytes"]) for name, record in manifest["files"].items()}
        return StoredModel(
            name=path.name,
            path=path,
            source=str(manifest["source"]),
            digest=str(manifest["digest"]),
            licence=str(manifest["licence"]),
            dtype=manifest.get("dtype"),
            size_bytes=int(manifest["size_bytes"]),
            created=str(manifest["created"]),
            problem=_problem(path, files),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _problem(path: Path, files: dict[str, int]) -> str:
    for name, num_bytes in files.items():
        try:
            size = (path / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != num_bytes:
            return f"{name} has {size} bytes instead of {num_bytes}"
    return ""
