"""What one plan computes, and the budgets of a step: plain data that schedulers fill and the leader reads."""

from __future__ import annotations

from dataclasses import dataclass, field

from trilithon_server.engine.request import Request, Sequence, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """
    Budgets of a step. `slots` is the number of plans that may be in flight, one per pipeline stage.

    `max_gather_tokens` bounds the cached tokens that the decodes of one plan attend to, and so attention's memory.
    """

    max_batch_tokens: int
    max_batch_sequences: int
    max_gather_tokens: int = 1 << 62
    block_size: int = 16
    slots: int = 1
    prefix_cache: bool = True


@dataclass(slots=True, eq=False)
class Item:
    """Tokens `[start, start + length)` of one sequence, and who draws a token from the last of them."""

    sequence: Sequence
    start: int
    length: int
    draws: list[Sequence]
    score_from: int = 0  # prompt positions [score_from, score_to) score their successors
    score_to: int = 0


@dataclass(slots=True, eq=False)
class Encode:
    """Sources `[start, stop)` of those that a request's encoder must still read."""

    request: Request
    start: int
    stop: int

    @property
    def sources(self) -> list[Source]:
        """They themselves."""
        return self.request.unread[self.start : self.stop]


@dataclass(slots=True, eq=False)
class Batch:
    """
    What one plan computes. `copies` are (from, to) blocks, copied in order before anything is written.

    `num_tokens` are those of the items and of the sources to encode, `num_encoded` the latter alone.
    """

    items: list[Item] = field(default_factory=list)
    encodes: list[Encode] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    started: list[Request] = field(default_factory=list)
    num_tokens: int = 0
    num_encoded: int = 0
    num_decodes: int = 0

    def types(self) -> list[int]:
        """Token types of all tokens; empty where all are zero."""
        if not any(item.sequence.request.has_types for item in self.items):
            return []
        parts = (item.sequence.request.types(item.start, item.length) or [0] * item.length for item in self.items)
        return [number for part in parts for number in part]

    def positions(self) -> list[int]:
        """Positions of all tokens; empty where each sequence counts from 0."""
        if not any(item.sequence.request.has_positions for item in self.items):
            return []
        parts = (
            item.sequence.request.positions(item.start, item.length) or range(item.start, item.start + item.length)
            for item in self.items
        )
        return [number for part in parts for number in part]
