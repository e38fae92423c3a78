"""
What a model says of held-out samples: the loss, the task's own numbers, and a few outputs to hold the export against.

One forward pass gives all of it. Every dp row takes a share and all ranks learn all outputs, so that all find the same
numbers and none has to be told.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from trilithon_finetune.data.prepared import Part
from trilithon_finetune.recipes.base import IGNORE, Context, Head, Output, Recipe, Sample
from trilithon_finetune.series import VALID_ACCURACY
from trilithon_finetune.train.collate import pair_of
from trilithon_finetune.train.stream import held_batches, plan_outputs
from trilithon_parallel.collectives import all_gather
from trilithon_parallel.contrast import Pool, contrast
from trilithon_parallel.contrast_terms import NOTHING, QUERY, Contrast
from trilithon_parallel.step import TrainingModel
from trilithon_parallel.trainer import Evaluation

Values = npt.NDArray[np.float32]

TOKEN_HEADS: tuple[Head, ...] = ("tokens", "span", "joint_span")
"""Of which every token has outputs, one a label."""

NUM_PROBES = 8
"""Samples whose outputs are kept, to compare the export with."""


def outputs_of(
    model: TrainingModel,
    part: Part,
    recipe: Recipe,
    *,
    micro_batch_tokens: int,
    seed: int,
    units: Sequence[int] | None = None,
    per_token: bool = False,
) -> dict[int, tuple[Sample, Values]]:
    """
    The model's outputs of a part's samples, on every rank: by index the sample as it was seen, and its values.

    Args:
        units: which; None for all.
        per_token: of a vocabulary, log-probabilities of single tokens [T] in place of both sums [2].
    """
    grid = model.grid
    plan = plan_outputs(part, dp=grid.dp.size, micro_batch_tokens=micro_batch_tokens, units=units)
    held = held_batches(part, recipe, plan[grid.dp.rank], device=grid.device, seed=seed)
    made = model.predict([item.batch for item in held], per_token=per_token)
    labels = model.config.hidden_size if model.config.task_head is None else len(model.config.task_head.labels)

    def size(index: int) -> int:
        return value_size(recipe.head, int(part.lengths[index]), labels, per_token=per_token)

    sizes = [sum(size(index) for group in row for index in group) for row in plan]
    flat = torch.zeros(max(sizes), dtype=torch.float32)
    if made:
        mine = torch.cat([outputs.flatten() for outputs in made])
        assert len(mine) == sizes[grid.dp.rank]
        flat[: len(mine)] = mine
    rows = all_gather(flat.unsqueeze(0).to(grid.device), grid.dp, dim=0, label="evaluation").cpu().numpy()
    found: dict[int, tuple[Sample, Values]] = {}
    for row, groups in zip(rows, plan, strict=True):
        at = 0
        for index in (index for group in groups for index in group):
            values = row[at : at + size(index)]
            at += size(index)
            sample = recipe.dress(part.sample(index), seed=seed, epoch=0)
            found[index] = (sample, values.reshape(-1, labels) if recipe.head in TOKEN_HEADS else values)
    return dict(sorted(found.items()))


def value_size(head: Head, length: int, labels: int, *, per_token: bool) -> int:
    """Numbers that the model says of one sample of so many tokens; `labels`, or the width of its vectors."""
    if head in TOKEN_HEADS:
        return length * labels
    if head in ("sequence", "vectors"):
        return labels
    return length if per_token else 2


@dataclass(frozen=True, slots=True)
class SampleLoss:
    """
    What one sample loses, and the tokens of it that the model would have said.

    Attributes:
        total: the sum over what counts; the same loss that training lowers.
        count: what counts.
        correct: how many of it are tokens whose target is the likeliest; None where single tokens aren't learned.
    """

    total: float
    count: int
    correct: int | None = None


def sample_loss(head: Head, sample: Sample, values: Values) -> SampleLoss:
    """
    What one sample loses, by its outputs.

    A preference's loss is that of pairs and is not asked for here.
    """
    match head:
        case _ if sample.columns.get("only_scored"):
            return SampleLoss(0.0, 0, 0 if head == "vocabulary" else None)
        case "tokens":
            targets = np.array(sample.targets)
            counts = targets != IGNORE
            logits, labels = values[counts], targets[counts, None]
            chosen = np.take_along_axis(_log_softmax(logits), labels, 1)
            correct = np.take_along_axis(logits, labels, 1)[:, 0] == logits.max(1)
            return SampleLoss(-float(chosen.sum()), int(counts.sum()), int(correct.sum()))
        case "sequence":
            return SampleLoss(-float(_log_softmax(values)[sample.columns["label"]]), 1)
        case "span":
            allowed = np.zeros(len(values), dtype=bool)
            allowed[sample.columns["context_start"] : sample.columns["context_stop"]] = True
            allowed[0] = True
            logprobs = _log_softmax(np.where(allowed[:, None], values, -np.inf), axis=0)
            both = float(logprobs[sample.columns["start"], 0] + logprobs[sample.columns["end"], 1])
            return SampleLoss(-both / 2, 1)
        case "joint_span":
            columns = sample.columns
            scores = spans_within(values, columns["context_start"], columns["context_stop"])
            chosen = scores[columns["start"] - columns["context_start"], columns["end"] - columns["start"]]
            return SampleLoss(float(np.logaddexp.reduce(scores, axis=None) - chosen), 1)
        case _:
            return SampleLoss(-float(values[0]), sample.num_supervised, round(float(values[1])))


def spans_within(values: Values, start: int, stop: int) -> npt.NDArray[np.float64]:
    """Scores of the spans that lie in tokens [start, stop); -inf where one would leave them."""
    scores = values[start:stop].astype(np.float64)
    firsts, lengths = np.indices(scores.shape)
    scores[firsts + lengths >= len(scores)] = -np.inf
    return scores


def total_loss(parts: Sequence[SampleLoss]) -> tuple[float, dict[str, float]]:
    """The mean loss over what counts in all of these, and where single tokens are learned their accuracy by name."""
    count = sum(part.count for part in parts)
    correct = [part.correct for part in parts if part.correct is not None]
    accuracy = {VALID_ACCURACY: sum(correct) / count} if correct and count else {}
    return math.fsum(part.total for part in parts) / max(1, count), accuracy


def _log_softmax(values: Values, axis: int = -1) -> npt.NDArray[np.float64]:
    wide = values.astype(np.float64)
    shifted = wide - wide.max(axis, keepdims=True)
    logprobs: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis, keepdims=True))
    return logprobs


def preference_numbers(
    outputs: Sequence[Values], references: Sequence[float], beta: float
) -> tuple[float, dict[str, float]]:
    """
    The mean loss of pairs, and how often and by how much the chosen answer gained on the rejected one.

    Args:
        outputs: summed log-probabilities, chosen and rejected in turn; `references` likewise, before training.
    Source: arXiv 2305.18290, equations 5 and 7.
    """
    gained = np.array([float(values[0]) for values in outputs]) - np.array(references)
    margins = beta * (gained[0::2] - gained[1::2])
    losses = np.logaddexp(0.0, -margins)
    return float(losses.mean()), {
        "reward_accuracy": float((margins > 0).mean()),
        "reward_margin": float(margins.mean()),
    }


def contrast_loss(outputs: Sequence[Output], how: Contrast, *, batch_samples: int) -> float:
    """
    The mean loss of questions, where all count each told from the passages of as many rows as a training batch has.

    Args:
        outputs: in the order of their samples; the last rows may make a smaller batch.
    """
    total, count = 0.0, 0
    for first in range(0, len(outputs), batch_samples):
        part = outputs[first : first + batch_samples]
        columns = [output.sample.columns for output in part]
        kept = [i for i, column in enumerate(columns) if column["role"] != NOTHING]
        pairs = [pair_of(part[i].sample) for i in kept]
        pool = Pool(
            torch.from_numpy(np.stack([part[i].values for i in kept])).double(),
            *(torch.tensor(n) for n in ([columns[i]["role"] for i in kept], pairs, [columns[i]["key"] for i in kept])),
        )
        total += float(contrast(pool, how)[0].sum())
        count += sum(columns[i]["role"] == QUERY for i in kept)
    return total / max(1, count)


class Probed(Protocol):
    """Who keeps outputs of a few samples at each evaluation, by sample index: what an export is held against."""

    probe: dict[int, tuple[Sample, Values]]


class JobEvaluator:
    """
    Evaluates a model on a job's validation part. All ranks make one alike and call it together.

    Args:
        valid: may be empty; then only the probes are made.
        probes: the part that they come from.
        rows: of the validation file by line, for recipes that measure against them.
    Attributes:
        references: of preferences, as `JobStream.references`, for the validation part.
        probe: the latest probes' outputs by sample index, per token.
    """

    def __init__(
        self,
        recipe: Recipe,
        context: Context,
        valid: Part,
        probes: Part,
        *,
        rows: Mapping[int, Mapping[str, Any]],
        micro_batch_tokens: int,
        seed: int,
        beta: float,
        contrast: Contrast,
        batch_size: int,
    ) -> None:
        self._recipe, self._context, self._valid, self._probes, self._rows = recipe, context, valid, probes, rows
        self._capacity, self._seed, self._beta = micro_batch_tokens, seed, beta
        self._contrast, self._batch_size = contrast, batch_size
        self.references: Sequence[float] = ()
        self.probe: dict[int, tuple[Sample, Values]] = {}

    def __call__(self, model: TrainingModel) -> Evaluation | None:
        """Measure."""
        units = probe_units(self._probes)
        self.probe = self._outputs(model, self._probes, units=units, per_token=True)
        if not len(self._valid):
            return None
        found = self._outputs(model, self._valid)
        outputs = [Output(sample, values) for sample, values in found.values()]
        if self._recipe.head == "preference":
            loss, numbers = preference_numbers([output.values for output in outputs], self.references, self._beta)
            return Evaluation(loss, numbers)
        if self._recipe.head == "vectors":
            samples = self._batch_size * self._valid.unit
            loss = contrast_loss(outputs, self._contrast, batch_samples=samples)
            return Evaluation(loss, self._recipe.metrics(outputs, self._rows, self._context))
        loss, accuracy = total_loss([sample_loss(self._recipe.head, o.sample, o.values) for o in outputs])
        return Evaluation(loss, {**accuracy, **self._recipe.metrics(outputs, self._rows, self._context)})

    def _outputs(
        self, model: TrainingModel, part: Part, *, units: Sequence[int] | None = None, per_token: bool = False
    ) -> dict[int, tuple[Sample, Values]]:
        return outputs_of(
            model,
            part,
            self._recipe,
            micro_batch_tokens=self._capacity,
            seed=self._seed,
            units=units,
            per_token=per_token,
        )


def probe_units(part: Part) -> list[int]:
    """The units whose outputs an export is compared by: the first few, spread over the part."""
    step = max(1, part.num_units // NUM_PROBES)
    return list(range(0, part.num_units, step))[:NUM_PROBES]


def probe_file(run_dir: Path, step: int) -> Path:
    """Where the outputs of the probes at a step lie."""
    return run_dir / f"probe_{step:08d}.safetensors"
