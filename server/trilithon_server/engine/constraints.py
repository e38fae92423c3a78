"""
Constrained output behind one seam: regex, choice, JSON schema and Lark grammars become matchers that say what may come.

The library is llguidance, chosen by measurement against xgrammar on SmolLM2's vocabulary (49,152 tokens, one core of a
cloud host): compiling a schema of six fields 1.7 ms against 605 ms, an enumeration of 18,400 values 0.09 s and 10 MiB
against 15 s and 117 MiB, import 0.05 s and 5 MiB against 2.9 s and 205 MiB (it loads torch and transformers), masks a
median of 15 to 44 us against 4 to 7 us. Its work per step is bounded by limits, so nobody's grammar stalls the rest.
"""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from trilithon_parallel.tokenizer import Tokenizer
from trilithon_server.engine.wire_pb2 import Constraint

if TYPE_CHECKING:
    import llguidance

_CACHED_MATCHERS = 64
_REGEX_META = frozenset("\\.+*?()|[]{}^$#&-~/")


class CompileError(ValueError):
    """A constraint that is malformed, unsatisfiable or too large; the message is for its sender."""


class Matcher:
    """Where one answer stands in its constraint. Errors never raise: the matcher then allows nothing."""

    def __init__(self, inner: Any, *, end_ids: tuple[int, ...]) -> None:
        self._inner = inner
        self._end_ids = end_ids

    def copy(self) -> Matcher:
        """The same place, to go on from separately."""
        return Matcher(self._inner.deep_copy(), end_ids=self._end_ids)

    def mask(self, *, may_end: bool) -> bytes:
        """Which tokens may come next, one bit each; without `may_end` an end token never is among them."""
        bits: bytes = self._inner.compute_bitmask()
        if self._inner.is_error():
            return bytes(len(bits))  # the library would allow the end token here, which would pass for an answer
        if may_end:
            return bits
        open_bits = bytearray(bits)
        for token in self._end_ids:
            open_bits[token // 8] &= ~(1 << token % 8)
        return bytes(open_bits)

    def accept(self, token: int) -> bool:
        """Go on by one token; False when the constraint does not allow it."""
        return bool(self._inner.consume_token(token))

    def is_complete(self) -> bool:
        """Whether the text so far satisfies the constraint."""
        return bool(self._inner.is_accepting()) and not self._inner.is_error()

    def is_exhausted(self) -> bool:
        """Whether the text satisfies the constraint and nothing may follow."""
        return bool(self._inner.is_stopped()) and not self._inner.is_error()

    def error(self) -> str:
        """Why nothing is allowed any more, or nothing."""
        return first_line(self._inner.get_error()) if self._inner.is_error() else ""


class ConstraintCompiler:
    """
    Compiles constraints for one tokenizer on a thread of its own, since the stepping thread must not wait.

    Args:
        load: opens the tokenizer; called once, when the first constraint comes.
    """

    Job = Future[Matcher]

    def __init__(self, load: Callable[[], Tokenizer]) -> None:
        self._load = load
        self._vocabulary: tuple[llguidance.LLTokenizer, tuple[int, ...]] | None = None
        self._cache: OrderedDict[bytes, Matcher] = OrderedDict()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="constraints")
        self._wake_fd: int | None = None

    def wake(self, fd: int) -> None:
        """Write a byte to this descriptor whenever a job is done."""
        self._wake_fd = fd

    def start(self, constraint: Constraint) -> Future[Matcher]:
        """Begin to compile; the result is a matcher to copy, or raises CompileError."""
        job = self._pool.submit(self.compile, constraint)
        job.add_done_callback(self._notify)
        return job

    def compile(self, constraint: Constraint) -> Matcher:
        """
        Compile now.

        Raises:
            CompileError: the constraint can't be used.
        """
        key = constraint.SerializeToString(deterministic=True)
        matcher = self._cache.get(key)
        if matcher is None:
            tokenizer, end_ids = self._tokenizer()
            matcher = Matcher(_matcher(tokenizer, constraint), end_ids=end_ids)
            self._cache[key] = matcher
            if len(self._cache) > _CACHED_MATCHERS:
                self._cache.popitem(last=False)
        else:
            self._cache.move_to_end(key)
        return matcher

    def warm_up(self) -> None:
        """Open the tokenizer now."""
        self._tokenizer()

    def _tokenizer(self) -> tuple[llguidance.LLTokenizer, tuple[int, ...]]:
        if self._vocabulary is None:
            from llguidance import LLTokenizer, TokenizerWrapper

            tokenizer = self._load()
            end_ids = tokenizer.eos_ids or (0,)  # the library wants one; `mask` takes it out again where none may come
            wrapper = TokenizerWrapper(_Vocabulary(tokenizer))
            self._vocabulary = LLTokenizer(wrapper, n_vocab=tokenizer.vocab_size, eos_token=list(end_ids)), end_ids
        return self._vocabulary

    def _notify(self, _job: Future[Matcher]) -> None:
        if self._wake_fd is not None:
            with contextlib.suppress(BlockingIOError):  # a full pipe wakes as well
                os.write(self._wake_fd, b"c")


class _Vocabulary:
    """A tokenizer in the shape that llguidance reads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_ids[0] if tokenizer.eos_ids else 0
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)

    def __call__(self, text: str | bytes) -> list[int]:
        plain = text.decode("utf-8") if isinstance(text, bytes) else text
        return self._tokenizer.encode(plain, add_special_tokens=False)


def _matcher(tokenizer: Any, constraint: Constraint) -> Any:
    from llguidance import LLMatcher, LLParserLimits

    # Bounds of the work that one token of one request may cost the stepping thread.
    limits = LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=250_000,
        max_grammar_size=500_000,
    )
    # Silent: what is wrong goes to the sender, not to the log.
    inner = LLMatcher(tokenizer, grammar_of(constraint), log_level=0, limits=limits)
    if not inner.is_error():
        inner.compute_bitmask()  # much of the work happens at the first mask
    if inner.is_error():
        raise CompileError(first_line(inner.get_error()))
    return inner


def grammar_of(constraint: Constraint) -> str:
    """
    The library's grammar of a constraint.

    Raises:
        CompileError: the schema is not JSON, or a choice is empty.
    """
    from llguidance import LLMatcher

    kind = constraint.WhichOneof("kind")
    if kind == "json_schema":
        try:
            return str(LLMatcher.grammar_from_json_schema(constraint.json_schema))
        except ValueError as error:
            raise CompileError(f"not a JSON schema: {first_line(str(error))}") from None
    if kind == "regex":
        return str(LLMatcher.grammar_from_regex(constraint.regex))
    if kind == "grammar":
        return str(LLMatcher.grammar_from_lark(constraint.grammar))
    if kind == "choice" and constraint.choice.values and all(constraint.choice.values):
        return str(LLMatcher.grammar_from_regex("|".join(escape(value) for value in constraint.choice.values)))
    raise CompileError("a constraint must set one of json_schema, regex, grammar, or choice with non-empty values.")


def escape(text: str) -> str:
    """
    A regex that matches this text alone.

    >>> escape("1+1")
    '1\\\\+1'
    """
    return "".join(f"\\{letter}" if letter in _REGEX_META else letter for letter in text)


def first_line(text: str) -> str:
    """The first line of a library's message that says something, cut at 300 characters."""
    lines = (line.strip() for line in text.splitlines())
    return next((line for line in lines if line), "unknown error")[:300]
