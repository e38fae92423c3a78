"""Generation parameters as flags: every name of the API, hyphens for underscores."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from trilithon._parameters import ChatOptions, GenerationOptions
from trilithon.cli._parser import UsageError, nearest

_NUMBERS: Mapping[str, tuple[type[int] | type[float], str]] = {
    "max_tokens": (int, "tokens to generate at most"),
    "temperature": (float, "0 is greedy [1]"),
    "top_k": (int, "draw from the k most likely; 0 is off"),
    "top_p": (float, "draw from the smallest set with this much probability [1]"),
    "min_p": (float, "drop tokens below this share of the likeliest one's probability [0]"),
    "typical_p": (float, "locally typical sampling [1]"),
    "top_p_decay": (float, "factual-nucleus sampling: decay of top-p at each token [off]"),
    "top_p_floor": (float, "factual-nucleus sampling: where the decay ends [0]"),
    "seed": (int, "repeat an answer [drawn by the server]"),
    "n": (int, "how many answers [1]"),
    "best_of": (int, "draw so many, return the best [n]"),
    "beam_width": (int, "search with so many beams instead of drawing; 0 is off"),
    "length_penalty": (float, "with beams: an answer is worth its log-probability / length^this [1]"),
    "presence_penalty": (float, "-2 to 2 [0]"),
    "frequency_penalty": (float, "-2 to 2 [0]"),
    "repetition_penalty": (float, "above 0 to 10 [1]"),
    "no_repeat_ngram": (int, "no sequence of so many tokens comes twice; 0 is off"),
    "min_tokens": (int, "no end before so many [0]"),
    "logprobs": (int, "log-probabilities: chosen tokens and so many likeliest [none]"),
    "prompt_logprobs": (int, "the same for the prompt [none]"),
    "truncate_prompt_tokens": (int, "keep only the last so many tokens of the prompt; 0 never truncates"),
    "time_limit_ms": (int, "end with what there is after so long"),
    "queue_timeout_ms": (int, "give up after waiting so long [60000]"),
    "priority": (int, "-10 to 10, larger first [0]"),
}
_LISTS: Mapping[str, str] = {
    "stop": "text that ends the answer; may be repeated",
    "bad_words": "text that must not appear; may be repeated",
}
_CONSTRAINTS = ("json_schema", "regex", "grammar", "choice")


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the parameters of a generation; what has no flag goes through `--param NAME=JSON`."""
    group = parser.add_argument_group("generation (left out: the server's default)")
    for name, (kind, words) in _NUMBERS.items():
        group.add_argument(_flag(name), type=kind, metavar="N" if kind is int else "X", help=words)
    for name, words in _LISTS.items():
        group.add_argument(_flag(name), action="append", metavar="TEXT", help=words)
    group.add_argument("--ignore-eos", action="store_true", default=None, help="go on past the model's end tokens")
    group.add_argument("--echo", action="store_true", default=None, help="put the prompt before the answer")
    group.add_argument("--json-schema", metavar="FILE", help="the answer must fit this JSON schema")
    group.add_argument("--regex", help="the answer must match this regular expression")
    group.add_argument("--grammar", metavar="FILE", help="the answer must fit this Lark grammar")
    group.add_argument("--choice", action="append", metavar="TEXT", help="the answer must be one of these; repeat it")
    group.add_argument(
        "--param", action="append", default=[], metavar="NAME=JSON", help="any parameter of the API, as JSON"
    )


def generation_options(args: argparse.Namespace, *, chat: bool = False) -> tuple[int | None, GenerationOptions]:
    """`n` and the other options that the arguments give."""
    options: dict[str, Any] = {
        name: getattr(args, name)
        for name in (*_NUMBERS, *_LISTS, "ignore_eos", "echo", "model")
        if getattr(args, name) is not None
    }
    constraint = {name: getattr(args, name) for name in _CONSTRAINTS if getattr(args, name) is not None}
    if len(constraint) > 1:
        flags = ", ".join(map(_flag, constraint))
        raise UsageError(f"only one of --json-schema, --regex, --grammar and --choice may be given. Given: {flags}.")
    for name in constraint.keys() & {"json_schema", "grammar"}:
        constraint[name] = _file(_flag(name), constraint[name])
    if constraint:
        options["constraint"] = constraint
    known = set(GenerationOptions.__annotations__) | (set(ChatOptions.__annotations__) if chat else set())
    for given in args.param:
        name, value = _parameter(given, known)
        if name in options:
            raise UsageError(f"--param {name} is also given as {_flag(name)}. Give it once.")
        options[name] = value
    return options.pop("n", None), cast(GenerationOptions, options)


def _parameter(given: str, known: set[str]) -> tuple[str, Any]:
    name, equals, text = given.partition("=")
    name = name.replace("-", "_")
    if name not in known:
        raise UsageError(f"--param knows no {name!r}.{nearest(name, known)}")
    try:
        return name, json.loads(text if equals else "true")
    except ValueError:
        raise UsageError(f"--param {name} must be JSON (strings in quotes). Given: {text!r}.") from None


def _file(flag: str, path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{flag} must be a readable text file. Given: {path} ({error}).") from None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
