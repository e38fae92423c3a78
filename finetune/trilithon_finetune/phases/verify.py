"""
Verification: a fresh process loads the export as a server does and holds it against what the trainer said.

A job succeeds only when its export says of held-out samples what the model said in training. That catches what loads
without a complaint and computes something else: a transposed factor, two projections swapped, a scale left out. Then a
task that measures answers has the export write some.
"""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file
from torch import Tensor

from trilithon.errors import TrilithonError
from trilithon_finetune.errors import FinetuneError, JobError
from trilithon_finetune.phases.export import chosen_checkpoint, write_results
from trilithon_finetune.phases.outcome import Events
from trilithon_finetune.phases.verify_reader import reader_outputs
from trilithon_finetune.phases.written import written_numbers
from trilithon_finetune.recipes.base import IGNORE, Sample
from trilithon_finetune.resolve import lora_spec
from trilithon_finetune.setup import JobFile
from trilithon_finetune.train.evaluation import probe_file
from trilithon_finetune.train.work import Work, open_work
from trilithon_parallel.attention import PackedView
from trilithon_parallel.backend import select
from trilithon_parallel.config import QUERY_DIR, ModelConfig, ModelError, load_config
from trilithon_parallel.contrast_terms import QUERY
from trilithon_parallel.grid import Grid
from trilithon_parallel.lora.bank import MAX_RANK, AdapterBank
from trilithon_parallel.lora.merge import merge_into
from trilithon_parallel.models import CausalStage, EncoderStage, build_stage
from trilithon_parallel.report import add_validation, read_metrics
from trilithon_parallel.weights.loader import load_stage

Values = npt.NDArray[np.float32]

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest difference of an output between trainer and export; in bfloat16 a rounding is 2^-8 of the value."""

MERGED_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""The same between an adapter beside its base and one merged into it: the sums are rounded in another order."""


@dataclass(frozen=True)
class Check:
    """One comparison: its name, the largest difference found, the largest allowed (None: it has no number)."""

    name: str
    max_abs: float
    allowed: float | None

    @property
    def passed(self) -> bool:
        """Whether it holds."""
        return self.allowed is None or self.max_abs <= self.allowed


def run(job: JobFile, events: Events) -> dict[str, Any]:
    """
    Verify the job's export.

    Raises:
        FinetuneError: `verify_mismatch`, with every check that failed.
    """
    events.tell("verify_started", "Loading the export and comparing it with the trainer.")
    step, _ = chosen_checkpoint(job)
    work = open_work(job)
    probes = _probes(work, load_file(probe_file(job.paths.run, step)))
    try:
        checks = (
            verify_adapter(work, job.paths.export, probes)
            if lora_spec(job.config)
            else verify_model(work, job.paths.export, probes)
        )
    except ModelError as error:
        raise _mismatch(f"the export cannot be loaded: {error}") from None
    failed = [check for check in checks if not check.passed]
    if failed:
        told = "; ".join(f"{c.name}: {c.max_abs:.3g}, at most {c.allowed:.3g} allowed" for c in failed)
        raise _mismatch(f"the export of step {step} differs from the trained model: {told}")
    worst = max(check.max_abs for check in checks if check.allowed is not None)
    data = {
        "step": step,
        "max_abs": worst,
        "checks": [{"name": c.name, "max_abs": c.max_abs, "allowed": c.allowed} for c in checks],
    }
    data["numbers"] = _written(work, step, events)
    message = f"The export gives the trainer's outputs on {len(probes)} samples, within {worst:.1e}."
    events.tell("verified", message, data=data)
    return data


def _written(work: Work, step: int, events: Events) -> dict[str, float]:
    """
    Numbers of answers that the export writes, told and put beside the step's evaluation.

    An export that is what was trained is good without them: where they can't be had, that is told.
    """
    try:
        numbers = written_numbers(work, work.job.paths.export)
    except (ModelError, TrilithonError) as error:
        events.tell("warning", f"The export's own answers could not be measured: {error}", level="warn")
        return {}
    if numbers:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        events.tell("eval", f"Step {step}, in its own words: {shown}", data={"step": step, **numbers})
        add_validation(work.job.paths.run, step, numbers)
        write_results(work.job, read_metrics(work.job.paths.run))
    return numbers


def _mismatch(message: str) -> FinetuneError:
    return FinetuneError(
        JobError(
            code="verify_mismatch",
            message=f"{message}.",
            hint="This is a fault of the software: the checkpoints are kept, report it with the job's directory.",
        )
    )


def _probes(work: Work, recorded: dict[str, Values]) -> list[tuple[Sample, Values]]:
    """The samples that the trainer was asked about, and what it said."""
    part = work.prepared.valid if len(work.prepared.valid) else work.prepared.train
    assert work.config.seed is not None
    return [
        (work.recipe.dress(part.sample(int(index)), seed=work.config.seed, epoch=0), values)
        for index, values in sorted(recorded.items(), key=lambda item: int(item[0]))
    ]


def verify_model(work: Work, export: Path, probes: list[tuple[Sample, Values]]) -> list[Check]:
    """A whole model: loaded from its own directory, by its own configuration."""
    if work.recipe.head == "reading":
        said = reader_outputs(work, export, probes, unit=work.prepared.facts.unit)
        return [_compare("export and trainer", said, probes, TOLERANCE[work.config.dtype])]
    if not work.model.has_twin:
        return [_compare("export and trainer", _said_by(work, export, probes), probes, TOLERANCE[work.config.dtype])]
    checks = []
    for name, directory, are_queries in (("passages", export, False), ("questions", export / QUERY_DIR, True)):
        asked = [probe for probe in probes if (probe[0].columns["role"] == QUERY) is are_queries]
        said = _said_by(work, directory, asked)
        checks.append(_compare(f"export and trainer, {name}", said, asked, TOLERANCE[work.config.dtype]))
    return checks


def _said_by(work: Work, directory: Path, probes: list[tuple[Sample, Values]]) -> list[Values]:
    stage = loaded_stage(load_config(directory), directory, dtype=getattr(torch, work.config.dtype))
    stage.prepare()
    return outputs_of_stage(stage, probes)


def verify_adapter(work: Work, export: Path, probes: list[tuple[Sample, Values]]) -> list[Check]:
    """An adapter: beside its base, merged into it, against the base alone, and by PEFT where that is installed."""
    dtype, base = work.config.dtype, work.job.model_dir
    stage = loaded_stage(work.base, base, dtype=getattr(torch, dtype))
    stage.prepare()
    plain = outputs_of_stage(stage, probes)
    bank = AdapterBank(stage, config=work.base, grid=Grid.single(), max_adapters=1, max_rank=MAX_RANK)
    bank.load(0, export)
    adapted = outputs_of_stage(stage, probes, bank=bank)
    merged = loaded_stage(work.base, base, dtype=getattr(torch, dtype))
    has_effect = merge_into(merged, export, config=work.base, grid=Grid.single())
    merged.prepare()
    checks = [
        _compare("export and trainer", adapted, probes, TOLERANCE[dtype]),
        between("merged and not merged", outputs_of_stage(merged, probes), adapted, MERGED_TOLERANCE[dtype]),
    ]
    if has_effect:
        moved = between("", adapted, plain, 0.0).max_abs
        checks.append(Check("base and export are one", float(moved == 0.0), 0.0))
    if dtype == "float32" and importlib.util.find_spec("peft") and importlib.util.find_spec("transformers"):
        checks.append(_compare("PEFT and trainer", outputs_of_peft(base, export, probes), probes, TOLERANCE[dtype]))
    return checks


def loaded_stage(config: ModelConfig, directory: Path, *, dtype: torch.dtype) -> CausalStage | EncoderStage:
    """A whole model from its directory, as a server loads it, not packed yet."""
    grid = Grid.single()
    stage = build_stage(config, grid=grid, backend=select("torch", device="cpu"), dtype=dtype)
    load_stage(stage, directory, config=config, grid=grid)
    stage.eval().requires_grad_(False)
    return stage


def outputs_of_stage(
    stage: CausalStage | EncoderStage, probes: list[tuple[Sample, Values]], *, bank: AdapterBank | None = None
) -> list[Values]:
    """What a packed stage says of each sample, alone: logits of a task head, log-probabilities, or a vector."""
    found = []
    for sample, _ in probes:
        length = len(sample.tokens)
        view = PackedView([0, length], causal=isinstance(stage, CausalStage))
        types_T = torch.tensor(sample.types) if sample.types else None
        with torch.inference_mode():
            if bank is None:
                hidden_TH = _run(stage, sample, view, types_T)
            else:
                with bank.batch([0], [0, length]):
                    hidden_TH = _run(stage, sample, view, types_T)
            found.append(_outputs(stage, hidden_TH, sample).float().numpy())
    return found


def _run(stage: CausalStage | EncoderStage, sample: Sample, view: PackedView, types_T: Tensor | None) -> Tensor:
    positions_T = torch.tensor(sample.positions or range(len(sample.tokens)))
    hidden_TH: Tensor = stage(torch.tensor(sample.tokens), positions_T=positions_T, view=view, types_T=types_T)
    return hidden_TH


def _outputs(stage: CausalStage | EncoderStage, hidden_TH: Tensor, sample: Sample) -> Tensor:
    if isinstance(stage, EncoderStage) and stage.config.task_head is not None:
        return stage.task_logits(hidden_TH, [0, len(sample.tokens)])
    if isinstance(stage, EncoderStage) and not stage.config.mlm_head:
        return stage.pool(hidden_TH, [0, len(sample.tokens)])
    return said(stage.gather_logits(hidden_TH), sample)


def said(logits_TV: Tensor, sample: Sample) -> Tensor:
    """The log-probability of each target, 0 where none counts, [T]."""
    targets_T = torch.tensor(sample.targets)
    logprobs_TV = torch.log_softmax(logits_TV.double(), -1)
    said_T = logprobs_TV.gather(1, targets_T.clamp(min=0).unsqueeze(1)).squeeze(1)
    return torch.where(targets_T == IGNORE, 0.0, said_T)


def outputs_of_peft(base: Path, export: Path, probes: list[tuple[Sample, Values]]) -> list[Values]:
    """What PEFT's reader of the same directory says; others load adapters with it."""
    import peft
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # untyped there
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # what the two libraries say of each other is not ours to hear
        plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(plain, export).eval()
        return [said(model(torch.tensor([sample.tokens])).logits[0], sample).float().numpy() for sample, _ in probes]


def _compare(name: str, found: list[Values], probes: list[tuple[Sample, Values]], allowed: float) -> Check:
    return between(name, found, [values for _, values in probes], allowed)


def between(name: str, found: list[Values], expected: list[Values], allowed: float) -> Check:
    """The largest difference; NaN anywhere is one that nothing allows."""
    worst = max(float(np.abs(a.reshape(b.shape) - b).max()) for a, b in zip(found, expected, strict=True))
    return Check(name, worst if worst == worst else float("inf"), allowed)
