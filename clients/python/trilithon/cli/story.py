"""`trilithon story`: a story sentence by sentence, with what each was written from, and told again from any of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, cast

from trilithon import SentenceControl, Story, StorySentence, StoryStarted, TaskOptions
from trilithon._stories import StoryStream
from trilithon.cli._connect import add_server_arguments, connect
from trilithon.cli._output import add_output_argument, print_json, printable
from trilithon.cli._parser import Parser, UsageError

Mode = Literal["replace", "append", "antonym"]

_FIELDS = ("sentences", "knowledge_k", "kb", "keyword_model", "ranker")
_DRAWN_BY = ("seed", "max_tokens", "temperature", "top_k", "top_p")
_DETAIL = "dim"


def add_arguments(parser: Parser) -> None:
    """Add what the verb takes."""
    parser.add_argument("first_sentence", nargs="?", metavar="SENTENCE", help="what the story begins with")
    parser.add_argument(
        "--rewrite", metavar="STORY_ID", help="tell this story again from the sentence that a control names"
    )
    parser.add_argument("--sentences", type=int, metavar="N", help="to be written beside the first, 1 to 32 [4]")
    controls = parser.add_argument_group("what a sentence is to be about (INDEX counts from 2; repeat for others)")
    words = "INDEX=WORD[,WORD...]"
    _add_control(controls, "replace", words, "keywords in the place of predicted ones")
    _add_control(controls, "append", words, "keywords before the predicted ones")
    _add_control(controls, "antonym", "INDEX[=WORD,...]", "opposites of these, or of those that it would have had")
    parser.add_argument("--knowledge-k", type=int, metavar="N", help="facts of a sentence at most [3, if it knows any]")
    parser.add_argument("--kb", metavar="NAME", help="the server's concepts [those it has]")
    parser.add_argument("--keyword-model", metavar="NAME", help="predicts keywords [one that was trained to]")
    parser.add_argument("--ranker", metavar="NAME", help="ranks facts [one that was trained to]")
    parser.add_argument("--seed", type=int, metavar="N", help="repeat a story [drawn by the server]")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of a sentence [64]")
    parser.add_argument("--temperature", type=float, metavar="X", help="0 is greedy [0.7]")
    parser.add_argument("--top-k", type=int, metavar="N", help="draw from the k most likely; 0 is off [40]")
    parser.add_argument("--top-p", type=float, metavar="X", help="draw from the smallest set with this probability [1]")
    add_output_argument(parser)
    add_server_arguments(parser)
    parser.add_examples(
        'trilithon story "Mia had a little white cat." --seed 7',
        'trilithon story "Mia had a little white cat." --replace 3=rain,umbrella --append 4=home --knowledge-k 0',
        "trilithon story --rewrite story_1f0c --antonym 3 -o json",
    )


def run(args: argparse.Namespace) -> int:
    """Tell a story, or tell one again; sentences are printed as they come."""
    controls: list[SentenceControl] = args.controls or []
    with connect(args) as client:
        if args.rewrite is None:
            if args.first_sentence is None:
                raise UsageError("trilithon story needs a SENTENCE that the story begins with, or --rewrite STORY_ID.")
            fields: dict[str, Any] = {name: getattr(args, name) for name in _FIELDS}
            stream = client.stories.generate(
                args.first_sentence, stream=True, controls=controls or None, **fields, **_drawn(args)
            )
        else:
            stream = client.stories.rewrite(args.rewrite, _only(controls, args), stream=True)
        with stream:
            if args.output == "json":
                for _ in stream:
                    pass
            else:
                _tell(stream)
    if args.output == "json":
        print_json(stream.result)
    return 0


def _drawn(args: argparse.Namespace) -> TaskOptions:
    names = (*_DRAWN_BY, "model")
    return cast(TaskOptions, {name: getattr(args, name) for name in names if getattr(args, name) is not None})


def _only(controls: Sequence[SentenceControl], args: argparse.Namespace) -> SentenceControl:
    """The control of a rewrite, which takes nothing else: a story keeps what it was asked with."""
    given = [
        f"--{name.replace('_', '-')}" for name in (*_FIELDS, *_DRAWN_BY, "model") if getattr(args, name) is not None
    ]
    if args.first_sentence is not None:
        given.insert(0, "SENTENCE")
    if given:
        raise UsageError(f"--rewrite must come without {', '.join(given)}: a story keeps what it was begun with.")
    if len(controls) != 1:
        rule = "--rewrite must come with one control: --replace, --append or --antonym"
        raise UsageError(f"{rule}. Given: {len(controls)}.")
    return controls[0]


def _add_control(group: argparse._ArgumentGroup, mode: Mode, metavar: str, words: str) -> None:
    def control(text: str) -> SentenceControl:
        index, equals, keywords = text.partition("=")
        given = [word.strip() for word in keywords.split(",")] if equals else []
        if not index.strip().isdecimal() or not all(given) or not (given or (mode == "antonym" and not equals)):
            raise argparse.ArgumentTypeError(f"must be {metavar}. Given: {text!r}")
        return {"index": int(index), "keywords": given, "mode": mode}

    group.add_argument(f"--{mode}", dest="controls", action="append", type=control, metavar=metavar, help=words)


def _tell(stream: StoryStream) -> None:
    """Print sentences as they come, and last how to tell the story again."""
    show = _shower()
    started = StoryStarted()
    for event in stream:
        if isinstance(event, StoryStarted):
            started = event
        else:
            for line, style in lines_of(event):
                show(printable(line), style)
    story = stream.result
    assert isinstance(story, Story)  # the stream has ended
    ended = " The time limit ended it early." if story.finish_reason == "time_limit" else ""
    print(
        printable(
            f"{started.story_id}, seed {story.seed}.{ended} Change it: "
            f"trilithon story --rewrite {started.story_id} --replace INDEX=WORD"
        ),
        file=sys.stderr,
    )


def lines_of(sentence: StorySentence) -> Iterator[tuple[str, str]]:
    """A sentence and what it was written from, each line with its style on a terminal."""
    yield f"{sentence.index}. {sentence.text}", ""
    if sentence.keywords:
        yield f"   keywords: {', '.join(sentence.keywords)}", _DETAIL
    for fact in sentence.facts:
        yield f"   knowledge: {fact.text} ({fact.score:.2f})", _DETAIL
    if sentence.unknown_keywords:
        yield f"   nothing is known of: {', '.join(sentence.unknown_keywords)}", _DETAIL
    if sentence.unopposed_keywords:
        yield f"   has no opposite: {', '.join(sentence.unopposed_keywords)}", _DETAIL


def _shower() -> Callable[[str, str], None]:
    """Prints a line at once: with its style on a terminal, plain elsewhere."""
    if not sys.stdout.isatty():
        return lambda line, style: print(line, flush=True)
    from rich.console import Console
    from rich.text import Text

    console = Console()
    return lambda line, style: console.print(Text(line, style))
