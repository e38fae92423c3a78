"""`trilithon generate`: go on from a prompt."""

from __future__ import annotations

import argparse
import sys
import time

from trilithon import Choice, Client, Completions, GenerationOptions
from trilithon.cli._connect import add_server_arguments, connect
from trilithon.cli._output import add_output_argument, print_json
from trilithon.cli._parser import Parser, UsageError
from trilithon.cli._sampling import add_generation_arguments, generation_options


def add_arguments(parser: Parser) -> None:
    """Add what the verb takes."""
    parser.add_argument("prompt", nargs="?", help="the prompt; - or nothing reads standard input")
    parser.add_argument("--no-stream", action="store_true", help="print the text when it is whole")
    add_output_argument(parser)
    add_generation_arguments(parser)
    add_server_arguments(parser)
    parser.add_examples(
        'trilithon generate "Once upon a time" --max-tokens 48 --seed 7',
        'trilithon generate "The capital of France is" --temperature 0 --max-tokens 4 --logprobs 2 -o json',
        'trilithon generate "Is water wet?" --choice yes --choice no --max-tokens 8',
    )


def run(args: argparse.Namespace) -> int:
    """Generate and print."""
    n, options = generation_options(args)
    prompt = read_prompt(args.prompt)
    with connect(args) as client:
        whole = args.no_stream or args.output == "json" or (n or 1) > 1 or "logprobs" in options
        if not whole:
            return _stream(client, prompt, options)
        answer = client.generate(prompt, n=n or 1, **options)
    if args.output == "json":
        print_json(answer)
    else:
        _print(answer)
    return 0


def read_prompt(given: str | None) -> str:
    """The argument, or standard input where there is none."""
    if given is not None and given != "-":
        return given
    if given is None and sys.stdin.isatty():
        raise UsageError("trilithon generate needs a PROMPT. Give it as an argument, or pipe it in.")
    return sys.stdin.read()


def _stream(client: Client, prompt: str, options: GenerationOptions) -> int:
    started_s = time.monotonic()
    first_s: float | None = None
    with client.generate(prompt, stream=True, **options) as stream:
        last: Choice | None = None
        for last in stream:
            if last.text and first_s is None:
                first_s = time.monotonic() - started_s
            print(last.text, end="", flush=True)
    print(flush=True)
    if sys.stderr.isatty() and last is not None and stream.usage is not None:
        total_s = time.monotonic() - started_s
        tokens = stream.usage.generated_tokens
        print(
            f"{tokens} tokens in {total_s:.2f} s, the first after {first_s or total_s:.2f} s; "
            f"{last.finish_reason}, seed {last.seed}",
            file=sys.stderr,
        )
    return 0


def _print(answer: Completions) -> None:
    for choice in answer:
        if len(answer) > 1:
            print(f"--- {choice.index} ({choice.finish_reason}, seed {choice.seed})")
        print(choice.text)
        for token in choice.tokens:
            likeliest = "  ".join(
                f"{other.text!r} {other.logprob:.4f}" for other in token.top if other.logprob is not None
            )
            shown = "-" if token.logprob is None else f"{token.logprob:.4f}"
            print(f"{shown:>10}  {token.text!r:<16} {likeliest}".rstrip())
