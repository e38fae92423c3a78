"""`trilithon score`: how likely are these continuations?"""

from __future__ import annotations

import argparse

from trilithon import CallOptions, ScoreItem
from trilithon.cli._connect import add_server_arguments, connect
from trilithon.cli._output import add_output_argument, print_json, print_table
from trilithon.cli._parser import Parser


def add_arguments(parser: Parser) -> None:
    """Add what the verb takes."""
    parser.add_argument("context", help="the text that comes before")
    parser.add_argument("continuations", nargs="+", metavar="continuation", help="what may follow, spaces included")
    parser.add_argument("--top", type=int, metavar="K", help="also report the K likeliest tokens (with -o json)")
    add_output_argument(parser)
    add_server_arguments(parser)
    parser.add_examples('trilithon score "The capital of France is" " Paris" " Rome" " a"')


def run(args: argparse.Namespace) -> int:
    """Score and print."""
    with connect(args) as client:
        options: CallOptions = {"model": args.model} if args.model else {}
        item: ScoreItem = {"context": args.context, "continuations": args.continuations}
        scores = client.score([item], top=args.top, **options)
    if args.output == "json":
        print_json(scores)
        return 0
    found = scores.items[0]
    rows = [
        (repr(text), f"{total:.4f}", count, f"{total / max(1, count):.4f}", "yes" if greedy else "")
        for text, total, count, greedy in zip(
            args.continuations, found.sum_logprob, found.token_count, found.is_greedy, strict=True
        )
    ]
    print_table(("continuation", "log-prob", "tokens", "per token", "greedy"), rows)
    return 0
