"""`trilithon bench`: measure any server that speaks OpenAI's completions, and compare results."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from trilithon.cli._connect import DEFAULT_URL, URL_VARIABLE, address, api_key, seconds
from trilithon.cli._output import (
    EXIT_CHECK_FAILED,
    EXIT_OK,
    EXIT_UNREACHABLE,
    EXIT_USAGE,
    Progress,
    add_output_argument,
    explain,
    print_json,
    print_table,
)
from trilithon.cli._parser import Parser, UsageError

_SLO_NAMES = ("ttft_ms", "tpot_ms", "e2e_ms")


def add_arguments(parser: Parser) -> None:
    """Add `serve` and `compare`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_serve(actions.add_parser("serve", help="load a running server, ours or another's"))
    compare = actions.add_parser("compare", help="ratios of two results, when they may be compared")
    compare.add_argument("first", help="a result that `bench serve --save` wrote")
    compare.add_argument("second", help="another one")
    add_output_argument(compare)
    compare.add_examples("trilithon bench compare before.json after.json")
    parser.add_examples(
        "trilithon bench serve --concurrency 8 --runs 1",
        "trilithon bench compare before.json after.json",
    )


def run(args: argparse.Namespace) -> int:
    """Measure or compare."""
    return _serve(args) if args.action == "serve" else _compare(args)


def _add_serve(parser: Parser) -> None:
    parser.add_argument("--url", help=f"http(s):// address [${URL_VARIABLE}, {DEFAULT_URL}]")
    parser.add_argument("--model", help="the served model's name [the first that the server lists]")
    parser.add_argument("--api-key-file", metavar="FILE", help="file that holds the key [$TRILITHON_API_KEY]")
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--concurrency", type=_count, metavar="N", help="closed loop: so many at a time [8]")
    load.add_argument("--rate", type=seconds, metavar="X", help="open loop: requests a second, at Poisson times")
    parser.add_argument("--requests", type=_count, default=32, metavar="N", help="requests of each pass [32]")
    parser.add_argument("--prompt-len", type=_count, default=128, metavar="N", help="tokens of each prompt [128]")
    parser.add_argument("--answer-len", type=_count, default=128, metavar="N", help="tokens of each answer [128]")
    parser.add_argument("--shared-prefix", type=int, default=0, metavar="N", help="leading tokens that all share [0]")
    parser.add_argument("--runs", type=_count, default=3, metavar="N", help="runs: a cold and a warm pass each [3]")
    parser.add_argument("--warmup", type=int, default=4, metavar="N", help="requests before the first run [4]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of prompts and arrival times [0]")
    parser.add_argument(
        "--prompt-format", choices=("ids", "text"), default="ids", help="text for servers that take no token ids [ids]"
    )
    parser.add_argument("--last-id", type=_count, default=8000, metavar="N", help="token ids are below this one [8000]")
    parser.add_argument(
        "--no-ignore-eos", action="store_true", help="for servers that refuse `ignore_eos`: answers may be shorter"
    )
    parser.add_argument("--extra-body", metavar="JSON", help="further fields of every request, as a JSON object")
    parser.add_argument(
        "--slo", action="append", default=[], metavar="NAME=MS", help="ttft_ms, tpot_ms or e2e_ms; repeat it"
    )
    parser.add_argument("--save", metavar="FILE", help="write the result as JSON")
    parser.add_argument("--baseline", metavar="FILE", help="exit 7 when output tokens/s fall below this result's")
    parser.add_argument("--max-regression", type=float, default=0.1, metavar="X", help="by more than this share [0.1]")
    add_output_argument(parser)
    parser.add_examples(
        "trilithon bench serve --concurrency 2 --requests 4 --prompt-len 16 --answer-len 8 --runs 1 --save after.json",
        "trilithon bench serve --rate 4 --requests 4 --prompt-len 16 --answer-len 8 --runs 1 --slo ttft_ms=500",
    )


def _serve(args: argparse.Namespace) -> int:
    from trilithon._bench import report
    from trilithon._bench.serve import measure, save
    from trilithon._bench.trace import FIRST_ID, Workload

    if not 0 <= args.shared_prefix <= args.prompt_len:
        raise UsageError(
            f"--shared-prefix must be from 0 to --prompt-len ({args.prompt_len}). Given: {args.shared_prefix}."
        )
    if args.last_id <= FIRST_ID:
        raise UsageError(f"--last-id must be above {FIRST_ID}. Given: {args.last_id}.")
    baseline = None
    workload = Workload(
        num_requests=args.requests,
        prompt_len=args.prompt_len,
        answer_len=args.answer_len,
        shared_prefix_len=args.shared_prefix,
        concurrency=None if args.rate is not None else args.concurrency or 8,
        rate=args.rate,
        runs=args.runs,
        warmup=max(0, args.warmup),
        seed=args.seed,
        prompt_format=args.prompt_format,
        last_id=args.last_id,
        ignore_eos=not args.no_ignore_eos,
        extra_body=_object("--extra-body", args.extra_body),
    )
    try:
        if args.baseline is not None:
            baseline = report.load_result(args.baseline)
        with Progress("measuring", total=None) as progress:
            result = measure(
                address(args),
                workload,
                model=args.model,
                api_key=api_key(args),
                slo=dict(map(_slo, args.slo)),
                on_progress=lambda what, done, of: progress.update(done, what=what, total=of),
            )
        if args.save is not None:
            save(result, args.save)
        if args.output == "json":
            print_json(result)
        else:
            print(report.block(result))
        if baseline is not None:
            return _check(report.compare(baseline, result), args.max_regression)
    except report.NotComparable as error:
        return explain(error, EXIT_USAGE, as_json=args.output == "json")
    return EXIT_OK if result["cold"]["requests_ok"]["min"] > 0 else EXIT_UNREACHABLE


def _check(rows: list[dict[str, Any]], max_regression: float) -> int:
    slower = [row for row in rows if row["figure"] == "output_tokens_per_s" and row["ratio"] < 1 - max_regression]
    for row in slower:
        print(f"trilithon: {row['cache']} output tokens/s fell to {row['ratio']:.2f} of the baseline", file=sys.stderr)
    return EXIT_CHECK_FAILED if slower else EXIT_OK


def _compare(args: argparse.Namespace) -> int:
    from trilithon._bench import report

    try:
        rows = report.compare(report.load_result(args.first), report.load_result(args.second))
    except report.NotComparable as error:
        return explain(error, EXIT_USAGE, as_json=args.output == "json")
    if args.output == "json":
        print_json(rows)
    else:
        cells = [
            (row["cache"], row["figure"], f"{row['first']:.2f}", f"{row['second']:.2f}", f"{row['ratio']:.2f}",
             "ranges overlap" if row["ranges_overlap"] else "")
            for row in rows
        ]  # fmt: skip
        print_table(("cache", "figure", "first", "second", "second/first", ""), cells)
    return EXIT_OK


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _slo(text: str) -> tuple[str, float]:
    name, _, limit = text.partition("=")
    try:
        if name not in _SLO_NAMES:
            raise ValueError
        return name, seconds(limit)
    except ValueError:
        raise UsageError(f"--slo must be one of {', '.join(_SLO_NAMES)} and =MS. Given: {text!r}.") from None


def _object(flag: str, text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UsageError(f"{flag} must be a JSON object. Given: {text!r}.")
    return value
