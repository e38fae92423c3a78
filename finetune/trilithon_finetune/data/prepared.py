"""
Prepared data: samples as integers on disk, which every rank maps and nobody parses.

    DIRECTORY/
      train.safetensors   tokens; targets, types, positions (where a task has them): i32, end to end
      valid.safetensors   offsets: i64 [samples + 1]; row, part, supervised, cut, column.NAME: i32 [samples]
      index.json          what it was made of and from, and the size and SHA-256 of both files

Written to a temporary name and renamed, so a directory that is there is whole. Opening it checks sizes and headers;
`verify` reads every byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trilithon_finetune.data.integer_file import TOKEN_ARRAYS, Ints, SampleWriter, map_integers
from trilithon_finetune.errors import FinetuneError, refuse
from trilithon_finetune.recipes.base import Sample
from trilithon_parallel.data.publish import publish_folder

FORMAT = 1
"""Of the directory; another one is not opened."""

_PARTS = ("train", "valid")


@dataclass(frozen=True)
class PartFacts:
    """
    Numbers of one part (`train` or `valid`).

    Attributes:
        samples, tokens, supervised: how many; `supervised` is what the loss is divided by in an epoch.
        longest: tokens of the longest sample.
    """

    samples: int = 0
    tokens: int = 0
    supervised: int = 0
    longest: int = 0


@dataclass(frozen=True)
class PreparedFacts:
    """
    What `index.json` says.

    Attributes:
        digest: of everything that the data depends on; the directory's key.
        task, labels: of the recipe.
        unit: neighbouring samples that stay together: 2 for pairs, else 1.
        train, valid: numbers of the parts.
        rows: of the training file, those that were left out included.
        bad_rows, dropped, truncated: rows with errors, rows and samples that `data.on_long` left out or shortened.
        made_from: the inputs of the digest by name.
    """

    digest: str
    task: str
    labels: tuple[str, ...]
    unit: int
    train: PartFacts
    valid: PartFacts
    rows: int
    bad_rows: int
    dropped: int
    truncated: int
    made_from: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As phases report it."""
        return asdict(self)


class Part:
    """
    The samples of one part, mapped.

    Args:
        path: a `.safetensors` file that `SampleWriter` wrote.
        unit: neighbouring samples that stay together.
    Raises:
        FinetuneError: `bug`, it is not such a file.
    """

    def __init__(self, path: Path, *, unit: int) -> None:
        try:
            arrays = map_integers(path)
        except (OSError, ValueError) as error:
            raise _damaged(path.parent, f"{path.name} cannot be read ({error})") from None
        self.unit = unit
        self.offsets = arrays["offsets"]
        self.supervised = arrays["supervised"]
        self.lengths: Ints = np.diff(self.offsets)
        self._of_tokens = {name: arrays.get(name) for name in TOKEN_ARRAYS}
        self._row, self._part, self._cut = arrays["row"], arrays["part"], arrays["cut"]
        self._columns = {
            name.removeprefix("column."): values for name, values in arrays.items() if name.startswith("column.")
        }

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_units(self) -> int:
        """How many units of `unit` samples there are."""
        return len(self) // self.unit

    @property
    def unit_lengths(self) -> list[int]:
        """Tokens of every unit."""
        lengths: list[int] = self.lengths.reshape(-1, self.unit).sum(1).tolist()
        return lengths

    def samples_of(self, unit: int) -> tuple[int, ...]:
        """The samples of a unit."""
        return tuple(range(unit * self.unit, (unit + 1) * self.unit))

    def sample(self, index: int) -> Sample:
        """
        Args:
            index: from 0 to `len(self) - 1`.
        """
        span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return Sample(
            **{name: _ints(values, span) for name, values in self._of_tokens.items()},
            columns={name: int(values[index]) for name, values in self._columns.items()},
            row=int(self._row[index]),
            part=int(self._part[index]),
            cut=int(self._cut[index]),
        )


@dataclass(frozen=True)
class Prepared:
    """A prepared directory that has been opened."""

    facts: PreparedFacts
    train: Part
    valid: Part


def write_prepared(
    directory: Path, train: Iterable[Sample], valid: Iterable[Sample], *, facts: Mapping[str, Any]
) -> PreparedFacts:
    """
    Write a directory whole, or leave the one that is already there.

    Args:
        directory: named by the digest.
        train, valid: the samples, in the order of their rows.
        facts: the fields of `PreparedFacts` but for `train` and `valid`; read after both have ended, so that what was
            counted on the way can be among them.
    """

    def fill(folder: Path) -> None:
        parts = {}
        for name, samples in zip(_PARTS, (train, valid), strict=True):
            writer = SampleWriter(folder / f"{name}.safetensors")
            try:
                for sample in samples:
                    writer.add(sample)
                writer.finish()
                parts[name] = PartFacts(len(writer), writer.num_tokens, writer.num_supervised, writer.longest)
            finally:
                writer.close()
        index = PreparedFacts(**{**facts, **parts}).to_json()
        index["format"] = FORMAT
        index["files"] = {name: _describe(folder / f"{name}.safetensors") for name in _PARTS}
        (folder / "index.json").write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    publish_folder(directory, fill)
    return read_facts(directory)


def read_facts(directory: Path) -> PreparedFacts:
    """
    What a prepared directory says about itself; sizes of its files are checked.

    Raises:
        FinetuneError: `bug`, it is not whole.
    """
    return _read_index(directory)[0]


def open_prepared(directory: Path, *, verify: bool = False) -> Prepared:
    """
    Map a prepared directory.

    Args:
        verify: read every byte and compare the SHA-256.
    Raises:
        FinetuneError: `bug`, it is not whole or was changed; remove it, and it is made again.
    """
    facts, files = _read_index(directory)
    for name in _PARTS if verify else ():
        path = directory / f"{name}.safetensors"
        if _describe(path) != files[name]:
            raise _damaged(directory, f"{path.name} is not the file that was written")
    return Prepared(facts, *(Part(directory / f"{name}.safetensors", unit=facts.unit) for name in _PARTS))


def _read_index(directory: Path) -> tuple[PreparedFacts, dict[str, Any]]:
    try:
        index = json.loads((directory / "index.json").read_text(encoding="utf-8"))
        files, found = index.pop("files"), index.pop("format")
        parts = {name: PartFacts(**index.pop(name)) for name in _PARTS}
        facts = PreparedFacts(**{**index, **parts, "labels": tuple(index["labels"])})
        sizes = {name: (directory / f"{name}.safetensors").stat().st_size for name in _PARTS}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(directory, f"index.json or a file of it cannot be read ({error})") from None
    if found != FORMAT:
        raise _damaged(directory, f"its format is {found}, where {FORMAT} is read")
    for name in _PARTS:
        if sizes[name] != files[name]["bytes"]:
            raise _damaged(directory, f"{name}.safetensors has {sizes[name]} bytes, not {files[name]['bytes']}")
    return facts, files


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _damaged(directory: Path, why: str) -> FinetuneError:
    return refuse("bug", f"prepared data {directory.name}: {why}.", hint="Remove the directory; it is made again.")


def _ints(values: Sequence[int] | Ints | None, span: slice) -> tuple[int, ...]:
    return tuple(values[span].tolist()) if isinstance(values, np.ndarray) else ()
