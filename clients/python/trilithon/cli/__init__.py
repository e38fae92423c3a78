"""The `trilithon` command. Nothing heavier than argparse is imported before the verb is known."""

from trilithon.cli._main import main

__all__ = ["main"]
