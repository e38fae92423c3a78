"""What is asked, and when: a pure function of the settings and the seed."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

# Ids below are bytes and special tokens in most vocabularies.
FIRST_ID = 1_000
WORDS = ("time", "year", "way", "day", "man", "thing", "life", "child", "world", "school", "state", "family", "group")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """
    One measurement's settings. Two results may be compared only when these are equal.

    Args:
        num_requests: requests of each pass.
        prompt_len, answer_len: tokens of each.
        shared_prefix_len: leading tokens that all prompts of a run share.
        concurrency: closed loop: so many requests are always in flight. None with `rate`.
        rate: open loop: requests a second, at Poisson times. None with `concurrency`.
        runs: how often a cold and a warm pass are measured.
        warmup: requests before the first run, of other prompts.
        seed: of prompts and arrival times.
        prompt_format: token ids are exact; text is for servers that take no ids, about one token a word.
        last_id: token ids are drawn from FIRST_ID up to here.
        ignore_eos: ask for answers of exactly `answer_len`, by vLLM's extra parameter.
        extra_body: further fields of every request.
    """

    num_requests: int
    prompt_len: int
    answer_len: int
    shared_prefix_len: int = 0
    concurrency: int | None = None
    rate: float | None = None
    runs: int = 3
    warmup: int = 4
    seed: int = 0
    prompt_format: Literal["ids", "text"] = "ids"
    last_id: int = 8_000
    ignore_eos: bool = True
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Identifies the settings: 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def prompts(workload: Workload, run: int) -> list[list[int] | str]:
    """
    The prompts of one run; run -1 is the warm-up. All differ after the shared prefix.

    >>> [len(ids) for ids in prompts(Workload(num_requests=2, prompt_len=5, answer_len=1, concurrency=1), 0)]
    [5, 5]
    """
    count = workload.num_requests if run >= 0 else workload.warmup
    rng = random.Random(f"{workload.seed}/{run}")
    prefix = _piece(workload, rng, workload.shared_prefix_len)
    rest_len = workload.prompt_len - workload.shared_prefix_len
    pieces = [prefix + _piece(workload, rng, rest_len) for _ in range(count)]
    if workload.prompt_format == "ids":
        return [[int(item) for item in piece] for piece in pieces]
    return [" ".join(map(str, piece)) for piece in pieces]


def arrivals_s(workload: Workload, run: int) -> list[float]:
    """Seconds from the start at which an open loop sends each request."""
    if workload.rate is None:
        return []
    rng = random.Random(f"{workload.seed}/{run}/arrivals")
    at_s = 0.0
    times = []
    for _ in range(workload.num_requests):
        times.append(at_s)
        at_s += rng.expovariate(workload.rate)
    return times


def body(workload: Workload, model: str, prompt: list[int] | str) -> bytes:
    """One request's JSON: greedy, streamed, with usage."""
    fields: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": workload.answer_len,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if workload.ignore_eos:
        fields["ignore_eos"] = True
    return json.dumps({**fields, **workload.extra_body}).encode()


def _piece(workload: Workload, rng: random.Random, length: int) -> list[int] | list[str]:
    if workload.prompt_format == "text":
        return rng.choices(WORDS, k=length)
    return [rng.randrange(FIRST_ID, workload.last_id) for _ in range(length)]
