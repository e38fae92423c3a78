"""`trilithon version`: what is installed here."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata

from trilithon import __version__
from trilithon.cli._output import add_output_argument, print_json
from trilithon.cli._parser import Parser

_PARTS = ("grpcio", "httpx", "protobuf", "torch", "tokenizers", "safetensors", "starlette", "uvicorn")


def add_arguments(parser: Parser) -> None:
    """Add what the verb takes."""
    add_output_argument(parser)
    parser.add_examples("trilithon version", "trilithon version -o json")


def run(args: argparse.Namespace) -> int:
    """Print versions; what is not installed is said to be so."""
    found: dict[str, str | None] = {"trilithon": __version__, "python": platform.python_version()}
    found |= {name: installed(name) for name in _PARTS}
    if args.output == "json":
        print_json(found)
    else:
        for name, version in found.items():
            print(f"{name} {version or 'not installed'}")
    return 0


def installed(name: str) -> str | None:
    """The version of an installed distribution, without importing it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
