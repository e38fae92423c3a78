"""
A result verified where it lies, away from the job that made it: read as a server reads it, and held against others.

An adapter is compared with itself merged, with its base alone, and with PEFT's reading of the same files; a model
directory with what `transformers` makes of it. The samples are a few sentences of our own.
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from trilithon_finetune.errors import refuse
from trilithon_finetune.phases.verify import (
    MERGED_TOLERANCE,
    TOLERANCE,
    Check,
    Values,
    between,
    loaded_stage,
    outputs_of_peft,
    outputs_of_stage,
    said,
)
from trilithon_finetune.recipes.base import IGNORE, Sample
from trilithon_parallel.config import ModelConfig, load_config
from trilithon_parallel.grid import Grid
from trilithon_parallel.lora.bank import MAX_RANK, AdapterBank
from trilithon_parallel.lora.files import CONFIG_FILE
from trilithon_parallel.lora.merge import merge_into
from trilithon_parallel.lora.peft import read_adapter
from trilithon_parallel.tokenizer import load_tokenizer
from trilithon_server.engine.identity import model_digest

TEXTS = (
    "The river was high after the rain, and the bridge was closed until noon.",
    "What does a lighthouse keeper do on a clear night?",
    "Two thirds of the apples were red; the others were still green.",
    "def area(width, height): return width * height",
    "Please write a short note to the neighbours about the noise.",
    "Water boils at a lower temperature on a high mountain.",
    "She opened the letter, read it twice, and put it back.",
    "1, 1, 2, 3, 5, 8, 13",
)

Probes = list[tuple[Sample, Values]]


def verify_directory(directory: Path, base: Path | None) -> list[Check]:
    """
    Verify an adapter directory or a model directory.

    Args:
        base: the model directory that an adapter stands on.
    Raises:
        ModelError: a directory cannot be read.
        FinetuneError: `invalid_config`: an adapter without a base.
    """
    if (directory / CONFIG_FILE).is_file():
        if base is None:
            raise refuse("invalid_config", f"{directory} holds an adapter, which needs its base.", hint="Add --base.")
        return _adapter(directory, base)
    return _model(directory)


def _adapter(directory: Path, base: Path) -> list[Check]:
    config = load_config(base)
    adapter = read_adapter(directory, config=config)  # every key and shape, or an error
    checks = [Check("every tensor has its place", 0.0, None)]
    if made_on := adapter.facts.get("base_digest"):
        checks.append(Check("made on this base", float(made_on != model_digest(base)), 0.0))
    probes = _probes(config, base)
    stage = loaded_stage(config, base, dtype=torch.float32)
    stage.prepare()
    plain = outputs_of_stage(stage, probes)
    bank = AdapterBank(stage, config=config, grid=Grid.single(), max_adapters=1, max_rank=MAX_RANK)
    bank.load(0, directory)
    adapted = outputs_of_stage(stage, probes, bank=bank)
    merged = loaded_stage(config, base, dtype=torch.float32)
    has_effect = merge_into(merged, directory, config=config, grid=Grid.single())
    merged.prepare()
    tolerance = MERGED_TOLERANCE["float32"]
    checks.append(between("merged and not merged", outputs_of_stage(merged, probes), adapted, tolerance))
    if has_effect:
        moved = between("", adapted, plain, 0.0).max_abs
        checks.append(Check("base and adapter are one", float(moved == 0.0), 0.0))
    if importlib.util.find_spec("peft") and importlib.util.find_spec("transformers"):
        theirs = outputs_of_peft(base, directory, probes)
        checks.append(between("PEFT and this software", theirs, adapted, TOLERANCE["float32"]))
    return checks


def _model(directory: Path) -> list[Check]:
    config = load_config(directory)
    probes = _probes(config, directory)
    stage = loaded_stage(config, directory, dtype=torch.float32)
    stage.prepare()
    ours = outputs_of_stage(stage, probes)
    checks = [Check("outputs that are not finite", float(sum(not np.isfinite(item).all() for item in ours)), 0.0)]
    is_known = config.task_head is None or config.task_head.is_in_transformers
    if is_known and importlib.util.find_spec("transformers"):
        theirs = _outputs_of_transformers(directory, config, probes)
        checks.append(between("transformers and this software", theirs, ours, TOLERANCE["float32"]))
    return checks


def _probes(config: ModelConfig, directory: Path) -> Probes:
    """Each text as a sample whose every token counts."""
    tokenizer = load_tokenizer(directory)
    found: Probes = []
    for text in TEXTS:
        tokens = tuple(tokenizer.encode(text, add_special_tokens=True))[: config.max_context]
        targets = (*tokens[1:], IGNORE) if config.is_causal else tokens
        found.append((Sample(tokens, targets), np.zeros(0, np.float32)))
    return found


def _outputs_of_transformers(directory: Path, config: ModelConfig, probes: Probes) -> list[Values]:
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # untyped there
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # of another library, about itself
        model = getattr(transformers, config.architecture).from_pretrained(directory, dtype=torch.float32).eval()
        found = []
        for sample, _ in probes:
            answer = model(torch.tensor([sample.tokens]))
            if not config.has_head and config.task_head is None:
                hidden_TH = answer.last_hidden_state[0]
                vector_H = hidden_TH.mean(0) if config.pooling == "mean" else hidden_TH[0]
                found.append((F.normalize(vector_H, dim=0) if config.normalize else vector_H).numpy())
                continue
            if config.task_head is None:
                found.append(said(answer.logits[0], sample).float().numpy())
            elif config.task_head.kind == "span":
                found.append(torch.stack((answer.start_logits[0], answer.end_logits[0]), -1).numpy())
            else:
                found.append(answer.logits[0].numpy())
        return found
