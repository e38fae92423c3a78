"""
How a request's broken rules are found, worded and collected.

A *check* is a function `(value, bounds) -> value` that returns the value in its final type or raises `Broken`. The
checks below are the building blocks of the table in `sampling.py`; both fronts report through `Violations`, so a
request hears of everything that is wrong with it at once.
"""

from __future__ import annotations

import difflib
import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trilithon.errors import InvalidArgument, Violation

MAX_VIOLATIONS = 16
"""Violations reported for one request; the rest would only be noise."""

GIVEN_CHARS = 64
"""How much of a value given by the user is repeated in a message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a request may ask of one model of this server: limits of the server, the model and the caller's key."""

    vocab_size: int = 1 << 31
    max_context: int = 1 << 31
    max_output_tokens: int | None = None
    default_max_tokens: int = 1024
    max_n: int = 16
    max_beam: int = 16
    max_logprobs: int = 20
    max_logprob_token_ids: int = 64
    max_time_ms: int = 600_000
    max_priority: int = 10
    max_stop: int = 16
    max_stop_bytes: int = 256
    max_stop_token_ids: int = 64
    max_bad_words: int = 256
    max_bad_word_tokens: int = 64
    max_logit_bias: int = 1024
    max_allowed_ids: int = 16_384
    max_constraint_bytes: int = 65_536

    @property
    def max_prompt(self) -> int:
        """The most tokens that a prompt may have: the window without one token of answer."""
        return self.max_context - 1

    @property
    def max_output(self) -> int:
        """The most tokens that one answer may have: the window without a token of prompt, or less if configured."""
        return min(self.max_context - 1, self.max_output_tokens or self.max_context)


Check = Callable[[Any, Bounds], Any]

_FLOAT32 = struct.Struct("f")


class Broken(Exception):
    """
    A value breaks its rule.

    Args:
        given: the offending value, when it is not the whole field.
        at: what to append to the field's name, such as `[2]`.
        code: the violation's code; `invalid_value` unless the rule has its own.
        rule: replaces the rule's text.
    """

    def __init__(self, given: object = ..., *, at: str = "", code: str = "", rule: str = "") -> None:
        super().__init__(rule)
        self.given, self.at, self.code, self.rule = given, at, code, rule


def shown(value: object) -> str:
    r"""
    A value as messages repeat it: JSON, ASCII, control characters escaped, cut after 64 characters.

    >>> shown("a\nb")
    '"a\\nb"'
    >>> shown("x" * 100)
    '"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx..."'
    """
    if isinstance(value, str):
        cut = value if len(value) <= GIVEN_CHARS else value[:GIVEN_CHARS] + "..."
        return json.dumps(cut).replace("\x7f", "\\u007f")
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"a whole number of {value.bit_length()} bits"
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= GIVEN_CHARS else text[:GIVEN_CHARS] + "..."


def nearest(word: str, known: Iterable[str]) -> str:
    """` Did you mean "x"?`, when something known is close to `word`, else nothing."""
    close = difflib.get_close_matches(word[:GIVEN_CHARS], list(known), n=1)
    return f' Did you mean "{close[0]}"?' if close else ""


class Violations:
    """Collects what is wrong with one request, in the order found."""

    def __init__(self) -> None:
        self._found: list[Violation] = []

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(
        self,
        field: str,
        rule: str,
        *,
        given: object = ...,
        code: str = "invalid_value",
        todo: str = "",
        limit: str = "",
    ) -> None:
        """Note that `field` breaks `rule`: the message is `` `field` rule. Given: value. todo``."""
        field = shown(field)[1:-1] if not field.isascii() or len(field) > GIVEN_CHARS else field
        value = "" if given is ... else shown(given)
        message = f"`{field}` {rule}."
        if value:
            message += f" Given: {value}."
        if todo:
            message += f" {todo}"
        self.say(field, message, code=code, rule=rule, given=value, limit=limit)

    def say(self, field: str, message: str, *, code: str, rule: str = "", given: str = "", limit: str = "") -> None:
        """Note a violation whose message is already worded."""
        if len(self._found) < MAX_VIOLATIONS:
            self._found.append(Violation(field=field, code=code, message=message, rule=rule, limit=limit, given=given))

    def raise_if_any(self) -> None:
        """
        Raises:
            InvalidArgument: with every violation noted; its code and message are those of the first.
        """
        if not self._found:
            return
        first = self._found[0]
        more = len(self._found) - 1
        tail = f" (and {more} more: see details)" if more else ""
        raise InvalidArgument(first.message + tail, code=first.code, details=self._found)


def invalid(
    field: str, rule: str, *, given: object = ..., code: str = "invalid_value", todo: str = ""
) -> InvalidArgument:
    """The error of a single violation."""
    found = Violations()
    found.add(field, rule, given=given, code=code, todo=todo)
    try:
        found.raise_if_any()
    except InvalidArgument as error:
        return error
    raise AssertionError("one violation was noted")


# Checks -----------------------------------------------------------------------------------------------------


def _limit(bound: float | str, bounds: Bounds) -> float:
    return getattr(bounds, bound) if isinstance(bound, str) else bound


def as_number(value: object) -> float:
    """A finite number; booleans and numeric strings are not numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Broken
    try:
        number = float(value)
    except OverflowError:
        raise Broken from None
    if not math.isfinite(number):
        raise Broken(str(value))
    return number


def as_whole(value: object) -> int:
    """A whole number; JSON does not tell 3.0 from 3, so both are taken."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return int(value)
    raise Broken


def float32(value: float) -> float:
    """The nearest number that protobuf and the engine can hold; what it makes of a value is what counts."""
    nearest_float: float = _FLOAT32.unpack(_FLOAT32.pack(value))[0]
    return nearest_float


def number(low: float, high: float, *, above: bool = False, zero: bool = False) -> Check:
    """From `low` (exclusive with `above`) to `high`; with `zero`, 0 too."""

    def check(value: object, bounds: Bounds) -> float:
        given = as_number(value)
        if zero and given == 0:
            return 0.0
        if not low <= given <= high:
            raise Broken
        kept = float32(given)
        if above and kept <= low:  # 1e-60 is above 0 and yet nothing as a float
            raise Broken
        return kept

    return check


def whole(low: int, high: int | str, *, also: tuple[int, ...] = (), digits: bool = False) -> Check:
    """A whole number from `low` to `high` (a number, or the name of a bound), or one of `also`."""

    def check(value: object, bounds: Bounds) -> int:
        if digits and isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 20:
            value = int(value)
        given = as_whole(value)
        if given not in also and not low <= given <= _limit(high, bounds):
            raise Broken
        return given

    return check


def boolean(value: object, bounds: Bounds) -> bool:
    if not isinstance(value, bool):
        raise Broken
    return value


def one_of(*allowed: str) -> Check:
    def check(value: object, bounds: Bounds) -> str:
        if value not in allowed or not isinstance(value, str):
            raise Broken
        return value

    return check


def token_id(value: object, bounds: Bounds, *, at: str = "") -> int:
    try:
        given = as_whole(value)
    except Broken:
        raise Broken(value, at=at) from None
    if not 0 <= given < bounds.vocab_size:
        rule = f"must be from 0 to {bounds.vocab_size - 1} (vocabulary size {bounds.vocab_size})"
        raise Broken(value, at=at, code="token_id_range", rule=rule)
    return given


def token_ids(most: int | str, *, least: int = 0) -> Check:
    """A list of token ids, each below the vocabulary size."""

    def check(value: object, bounds: Bounds) -> tuple[int, ...]:
        items = as_list(value, least=least, most=int(_limit(most, bounds)))
        return tuple(token_id(item, bounds, at=f"[{i}]") for i, item in enumerate(items))

    return check


def as_list(value: object, *, least: int, most: int) -> Sequence[Any]:
    """A list of `least` to `most` items."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise Broken
    if not least <= len(value) <= most:
        raise Broken(f"{len(value)} items")
    return value


def strings(most: int | str, *, max_bytes: int | str, single: bool = False) -> Check:
    """A list of non-empty strings of at most `max_bytes` UTF-8 bytes; with `single`, one string stands for a list."""

    def check(value: object, bounds: Bounds) -> tuple[str, ...]:
        if single and isinstance(value, str):
            value = [value]
        items = as_list(value, least=0, most=int(_limit(most, bounds)))
        for i, item in enumerate(items):
            if (
                not isinstance(item, str)
                or not item
                or not is_text(item)
                or len(item.encode()) > _limit(max_bytes, bounds)
            ):
                raise Broken(item, at=f"[{i}]")
        return tuple(items)

    return check


def is_text(value: str) -> bool:
    """Whether a string is sound Unicode: JSON can smuggle in half a surrogate pair, which no tokenizer takes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def string(max_bytes: int) -> Check:
    def check(value: object, bounds: Bounds) -> str:
        if not isinstance(value, str) or not is_text(value) or len(value.encode()) > max_bytes:
            raise Broken
        return value

    return check


def bias(most: str, *, low: float, high: float) -> Check:
    """A map of token ids (JSON keys are strings of digits) to numbers from `low` to `high`."""

    def check(value: object, bounds: Bounds) -> dict[int, float]:
        if not isinstance(value, Mapping):
            raise Broken
        if len(value) > _limit(most, bounds):
            raise Broken(f"{len(value)} entries")
        out: dict[int, float] = {}
        for key, amount in value.items():
            at = f".{shown(str(key))[1:-1]}"
            if isinstance(key, str):
                if not (key.isascii() and key.isdigit() and len(key) <= 20):
                    raise Broken(key)
                key = int(key)
            token = token_id(key, bounds, at=at)
            try:
                given = as_number(amount)
            except Broken:
                raise Broken(amount, at=at) from None
            if not low <= given <= high:
                raise Broken(amount, at=at)
            out[token] = given
        return out

    return check


def pairs(most: int, *, key_chars: int, value_chars: int) -> Check:
    """A map of short strings to strings."""

    def check(value: object, bounds: Bounds) -> dict[str, str]:
        if not isinstance(value, Mapping):
            raise Broken
        if len(value) > most:
            raise Broken(f"{len(value)} pairs")
        for key, text in value.items():
            if not isinstance(text, str) or len(key) > key_chars or len(text) > value_chars:
                raise Broken({str(key)[:GIVEN_CHARS]: text if isinstance(text, str) else shown(text)})
        return dict(value)

    return check
