"""What the recipes of texts share: how a prompt and its answer become a sample, and how one is shortened."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trilithon_finetune.data.findings import Finding, finding
from trilithon_finetune.recipes.base import IGNORE, Context, Sample
from trilithon_parallel.tokenizer import Tokenizer
from trilithon_server.text.chat import special_pattern, spelled


def next_token_targets(tokens: Sequence[int], supervised: Sequence[bool]) -> tuple[int, ...]:
    """
    Targets of a text, one a token: the next token where that one is supervised.

    >>> next_token_targets([5, 6, 7], [False, False, True])
    (-1, 7, -1)
    """
    following = zip(tokens[1:], supervised[1:], strict=True)
    return (*(token if counts else IGNORE for token, counts in following), IGNORE)


def continuation(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """
    Token ids of a prompt as the server feeds it, and of what the model goes on with.

    The answer is tokenised in its place behind the prompt, unless a token would then span the seam.
    """
    head = tokenizer.encode(prompt, add_special_tokens=True)
    whole = tokenizer.encode(prompt + answer, add_special_tokens=True)
    if whole[: len(head)] == head:
        return head, whole[len(head) :]
    return head, tokenizer.encode(answer, add_special_tokens=False)


def answered(
    head: Sequence[int], answer: Sequence[int], context: Context, *, file: str, line: int, path: str
) -> Sample | Finding:
    """
    A prompt whose answer, and the end token behind it, are learned; or why it cannot be.

    Args:
        path: of the answer in the row.
    """
    ends = context.tokenizer.eos_ids
    if not ends:
        message = (
            "cannot be learned to its end: the tokenizer names no end token, so the model would not learn to stop."
        )
        return finding("E-DATA-023", message, file=file, line=line, path=path)
    tokens = (*head, *answer, ends[0])
    supervised = [False] * len(head) + [True] * (len(answer) + 1)
    cut = 0
    if len(tokens) > context.max_tokens:
        if context.on_long != "truncate":
            return too_long(len(tokens), context, file=file, line=line)
        cut = len(tokens) - context.max_tokens
        tokens, supervised = tokens[: context.max_tokens], supervised[: context.max_tokens]
    # The first token of all is nobody's next.
    if not any(supervised[1:]):
        return nothing_learned(context, file=file, line=line, path=path, cut=cut)
    return Sample(tokens, next_token_targets(tokens, supervised), row=line, cut=cut)


def too_long(length: int, context: Context, *, file: str, line: int, path: str = "") -> Finding:
    """E-DATA-021."""
    message = f"{length} tokens, at most {context.max_tokens} allowed (data.max_tokens)."
    hint = "Set data.on_long to truncate or drop, or raise data.max_tokens."
    return finding("E-DATA-021", message, file=file, line=line, path=path, hint=hint)


def nothing_learned(context: Context, *, file: str, line: int, path: str = "", cut: int = 0) -> Finding:
    """E-DATA-022."""
    if cut:
        message = f"has no token to learn from within its first {context.max_tokens} (data.max_tokens)."
        hint = "Raise data.max_tokens, or set data.on_long to drop."
    else:
        message, hint = "has no token to learn from.", ""
    return finding("E-DATA-022", message, file=file, line=line, path=path, hint=hint)


def special_text(tokenizer: Tokenizer, text: str, *, file: str, line: int, path: str, read: bool) -> list[Finding]:
    """
    E-DATA-025 where a text spells a special token.

    Args:
        read: whether the text is read as that token; in a chat it is not.
    """
    pattern = special_pattern(tokenizer)
    found = spelled(pattern, text) if pattern is not None else None
    if found is None:
        return []
    what = "is read as that token, here and in prompts" if read else "is learned as text, not as that token"
    message = f'holds the text of the special token "{found}", which {what}.'
    return [finding("E-DATA-025", message, file=file, line=line, path=path, hint="Remove it if that is not meant.")]


def untrained_end(context: Context, *, file: str, line: int) -> list[Finding]:
    """E-DATA-024 where the end token of answers is one that the base never learned and this tuning leaves as it is."""
    ends = context.tokenizer.eos_ids
    if not ends or ends[0] not in context.untrained_ids:
        return []
    return [end_finding(ends[0], context, file=file, line=line)]


def end_finding(token: int, context: Context, *, file: str, line: int) -> Finding:
    """E-DATA-024 for one token."""
    message = (
        f'the end token "{context.tokenizer.id_to_piece(token)}" was never trained in the base model, and an adapter '
        "does not train it: the model may not learn to stop."
    )
    hint = "Begin with an instruct model, or set tuning.kind to full."
    return finding("E-DATA-024", message, file=file, line=line, hint=hint)


def most_that_fits(words: int, fits: Callable[[int], bool]) -> int | None:
    """
    How many of so many words can stay; None where not even none of them fit.

    >>> most_that_fits(10, lambda kept: kept <= 3)
    3

    Args:
        fits: whether so many words fit; what holds for more holds for fewer.
    """
    if not fits(0):
        return None
    low, high = 0, words
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
