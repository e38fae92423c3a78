"""
What adapters cost: throughput of one engine with 0, 1, 4 and 16 adapters in its batch, in turns within one run.

    python benchmarks/adapters.py --dtype bfloat16

All sides do the same work over the same prompts: `--concurrency` requests at once, `--tokens` answer tokens each,
greedy and without end tokens. The requests of a side take its adapters in turn, so with 16 every row of a step has its
own. The adapters are random, of rank 16 over all products of every layer, and loaded before the first round.

Two ratios stand beside each side: of tokens a second, and of the processor time of a step. On a machine that others
use, the second is the one to read, with `--threads 1`: waiting for a core is no part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from trilithon_parallel.backend.torch_ops import preferred_dtype
from trilithon_parallel.config import load_config
from trilithon_parallel.lora.peft import write_adapter
from trilithon_parallel.lora.spec import LoraSpec, owned_shapes, targets_of
from trilithon_server.engine.inprocess import InProcessEngine
from trilithon_server.engine.spec import Dtype, EngineSpec
from trilithon_server.engine.wire_pb2 import Adapter, AdapterControl, Sampling, Submit, ToEngine

SIDES = (0, 1, 4, 16)


@dataclass(slots=True)
class Side:
    """Rounds of one number of adapters: answer tokens a second; the mean step in ms by the clock, and of processors."""

    adapters: int
    tokens_per_s: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)


def make_adapters(directory: Path, model_dir: Path, *, count: int, rank: int) -> list[Adapter]:
    """Random adapters in PEFT's layout."""
    config = load_config(model_dir)
    spec = LoraSpec(rank=rank, alpha=2.0 * rank, targets=targets_of(config))
    made = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        state = {
            name: 0.02 * torch.randn(shape, generator=generator) for name, shape in owned_shapes(config, spec).items()
        }
        path = directory / f"adapter{number}"
        write_adapter(path, state, config=config, spec=spec, base_model="benchmark", facts={})
        made.append(Adapter(digest=str(number), directory=str(path)))
    return made


def run(engine: InProcessEngine, adapters: Sequence[Adapter], side: Side, *, concurrency: int, tokens: int) -> None:
    """One round of a side, counted from the first step after every prompt is computed."""
    sampling = Sampling(
        num_sequences=1, top_p=1.0, typical_p=1.0, top_p_decay=1.0, repetition_penalty=1.0, max_tokens=tokens,
        logprobs=-1, prompt_logprobs=-1,
    )  # fmt: skip
    for number in range(concurrency):
        prompt = [(7 * number + 3 * i) % 1000 + 10 for i in range(16)]
        submit = Submit(handle=number, prompt=prompt, sampling=sampling, bypass_cache=True)
        if adapters:
            submit.adapter.CopyFrom(adapters[number % len(adapters)])
        engine.send(ToEngine(submit=submit))
    began = ended = time.perf_counter(), time.process_time()
    counted, steps = 0, 0
    for step in engine.steps():
        if step.stats.step_decodes < concurrency:  # prompts, and the last steps of an uneven end
            if not steps:
                began = time.perf_counter(), time.process_time()
            continue
        counted += sum(len(delta.tokens) for delta in step.deltas)
        steps += 1
        ended = time.perf_counter(), time.process_time()
    seconds, cpu_s = (stop - start for start, stop in zip(began, ended, strict=True))
    side.tokens_per_s.append(counted / seconds)
    side.step_ms.append(1000 * seconds / steps)
    side.cpu_ms.append(1000 * cpu_s / steps)


def measure(args: argparse.Namespace) -> list[Side]:
    """Every side in turn, `args.rounds` times."""
    dtype: Dtype = args.dtype
    sides = [Side(count) for count in SIDES if count <= args.concurrency]
    with tempfile.TemporaryDirectory(prefix="trilithon-bench-") as directory:
        adapters = make_adapters(Path(directory), args.model, count=sides[-1].adapters, rank=args.rank)
        spec = EngineSpec(
            name="bench", model_dir=str(args.model), dtype=dtype, num_threads=args.threads, max_context=2048,
            max_batch_sequences=args.concurrency, max_adapters=sides[-1].adapters,
        )  # fmt: skip
        with InProcessEngine(spec) as engine:
            for adapter in adapters:
                engine.send(ToEngine(adapter=AdapterControl(kind=AdapterControl.LOAD, adapter=adapter)))
            for _ in engine.steps():
                pass
            run(engine, adapters, Side(0), concurrency=args.concurrency, tokens=8)  # warms up
            for _ in range(args.rounds):
                for side in sides:
                    held = adapters[: side.adapters]
                    run(engine, held, side, concurrency=args.concurrency, tokens=args.tokens)
    return sides


def report(sides: Sequence[Side]) -> Mapping[str, object]:
    """Print a table; the ratios are medians over rounds of each round's own ratio to none."""
    names = ("adapters", "tokens/s", "least", "greatest", "of none", "cpu ms", "of none")
    print("  ".join(f"{name:>8}" for name in names))
    ratios = {}
    for side in sides:
        by_clock = [rate / none for rate, none in zip(side.tokens_per_s, sides[0].tokens_per_s, strict=True)]
        by_cpu = [none / spent for spent, none in zip(side.cpu_ms, sides[0].cpu_ms, strict=True)]
        ratio = ratios[side.adapters] = (statistics.median(by_clock), statistics.median(by_cpu))
        rates = side.tokens_per_s
        print(
            f"{side.adapters:>8}  {statistics.median(rates):>8.1f}  {min(rates):>8.1f}  {max(rates):>8.1f}  "
            f"{ratio[0]:>8.3f}  {statistics.median(side.cpu_ms):>8.2f}  {ratio[1]:>8.3f}"
        )
    return {"sides": [asdict(side) for side in sides], "ratios": ratios}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    default = str(preferred_dtype("cpu")).removeprefix("torch.")
    parser.add_argument("model", type=Path, help="model directory")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=default)
    parser.add_argument("--concurrency", type=int, default=16, help="requests at once [%(default)s]")
    parser.add_argument("--tokens", type=int, default=48, help="answer tokens of each [%(default)s]")
    parser.add_argument("--rank", type=int, default=16, help="of every adapter [%(default)s]")
    parser.add_argument("--rounds", type=int, default=7, help="of every side [%(default)s]")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="[%(default)s]")
    parser.add_argument("--save", type=Path, help="also write every number to this JSON file")
    args = parser.parse_args(argv)
    found = report(measure(args))
    if args.save is not None:
        settings = {name: str(value) for name, value in vars(args).items()}
        args.save.write_text(json.dumps({"settings": settings, **found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
