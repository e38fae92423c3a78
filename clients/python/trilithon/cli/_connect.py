"""Which server a verb talks to. The command's environment variables are read here and nowhere else."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from trilithon import Client
from trilithon.cli._parser import UsageError

DEFAULT_URL = "http://127.0.0.1:8000"
URL_VARIABLE = "TRILITHON_URL"
KEY_VARIABLE = "TRILITHON_API_KEY"


def add_server_arguments(parser: argparse.ArgumentParser, *, model: bool = True) -> None:
    """Add `--url`, `--model` and what else a connection takes."""
    group = parser.add_argument_group("server")
    group.add_argument(
        "--url", help=f"http(s)://, grpc(s)://, http+unix:// or grpc+unix:// address [${URL_VARIABLE}, {DEFAULT_URL}]"
    )
    if model:
        group.add_argument("--model", help="the served model's name [the only one served]")
    group.add_argument("--api-key-file", metavar="FILE", help=f"file that holds the key [${KEY_VARIABLE}]")
    group.add_argument("--timeout", type=seconds, help="seconds for the whole call [600]")
    group.add_argument("--tls-ca", metavar="FILE", help="PEM file of who may have signed the server's certificate")
    group.add_argument("--tls-cert", metavar="FILE", help="PEM file of this client's certificate")
    group.add_argument("--tls-key", metavar="FILE", help="PEM file of its key")


def connect(args: argparse.Namespace) -> Client:
    """A client for the server that the arguments and the environment name."""
    return Client(
        address(args),
        api_key=api_key(args),
        timeout=args.timeout,
        tls_ca=args.tls_ca,
        tls_cert=args.tls_cert,
        tls_key=args.tls_key,
    )


def address(args: argparse.Namespace) -> str:
    """The server's URL."""
    url: str = args.url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
    return url


def api_key(args: argparse.Namespace) -> str | None:
    """The key: from a file, or from the environment; never from the command line, which other users can see."""
    if args.api_key_file is None:
        return os.environ.get(KEY_VARIABLE)
    try:
        return Path(args.api_key_file).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--api-key-file must be a readable text file. Given: {args.api_key_file} ({error})."
        ) from None


def seconds(text: str) -> float:
    """A positive number of seconds."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value
