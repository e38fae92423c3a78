"""
Verification of a reader and its retriever: both are loaded from what was exported, each from its own directory, and
asked the trainer's questions about the passages that it had found for them.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from trilithon_finetune.recipes.base import Sample
from trilithon_finetune.recipes.openqa import Reader
from trilithon_finetune.setup import load_pair
from trilithon_finetune.train.evidence import Evidence
from trilithon_finetune.train.reading import Readings
from trilithon_finetune.train.work import Work
from trilithon_parallel.backend import select
from trilithon_parallel.config import QUERY_DIR, RETRIEVER_DIR, load_config
from trilithon_parallel.grid import Grid
from trilithon_parallel.models import EncoderStage, ReaderStage, TwinStage, build_seq2seq, build_stage
from trilithon_parallel.weights.loader import load_stage
from trilithon_server.tasks.reader_format import ReaderFormat

Values = npt.NDArray[np.float32]


def reader_outputs(work: Work, export: Path, probes: list[tuple[Sample, Values]], *, unit: int) -> list[Values]:
    """
    What the export says of each probe: the rows of its passages as they were recorded, log p(a|q), and log p(z|q) of
    each, as `ReadingEvaluator` records them.

    Args:
        probes: what was recorded, in the order of the part's samples; `unit` samples make one question.
    """
    stage = loaded_reader(work, export)
    readings = Readings(work, None if work.context.retriever is None else Evidence(work))
    part = work.prepared.valid if len(work.prepared.valid) else work.prepared.train
    first_of = {_place(part.sample(index)): index for index in range(0, len(part), unit)}
    found = []
    for sample, recorded in probes:
        rows = recorded[: readings.num_passages]
        index = first_of[_place(sample)]
        reading = readings.reading(part, index // unit, [int(row) for row in rows])
        batch = readings.batch([reading], [index], device=torch.device("cpu"))
        with torch.inference_mode():
            memory_EH = batch.run(stage, None, dropout=None)
            outputs = batch.outputs(stage, memory_EH, grid=stage.grid, per_token=False)
        found.append(np.concatenate((rows, outputs[0].float().numpy())))
    return found


def loaded_reader(work: Work, export: Path) -> ReaderStage:
    """The exported models as the one that they were trained as."""
    grid, dtype = Grid.single(), getattr(torch, work.config.dtype)
    config, options, recipe = load_config(export), work.context.options, work.recipe
    assert isinstance(recipe, Reader)
    backend = select("torch", device="cpu")
    has_retriever = work.context.retriever is not None
    retriever = load_pair(export / RETRIEVER_DIR) if has_retriever else None
    plain = build_seq2seq(config, grid=grid, backend=backend, dtype=dtype)
    load_stage(plain, export, config=config, grid=grid)
    stage = build_seq2seq(recipe.trained(config, options, retriever), grid=grid, backend=backend, dtype=dtype)
    assert isinstance(stage, ReaderStage)
    _take(stage, plain, beside=("retriever.", "passage_strength"))
    if stage.retriever is not None:
        _fill(stage.retriever, export / RETRIEVER_DIR)
        if isinstance(stage.retriever, TwinStage):
            _fill(stage.retriever.query, export / RETRIEVER_DIR / QUERY_DIR)
    stage.eval().requires_grad_(False)
    if stage.passage_strength is not None:
        format_ = ReaderFormat.from_task_file(json.loads((export / "task.json").read_bytes()))
        stage.passage_strength.fill_(format_.strength)
    return stage


def _fill(encoder: EncoderStage, directory: Path) -> None:
    """An encoder's own weights, from its directory; those of the one beside it stay."""
    config = load_config(directory)
    plain = build_stage(config, grid=encoder.grid, backend=encoder.backend, dtype=encoder.dtype)
    load_stage(plain, directory, config=config, grid=encoder.grid)
    _take(encoder, plain, beside=("query.",))


def _take(whole: nn.Module, part: nn.Module, *, beside: tuple[str, ...]) -> None:
    """All weights of a part; what is beside it in the whole, by how its names begin, stays."""
    found = whole.load_state_dict(part.state_dict(), strict=False)
    strange = [*found.unexpected_keys, *(key for key in found.missing_keys if not key.startswith(beside))]
    assert not strange, f"the trained model and the exported one have other tensors: {strange[:3]}"


def _place(sample: Sample) -> tuple[int, int]:
    return sample.row, sample.part
