"""
Labels of stories that a job makes itself, of rows that come without: kept beside its prepared data for the next job.

    STORE/prepared/DIGEST/labels.jsonl    {"story": KEY, "steps": [...]} a line

The digest is of the data file, the concepts, the encoder and the options; a row is found by its sentences. Loads torch
only where an encoder is asked.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trilithon_finetune.data.check import file_digest
from trilithon_finetune.data.findings import Finding
from trilithon_finetune.data.judging import row_key
from trilithon_finetune.data.reading import read_rows
from trilithon_finetune.data.story_labels import LabelOptions, StoryLabeller, unranked
from trilithon_finetune.errors import FinetuneError, refuse
from trilithon_finetune.paths import StorePaths
from trilithon_finetune.recipes.story_rows import check_story
from trilithon_finetune.setup import JobFile
from trilithon_parallel.config import ModelError, load_config
from trilithon_parallel.data.publish import publish_folder
from trilithon_server.engine.identity import model_digest
from trilithon_server.knowledge.concepts import Concepts, ConceptsError, concepts_digest, read_concepts

FILE = "labels.jsonl"
VERSION = 2
"""Raised when the same sources give other labels than before."""

OPTIONS = LabelOptions()

Row = Mapping[str, Any]
Label = Callable[[Row], Row]
Steps = list[dict[str, list[str]]]


@dataclass(frozen=True)
class LabelSource:
    """
    What labels are made from.

    Attributes:
        concepts: a file or a folder of facts.
        encoder: the directory of a model.
    """

    concepts: Path
    encoder: Path

    def digest(self) -> str:
        """
        SHA-256 (hex) of facts, encoder and options.

        Raises:
            FinetuneError: `invalid_config`, one of them cannot be read, or the model is no encoder.
        """
        return _digest({"version": VERSION, **self._made_by()})

    def counted(self) -> Label:
        """
        Labels to count with: as many as there will be, but the facts are not ranked. No torch.

        Raises:
            FinetuneError: as `digest`.
        """
        self._made_by()
        graph = self._read_concepts().graph
        return lambda row: unranked(row, graph, OPTIONS)

    @contextmanager
    def opened(self) -> Iterator[Label]:
        """
        Labels, each made when it is asked for; loads the encoder.

        Raises:
            FinetuneError: as `digest`.
        """
        from trilithon_finetune.train.text_encoder import open_encoder

        known = self._read_concepts()
        try:
            with open_encoder(self.encoder) as encoder:
                yield StoryLabeller(known, encoder, OPTIONS).label
        except ModelError as error:
            raise _wrong("encoder", str(error)) from None

    def kept(self, path: Path, store: StorePaths, *, file: str, told: Callable[[float], None]) -> dict[str, Steps]:
        """
        Labels of a data file's rows, made now unless an earlier job has left them.

        Args:
            file: its name, which says what kind of file it is.
            told: the share that is done, from 0 to 1.
        Returns:
            Steps by story, as `by_story` looks them up.
        Raises:
            FinetuneError: as `digest`; `bug`, what is kept was changed.
        """
        made_by = {"version": VERSION, **self._made_by(), "data": file_digest(path)}
        directory = store.prepared(_digest(made_by))
        if not directory.is_dir():
            publish_folder(directory, lambda folder: self._write(folder / FILE, path, file, told))
        os.utime(directory)  # used now
        told(1.0)
        return _read(directory / FILE)

    def _write(self, target: Path, path: Path, file: str, told: Callable[[float], None]) -> None:
        size, done = max(1, path.stat().st_size), set[str]()
        with target.open("w", encoding="utf-8") as out, ExitStack() as stack:
            label: Label | None = None
            for item in read_rows(path, file=file, on_bytes=lambda position: told(position / size)):
                if isinstance(item, Finding) or "steps" in item.value:
                    continue
                if check_story(item.value, file=file, line=item.line) or (key := _key(item.value)) in done:
                    continue
                label = label or stack.enter_context(self.opened())
                out.write(json.dumps({"story": key, "steps": label(item.value)["steps"]}, ensure_ascii=False) + "\n")
                done.add(key)

    def _made_by(self) -> dict[str, Any]:
        try:
            facts = concepts_digest(self.concepts)
        except ConceptsError as error:
            raise _wrong("concepts", str(error)) from None
        try:
            model = load_config(self.encoder)
        except ModelError as error:
            raise _wrong("encoder", str(error)) from None
        if model.is_causal or model.is_seq2seq:
            raise _wrong("encoder", f"must be an encoder. Given: {self.encoder.name}, a {model.architecture}.")
        return {"concepts": facts, "encoder": model_digest(self.encoder), "options": asdict(OPTIONS)}

    def _read_concepts(self) -> Concepts:
        try:
            return read_concepts(self.concepts)
        except ConceptsError as error:
            raise _wrong("concepts", str(error)) from None


def label_source(job: JobFile) -> LabelSource | None:
    """What a job's rows are labelled by; None where they bring their labels."""
    if job.concepts_path is None or job.encoder_dir is None:
        return None
    return LabelSource(job.concepts_path, job.encoder_dir)


def by_story(known: Mapping[str, Steps]) -> Label:
    """Labels of stories that `LabelSource.kept` has found; each must be among them."""
    return lambda row: {**row, "steps": known[_key(row)]}


def _read(path: Path) -> dict[str, Steps]:
    try:
        with path.open(encoding="utf-8") as lines:
            return {row["story"]: row["steps"] for row in map(json.loads, lines)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path.parent.name, f"{path.name} cannot be read ({error})") from None


def _key(row: Row) -> str:
    return f"{row_key({'sentences': row['sentences']}):016x}"


def _digest(made_by: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()


def _wrong(name: str, message: str) -> FinetuneError:
    return refuse("invalid_config", f"options.{name}: {message}", param=f"options.{name}")


def _damaged(name: str, why: str) -> FinetuneError:
    return refuse("bug", f"labels {name}: {why}.", hint="Remove the directory; it is made again.")
