"""`trilithon index`: passages that can be searched, on a server or in a folder of this machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from trilithon import Index
from trilithon.cli._connect import add_server_arguments
from trilithon.cli._index_doors import opened
from trilithon.cli._output import EXIT_OK, add_output_argument, print_json, print_table, printable
from trilithon.cli._parser import Parser

_SHOWN_CHARS = 200
"""Of a passage, in a list of them."""


def add_arguments(parser: Parser) -> None:
    """Add the actions."""
    parser.add_examples("trilithon index build walks passages.jsonl", 'trilithon index search walks "How far is it?"')
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = actions.add_parser("build", help="build an index from a file of passages")
    _add_name(build)
    build.add_argument("file", type=Path, metavar="FILE", help='JSON lines of {"id", "title", "text"}')
    build.add_argument("--backend", choices=("flat", "hnsw"), help="how vectors are searched [flat: exact]")
    _add_place(
        build,
        "trilithon index build walks passages.jsonl",
        "trilithon index build walks passages.jsonl --dir indexes --model all-minilm-l6-v2 --backend hnsw",
    )
    search = actions.add_parser("search", help="find the passages that go with questions")
    _add_name(search)
    search.add_argument("queries", nargs="+", metavar="QUESTION", help="what is looked for")
    search.add_argument("--mode", choices=("dense", "bm25", "hybrid"), help="by meaning, by words, by both [dense]")
    search.add_argument("--top-k", type=int, default=5, metavar="K", help="passages for each question at most [5]")
    _add_place(
        search,
        'trilithon index search walks "How far is it?" --mode hybrid',
        'trilithon index search walks "How far is it?" --dir indexes --top-k 3 -o json',
    )
    refresh = actions.add_parser("refresh", help="encode an index's passages again; it is served meanwhile")
    _add_name(refresh)
    _add_place(
        refresh, "trilithon index refresh walks", "trilithon index refresh walks --dir indexes --model my-encoder"
    )
    _add_place(
        actions.add_parser("ls", help="list the indexes"), "trilithon index ls", "trilithon index ls --dir indexes"
    )
    remove = actions.add_parser("rm", help="remove an index")
    _add_name(remove)
    _add_place(remove, "trilithon index rm walks", "trilithon index rm walks --dir indexes")


def _add_name(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="of the index")


def _add_place(parser: Parser, *examples: str) -> None:
    parser.add_argument("--dir", type=Path, metavar="DIR", help="a folder of indexes here, in place of the server's")
    parser.add_argument(
        "--model", help="the encoder: a served one's name; with --dir one of this machine [the index's]"
    )
    add_output_argument(parser)
    add_server_arguments(parser, model=False)
    parser.add_examples(*examples)


def run(args: argparse.Namespace) -> int:
    """Do what the action says."""
    door = opened(args)
    try:
        if args.action == "build":
            _print((door.build(args.name, args.file, backend=args.backend),), args, one=True)
        elif args.action == "refresh":
            _print((door.refresh(args.name),), args, one=True)
        elif args.action == "ls":
            _print(door.list(), args, one=False)
        elif args.action == "rm":
            door.delete(args.name)
            print_json({"deleted": args.name}) if args.output == "json" else print(f"{args.name} is gone.")
        else:
            found = door.search(args.name, args.queries, top_k=args.top_k, mode=args.mode)
            if args.output == "json":
                print_json(found)
            else:
                for query, hits in zip(args.queries, found, strict=True):
                    print(printable(query))
                    for hit in hits:
                        print(f"  {hit.score:8.4f}  {printable(hit.id)}  {_line(hit.title, hit.text)}")
    finally:
        door.close()
    return EXIT_OK


def _print(indexes: Sequence[Index], args: argparse.Namespace, *, one: bool) -> None:
    if args.output == "json":
        print_json(indexes[0] if one else list(indexes))
    elif not indexes:
        print("There are no indexes.")
    else:
        headings = ("name", "state", "version", "passages", "model", "backend", "error")
        rows = [(i.name, i.state, i.version, i.passages, i.model, i.backend, i.error) for i in indexes]
        print_table(headings, rows)


def _line(title: str, text: str) -> str:
    whole = " ".join(f"{title}: {text}".split() if title else text.split())
    return printable(whole if len(whole) <= _SHOWN_CHARS else f"{whole[:_SHOWN_CHARS]} ...")
