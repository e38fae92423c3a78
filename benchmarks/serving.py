"""
Our server against transformers' `generate`, in one run on one machine, interleaved.

    python benchmarks/serving.py
    python benchmarks/serving.py --dtype float32 --runs 5 --save result.json

Starts `trilithon serve` as a user would, and transformers in a process of its own. Each round measures, in rotating
order: our server under a closed loop (HTTP, streamed, cold prefix cache), transformers one request at a time, and
transformers with all requests in one static batch. Both get the same token ids and generate the same number of tokens,
greedily. Only the ratios mean something elsewhere; absolute speeds belong to the machine and the hour.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from trilithon import Client, Unavailable, _store
from trilithon._bench.load import run_pass
from trilithon._bench.serve import machine, target_for
from trilithon._bench.statistics import figures, spread
from trilithon._bench.trace import Workload, body, prompts
from trilithon.errors import ConnectionFailed, NotFound

START_S = 600.0
COMMAND = [sys.executable, "-c", "import sys; from trilithon.cli import main; sys.exit(main())"]
GIB = 2**30


@dataclass
class Server:
    """Our server, started: its processes and what its start told."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    first_answer_s: float = 0.0

    def tree(self) -> list[psutil.Process]:
        """Supervisor, front and ranks."""
        top = psutil.Process(self.process.pid)
        return [top, *top.children(recursive=True)]

    def peak_bytes(self) -> int:
        """The sum of the processes' greatest resident sizes: an upper bound, since they share pages."""
        return sum(_high_water_bytes(process.pid) for process in self.tree())

    def front_cpu_s(self) -> float:
        """Processor time of the front so far."""
        times = [one.cpu_times() for one in self.tree() if "trilithon_server.front" in " ".join(one.cmdline())]
        return sum(time.user + time.system for time in times)

    def phases_s(self) -> dict[str, float]:
        """Seconds of each phase of the start, from the log."""
        found: dict[str, float] = {}
        for line in self.log.read_text("utf-8", "replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                event = json.loads(line)
                if event["event"] == "startup_phase":
                    found[event["phase"]] = max(found.get(event["phase"], 0.0), float(event["seconds"]))
        return found


@contextlib.contextmanager
def our_server(model: str, dtype: str, flags: Sequence[str]) -> Iterator[Server]:
    """`trilithon serve` on free ports, ready and answered once."""
    ports = [_free_port(), _free_port()]
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        with log.open("wb") as out:
            started_s = time.perf_counter()
            process = subprocess.Popen(
                [*COMMAND, "serve", model, "--dtype", dtype, "--http-port", str(ports[0]), "--grpc-port", str(ports[1]),
                 "--log-format", "json", *flags],
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        server = Server(process, f"http://127.0.0.1:{ports[0]}", log)
        try:
            _wait_ready(server)
            with Client(server.url, timeout=120) as client:
                client.generate([1, 2, 3], model=_served_name(server.url), max_tokens=1, temperature=0.0)
            server.first_answer_s = time.perf_counter() - started_s
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


class Transformers:
    """The peer's process."""

    def __init__(self, model_dir: Path, dtype: str, threads: int) -> None:
        script = Path(__file__).with_name("peer_transformers.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.started = self.ask({"model_dir": str(model_dir), "dtype": dtype, "threads": threads})

    def ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """One command, one answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of transformers ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def main() -> int:
    """Measure, print, save."""
    args = _arguments()
    # Asked to stop, leave through the blocks that stop the two sides.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    model_dir = model_directory(args.model)
    workload = Workload(
        num_requests=args.concurrency,
        prompt_len=args.prompt_len,
        answer_len=args.answer_len,
        concurrency=args.concurrency,
        runs=args.runs,
        warmup=args.concurrency,
        seed=args.seed,
    )
    with our_server(
        str(model_dir), args.dtype, [f"--kv-cache-bytes={args.kv_cache_bytes}", *args.serve_flag]
    ) as server:
        peer = Transformers(model_dir, args.dtype, args.threads)
        try:
            result = _measure(server, peer, workload, model_dir)
        finally:
            peer.close()
        result["ours"] |= {
            "first_answer_s": server.first_answer_s,
            "phases_s": server.phases_s(),
            "peak_bytes": server.peak_bytes(),
        }
    result |= {
        "machine": machine(),
        "dtype": args.dtype,
        "threads": args.threads,
        "kv_cache_bytes": args.kv_cache_bytes,
        "workload_digest": workload.digest,
        "seed": args.seed,
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("trilithon", "torch", "transformers")},
        },
    }
    print(_block(result, workload))
    if args.save is not None:
        Path(args.save).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def _measure(server: Server, peer: Transformers, workload: Workload, model_dir: Path) -> dict[str, Any]:
    batch = workload.num_requests
    name = _served_name(server.url)
    front_shares: list[float] = []
    details: list[dict[str, Any]] = []
    peak_bytes = 0

    def ours(run: int) -> float:
        bodies = [body(workload, name, prompt) for prompt in prompts(workload, run)]
        front_s = server.front_cpu_s()
        done = asyncio.run(run_pass(target_for(server.url, None), bodies, concurrency=workload.concurrency))
        front_shares.append((server.front_cpu_s() - front_s) / done.duration_s)
        found = figures(done, answer_len=workload.answer_len, slo={})
        if found["requests_failed"] or found["answers_of_other_length"]:
            raise SystemExit(f"our server failed: {found['errors']}")
        details.append(found)
        return float(found["output_tokens_per_s"])

    def theirs(size: int) -> Any:
        def run_one(run: int) -> float:
            nonlocal peak_bytes
            command = {"prompts": prompts(workload, run), "batch": size, "answer_len": workload.answer_len}
            done = peer.ask(command)
            peak_bytes = max(peak_bytes, done["peak_bytes"])
            return batch * workload.answer_len / float(done["seconds"])

        return run_one

    sides = {"ours": ours, "one_at_a_time": theirs(1), "static_batch": theirs(batch)}
    print("comparing greedy answers", file=sys.stderr, flush=True)
    agreement = _agreement(server.url, peer, workload)
    for name_of_side, side in sides.items():
        print(f"warm-up: {name_of_side}", file=sys.stderr, flush=True)
        side(-1)
    front_shares.clear()
    details.clear()
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    for run in range(workload.runs):
        order = list(sides)[run % 3 :] + list(sides)[: run % 3]
        for side in order:
            print(f"round {run + 1} of {workload.runs}: {side}", file=sys.stderr, flush=True)
            speeds[side].append(sides[side](run))
    ratios = {
        side: spread([mine / other for mine, other in zip(speeds["ours"], speeds[side], strict=True)])
        for side in ("one_at_a_time", "static_batch")
    }
    return {
        "ratios": ratios,
        "agreement": agreement,
        "ours": {
            "tokens_per_s": spread(speeds["ours"]),
            "ttft_ms": spread([one["ttft_ms"]["p50"] for one in details]),
            "tpot_ms": spread([one["tpot_ms"]["p50"] for one in details]),
            "front_cpu_share": spread(front_shares),
            "load_generator_cpu_share": spread([one["load_generator_cpu_share"] for one in details]),
        },
        "transformers": {
            "one_at_a_time_tokens_per_s": spread(speeds["one_at_a_time"]),
            "static_batch_tokens_per_s": spread(speeds["static_batch"]),
            "ready_s": peer.started["ready_s"],
            "peak_bytes": peak_bytes,
        },
    }


def _agreement(url: str, peer: Transformers, workload: Workload) -> dict[str, float]:
    """
    How far greedy answers of both sides agree, before speed is compared.

    At float32 they should agree to the end; at bfloat16 two correct programs part at the first near-tie.
    """
    asked = [ids for ids in prompts(workload, -1)[:2] if isinstance(ids, list)]
    length = min(32, workload.answer_len)
    theirs = peer.ask({"prompts": asked, "batch": 1, "answer_len": length})["answers"]
    shares = []
    with Client(url, timeout=300) as client:
        for ids, other in zip(asked, theirs, strict=True):
            answer = client.generate(ids, max_tokens=length, temperature=0.0, ignore_eos=True, return_token_ids=True)
            mine = [token.id for token in answer.tokens]
            same = next((at for at, pair in enumerate(zip(mine, other, strict=True)) if pair[0] != pair[1]), length)
            shares.append(same / length)
    return {"compared_tokens": length, **spread(shares)}


def _block(result: Mapping[str, Any], workload: Workload) -> str:
    ours, peer, place = result["ours"], result["transformers"], result["machine"]
    versions = result["versions"]
    lines = [
        f"{place['cpu']}, {place['num_cpus']} cores, {place['memory_gib']} GiB; {result['dtype']}, "
        f"{result['threads']} threads; trilithon {versions['trilithon']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}",
        f"{workload.num_requests} requests at once, {workload.prompt_len} tokens in, {workload.answer_len} out; "
        f"{workload.runs} interleaved rounds after a warm-up; median [min .. max]",
        "",
        f"ratio to generate() one at a time      {shown_range(result['ratios']['one_at_a_time'], '.2f')}",
        f"ratio to generate() in a static batch  {shown_range(result['ratios']['static_batch'], '.2f')}",
        f"greedy tokens equal to transformers'   {shown_range(result['agreement'], '.0%')}",
        "",
        f"ours, tokens/s                         {shown_range(ours['tokens_per_s'], '.1f')}",
        f"transformers one at a time, tokens/s   {shown_range(peer['one_at_a_time_tokens_per_s'], '.1f')}",
        f"transformers static batch, tokens/s    {shown_range(peer['static_batch_tokens_per_s'], '.1f')}",
        f"ours, TTFT p50 ms                      {shown_range(ours['ttft_ms'], '.1f')}",
        f"ours, TPOT p50 ms                      {shown_range(ours['tpot_ms'], '.2f')}",
        f"ours, front's share of a core          {shown_range(ours['front_cpu_share'], '.3f')}",
        f"load generator's share of a core       {shown_range(ours['load_generator_cpu_share'], '.3f')}",
        f"ours, start to first answer s          {ours['first_answer_s']:.1f} "
        f"({', '.join(f'{name} {seconds:.1f}' for name, seconds in ours['phases_s'].items())})",
        f"transformers, start to ready s         {peer['ready_s']:.1f}",
        f"ours, peak memory of all processes     {ours['peak_bytes'] / GIB:.2f} GiB, "
        f"of it {result['kv_cache_bytes']} for keys and values",
        f"transformers, peak memory              {peer['peak_bytes'] / GIB:.2f} GiB",
    ]
    return "\n".join(lines)


def shown_range(value: Mapping[str, float], form: str) -> str:
    middle, low, high = (format(value[key], form) for key in ("median", "min", "max"))
    return f"{middle} [{low} .. {high}]"


def model_directory(model: str) -> Path:
    try:
        return _store.resolve(model)
    except NotFound:
        subprocess.run([*COMMAND, "pull", model], check=True)
        return _store.resolve(model)


def _served_name(url: str) -> str:
    with Client(url) as client:
        return client.models.list()[0].id


def _wait_ready(server: Server) -> None:
    deadline = time.monotonic() + START_S
    with Client(server.url) as client:
        while time.monotonic() < deadline:
            if server.process.poll() is not None:
                break
            with contextlib.suppress(ConnectionFailed, Unavailable):
                if client.health(timeout=5).ready:
                    return
            time.sleep(0.05)
    raise SystemExit(f"our server did not become ready:\n{server.log.read_text('utf-8', 'replace')}")


def _high_water_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure our server against transformers' generate(), interleaved.")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a name of the store, or a directory")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of both sides")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at once, and the static batch")
    parser.add_argument("--prompt-len", type=int, default=128, help="tokens in")
    parser.add_argument("--answer-len", type=int, default=128, help="tokens out")
    parser.add_argument("--runs", type=int, default=3, help="interleaved rounds")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the peer")
    parser.add_argument("--kv-cache-bytes", default="1GiB", help="of our server, so that its memory compares")
    parser.add_argument(
        "--serve-flag", action="append", default=[], help="of `trilithon serve`, as in --serve-flag=--tp=2"
    )
    parser.add_argument("--save", help="write the result as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
