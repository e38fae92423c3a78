"""
Answers that an export writes by itself: the engine that serves it loads it and writes, the recipe compares.

Log-probabilities of right answers say how a model learns; whether it finds them, and stops behind them, only its own
words say. They are greedy, so the same export writes the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from trilithon_finetune.recipes.base import IGNORE, Sample, Writing
from trilithon_finetune.resolve import lora_spec
from trilithon_finetune.setup import read_rows_of
from trilithon_finetune.train.work import Work
from trilithon_parallel.attention import PagedKVCache
from trilithon_parallel.grid import Grid
from trilithon_server.engine.spec import BLOCK_SIZE
from trilithon_server.llm import LLM
from trilithon_server.prompts import Sequenced
from trilithon_server.sampling import SamplingParams

ADAPTER = "export"

SEQUENCES = 16
"""Answers that are written at once; memory for them, and no more, is taken."""


def written_numbers(work: Work, export: Path) -> dict[str, float]:
    """
    What the recipe says of answers to validation questions, by name; empty where it asks for none, or none is held out.

    Raises:
        ModelError: the export cannot be served here. TrilithonError: an answer could not be finished.
    """
    writing = work.recipe.writing(work.context)
    if writing is None or not (samples := _asked(work, writing.count)):
        return {}
    texts = _write(work, export, samples, writing)
    rows = read_rows_of(work.job, work.recipe, set(texts))
    return dict(work.recipe.judge(texts, rows, work.context))


def _asked(work: Work, count: int) -> list[Sample]:
    """Validation samples, at most so many, spread over all of them."""
    part = work.prepared.valid
    kept = min(count, len(part))
    return [part.sample(i * len(part) // kept) for i in range(kept)]


def _write(work: Work, export: Path, samples: Sequence[Sample], writing: Writing) -> dict[int, str]:
    """The text behind each sample's prompt, by line of the validation file; none is longer than the longest learned."""
    prompts = [prompt_of(sample) for sample in samples]
    most = max(int(part.supervised.max()) for part in (work.prepared.train, work.prepared.valid))
    window = min(work.base.max_context, max(len(prompt.ids) for prompt in prompts) + most)
    by_room: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_room.setdefault(min(most, window - len(prompt.ids)), []).append(index)
    texts: dict[int, str] = {}
    name = ADAPTER if lora_spec(work.config) is not None else None
    with _engine(work, export, window=window, queue=len(prompts)) as llm:
        for room, indices in by_room.items():
            params = SamplingParams(temperature=0, max_tokens=room, stop=writing.stops)
            outputs = llm.generate([prompts[index] for index in indices], params, adapter=name)
            texts |= {samples[i].row: out.choices[0].text for i, out in zip(indices, outputs, strict=True)}
    return texts


def prompt_of(sample: Sample) -> Sequenced:
    """The tokens before the first that is learned: what a server is sent."""
    first = next(at for at, target in enumerate(sample.targets) if target != IGNORE)
    behind = first + 1
    return Sequenced(
        ids=sample.tokens[:behind],
        types=sample.types[:behind],
        positions=sample.positions[:behind],
        answer_type=sample.types[behind] if sample.types else 0,
    )


def _engine(work: Work, export: Path, *, window: int, queue: int) -> LLM:
    dtype: torch.dtype = getattr(torch, work.config.dtype)
    blocks = SEQUENCES * -(-window // BLOCK_SIZE)
    is_adapter = lora_spec(work.config) is not None
    return LLM(
        work.job.model_dir if is_adapter else export,
        adapters={ADAPTER: export} if is_adapter else None,
        dtype=work.config.dtype,
        device=work.config.parallel.device,
        max_context=window,
        kv_cache_bytes=blocks * PagedKVCache.bytes_per_block(work.base, Grid.single(), dtype),
        max_batch_sequences=SEQUENCES,
        max_queued_requests=queue,
        num_threads=torch.get_num_threads(),
    )
