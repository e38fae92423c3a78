"""`trilithon models`: what the local store holds, or what a server serves."""

from __future__ import annotations

import argparse

from trilithon import CallOptions, _store
from trilithon.cli._connect import add_server_arguments, connect
from trilithon.cli._output import add_output_argument, human_bytes, print_json, print_table
from trilithon.cli._parser import Parser


def add_arguments(parser: Parser) -> None:
    """Add what the verb takes."""
    parser.add_argument("--served", action="store_true", help="ask the server instead of the local store")
    add_output_argument(parser)
    add_server_arguments(parser, model=False)
    parser.add_examples("trilithon models", "trilithon models --served -o json")


def run(args: argparse.Namespace) -> int:
    """List."""
    return _served(args) if args.served or args.url else _stored(args)


def _stored(args: argparse.Namespace) -> int:
    models = _store.list_models()
    if args.output == "json":
        print_json([{**_fields(model), "path": str(model.path)} for model in models])
    elif not models:
        print(f"The store {_store.models_dir()} is empty. Fetch a model: trilithon pull {_store.KNOWN_MODELS[-1]}")
    else:
        rows = [
            (model.name, human_bytes(model.size_bytes), model.dtype or "", model.licence, model.source, model.problem)
            for model in models
        ]
        print_table(("name", "size", "dtype", "licence", "source", "problem"), rows)
    return 0


def _served(args: argparse.Namespace) -> int:
    options: CallOptions = {}
    with connect(args) as client:
        models = client.models.list(**options)
    if args.output == "json":
        print_json(models)
    else:
        rows = [
            (
                model.id,
                model.kind or "",
                model.state or "",
                model.max_context_tokens,
                f"{model.tp}x{model.pp}",
                model.dtype,
            )
            for model in models
        ]
        print_table(("id", "kind", "state", "context", "tp x pp", "dtype"), rows)
    return 0


def _fields(model: _store.StoredModel) -> dict[str, object]:
    names = ("name", "source", "digest", "licence", "dtype", "size_bytes", "created", "problem")
    return {name: getattr(model, name) for name in names}
