"""`trilithon embed`: vectors for texts."""

from __future__ import annotations

import argparse
import json

from trilithon import CallOptions
from trilithon.cli._connect import add_server_arguments, connect
from trilithon.cli._output import add_output_argument, print_json
from trilithon.cli._parser import Parser


def add_arguments(parser: Parser) -> None:
    """Add what the verb takes."""
    parser.add_argument("texts", nargs="+", metavar="text", help="what to embed")
    parser.add_argument("--pooling", choices=("mean", "last", "first"), help="how token vectors become one [model's]")
    parser.add_argument("--dimensions", type=int, metavar="N", help="keep only so many leading values [all]")
    parser.add_argument(
        "--normalize", action=argparse.BooleanOptionalAction, default=None, help="scale to unit length [model's]"
    )
    add_output_argument(parser)
    add_server_arguments(parser)
    parser.add_examples('trilithon embed "a cat" "a dog"', 'trilithon embed "a cat" --dimensions 8 -o json')


def run(args: argparse.Namespace) -> int:
    """Embed and print: one JSON array a line, or the whole answer."""
    options: CallOptions = {"model": args.model} if args.model else {}
    with connect(args) as client:
        answer = client.embed(
            args.texts, pooling=args.pooling, normalize=args.normalize, dimensions=args.dimensions, **options
        )
    if args.output == "json":
        print_json(answer)
    else:
        for embedding in answer.data:
            print(json.dumps(embedding.values))
    return 0
