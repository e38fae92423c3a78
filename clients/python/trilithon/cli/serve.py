"""`trilithon serve`: the server's own verb, when it is installed, with finetuning jobs when they are asked for."""

from __future__ import annotations

import argparse
from typing import Any

from trilithon.cli import _extra
from trilithon.cli._parser import Parser


def add_arguments(parser: Parser) -> None:
    """Add what the verb takes: the server says what."""
    _extra.load("trilithon_server.cli", verb="serve", extra="serve").add_serve_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until stopped."""
    code: int = _extra.load("trilithon_server.cli", verb="serve", extra="serve").run_serve(args, launch=_launch)
    return code


def _launch(config: Any) -> Any:
    """What runs beside the engines: with a store, the front that serves jobs too, and a worker."""
    if config.jobs.store is None:
        return _extra.load("trilithon_server.extension", verb="serve", extra="serve").Launch(config=config)
    return _extra.load("trilithon_finetune.api.launch", verb="serve --jobs", extra="jobs").launch(config)
