"""
Two chat adapters of SmolLM2-135M-Instruct, of a few hundred rows each, served beside their base in one batch.

    python benchmarks/quality/chat.py --seed 1

Told: the validation loss of the base and of each adapter, the time, and whether every answer of the mixed batch is the
answer that its model gives alone (greedy, token for token). What adapters cost is measured by `benchmarks/adapters.py`.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from runs import Result, data_dir, model_dir, record, run_job, settings, write_rows

from trilithon_finetune.converters.questions import json_lines
from trilithon_finetune.phases.verify import loaded_stage, outputs_of_stage
from trilithon_finetune.setup import read_job
from trilithon_finetune.train.work import open_work
from trilithon_parallel.tokenizer import load_tokenizer
from trilithon_server.engine.inprocess import InProcessEngine
from trilithon_server.engine.spec import EngineSpec
from trilithon_server.engine.wire_pb2 import Adapter, AdapterControl, Sampling, Submit, ToEngine
from trilithon_server.text.template import load_template

MODEL = "smollm2-135m-instruct"
QUESTIONS = ("Name three uses of salt.", "Write a polite reminder to pay an invoice.", "What is a trilithon?")
TOKENS = 40
_INSTRUCTION = re.compile(r"### Instruction:\n(.*?)\n\n### Response:", re.DOTALL)


def dolly(count: int) -> list[dict[str, Any]]:
    """Instructions with written answers."""
    rows = _rows("instruct/dolly_hhrlhf_small.jsonl")
    found = []
    for row in rows:
        asked = _INSTRUCTION.search(row["prompt"])
        if asked and row["response"].strip() and len(row["prompt"]) + len(row["response"]) < 1500:
            found.append(chat(asked[1].strip(), row["response"].strip()))
    return found[:count]


def seed_tasks() -> list[dict[str, Any]]:
    """Tasks with an input and an output each."""
    found = []
    for row in _rows("instruct/self_instruct_seed_tasks.jsonl"):
        for instance in row["instances"][:1]:
            asked = "\n\n".join(part for part in (row["instruction"], instance["input"]) if part)
            if instance["output"].strip() and len(asked) + len(instance["output"]) < 1500:
                found.append(chat(asked, instance["output"].strip()))
    return found


def chat(asked: str, answer: str) -> dict[str, Any]:
    """One turn each."""
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def _rows(name: str) -> list[dict[str, Any]]:
    return list(json_lines((data_dir() / name).read_bytes()))


def loss_of_base(result: Result) -> float:
    """What the base loses of the validation rows, a supervised token."""
    work = open_work(read_job(result.export.parent))
    stage = loaded_stage(work.base, work.job.model_dir, dtype=torch.float32)
    stage.prepare()
    part = work.prepared.valid
    samples = [(part.sample(i), None) for i in range(len(part))]
    said = outputs_of_stage(stage, samples)  # type: ignore[arg-type]  # nothing to compare with
    return -sum(float(values.sum()) for values in said) / sum(sample.num_supervised for sample, _ in samples)


def answers(engine: InProcessEngine, asked: Sequence[tuple[Sequence[int], Adapter | None]]) -> list[list[int]]:
    """Greedy answers of one batch."""
    sampling = Sampling(
        num_sequences=1, top_p=1.0, typical_p=1.0, top_p_decay=1.0, repetition_penalty=1.0, max_tokens=TOKENS,
        logprobs=-1, prompt_logprobs=-1,
    )  # fmt: skip
    for handle, (prompt, adapter) in enumerate(asked):
        submit = Submit(handle=handle, prompt=prompt, sampling=sampling, bypass_cache=True)
        if adapter is not None:
            submit.adapter.CopyFrom(adapter)
        engine.send(ToEngine(submit=submit))
    found: list[list[int]] = [[] for _ in asked]
    for step in engine.steps():
        for delta in step.deltas:
            found[delta.handle] += [token.id for token in delta.tokens]
    return found


def serve(model: Path, adapters: Mapping[str, Path]) -> dict[str, Any]:
    """All models in one batch, and each alone."""
    spec = EngineSpec(
        name="chat", model_dir=str(model), dtype="float32", max_context=1024,
        max_batch_sequences=16, max_adapters=len(adapters),
    )  # fmt: skip
    template = load_template(model)
    assert template is not None
    with InProcessEngine(spec) as engine:
        loaded: dict[str, Adapter | None] = {"base": None}
        for name, path in adapters.items():
            loaded[name] = Adapter(digest=name, directory=str(path))
            engine.send(ToEngine(adapter=AdapterControl(kind=AdapterControl.LOAD, adapter=loaded[name])))
        for _ in engine.steps():
            pass
        prompts = [template.render([{"role": "user", "content": q}], add_generation_prompt=True) for q in QUESTIONS]
        tokenizer = load_tokenizer(model)
        ids = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
        mixed = [(prompt, adapter) for prompt in ids for adapter in loaded.values()]
        together = answers(engine, mixed)
        alone = [answers(engine, [item])[0] for item in mixed]
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in together]
    names = [(question, name) for question in QUESTIONS for name in loaded]
    return {
        "rows_in_one_batch": len(mixed),
        "equal_to_alone": sum(a == b for a, b in zip(together, alone, strict=True)),
        "answers": [{"question": q, "model": n, "text": text} for (q, n), text in zip(names, texts, strict=True)],
    }


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", type=int, default=350, help="of the first adapter, validation included")
    parser.add_argument("--epochs", type=int, default=1)
    args = parser.parse_args()
    model, numbers, exports = model_dir(MODEL), {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, rows in (("dolly", dolly(args.rows)), ("tasks", seed_tasks())):
            train = write_rows(folder / f"{kind}.jsonl", (row for i, row in enumerate(rows) if i % 8))
            dev = write_rows(folder / f"{kind}-dev.jsonl", rows[::8])
            config = {
                "task": "sft",
                "seed": args.seed,
                "training": {"epochs": args.epochs, "batch_size": 8},
                "data": {"max_tokens": 640},
            }
            result = run_job(folder, model, train, dev, config)
            exports[kind] = result.export
            numbers[kind] = {
                "rows": len(rows),
                "base_loss": loss_of_base(result),
                "best": dict(result.metrics),
                "last": dict(result.last),
                "seconds": result.seconds,
                "tokens_per_s": result.tokens / result.step_seconds,
                "peak_bytes": result.peak_bytes,
                "estimated_bytes": result.estimate["peak_bytes_per_rank"],
                "estimated_seconds": result.estimate["seconds"],
                "verified_max_abs": result.verified["max_abs"],
            }
        record("chat", {"settings": settings(args), **numbers, "served": serve(model, exports)})


if __name__ == "__main__":
    main()
