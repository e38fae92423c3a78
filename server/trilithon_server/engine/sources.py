"""
What decoders of encoder-decoders read: sources in blocks of the cache, made by the encoder before the decoder begins.

A source's blocks hold the keys and values of the decoder's attention to it. They depend on its tokens alone, so the
prefix cache keeps them: the same passage of another request is not encoded again. A request takes the blocks of all its
sources when it is admitted and holds them until its last sequence is through; a preempted one has them found or encoded
again.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

from trilithon_parallel.models.seq2seq_serving import Sources
from trilithon_server.engine.batch import Batch, Encode, Limits
from trilithon_server.engine.blocks import BlockPool
from trilithon_server.engine.prefix import source_keys
from trilithon_server.engine.request import Request, Source, source_blocks
from trilithon_server.engine.wire_pb2 import Submit


def sources_of(submit: Submit, root: bytes, *, block_size: int) -> list[Source]:
    """The sources of a checked request; `root` is that of the prefix cache for its weights and tenant."""
    biases = submit.source_biases or [0.0] * len(submit.source_lengths)
    parts = [list(submit.source_tokens[a:b]) for a, b in pairwise([0, *accumulate(submit.source_lengths)])]
    return [
        Source(tokens, bias, source_keys(root, tokens, block_size=block_size))
        for tokens, bias in zip(parts, biases, strict=True)
    ]


def reads_of(request: Request) -> Sources:
    """What a sequence of an admitted request reads, as ranks are told."""
    return Sources(
        [len(source.tokens) for source in request.sources],
        [block for source in request.sources for block in source.blocks],
        [source.bias for source in request.sources] if request.submit.source_biases else [],
    )


class SourceBlocks:
    """The blocks of requests' sources. Requests without sources pass through every method unchanged."""

    def __init__(self, limits: Limits, pool: BlockPool) -> None:
        self._limits, self._pool = limits, pool

    def find(self, request: Request) -> list[list[int]]:
        """Of each source the blocks that the prefix cache has of it: all of them or none."""
        if not self._may_cache(request):
            return [[] for _ in request.sources]
        known = [self._pool.lookup(source.keys) for source in request.sources]
        return [
            blocks if len(blocks) == len(source.keys) else []
            for source, blocks in zip(request.sources, known, strict=True)
        ]

    def count_taken(self, request: Request, found: list[list[int]]) -> int:
        """How many of the available blocks `take` would use up, at most: found ones that nobody holds, and new ones."""
        missing = [len(s.tokens) for s, blocks in zip(request.sources, found, strict=True) if not blocks]
        unheld = self._pool.count_unheld([block for blocks in found for block in blocks])
        return unheld + source_blocks(missing, block_size=self._limits.block_size)

    def take(self, request: Request, found: list[list[int]]) -> tuple[int, int]:
        """Give every source its blocks. Returns the tokens that the cache was asked for, and those that it had."""
        for blocks in found:  # before anything is allocated, which may forget what was found
            self._pool.claim(blocks)
        request.unread, request.encoded, request.encoding = [], 0, 0
        asked = hit = 0
        for source, blocks in zip(request.sources, found, strict=True):
            asked += len(source.tokens)
            hit += len(source.tokens) if blocks else 0
            if not blocks:
                request.unread.append(source)
            source.blocks = blocks or self._pool.allocate(len(source.keys))
        return (asked, hit) if self._may_cache(request) else (0, 0)

    def schedule(self, request: Request, batch: Batch, end: int) -> None:
        """
        Have the encoder read what is unread, while the batch has less than `end` tokens.

        A source is read whole, so the first one of a plan needs no room: however full steps are, one goes on.
        """
        start = request.encoding
        for source in request.unread[start:]:
            if batch.num_encoded and batch.num_tokens + len(source.tokens) > end:
                break
            batch.num_encoded += len(source.tokens)
            batch.num_tokens += len(source.tokens)
            request.encoding += 1
        if request.encoding > start:
            batch.encodes.append(Encode(request, start, request.encoding))

    def complete(self, encode: Encode) -> None:
        """A plan has come back: what it encoded may be found."""
        request = encode.request
        request.encoded = encode.stop
        if self._may_cache(request):
            for source in encode.sources:
                for block, key in zip(source.blocks, source.keys, strict=True):
                    self._pool.register(block, key)
        self.release_if_over(request)

    def release_if_over(self, request: Request) -> None:
        """Free the blocks of a request that nobody goes on with."""
        if not request.live and not request.in_flight:
            self.release(request)

    def release(self, request: Request) -> None:
        """Free the blocks; idempotent. The caller knows that no plan in flight needs them."""
        for source in request.sources:
            self._pool.release(source.blocks)
            source.blocks = []
        request.unread, request.encoded, request.encoding = [], 0, 0

    def _may_cache(self, request: Request) -> bool:
        return self._limits.prefix_cache and not request.submit.bypass_cache
