"""From answers to figures; no numpy, since the base install has none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from trilithon._bench.load import Pass
from trilithon._bench.wire import Answer

LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")


def percentile(ordered: Sequence[float], share: float) -> float:
    """
    By linear interpolation between closest ranks, as numpy's default.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 0.5)
    2.5
    """
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def summary(values: Iterable[float]) -> dict[str, float] | None:
    """Mean, p50, p90 and p99; None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    figures = {f"p{share}": percentile(ordered, share / 100) for share in (50, 90, 99)}
    return {"mean": math.fsum(ordered) / len(ordered), **figures}


def figures(done: Pass, *, answer_len: int, slo: Mapping[str, float]) -> dict[str, Any]:
    """
    What one pass measured.

    TTFT is from sending to the first text; TPOT = (E2E - TTFT) / (n - 1) for n answer tokens; ITL are the gaps between
    events that brought text (an event may bring several tokens); E2E ends with the last byte.

    Args:
        done: the pass.
        answer_len: what every answer should have.
        slo: upper bounds in ms for ttft_ms, tpot_ms, e2e_ms; goodput counts the requests within all of them.
    """
    good = [answer for answer in done.answers if not answer.error]
    each = [_latencies(answer) for answer in good]
    output = sum(answer.answer_tokens for answer in good)
    prompt = sum(answer.prompt_tokens for answer in good)
    span_s = max(done.duration_s, 1e-9)
    within = sum(all(latencies[name] <= limit for name, limit in slo.items()) for latencies in each)
    result: dict[str, Any] = {
        "requests_ok": len(good),
        "requests_failed": len(done.answers) - len(good),
        "errors": sorted({answer.error for answer in done.answers if answer.error})[:4],
        "duration_s": done.duration_s,
        "prompt_tokens": prompt,
        "cached_tokens": sum(answer.cached_tokens for answer in good),
        "output_tokens": output,
        "answers_of_other_length": sum(answer.answer_tokens != answer_len for answer in good),
        "requests_per_s": len(good) / span_s,
        "output_tokens_per_s": output / span_s,
        "total_tokens_per_s": (output + prompt) / span_s,
        "max_in_flight": done.max_in_flight,
        "load_generator_cpu_share": done.own_cpu_s / span_s,
        "load_generator_us_per_token": done.own_cpu_s * 1e6 / max(1, output),
    }
    for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
        result[name] = summary(latencies[name] for latencies in each)
    result["itl_ms"] = summary(gap for answer in good for gap in _gaps_ms(answer))
    if slo:
        result["goodput_requests_per_s"] = within / span_s
        result["goodput_share"] = within / max(1, len(done.answers))
    return result


def spread(values: Sequence[float]) -> dict[str, float]:
    """
    Median, least and greatest over runs.

    >>> spread([3.0, 1.0, 2.0])
    {'median': 2.0, 'min': 1.0, 'max': 3.0}
    """
    ordered = sorted(values)
    return {"median": percentile(ordered, 0.5), "min": ordered[0], "max": ordered[-1]}


def over_runs(passes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each figure's spread over the passes of one kind; figures that some pass lacks are left out."""
    result: dict[str, Any] = {}
    for name, first in passes[0].items():
        values = [one[name] for one in passes]
        if isinstance(first, Mapping) and all(values):
            result[name] = {key: spread([value[key] for value in values]) for key in first}
        elif isinstance(first, int | float):
            result[name] = spread(values)
    return result


def _latencies(answer: Answer) -> dict[str, float]:
    ttft_s = answer.token_times_s[0] - answer.sent_s
    e2e_s = answer.ended_s - answer.sent_s
    tpot_s = (e2e_s - ttft_s) / max(1, answer.answer_tokens - 1)
    return {"ttft_ms": ttft_s * 1e3, "tpot_ms": tpot_s * 1e3, "e2e_ms": e2e_s * 1e3}


def _gaps_ms(answer: Answer) -> list[float]:
    times = answer.token_times_s
    return [(after - before) * 1e3 for before, after in pairwise(times)]
