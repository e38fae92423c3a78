"""
What a reader says of held-out questions: the loss, answers in its own words, and whether its retriever finds them.

Passages are looked up in an index of the retriever as it is now, so the numbers are those of what would be exported. Of
each question that is kept to verify with, the passages are kept too.

Shapes: B questions, K passages of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from trilithon_finetune.data.prepared import Part
from trilithon_finetune.metrics.retrieval import top_k_accuracy
from trilithon_finetune.metrics.squad import best_of, exact_match, token_f1
from trilithon_finetune.recipes.base import Context, Sample
from trilithon_finetune.recipes.openqa import Reader
from trilithon_finetune.setup import read_rows_of
from trilithon_finetune.train.evaluation import Values, probe_units
from trilithon_finetune.train.evidence import PassageIndex, make_index
from trilithon_finetune.train.reading import Readings
from trilithon_finetune.train.work import Work
from trilithon_parallel.collectives import all_gather
from trilithon_parallel.step import TrainingModel
from trilithon_parallel.trainer import Evaluation
from trilithon_server.tasks.reader_format import read_answer

TOP = (1, 5)

AT_ONCE = 64
"""Batches that are made before the model reads them: enough to keep a pipeline full, few enough for the memory."""

NOTHING = -1.0
"""Behind the end of an answer; in place of the row of a passage that is not of the evidence."""


class ReadingEvaluator:
    """
    Evaluates a reader on a job's validation part. All ranks make one alike and call it together.

    Attributes:
        probe: by sample index the outputs of a few questions: [2 K + 1], the rows of their passages, log p(a|q), and
            log p(z|q) of each passage.
    """

    def __init__(self, work: Work, readings: Readings) -> None:
        assert isinstance(work.recipe, Reader)
        self._work, self._readings, self._recipe = work, readings, work.recipe
        self._valid = work.prepared.valid
        self._probes = self._valid if len(self._valid) else work.prepared.train
        lines = {self._valid.sample(index).row for index in range(len(self._valid))}
        self._rows = read_rows_of(work.job, work.recipe, lines) if lines else {}
        self.probe: dict[int, tuple[Sample, Values]] = {}

    def __call__(self, model: TrainingModel) -> Evaluation | None:
        """Measure."""
        index, readings = None, self._readings
        if readings.evidence is not None:
            index = PassageIndex(make_index(model, readings.evidence, capacity=readings.capacity))
        probed = self._outputs(model, self._probes, probe_units(self._probes), index, written=False)
        self.probe = {}
        for unit, values in probed.items():
            at = self._probes.samples_of(unit)[0]
            self.probe[at] = (self._probes.sample(at), values[max(TOP) :])
        if not len(self._valid):
            return None
        written = set(spread(self._valid.num_units, readings.options.written_answers))
        plain = [unit for unit in range(self._valid.num_units) if unit not in written]
        said = self._outputs(model, self._valid, sorted(written), index, written=True)
        found = {**said, **self._outputs(model, self._valid, plain, index, written=False)}
        answer_at = max(TOP) + readings.num_passages
        loss = -float(np.mean([values[answer_at] for _, values in sorted(found.items())], dtype=np.float64))
        numbers = self._finding(found) if index is not None else {}
        if readings.options.has_null:
            alone = self._without_passages(model)
            numbers["retriever_utility"] = -loss - float(np.mean([alone[unit] for unit in sorted(alone)]))
        tokens = {unit: values[answer_at + 1 + readings.num_passages :] for unit, values in said.items()}
        return Evaluation(loss, {**self._answering(tokens), **numbers})

    def _outputs(
        self,
        model: TrainingModel,
        part: Part,
        units: Sequence[int],
        index: PassageIndex | None,
        *,
        written: bool,
    ) -> dict[int, Values]:
        """Of each unit, on every rank: the rows of the best five, those that were read, and the batch's outputs."""
        readings, grid = self._readings, model.grid
        each = max(1, readings.capacity // (self._work.recipe.unit_tokens(self._work.context) or 1))
        mine = units[grid.dp.rank :: grid.dp.size]
        groups = [mine[first : first + each] for first in range(0, len(mine), each)]
        width = max(TOP) + 2 * readings.num_passages + 1 + (readings.options.max_answer_tokens if written else 0)
        count = max(readings.num_passages, *TOP)
        best, made = [], [torch.zeros(0, width - max(TOP) - readings.num_passages)]
        for first in range(0, len(groups), AT_ONCE):
            batches = []
            for group in groups[first : first + AT_ONCE]:
                found = readings.found(part, group, model=model, index=index, count=count)
                some = [readings.reading(part, unit, rows) for unit, rows in zip(group, found, strict=True)]
                ids = [part.samples_of(unit)[0] for unit in group]
                batches.append(readings.batch(some, ids, device=grid.device, written=written))
                best += [[*_padded(rows, max(TOP)), *item.rows] for rows, item in zip(found, some, strict=True)]
            made += model.predict(batches)
        chosen = torch.tensor(best, dtype=torch.float32).view(len(best), max(TOP) + readings.num_passages)
        return _of_all(model, units, torch.cat((chosen, torch.cat(made)), 1))

    def _without_passages(self, model: TrainingModel) -> dict[int, float]:
        """Of each unit, on every rank, log p(a|q) from the empty passage alone."""
        readings, grid = self._readings, model.grid
        units = range(self._valid.num_units)
        each = max(1, readings.capacity // self._work.context.max_tokens)
        mine = units[grid.dp.rank :: grid.dp.size]
        batches = [
            readings.batch(
                [readings.reading(self._valid, unit, ()) for unit in group],
                [self._valid.samples_of(unit)[0] for unit in group],
                device=grid.device,
            )
            for group in (mine[first : first + each] for first in range(0, len(mine), each))
        ]
        made = torch.cat([torch.zeros(0, 2), *model.predict(batches)])
        return {unit: float(values[0]) for unit, values in _of_all(model, units, made).items()}

    def _answering(self, said: Mapping[int, Values]) -> dict[str, float]:
        """`em` and `f1` of answers that were written greedily, and of how many they are."""
        if not said:
            return {}
        tokenizer, scores = self._work.context.tokenizer, []
        for unit, tokens in said.items():
            ids = [int(token) for token in tokens if token != NOTHING]
            text = read_answer(tokenizer.decode(ids, skip_special_tokens=True))
            golds = self._of_row(unit, self._recipe.golds)
            scores.append((best_of(exact_match, text, golds), best_of(token_f1, text, golds)))
        em, f1 = np.mean(scores, axis=0).tolist()
        return {"em": em, "f1": f1, "written_answers": float(len(said))}

    def _finding(self, found: Mapping[int, Values]) -> dict[str, float]:
        """`top_1` and `top_5`: one of so many passages that the retriever finds first holds an answer."""
        evidence = self._readings.evidence
        assert evidence is not None
        texts = [
            [evidence.passages[int(row)].text for row in values[: max(TOP)] if row != NOTHING]
            for values in found.values()
        ]
        shares = top_k_accuracy(texts, [self._of_row(unit, self._recipe.looked_for) for unit in found], TOP)
        return {f"top_{k}": share for k, share in shares.items()}

    def _of_row(self, unit: int, told: Callable[[Mapping[str, Any], int, Context], list[str]]) -> list[str]:
        """What the recipe tells of a unit's row."""
        sample = self._valid.sample(self._valid.samples_of(unit)[0])
        return told(self._rows[sample.row], sample.part, self._work.context)


def _of_all(model: TrainingModel, units: Sequence[int], rows_BW: torch.Tensor) -> dict[int, Values]:
    """What all dp rows found of every unit, each of those that are its turn. Collective."""
    dp = model.grid.dp
    missing = -(-len(units) // dp.size) - len(rows_BW)
    padded = torch.cat((rows_BW, rows_BW.new_zeros(missing, rows_BW.shape[1]))).unsqueeze(0).to(model.grid.device)
    gathered = all_gather(padded, dp, dim=0, label="evaluation").cpu().numpy()
    return {unit: gathered[at % dp.size, at // dp.size] for at, unit in enumerate(units)}


def spread(total: int, count: int) -> list[int]:
    """So many of `total` numbers, or all, spread evenly."""
    kept = min(count, total)
    return [i * total // kept for i in range(kept)]


def _padded(rows: Sequence[int], size: int) -> list[float]:
    return [float(row) for row in rows[:size]] + [NOTHING] * (size - len(rows[:size]))
