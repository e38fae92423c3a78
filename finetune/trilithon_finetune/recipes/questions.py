"""What the recipes of questions that a decoder answers share: a context that is shortened where all is too long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from trilithon_finetune.data.findings import Finding
from trilithon_finetune.recipes.base import Context, Sample
from trilithon_finetune.recipes.texts import (
    answered,
    continuation,
    most_that_fits,
    special_text,
    too_long,
    untrained_end,
)


def encode_question(
    prompt: Callable[[str], str], passage: str, answer: str, context: Context, *, file: str, line: int, path: str
) -> Sequence[Sample | Finding]:
    """
    The sample of a question, its answer supervised, with warnings behind it; or why it cannot be learned.

    Where the whole is beyond `context.max_tokens` and may be truncated, words are taken from the end of the passage, so
    that question and answer stay whole.

    Args:
        prompt: makes the text of a passage.
        passage: the context of the question; may be empty.
        answer: the continuation, as its format writes it.
        path: of the answer in the row.
    """
    head, tail = continuation(context.tokenizer, prompt(passage), answer)
    whole = len(head) + len(tail) + 1
    if whole > context.max_tokens and context.on_long == "truncate":
        words = passage.split(" ")

        def fits(kept: int) -> bool:
            parts = continuation(context.tokenizer, prompt(" ".join(words[:kept])), answer)
            return sum(map(len, parts)) + 1 <= context.max_tokens

        kept = most_that_fits(len(words), fits)
        if kept is None:
            return [too_long(whole, context, file=file, line=line)]
        head, tail = continuation(context.tokenizer, prompt(" ".join(words[:kept])), answer)
    found = answered(head, tail, context, file=file, line=line, path=path)
    if not isinstance(found, Sample):
        return [found]
    sample = replace(found, cut=whole - len(found.tokens))
    text = prompt(passage) + answer
    return [
        sample,
        *special_text(context.tokenizer, text, file=file, line=line, path="", read=True),
        *untrained_end(context, file=file, line=line),
    ]
