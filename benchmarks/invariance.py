"""
What the batch-invariant mode costs: two of our servers, with the mode and without, in one run on one machine.

    python benchmarks/invariance.py
    python benchmarks/invariance.py --dtype float32 --serve-flag=--tp=2

Both serve the same model at the same layout and take turns under one closed loop (HTTP, streamed, cold prefix cache).
The ratios are speed with the mode by speed without: 1 is free, below 1 is the price.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import Any

from serving import model_directory, our_server, shown_range

from trilithon._bench.load import run_pass
from trilithon._bench.serve import machine, target_for
from trilithon._bench.statistics import figures, spread
from trilithon._bench.trace import Workload, body, prompts

NAME = "invariance"


def main() -> int:
    """Measure and print."""
    args = _arguments()
    model_dir = str(model_directory(args.model))
    flags = ["--kv-cache-bytes=1GiB", f"--served-name={NAME}", *args.serve_flag]
    place = machine()
    print(f"{place['cpu']}, {place['num_cpus']} cores; {args.dtype} {' '.join(args.serve_flag)}".rstrip())
    with (
        our_server(model_dir, args.dtype, [*flags, "--no-batch-invariant"]) as plain,
        our_server(model_dir, args.dtype, [*flags, "--batch-invariant"]) as invariant,
    ):
        sides = {"without": plain.url, "with": invariant.url}
        for concurrency in args.concurrency:
            workload = Workload(
                num_requests=concurrency,
                prompt_len=args.prompt_len,
                answer_len=args.answer_len,
                concurrency=concurrency,
                runs=args.runs,
                warmup=concurrency,
                seed=args.seed,
            )
            found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
            for run in range(-1, args.runs):  # the first is the warm-up
                for side in sorted(sides, reverse=bool(run % 2)):
                    bodies = [body(workload, NAME, prompt) for prompt in prompts(workload, run)]
                    done = asyncio.run(run_pass(target_for(sides[side], None), bodies, concurrency=concurrency))
                    one = figures(done, answer_len=workload.answer_len, slo={})
                    if one["requests_failed"] or one["answers_of_other_length"]:
                        raise SystemExit(f"the server {side} the mode failed: {one['errors']}")
                    if run >= 0:
                        found[side].append(one)
            pairs = list(zip(found["with"], found["without"], strict=True))
            speeds = spread([mine["output_tokens_per_s"] / other["output_tokens_per_s"] for mine, other in pairs])
            firsts = spread([other["ttft_ms"]["p50"] / mine["ttft_ms"]["p50"] for mine, other in pairs])
            print(
                f"{concurrency:3} at once, {args.prompt_len} in, {args.answer_len} out: output speed "
                f"{shown_range(speeds, '.2f')}, first token {shown_range(firsts, '.2f')}, of that without the mode",
                flush=True,
            )
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what the batch-invariant mode costs, interleaved.")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a name of the store, or a directory")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of both servers")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32], help="requests at once")
    parser.add_argument("--prompt-len", type=int, default=128, help="tokens in")
    parser.add_argument("--answer-len", type=int, default=64, help="tokens out")
    parser.add_argument("--runs", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--serve-flag", action="append", default=[], help="of both, as in --serve-flag=--tp=2")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
