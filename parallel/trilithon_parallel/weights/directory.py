"""The weight files of a model directory: one safetensors file, or several with an index, checked against each other."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from trilithon_parallel.config import ModelError
from trilithon_parallel.weights.safetensors_io import (
    SafetensorsFile,
    TensorEntry,
    TensorSpec,
    split_shards,
    write_safetensors,
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

MAX_SHARD_BYTES = 5 * 1000**3
"""Size of a weight file, as `transformers` splits them."""

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Endings of files that are read by unpickling, which runs whatever code the file holds: never opened."""


class WeightFiles:
    """
    The tensors of a model directory, whichever file each is in.

    `stem` names another set of files with an index of its own (training checkpoints keep `optim` beside the model).

    Raises (from the constructor):
        ModelError: no weights, only pickled ones, a broken file, or an index that does not fit its files.
    """

    def __init__(self, model_dir: Path, *, stem: str = "model") -> None:
        self._files: dict[str, SafetensorsFile] = {}
        self.tensors: dict[str, TensorEntry] = {}
        self._file_of: dict[str, SafetensorsFile] = {}
        with contextlib.ExitStack() as on_error:
            on_error.callback(self.close)
            single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
            weight_map = _weight_map(model_dir, single=single, index=index)
            for file_name in sorted(set(weight_map.values())) if weight_map is not None else [single]:
                file = SafetensorsFile(model_dir / file_name)
                self._files[file_name] = file
                for name, entry in file.tensors.items():
                    self._add(name, entry, file, weight_map, index=index)
            if weight_map is not None and (missing := sorted(set(weight_map) - set(self.tensors))):
                raise ModelError(
                    f"{index} says that {weight_map[missing[0]]} holds tensor {missing[0]}, which it does not"
                    f"{and_more(missing)}.",
                    code="weights_missing",
                    hint="Copy or download all files of the model again.",
                )
            on_error.pop_all()

    def _add(
        self, name: str, entry: TensorEntry, file: SafetensorsFile, weight_map: Mapping[str, str] | None, *, index: str
    ) -> None:
        if weight_map is not None and weight_map.get(name) != file.path.name:
            raise ModelError(
                f"{file.path.name} tensor {name} must be listed in {index} under that file. "
                f"Given: {weight_map.get(name, 'no entry')}.",
                code="weights_invalid",
                hint="The files are of different exports: download all of them again.",
            )
        self.tensors[name] = entry
        self._file_of[name] = file

    def file_of(self, name: str) -> SafetensorsFile:
        """The open file that holds a tensor."""
        return self._file_of[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release every file; safe to call twice."""
        for file in self._files.values():
            file.close()


def write_shards(
    model_dir: Path,
    specs: Sequence[TensorSpec],
    produce: Callable[[TensorSpec], torch.Tensor],
    *,
    max_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """
    Write the weight files of a model directory: one, or several with an index where they exceed `max_bytes`.

    `specs` and `produce` are those of `safetensors_io.write_safetensors`; one tensor is in memory at a time.
    """
    shards = split_shards(specs, max_bytes=max_bytes)
    if len(shards) == 1:
        write_safetensors(model_dir / SINGLE_FILE, specs, produce)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(model_dir / file_name, shard, produce)
        weight_map |= {spec.name: file_name for spec in shard}
    index = {"metadata": {"total_size": sum(spec.num_bytes for spec in specs)}, "weight_map": weight_map}
    (model_dir / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def and_more(names: list[str]) -> str:
    """How an error that names the first of several says that there are others."""
    return (
        f" (and {len(names) - 1} more: {', '.join(names[1:4])}{', ...' if len(names) > 4 else ''})" if names[1:] else ""
    )


def _weight_map(model_dir: Path, *, single: str, index: str) -> dict[str, str] | None:
    """Tensor name -> file name from the index; None where there is one file and no index."""
    if (model_dir / single).exists() and (model_dir / index).exists():
        raise ModelError(
            f"the model directory holds both {single} and {index}, and only one of them can be the model.",
            code="weights_invalid",
            hint="Remove the one that is out of date.",
        )
    if (model_dir / single).exists():
        return None
    if not (model_dir / index).exists():
        raise _no_weights(model_dir, single=single, index=index)
    try:
        document: Any = json.loads((model_dir / index).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{index} is not readable JSON: {error}.", code="weights_invalid", hint="Download it again."
        ) from None
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(
            f"{index} weight_map must map tensor names to file names. Given: {weight_map!r:.200}.",
            code="weights_invalid",
            hint="Download it again.",
        )
    for name, file in weight_map.items():
        # Only a bare file name: an index must not reach outside its directory.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(
                f"{index} weight_map[{name!r}] must name a .safetensors file of the same directory. Given: {file!r}.",
                code="weights_invalid",
                hint="Do not trust this model before its index is repaired.",
            )
        if not (model_dir / file).is_file():
            raise ModelError(
                f"{file} is missing in the model directory, and {index} needs it.",
                code="weights_missing",
                hint="Copy or download all files of the model again.",
            )
    return weight_map


def _no_weights(model_dir: Path, *, single: str, index: str) -> ModelError:
    pickled = sorted(path.name for path in model_dir.iterdir() if path.suffix in PICKLED)
    if pickled:
        return ModelError(
            f"{pickled[0]} is pickled{and_more(pickled)}: loading it would run code that the file brings along, so it "
            "is never opened.",
            code="weights_pickled",
            hint="Get the model's safetensors files, or convert it where you trust it: "
            "`AutoModel.from_pretrained(DIR).save_pretrained(OUT)` of transformers writes them.",
        )
    return ModelError(
        f"the model directory holds no weights: neither {single} nor {index} is there.",
        code="weights_missing",
        hint="Copy the model's safetensors files into it, or fetch a model with `trilithon pull`.",
    )
