"""argparse with examples below the help and the nearest name beside an unknown one."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn


class UsageError(Exception):
    """The command line is wrong; the message is a sentence for its author."""


class Parser(argparse.ArgumentParser):
    """One verb's parser. Flags must be spelt out, so that a new flag never changes what an old command means."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def add_examples(self, *examples: str) -> None:
        """Commands that the help ends with; tests run each."""
        self.epilog = "\n".join(["examples:", *(f"  {example}" for example in examples)])

    def actions(self) -> list[Parser]:
        """The parsers of its sub-verbs."""
        found = [action.choices.values() for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return [parser for parsers in found for parser in parsers if isinstance(parser, Parser)]

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """
        Parse, or raise UsageError with a sentence.

        `--help` prints and leaves through SystemExit(0), as argparse does.
        """
        args, unknown = self.parse_known_args(list(arguments))
        if unknown:
            parser = self._deepest(args)
            name = unknown[0].partition("=")[0]
            if name.startswith("-"):
                known = nearest(name, parser._option_string_actions)
                raise UsageError(f"unknown flag {name!r}.{known} See `{parser.prog} --help`.")
            raise UsageError(f"unexpected argument {name!r}. See `{parser.prog} --help`.")
        return args

    def flags_of(self, choice: str, arguments: Sequence[str]) -> set[str]:
        """Flags that have this choice, of the verb and of the sub-verb that the arguments name, or of any."""
        found = {name for action in self._actions if choice in _choices(action) for name in action.option_strings}
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                named = [action.choices[word] for word in arguments if word in action.choices]
                for parser in named[:1] or action.choices.values():
                    found |= parser.flags_of(choice, arguments)
        return found

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise UsageError(f"{message}.{_hint(message)} See `{self.prog} --help`.")

    def _deepest(self, args: argparse.Namespace) -> Parser:
        """The parser of the sub-verb that was chosen, if there are any."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                chosen = action.choices.get(getattr(args, action.dest, None) or "")
                if isinstance(chosen, Parser):
                    return chosen._deepest(args)
        return self


def _choices(action: argparse.Action) -> Sequence[str]:
    """What a flag may be given; where a function reads it, the placeholder tells: `FILE.svg|json`."""
    return list(action.choices or ()) or str(action.metavar or "").split("|")


def nearest(name: str, known: Iterable[str]) -> str:
    """
    A hint at the nearest known name, with a leading space, or nothing.

    >>> nearest("serv", ["serve", "score"])
    " Did you mean 'serve'?"
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _hint(message: str) -> str:
    """argparse lists the choices of a bad value; name the nearest one."""
    if "invalid choice: " not in message:
        return ""
    given = message.partition("invalid choice: ")[2].partition(" (choose from")[0].strip("'")
    choices = message.partition("(choose from ")[2].rstrip(")").split(",")
    return nearest(given, [choice.strip(" '") for choice in choices])
