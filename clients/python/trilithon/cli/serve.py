"""`trilithon serve`: the server's own verb, when it is installed."""

from __future__ import annotations

import argparse

from trilithon.cli import _extra
from trilithon.cli._parser import Parser


def add_arguments(parser: Parser) -> None:
    """Add what the verb takes: the server says what."""
    _extra.load("trilithon_server.cli", verb="serve", extra="serve").add_serve_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until stopped."""
    code: int = _extra.load("trilithon_server.cli", verb="serve", extra="serve").run_serve(args)
    return code
