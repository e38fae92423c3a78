"""`trilithon config`: the server's configuration, when it is installed."""

from __future__ import annotations

import argparse

from trilithon.cli import _extra
from trilithon.cli._parser import Parser


def add_arguments(parser: Parser) -> None:
    """Add what the verb takes: the server says what."""
    _extra.load("trilithon_server.cli", verb="config", extra="serve").add_config_arguments(parser)
    parser.add_examples("trilithon config show smollm2-135m-instruct --origin", "trilithon config schema")
    for action in parser.actions():
        if action.prog.endswith(" show"):
            action.add_examples(
                "trilithon config show smollm2-135m-instruct --tp 2 --origin",
                "trilithon config show smollm2-135m-instruct --resolved",
            )


def run(args: argparse.Namespace) -> int:
    """Print the configuration or its schema."""
    code: int = _extra.load("trilithon_server.cli", verb="config", extra="serve").run_config(args)
    return code
