"""
What a reader's retriever finds while both are trained: passages, their vectors, and an index of these.

The index proposes passages; it is as old as the last step at which it was made. Every rank holds all of it. The vectors
of such a step are kept in a file beside the checkpoints, so that a run that was stopped between two goes on with the
proposals that it would have had.

Shapes: M passages, N questions, H width of the vectors, K results.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from trilithon_finetune.data.evidence import KEPT_TOKENS, read_evidence
from trilithon_finetune.errors import refuse
from trilithon_finetune.recipes.openqa import own_key
from trilithon_finetune.setup import JobFile
from trilithon_finetune.train.work import Work
from trilithon_parallel.checkpoint.run_dir import steps
from trilithon_parallel.collectives import all_gather, barrier
from trilithon_parallel.contrast_terms import QUERY, Contrast
from trilithon_parallel.data.publish import sync
from trilithon_parallel.step import TrainingModel
from trilithon_parallel.vector_batch import VectorBatch
from trilithon_server.knowledge.dense import FlatIndex
from trilithon_server.knowledge.passages import Passage
from trilithon_server.tasks.reader_format import passage_tokens

Vectors = npt.NDArray[np.float32]

ENCODED_AT_ONCE = 1_024
"""Passages whose tokens are there together while an index is made."""


class Evidence:
    """The passages of a job as reader and retriever read them. Row `null_row`, behind them, is an empty one."""

    def __init__(self, work: Work) -> None:
        assert work.context.retriever is not None
        self.passages = read_evidence(work.job)
        self.retriever, self._tokenizer = work.context.retriever, work.context.tokenizer
        self._keys: dict[int, list[int]] = {}
        for row, passage in enumerate(self.passages):
            for key in {own_key(passage.id), own_key(f"{passage.title}\0{passage.text}")}:
                self._keys.setdefault(key, []).append(row)
        self._kept_read = functools.lru_cache(maxsize=KEPT_TOKENS)(lambda row: array("i", self._read(row)))
        self._kept_sought = functools.lru_cache(maxsize=KEPT_TOKENS)(lambda row: array("i", self.seek(row)))

    def __len__(self) -> int:
        return len(self.passages)

    @property
    def null_row(self) -> int:
        """Of the empty passage."""
        return len(self)

    def own_rows(self, key: int) -> frozenset[int]:
        """Passages that a question with this `own` was made from."""
        return frozenset(self._keys.get(key, ()))

    def longest(self, count: int) -> list[int]:
        """So many passages with the most characters: what memory must hold."""
        return sorted(range(len(self)), key=lambda row: (-len(self.passages[row].text), row))[:count]

    def read(self, row: int) -> tuple[int, ...]:
        """A passage's tokens as the reader has them."""
        return tuple(self._kept_read(row))

    def sought(self, row: int) -> tuple[int, ...]:
        """The same of the retriever."""
        return tuple(self._kept_sought(row))

    def _read(self, row: int) -> list[int]:
        passage = self._at(row)
        return passage_tokens(passage.title, passage.text, self._tokenizer)

    def seek(self, row: int) -> tuple[int, ...]:
        """`sought`, not remembered: where all passages have their turn, one would push out the other."""
        passage, retriever = self._at(row), self.retriever
        return retriever.format.passage(passage.title, passage.text, retriever.tokenizer).tokens

    def _at(self, row: int) -> Passage:
        return NULL if row == self.null_row else self.passages[row]


NULL = Passage(id="", title="", text="")


class PassageIndex:
    """Exact search by inner product; questions may leave passages out."""

    def __init__(self, vectors_MH: Vectors) -> None:
        self._flat = FlatIndex(vectors_MH)

    def search(self, queries_NH: Vectors, count: int, *, without: Sequence[frozenset[int]]) -> list[list[int]]:
        """
        The rows of the best passages of each question, of equal ones the lower.

        Args:
            count: of each question; there are as many beside those left out.
            without: of each question, rows that it may not have.
        """
        most = min(count + max(map(len, without), default=0), len(self._flat.vectors_MH))
        found = self._flat.search(queries_NH, most)
        return [
            [int(row) for row in ranking.rows if int(row) not in left_out][:count]
            for ranking, left_out in zip(found, without, strict=True)
        ]


def vector_batch(
    sequences: Sequence[Sequence[int]], *, num_queries: int, score_scale: float, device: torch.device
) -> VectorBatch:
    """Texts of the retriever as a batch that asks for their vectors: first questions, then passages."""
    lengths = [len(tokens) for tokens in sequences]

    def ints(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return VectorBatch(
        tokens_T=ints([token for tokens in sequences for token in tokens]),
        positions_T=ints([at for length in lengths for at in range(length)]),
        cu_seqlens=[0, *accumulate(lengths)],
        sample_ids=range(len(lengths)),
        lengths=lengths,
        is_query_B=[i < num_queries for i in range(len(lengths))],
        roles_B=torch.full((len(lengths),), QUERY),
        pairs_B=torch.arange(len(lengths)),
        keys_B=torch.zeros(len(lengths), dtype=torch.int64),
        contrast=Contrast(score_scale),
    )


def vectors_of(
    model: TrainingModel, sequences: Sequence[Sequence[int]], *, are_queries: bool, capacity: int
) -> Vectors:
    """Vectors [N, H] of texts by the retriever as it is, on this row's ranks alone; `capacity`: tokens at once."""
    width = model.config.retriever.hidden_size if model.config.retriever is not None else 0
    batches = [
        vector_batch(some, num_queries=len(some) * are_queries, score_scale=1.0, device=model.grid.device)
        for some in _in_batches(sequences, capacity)
    ]
    made = model.predict(batches)
    return torch.cat(made).numpy() if made else np.zeros((0, width), np.float32)


def make_index(model: TrainingModel, evidence: Evidence, *, capacity: int) -> Vectors:
    """
    The vectors [M, H] of all passages by the retriever as it is: every dp row makes a share, all get all. Collective.
    """
    dp = model.grid.dp
    each = -(-len(evidence) // dp.size)
    mine = range(min(dp.rank * each, len(evidence)), min((dp.rank + 1) * each, len(evidence)))
    share_MH = np.zeros((each, evidence.retriever.model.hidden_size), np.float32)
    for first in range(0, len(mine), ENCODED_AT_ONCE):  # all tokens together would need more than the vectors do
        rows = mine[first : first + ENCODED_AT_ONCE]
        sought = [evidence.seek(row) for row in rows]
        share_MH[first : first + len(rows)] = vectors_of(model, sought, are_queries=False, capacity=capacity)
    share = torch.from_numpy(share_MH).to(model.grid.device)
    vectors: Vectors = all_gather(share, dp, dim=0, label="index").cpu().numpy()[: len(evidence)]
    return vectors


class KeptIndex:
    """
    The index of a run: made at steps that are multiples of `every`, and kept for whoever resumes in between.

    Args:
        every: 0: it is made at the first step alone.
        capacity: tokens that are encoded at once.
    """

    def __init__(self, job: JobFile, evidence: Evidence, *, every: int, capacity: int) -> None:
        self._run_dir, self._evidence = job.paths.run, evidence
        self._every, self._capacity = every, capacity
        self._made_at: int | None = None
        self._index: PassageIndex | None = None

    def at(self, step: int, model: TrainingModel) -> PassageIndex:
        """
        What step number `step`, from 0, searches, with the model as it is before that step. Collective.

        Raises:
            FinetuneError: `checkpoint_corrupt`, the vectors of an earlier step are gone.
        """
        wanted = self._step_of(step)
        if self._index is None or wanted != self._made_at:
            self._index = None  # two would be held together
            vectors_MH = self._make(step, model) if wanted == step else self._load(wanted)
            self._index, self._made_at = PassageIndex(vectors_MH), wanted
        return self._index

    def _step_of(self, step: int) -> int:
        return step - step % self._every if self._every else 0

    def _make(self, step: int, model: TrainingModel) -> Vectors:
        vectors_MH = make_index(model, self._evidence, capacity=self._capacity)
        if model.grid.rank == 0:
            path = index_file(self._run_dir, step)
            part = path.with_suffix(".part")
            save_file({"vectors": vectors_MH}, part)
            sync(part)  # a checkpoint of this step may outlive what is not on the disk
            part.replace(path)
            sync(path.parent)
            self._forget(step)
        barrier(model.grid.world, label="index")
        return vectors_MH

    def _load(self, step: int) -> Vectors:
        path = index_file(self._run_dir, step)
        try:
            vectors_MH: Vectors = load_file(path)["vectors"]
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            message = f"the index of step {step}, which the run goes on with, cannot be read ({error})."
            raise refuse("checkpoint_corrupt", message, hint="Begin a new job.") from None
        return vectors_MH

    def _forget(self, step: int) -> None:
        """Remove what no checkpoint needs; one that is being written is newer than all that are there."""
        needed = {self._step_of(saved) for saved in steps(self._run_dir)}
        for path in self._run_dir.glob("index_*.safetensors"):
            made_at = int(path.stem.removeprefix("index_"))
            if made_at != step and made_at not in needed and made_at < max(needed, default=0):
                path.unlink(missing_ok=True)


def index_file(run_dir: Path, step: int) -> Path:
    """Where the vectors lie that were made before a step."""
    return run_dir / f"index_{step:08d}.safetensors"


def _in_batches(sequences: Sequence[Sequence[int]], capacity: int) -> list[list[Sequence[int]]]:
    """Neighbours together, of at most `capacity` tokens; a longer one goes alone."""
    batches: list[list[Sequence[int]]] = []
    room = 0
    for tokens in sequences:
        if not batches or len(tokens) > room:
            batches.append([])
            room = capacity
        batches[-1].append(tokens)
        room -= len(tokens)
    return batches
