"""R9: many requests, clients that crash at random among them, and a server that neither grows nor forgets."""

from __future__ import annotations

import itertools
import random
import statistics
import threading
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from crashing import assert_blocks_are_free, crashing_client, total_blocks
from front_server import ADMIN, MODEL, OTHER, Front, fronted

from trilithon import Client

# Allocators settle and fragment: what a look may differ by without anything being kept.
NOISE_BYTES = 3 << 20


def resident_bytes(front: Front) -> int:
    """What supervisor, front and ranks hold together, each page of their own counted once."""
    top = psutil.Process(front.server.process.pid)
    return sum(process.memory_full_info().uss for process in (top, *top.children(recursive=True)))


@pytest.mark.parametrize(
    ("rounds", "bytes_per_request"),
    [(1500, 4096), pytest.param(30_000, 512, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])],
)
def test_R9_a_soak_leaves_no_trace(
    tmp_path_factory: pytest.TempPathFactory, rounds: int, bytes_per_request: int
) -> None:
    """
    Four clients that crash beside two that don't: every answer of the latter is whole, memory has no slope over the
    requests after a warm-up, and no block is held or lost.

    The slope is the median of what is gained from one look to the next: what is kept of requests is gained between any
    two, while a pool that is enlarged, or pages that the kernel takes and gives back, are one step.

    Inverse seen: keeping 32 KiB of each request in a list of the service turns it red.
    """
    lost: list[object] = []

    def steady(front: Front, key: str, seed: int, until: threading.Event) -> int:
        rng, answers = random.Random(seed), 0
        with Client(front.server.url, api_key=key) as client:
            while not until.is_set():
                wanted = rng.choice([1, 8, 30])
                done = client.generate(f"steady {seed}", model=MODEL, max_tokens=wanted, ignore_eos=True, seed=seed)
                answers += 1
                if done.usage.generated_tokens != wanted or done.finish_reason != "max_tokens":
                    lost.append(done)
        return answers

    def crash(front: Front, seeds: range) -> None:
        for seed in seeds:
            crashing_client(front, random.Random(seed))

    with fronted(tmp_path_factory.mktemp("soak")) as front, ThreadPoolExecutor(6) as pool:
        front.generate(prompt="x", max_tokens=1)  # the first step brings the first statistics
        total, looks, until = total_blocks(front), [], threading.Event()
        steadies = [pool.submit(steady, front, key, seed, until) for seed, key in enumerate((OTHER, ADMIN))]
        parts = 8  # the first two warm caches and pools up
        for part in range(parts):
            crashes = [
                pool.submit(crash, front, range(part * rounds // parts + i, (part + 1) * rounds // parts, 4))
                for i in range(4)
            ]
            for job in crashes:
                job.result()
            looks.append(resident_bytes(front))
        until.set()
        answers = sum(job.result() for job in steadies)
        assert_blocks_are_free(front)

        assert total_blocks(front) == total
    steps = parts // 2
    grown = steps * statistics.median(later - earlier for earlier, later in itertools.pairwise(looks[2:]))
    allowed = NOISE_BYTES + bytes_per_request * (rounds * steps // parts)
    assert not lost
    assert answers > 0
    assert grown <= allowed, f"grew by {grown / 2**20:.1f} MiB over {rounds * steps // parts} requests: {looks}"
