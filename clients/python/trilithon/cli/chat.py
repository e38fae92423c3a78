"""`trilithon chat`: talk with a model, in the terminal."""

from __future__ import annotations

import argparse
import sys
from typing import cast

from trilithon import ChatOptions, Client, Message
from trilithon.cli._connect import add_server_arguments, connect
from trilithon.cli._output import add_output_argument, print_json
from trilithon.cli._parser import Parser, UsageError
from trilithon.cli._sampling import add_generation_arguments, generation_options

_COMMANDS = "/reset starts again, /quit leaves; Ctrl-C ends an answer, Ctrl-D leaves."


def add_arguments(parser: Parser) -> None:
    """Add what the verb takes."""
    parser.add_argument("message", nargs="?", help="ask this and leave; without it, a conversation")
    parser.add_argument("--system", metavar="TEXT", help="what the model should be")
    add_output_argument(parser)
    add_generation_arguments(parser)
    add_server_arguments(parser)
    parser.add_examples(
        "trilithon chat",
        'trilithon chat "What is gravity?" --max-tokens 48',
        'trilithon chat "Name a colour." --system "Answer in one word." --temperature 0 --max-tokens 8 -o json',
    )


def run(args: argparse.Namespace) -> int:
    """Answer one message, or converse until the input ends."""
    n, generation = generation_options(args, chat=True)
    if n not in (None, 1):
        raise UsageError(f"trilithon chat gives one answer at a time. Given: --n {n}. Use `trilithon generate`.")
    options = cast(ChatOptions, generation)
    opening: list[Message] = [{"role": "system", "content": args.system}] if args.system is not None else []
    with connect(args) as client:
        if args.message is not None:
            messages: list[Message] = [*opening, {"role": "user", "content": args.message}]
            if args.output == "json":
                print_json(client.chat(messages, **options))
            else:
                _answer(client, messages, options)
            return 0
        if args.output == "json":
            raise UsageError("-o json needs a MESSAGE. A conversation is printed as text.")
        return _converse(client, opening, options)


def _converse(client: Client, opening: list[Message], options: ChatOptions) -> int:
    interactive = sys.stdin.isatty()
    if interactive:
        print(_COMMANDS, file=sys.stderr)
    messages = list(opening)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return 0
        if line == "/quit":
            return 0
        if line == "/reset":
            messages = list(opening)
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                messages.append(_answer(client, messages, options))
            except KeyboardInterrupt:
                if not interactive:
                    raise
                # The stream's block was left, so the server has stopped; the question goes too.
                messages.pop()
                print(" [ended]", file=sys.stderr)


def _answer(client: Client, messages: list[Message], options: ChatOptions) -> Message:
    text = ""
    with client.chat(messages, stream=True, **options) as stream:
        for delta in stream:
            text += delta.text
            print(delta.text, end="", flush=True)
    print(flush=True)
    return {"role": "assistant", "content": text}
