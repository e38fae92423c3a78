"""Find the verb, load its module, run it, and turn whatever goes wrong into a sentence and an exit code."""

from __future__ import annotations

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
    try:
        return _run(arguments)
    except UsageError as error:
        return explain(error, EXIT_USAGE, as_json=_wants_json(arguments))
    except TrilithonError as error:
        return explain(error, as_json=_wants_json(arguments))
    except BrokenPipeError:
        # The reader of our output had enough. Point stdout elsewhere, since it is flushed once more at exit.
        sys.stdout = None
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _run(arguments: list[str]) -> int:
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help", "help"):
        print(_overview(), end="")
        return 0
    if verb == "--version":
        verb = "version"
    if verb not in VERBS:
        kind = "flag" if verb.startswith("-") else "verb"
        raise UsageError(f"unknown {kind} {verb!r}.{nearest(verb, VERBS)} See `trilithon --help`.")
    module = importlib.import_module(f"trilithon.cli.{verb.replace('-', '_')}")
    parser = Parser(prog=f"trilithon {verb}", description=_sentence(VERBS[verb]))
    module.add_arguments(parser)
    code: int = module.run(parser.parse(arguments[1:]))
    return code


def _overview() -> str:
    lines = ["usage: trilithon VERB ...", "", "Pretrain, adapt and serve large language models.", "", "verbs:"]
    lines += [f"  {name:<10} {text}" for name, text in VERBS.items()]
    lines += ["", "examples:", *(f"  {example}" for example in _EXAMPLES)]
    lines += ["", "`trilithon VERB --help` tells more about each."]
    return "\n".join(lines) + "\n"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + ("" if text.endswith("?") else ".")


def _wants_json(arguments: Sequence[str]) -> bool:
    """Whether errors are to be JSON too; asked before, or instead of, a successful parse."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    return any(
        name in ("-ojson", "--output=json") or (name in ("-o", "--output") and value == "json") for name, value in pairs
    )
