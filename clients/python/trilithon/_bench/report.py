"""The fixed block that a measurement prints, and the comparison of two."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trilithon._bench.serve import FORMAT

HIGHER_IS_BETTER = ("output_tokens_per_s", "requests_per_s")
_COUNTS = (
    ("requests ok", "requests_ok", "{:.0f}"),
    ("requests failed", "requests_failed", "{:.0f}"),
    ("answers of another length", "answers_of_other_length", "{:.0f}"),
    ("duration s", "duration_s", "{:.2f}"),
    ("prompt tokens", "prompt_tokens", "{:.0f}"),
    ("of these from the cache", "cached_tokens", "{:.0f}"),
    ("output tokens", "output_tokens", "{:.0f}"),
    ("requests/s", "requests_per_s", "{:.2f}"),
    ("output tokens/s", "output_tokens_per_s", "{:.1f}"),
    ("total tokens/s", "total_tokens_per_s", "{:.1f}"),
    ("goodput requests/s", "goodput_requests_per_s", "{:.2f}"),
    ("load generator, share of a core", "load_generator_cpu_share", "{:.3f}"),
    ("load generator, us per token", "load_generator_us_per_token", "{:.1f}"),
)
_LATENCIES = (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("ITL", "itl_ms"), ("E2E", "e2e_ms"))


class NotComparable(ValueError):
    """Two results were measured with different settings or on different machines."""


def block(result: Mapping[str, Any]) -> str:
    """A measurement for people: the median of the runs, with least and greatest."""
    work = result["workload"]
    loop = f"closed loop, {work['concurrency']} at a time" if work["rate"] is None else f"open loop, {work['rate']:g}/s"
    shared = f", {work['shared_prefix_len']} of them shared" if work["shared_prefix_len"] else ""
    place = result["machine"]
    lines = [
        f"{result['model']} at {result['url']} {result['fingerprint']}".rstrip(),
        f"{place['cpu']}, {place['num_cpus']} cores, {place['memory_gib']} GiB, {place['system']}",
        f"{loop}; {work['num_requests']} requests of {work['prompt_len']} tokens in{shared}, {work['answer_len']} out; "
        f"{work['runs']} runs after {work['warmup']} requests of warm-up; seed {work['seed']}, "
        f"settings {result['workload_digest']}",
        "",
        f"{'median of the runs [min .. max]':<34}{'cold prefix cache':>30}{'warm prefix cache':>30}",
    ]
    for words, name, form in _COUNTS:
        if name in result["cold"]:
            lines.append(f"{words:<34}{_cell(result['cold'][name], form)}{_cell(result['warm'][name], form)}")
    for words, name in _LATENCIES:
        for key in ("mean", "p50", "p90", "p99"):
            cells = [_cell(result[kind].get(name, {}).get(key), "{:.1f}") for kind in ("cold", "warm")]
            lines.append(f"{f'{words} {key} ms':<34}{''.join(cells)}")
    errors = sorted({error for kind in ("cold", "warm") for one in result["passes"][kind] for error in one["errors"]})
    lines += [f"failed: {error}" for error in errors]
    return "\n".join(lines)


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[dict[str, Any]]:
    """
    How the second result stands to the first: ratios of medians, and whether the runs' ranges overlap.

    Raises:
        NotComparable: settings, trace or machine differ; the message says where.
    """
    differences = [
        f"workload.{name} ({value!r} and {second['workload'].get(name)!r})"
        for name, value in first["workload"].items()
        if second["workload"].get(name) != value
    ]
    differences += [
        f"machine.{name} ({value!r} and {second['machine'].get(name)!r})"
        for name, value in first["machine"].items()
        if second["machine"].get(name) != value
    ]
    if not differences and first["workload_digest"] != second["workload_digest"]:
        differences = ["workload_digest"]
    if differences:
        raise NotComparable(f"the results differ in {'; '.join(differences)}. A ratio would mean nothing.")
    rows = []
    for kind in ("cold", "warm"):
        for name in HIGHER_IS_BETTER:
            rows.append(_row(kind, name, first[kind].get(name), second[kind].get(name)))
        for _, name in _LATENCIES:
            for key in ("p50", "p99"):
                pair = [side[kind].get(name, {}).get(key) for side in (first, second)]
                rows.append(_row(kind, f"{name} {key}", *pair))
    return [row for row in rows if row]


def load_result(path: str) -> dict[str, Any]:
    """
    A result from its file.

    Raises:
        NotComparable: the file is not such a result.
    """
    try:
        result = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise NotComparable(f"{path} must be a result of `trilithon bench serve`. Given: {error}.") from None
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise NotComparable(f"{path} must be a result of `trilithon bench serve`. Given: another format.")
    return result


def _row(kind: str, name: str, first: Mapping[str, float] | None, second: Mapping[str, float] | None) -> dict[str, Any]:
    if first is None or second is None or first["median"] <= 0:
        return {}
    overlap = first["min"] <= second["max"] and second["min"] <= first["max"]
    return {
        "cache": kind,
        "figure": name,
        "first": first["median"],
        "second": second["median"],
        "ratio": second["median"] / first["median"],
        "ranges_overlap": overlap,
    }


def _cell(value: Mapping[str, float] | None, form: str) -> str:
    if value is None:
        return f"{'-':>30}"
    low, middle, high = (form.format(value[key]) for key in ("min", "median", "max"))
    return f"{middle if low == high else f'{middle} [{low} .. {high}]':>30}"
