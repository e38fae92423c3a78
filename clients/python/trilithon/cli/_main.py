"""Find the verb, load its module, run it, and turn whatever goes wrong into a sentence and an exit code."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence

from trilithon.cli._output import EXIT_INTERRUPTED, EXIT_USAGE, explain
from trilithon.cli._parser import Parser, UsageError, nearest
from trilithon.errors import TrilithonError

VERBS: Mapping[str, str] = {
    "pull": "fetch a model into the local store",
    "models": "list the local store, or what a server serves",
    "serve": "serve a model over HTTP and gRPC",
    "generate": "go on from a prompt",
    "chat": "talk with a model",
    "score": "how likely are these continuations?",
    "embed": "vectors for texts",
    "index": "build and search indexes of passages",
    "story": "tell a story sentence by sentence, by keywords and knowledge",
    "synth-qa": "make questions and answers from a corpus",
    "tokenize": "token ids of texts, and back",
    "bench": "measure a server",
    "data": "turn texts into token files, train a vocabulary",
    "plan": "which layout to train with, how long it takes and what it costs",
    "schedule": "draw and time a pipeline schedule",
    "pretrain": "train a model by a configuration file",
    "finetune": "adapt a model to data of your own: jobs, checkpoints, results",
    "checkpoint": "verify and export what a training run keeps",
    "config": "show the server's configuration and where each value comes from",
    "doctor": "check this machine and say what to do",
    "version": "versions of this installation",
}
"""Verb -> what it does. Each is a module of this package with `add_arguments(parser)` and `run(args) -> int`."""

_EXAMPLES = ("trilithon pull smollm2-135m-instruct", "trilithon serve smollm2-135m-instruct", "trilithon chat")


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command.

    Returns:
        The exit code: 0 ok, 1 bug, 2 usage or configuration, 3 invalid data or model, 4 job failed, 5 unreachable,
        6 engine lost, 7 check failed, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = _Command(arguments)
    try:
        return command.run()
    except UsageError as error:
        return explain(error, EXIT_USAGE, as_json=command.wants_json())
    except TrilithonError as error:
        return explain(error, as_json=command.wants_json())
    except BrokenPipeError:
        # The reader of our output had enough. Point stdout elsewhere, since it is flushed once more at exit.
        sys.stdout = None
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


class _Command:
    """One call of the command, and what is known of its arguments so far."""

    def __init__(self, arguments: list[str]) -> None:
        self._arguments = arguments
        self._parser: Parser | None = None
        self._args: argparse.Namespace | None = None

    def run(self) -> int:
        """Run its verb."""
        verb = self._arguments[0] if self._arguments else "--help"
        if verb in ("-h", "--help", "help"):
            print(_overview(), end="")
            return 0
        if verb == "--version":
            verb = "version"
        if verb not in VERBS:
            kind = "flag" if verb.startswith("-") else "verb"
            raise UsageError(f"unknown {kind} {verb!r}.{nearest(verb, VERBS)} See `trilithon --help`.")
        module = importlib.import_module(f"trilithon.cli.{verb.replace('-', '_')}")
        self._parser = Parser(prog=f"trilithon {verb}", description=_sentence(VERBS[verb]))
        module.add_arguments(self._parser)
        self._args = self._parser.parse(self._arguments[1:])
        code: int = module.run(self._args)
        return code

    def wants_json(self) -> bool:
        """
        Whether errors are to be JSON too: as its arguments were parsed. Where they could not be, the flags decide that
        take `json`; a verb's `-o` may be a file.
        """
        if self._args is not None:
            known = vars(self._args)
            return "json" in (known.get("output"), known.get("format")) or known.get("json") is True
        flags = ("-o", "--output") if self._parser is None else self._parser.flags_of("json", self._arguments[1:])
        pairs = zip(self._arguments, [*self._arguments[1:], ""], strict=True)
        return any(
            (word in flags and following == "json")
            or any(word == (f"{flag}=json" if flag.startswith("--") else f"{flag}json") for flag in flags)
            for word, following in pairs
        )


def _overview() -> str:
    lines = ["usage: trilithon VERB ...", "", "Pretrain, adapt and serve large language models.", "", "verbs:"]
    lines += [f"  {name:<10} {text}" for name, text in VERBS.items()]
    lines += ["", "examples:", *(f"  {example}" for example in _EXAMPLES)]
    lines += ["", "`trilithon VERB --help` tells more about each."]
    return "\n".join(lines) + "\n"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + ("" if text.endswith("?") else ".")
