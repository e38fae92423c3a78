"""
Batches of a reader's job: prepared questions, and for each the passages that are found for it when its step comes.

Shapes: B questions, K passages of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from trilithon_finetune.data.batches import MicroBatch
from trilithon_finetune.data.prepared import Part
from trilithon_finetune.errors import refuse
from trilithon_finetune.recipes.base import Sample
from trilithon_finetune.recipes.openqa import (
    IndividualOptions,
    JointOptions,
    Reader,
    ReaderOptions,
    format_of,
    score_of,
)
from trilithon_finetune.train.evidence import Evidence, KeptIndex, PassageIndex, vector_batch, vectors_of
from trilithon_finetune.train.stream import JobStream
from trilithon_finetune.train.work import Work
from trilithon_parallel.collectives import all_reduce
from trilithon_parallel.data.ramp import Step
from trilithon_parallel.grid import Grid
from trilithon_parallel.objective import PackedBatch
from trilithon_parallel.reading_batch import ReadingBatch
from trilithon_parallel.step import TrainingModel
from trilithon_server.tasks.reader_format import frame


@dataclass(frozen=True)
class Reading:
    """
    One question and what it is answered from.

    Attributes:
        query: tokens of the retriever; empty without one. question, decoder, answer: of the reader.
        passages: tokens of the reader. sought: the same passages' of the retriever; empty without one.
        rows: of the evidence; -1 of passages that the row brought. scores: of those.
    """

    query: tuple[int, ...]
    question: tuple[int, ...]
    decoder: tuple[int, ...]
    answer: tuple[int, ...]
    passages: tuple[tuple[int, ...], ...] = ()
    sought: tuple[tuple[int, ...], ...] = ()
    rows: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()


class Readings:
    """
    Turns units of prepared data into batches.

    Args:
        evidence: None where rows bring their passages.
    """

    def __init__(self, work: Work, evidence: Evidence | None) -> None:
        recipe, options = work.recipe, work.context.options
        assert isinstance(recipe, Reader)
        assert isinstance(options, ReaderOptions)
        self.options, self.evidence = options, evidence
        self._tokenizer, self._score_scale = work.context.tokenizer, work.contrast.scale
        self._kind, self._format = recipe.kind, format_of(work.context, recipe.kind)
        self._marginal = options.marginal if isinstance(options, IndividualOptions) else "sequence"
        self._is_strength_learned = not (isinstance(options, JointOptions) and options.freeze_strength)
        self._end_id = frame(self._tokenizer)[1]
        assert work.config.training.micro_batch_tokens is not None
        self.capacity = work.config.training.micro_batch_tokens

    @property
    def num_passages(self) -> int:
        """K."""
        return self.options.top_k

    def found(
        self, part: Part, units: Sequence[int], *, model: TrainingModel, index: PassageIndex | None, count: int
    ) -> list[list[int]]:
        """The evidence's rows for each unit's question, `count` of them, best first; none without an index."""
        if self.evidence is None:
            return [[] for _ in units]
        assert index is not None
        samples = [part.sample(part.samples_of(unit)[0]) for unit in units]
        queries = vectors_of(model, [_query(sample) for sample in samples], are_queries=True, capacity=self.capacity)
        without = [self.evidence.own_rows(sample.columns["own"]) for sample in samples]
        found = index.search(queries, count, without=without)
        needed = self.num_passages - self.options.has_null
        if any(len(rows) < needed for rows in found):
            raise refuse(
                "invalid_config",
                f"options.passages must hold at least {needed} passages for options.top_k {self.num_passages}, beside "
                f"those that a question was made from. Given: {min(map(len, found))}.",
                param="options.passages",
                hint="Lower options.top_k, or give more passages.",
            )
        return found

    def reading(self, part: Part, unit: int, rows: Sequence[int]) -> Reading:
        """A unit's question with these rows of the evidence and the empty one, or with the passages that it brings."""
        first, *brought = (part.sample(index) for index in part.samples_of(unit))
        query, question = first.columns["query"], first.columns["question"]
        before = query + question
        asked = Reading(
            query=first.tokens[:query],
            question=first.tokens[query:before],
            decoder=first.tokens[before:],
            answer=first.targets[before:],
        )
        if self.evidence is None:
            passages, scores = tuple(s.tokens for s in brought), tuple(map(score_of, brought))
            return replace(asked, passages=passages, rows=(-1,) * len(passages), scores=scores)
        null = (self.evidence.null_row,) * self.options.has_null
        chosen = (*rows[: self.num_passages - len(null)], *null)
        return replace(
            asked,
            passages=tuple(map(self.evidence.read, chosen)),
            sought=tuple(map(self.evidence.sought, chosen)),
            rows=chosen,
            scores=(0.0,) * len(chosen),
        )

    def batch(
        self,
        readings: Sequence[Reading],
        ids: Sequence[int],
        *,
        device: torch.device,
        counts: bool = True,
        written: bool = False,
    ) -> ReadingBatch:
        """
        Questions as one micro-batch.

        Args:
            ids: of their samples. counts: False: it is there for company. written: answers are among its outputs.
        """

        def ints(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        sequences = [
            self._format.join(item.question, passage, self._tokenizer).tokens
            for item in readings
            for passage in item.passages
        ]
        lengths = [len(item.decoder) for item in readings]
        has_retriever = self.evidence is not None
        sought = [item.query for item in readings] + [tokens for item in readings for tokens in item.sought]
        scores_BK = torch.tensor([item.scores for item in readings], dtype=torch.float64, device=device)
        return ReadingBatch(
            tokens_T=ints([token for item in readings for token in item.decoder]),
            positions_T=ints([at for length in lengths for at in range(length)]),
            cu_seqlens=[0, *accumulate(lengths)],
            sample_ids=list(ids),
            lengths=lengths,
            targets_T=ints([token for item in readings for token in item.answer]),
            encoder_tokens_E=ints([token for tokens in sequences for token in tokens]),
            encoder_cu_seqlens=[0, *accumulate(map(len, sequences))],
            kind=self._kind,
            end_id=self._end_id,
            marginal=self._marginal,
            vectors=vector_batch(sought, num_queries=len(readings), score_scale=self._score_scale, device=device)
            if has_retriever
            else None,
            logprobs_BK=None if has_retriever else scores_BK.log_softmax(1),
            is_strength_learned=self._is_strength_learned,
            max_answer_tokens=self.options.max_answer_tokens if written else 0,
            counts=counts,
        )


class ReadingStream(JobStream):
    """
    Batches for one rank, whose passages are looked up as their step comes: all ranks ask for a step's together.

    Micro-batches are cut as if every passage were as long as may be; what a step is said to have read is counted.

    Attributes:
        model: whose retriever looks them up; set before the first step.
    """

    def __init__(self, work: Work, grid: Grid, readings: Readings) -> None:
        super().__init__(work, grid)
        self.readings, options = readings, readings.options
        tokens = work.recipe.unit_tokens(work.context)
        assert tokens is not None
        self._lengths = [tokens] * self._train.num_units
        self.model: TrainingModel | None = None
        self._kept: KeptIndex | None = None
        self._index: PassageIndex | None = None
        self._read: tuple[int, int] | None = None
        if readings.evidence is not None:
            every = options.reload_every if options.refresh else 0
            self._kept = KeptIndex(work.job, readings.evidence, every=every, capacity=readings.capacity)

    def micro_batches(self, step: Step) -> Sequence[PackedBatch]:
        """This dp row's micro-batches of a step, from the index as it is due."""
        if self._kept is not None:
            assert self.model is not None
            self._index = self._kept.at(step.step, self.model)
        batches = super().micro_batches(step)
        self._read = step.step, sum(b.num_read for b in batches if isinstance(b, ReadingBatch) and b.counts)
        return batches

    def tokens(self, step: Step) -> int:
        """Tokens that the step has read over all ranks; its micro-batches were the last that were asked for."""
        assert self._read is not None
        assert self._read[0] == step.step
        count = torch.tensor(self._read[1], device=self._grid.device)
        return int(all_reduce(count, self._grid.dp, label="tokens"))

    @property
    def silent_tokens(self) -> int:
        """The largest micro-batch, and this row's share of the passages: they are read at once."""
        evidence = self.readings.evidence
        if evidence is None:
            return super().silent_tokens
        share = -(-len(evidence) // self._grid.dp.size)
        return super().silent_tokens + share * evidence.retriever.format.max_passage_tokens

    def _batch(self, micro: MicroBatch, epoch: int) -> PackedBatch:
        readings, part = self.readings, self._train
        if readings.evidence is not None and self._index is None:  # only tried out: what takes the most memory
            found = [readings.evidence.longest(readings.num_passages)] * len(micro.units)
        else:
            assert self.model is not None
            found = readings.found(part, micro.units, model=self.model, index=self._index, count=readings.num_passages)
        ids = [part.samples_of(unit)[0] for unit in micro.units]
        some = [readings.reading(part, unit, rows) for unit, rows in zip(micro.units, found, strict=True)]
        return readings.batch(some, ids, device=self._grid.device, counts=micro.counts)


def _query(sample: Sample) -> tuple[int, ...]:
    return sample.tokens[: sample.columns["query"]]
