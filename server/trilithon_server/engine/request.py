"""
Requests and their sequences: arithmetic on half-open intervals, no states.

    tokens      [0 ............... computed ........ scheduled ........ len(tokens))
                 keys and values    in flight         not yet asked for
                 in the cache       (one plan)

`0 <= computed <= scheduled <= len(tokens)`. What still has one token to go is a decode, what has more is a prefill.

A request of an encoder-decoder has sources, too, which its decoder reads. Those that no cache holds are `unread`, and
the encoder reads them before the decoder begins: `0 <= encoded <= encoding <= len(unread)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from trilithon_server.engine.wire_pb2 import Submit

AGEING_S = 10.0  # a waiting request gains one priority level in this time


@dataclass(slots=True, eq=False)
class Sequence:
    """One answer in the making: the prompt and what was generated after it."""

    id: int
    request: Request
    index: int
    tokens: list[int]
    computed: int = 0
    scheduled: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # prefix-cache keys of the leading full blocks
    num_registered: int = 0  # leading blocks that the prefix cache has been told about
    parked: bool = False  # waits until its request's lead has computed what they share
    finished: bool = False

    @property
    def in_flight(self) -> bool:
        """Whether a plan that holds this sequence has not come back yet."""
        return self.scheduled > self.computed

    @property
    def remaining(self) -> int:
        """Tokens that no plan has computed or is computing."""
        return len(self.tokens) - self.scheduled

    @property
    def num_generated(self) -> int:
        """Tokens after the prompt."""
        return len(self.tokens) - self.request.num_prompt


@dataclass(slots=True, eq=False)
class Source:
    """One sequence of the encoder; `bias` is added to the decoder's scores of its tokens."""

    tokens: list[int]
    bias: float
    keys: list[bytes]  # of its blocks in the prefix cache
    blocks: list[int] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Request:
    """One submitted request: its sequences share the prompt, live in one plan order and are preempted together."""

    id: int  # arrival order
    connection: int
    submit: Submit
    arrival_s: float
    root: bytes = b""  # parent of the prompt's first prefix-cache key
    sequences: list[Sequence] = field(default_factory=list)
    started_s: float | None = None
    first_token_s: float | None = None
    preemptions: int = 0
    num_cached: int = 0  # prompt tokens that the prefix cache served when the request started
    output_bytes: int = 0  # of an encoder's task logits
    num_scored: int = 0  # prompt positions whose successor has its log-probability
    sources: list[Source] = field(default_factory=list)
    unread: list[Source] = field(default_factory=list)
    encoded: int = 0
    encoding: int = 0

    # Read for every token of every step, so taken out of the message once.
    num_prompt: int = field(init=False)
    num_source_tokens: int = field(init=False)
    max_new_tokens: int = field(init=False)  # upper bound on the tokens of each answer
    wants_scores: bool = field(init=False)  # log-probabilities of prompt tokens were asked for
    end_ids: frozenset[int] = field(init=False)
    stop_ids: frozenset[int] = field(init=False)
    has_types: bool = field(init=False)  # not all zero
    has_positions: bool = field(init=False)  # not counted from 0
    is_beam: bool = field(init=False)
    num_answers: int = field(init=False)  # answers that the front is told of: choices 0 .. num_answers - 1

    def __post_init__(self) -> None:
        sampling = self.submit.sampling
        self.num_prompt = len(self.submit.prompt)
        self.num_source_tokens = sum(self.submit.source_lengths)
        self.max_new_tokens = sampling.max_tokens
        self.wants_scores = self.submit.HasField("sampling") and sampling.prompt_logprobs >= 0
        self.end_ids = frozenset(sampling.end_token_ids)
        self.stop_ids = frozenset(sampling.stop_token_ids)
        self.has_types = any(self.submit.types) or self.submit.answer_type > 0
        self.has_positions = list(self.submit.positions) != list(range(len(self.submit.positions)))
        self.is_beam = sampling.HasField("beam")
        self.num_answers = answers_told(self.submit)

    @property
    def live(self) -> list[Sequence]:
        """Sequences that are not finished, by index."""
        return [sequence for sequence in self.sequences if not sequence.finished]

    @property
    def in_flight(self) -> bool:
        """Whether any source or sequence, finished or not, is in a plan that has not come back."""
        return self.encoding > self.encoded or any(sequence.in_flight for sequence in self.sequences)

    @property
    def is_reading(self) -> bool:
        """Whether there are sources that no plan has encoded or is encoding."""
        return self.encoding < len(self.unread)

    def types(self, start: int, length: int) -> list[int]:
        """Token types of [start, start + length) of a sequence; empty where all of a request's are zero."""
        if not self.has_types:
            return []
        given = self.submit.types or [0] * self.num_prompt
        return [*given[start : start + length], *[self.submit.answer_type] * self._num_behind(start, length)]

    def positions(self, start: int, length: int) -> list[int]:
        """Positions of [start, start + length) of a sequence; empty where a request's count from 0."""
        if not self.has_positions:
            return []
        given = self.submit.positions
        behind = self._num_behind(start, length)
        first = given[-1] + 1 + max(0, start - self.num_prompt)
        return [*given[start : start + length], *range(first, first + behind)]

    def _num_behind(self, start: int, length: int) -> int:
        """How many of [start, start + length) lie behind the prompt."""
        return max(0, start + length - max(start, self.num_prompt))

    def may_read_cache(self) -> bool:
        """A prompt whose log-probabilities are still owed must be computed, not looked up."""
        scores_owed = self.wants_scores and self.num_scored < self.num_prompt - 1
        return not self.submit.bypass_cache and not scores_owed

    def worst_case_blocks(self, *, block_size: int, max_context: int) -> int:
        """KV blocks held when every answer is at its longest."""
        new = min(self.max_new_tokens, max_context - self.num_prompt)
        own = blocks_held(self.num_prompt, new, num_sequences=len(self.sequences), block_size=block_size)
        return own + source_blocks(self.submit.source_lengths, block_size=block_size)


def answers_told(submit: Submit) -> int:
    """How many answers the front hears of: every sequence, or the best of a beam search."""
    sampling = submit.sampling
    return max(1, sampling.beam.num_answers if sampling.HasField("beam") else sampling.num_sequences)


def blocks_held(prompt_len: int, answer_len: int, *, num_sequences: int, block_size: int) -> int:
    """
    KV blocks of answers to one prompt: its full blocks are shared, and an answer's last token is never in the cache.

    >>> blocks_held(20, 13, num_sequences=2, block_size=16), blocks_held(20, 14, num_sequences=2, block_size=16)
    (3, 5)
    """
    whole, rest = divmod(prompt_len, block_size)
    return whole + num_sequences * math.ceil((rest + max(0, answer_len - 1)) / block_size)


def longest_answer(prompt_len: int, num_blocks: int, *, num_sequences: int, block_size: int) -> int:
    """
    Tokens of each answer that so many blocks hold, by `blocks_held`; 0 where they don't hold the prompt.

    >>> longest_answer(20, 4, num_sequences=2, block_size=16), longest_answer(20, 1, num_sequences=1, block_size=16)
    (13, 0)
    """
    whole, rest = divmod(prompt_len, block_size)
    return max(0, (num_blocks - whole) // num_sequences * block_size - rest + 1)


def source_blocks(lengths: Iterable[int], *, block_size: int) -> int:
    """
    KV blocks of sources of so many tokens: each begins in a block of its own.

    >>> source_blocks([1, 16, 17], block_size=16)
    4
    """
    return sum(math.ceil(length / block_size) for length in lengths)


def running_order(request: Request) -> tuple[int, int]:
    """Best first: priority, then arrival."""
    return -request.submit.priority, request.id


def waiting_order(request: Request, now_s: float) -> tuple[int, int]:
    """Best first: priority with ageing, then arrival."""
    return -request.submit.priority - int((now_s - request.arrival_s) / AGEING_S), request.id
