"""`trilithon tokenize`: token ids of texts, and back."""

from __future__ import annotations

import argparse

from trilithon import CallOptions
from trilithon.cli._connect import add_server_arguments, connect
from trilithon.cli._output import add_output_argument, print_json, print_table
from trilithon.cli._parser import Parser, UsageError


def add_arguments(parser: Parser) -> None:
    """Add what the verb takes."""
    parser.add_argument("texts", nargs="+", metavar="text", help="texts, or with --decode the token ids of one")
    parser.add_argument("--decode", action="store_true", help="turn token ids into text")
    parser.add_argument("--no-special-tokens", action="store_true", help="add or keep no special tokens")
    add_output_argument(parser)
    add_server_arguments(parser)
    parser.add_examples('trilithon tokenize "Once upon a time"', "trilithon tokenize --decode 1 2 3 -o json")


def run(args: argparse.Namespace) -> int:
    """Tokenise or join, and print."""
    options: CallOptions = {"model": args.model} if args.model else {}
    if args.decode:
        try:
            ids = [int(text) for text in args.texts]
        except ValueError:
            raise UsageError(f"--decode takes token ids. Given: {' '.join(args.texts)!r:.64}.") from None
        with connect(args) as client:
            texts = client.detokenize([ids], keep_special_tokens=not args.no_special_tokens, **options)
        if args.output == "json":
            print_json(texts)
        else:
            print(texts.texts[0])
        return 0
    with connect(args) as client:
        special = False if args.no_special_tokens else None
        answer = client.tokenize(args.texts, add_special_tokens=special, return_pieces=True, **options)
    if args.output == "json":
        print_json(answer)
        return 0
    for text, result in zip(args.texts, answer.results, strict=True):
        print(f"{text!r}: {result.count} tokens")
        print_table(("id", "piece"), list(zip(result.ids, result.pieces, strict=True)))
    return 0
