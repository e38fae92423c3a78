"""
Which tokens of which sequences the next plan computes: a token budget, no clock, no input or output.

A plan packs decodes first, then chunks of prompts. Blocks for all tokens of a sequence are taken when it is admitted,
so that only decodes ever ask for more; when there is none, the newest request of the lowest priority gives its blocks
back and is computed again later. The oldest running request never does, so something always finishes.

Who holds blocks: every admitted sequence its own list. Sequences of one request hold the prompt's blocks together;
the one that fills them is the request's lead (its first live sequence), the others are parked until then.
"""

from __future__ import annotations

import math
from bisect import insort

from trilithon_server.engine.batch import Batch, Item, Limits
from trilithon_server.engine.beam import Move
from trilithon_server.engine.blocks import BlockPool
from trilithon_server.engine.prefix import block_key
from trilithon_server.engine.request import Request, Sequence, running_order, waiting_order
from trilithon_server.engine.sources import SourceBlocks

MAX_PARTIAL_PREFILLS = 2


class Scheduler:
    """Waiting and running requests and their blocks. Every method is a pure function of this data and its arguments."""

    def __init__(self, limits: Limits, pool: BlockPool) -> None:
        self.limits = limits
        self.pool = pool
        self.sources = SourceBlocks(limits, pool)
        self.waiting: list[Request] = []
        self.running: list[Request] = []  # best first
        self.preemptions = 0
        self.queried_tokens = 0
        self.hit_tokens = 0
        self._blocked: tuple[Request, int] | None = (
            None  # head of the queue and the pool's releases when it did not fit
        )

    @property
    def has_work(self) -> bool:
        """Whether any request is here."""
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a request; the caller has checked that it can ever fit."""
        self.waiting.append(request)

    def schedule(self, now_s: float) -> Batch | None:
        """The next plan's content, or None when nothing can run before a plan in flight comes back."""
        batch = Batch()
        self._decodes(batch)
        self._prefills(batch)
        self._admit(batch, now_s)
        return batch if batch.items or batch.encodes else None

    def complete(self, batch: Batch) -> None:
        """A plan has come back: what it held is computed; blocks of sequences that finished meanwhile are freed."""
        for encode in batch.encodes:
            self.sources.complete(encode)
        for item in batch.items:
            sequence = item.sequence
            sequence.computed = sequence.scheduled
            request = sequence.request
            if request.wants_scores and item.score_to > item.score_from:
                request.num_scored = item.score_to
            self._register(sequence)
            if len(request.sequences) > 1:
                self._unpark(sequence)
            if sequence.finished:
                self._retire(sequence)

    def finish(self, sequence: Sequence) -> None:
        """End a sequence. Its blocks are free now, or when the plan that holds it comes back."""
        sequence.finished = True
        request = sequence.request
        if not sequence.in_flight:
            self._retire(sequence)
        if not request.live:
            if request in self.waiting:
                self.waiting.remove(request)
            elif request in self.running:
                self.running.remove(request)

    def move_beams(self, request: Request, moves: list[Move]) -> None:
        """Sequence i goes on as the one it comes from, with one token more; blocks are shared until one writes."""
        before = [(s.tokens, s.blocks, s.keys, s.num_registered, s.computed) for s in request.sequences]
        for move in moves:  # before anything is released
            self.pool.claim(before[move.parent][1])
        for sequence, move in zip(request.sequences, moves, strict=True):
            tokens, blocks, keys, num_registered, computed = before[move.parent]
            sequence.tokens, sequence.blocks, sequence.keys = [*tokens, move.token], list(blocks), list(keys)
            sequence.num_registered, sequence.computed, sequence.scheduled = num_registered, computed, computed
        for _, blocks, *_ in before:
            self.pool.release(blocks)

    def reset_prefix_cache(self) -> None:
        """Forget what finished requests left behind."""
        self.pool.forget_all()

    def check(self) -> None:
        """The conservation law and the intervals of every sequence. Raises RuntimeError or AssertionError."""
        self.pool.check()
        for request in self.running + self.waiting:
            for sequence in request.sequences:
                assert 0 <= sequence.computed <= sequence.scheduled <= len(sequence.tokens)
            assert 0 <= request.encoded <= request.encoding <= len(request.unread)

    # Decodes and prefills of what runs already ----------------------------------------------------------------

    def _decodes(self, batch: Batch) -> None:
        ready = [
            sequence
            for request in self.running
            for sequence in request.sequences
            if not (sequence.finished or sequence.parked or request.is_reading)
            and len(sequence.tokens) - sequence.computed == 1
        ]
        # Pipeline slots share the decodes evenly, so that the stages stay full.
        rows = min(self.limits.max_batch_sequences, math.ceil(len(ready) / self.limits.slots))
        gathered = 0
        for sequence in ready:
            if len(batch.items) >= rows or batch.num_tokens >= self.limits.max_batch_tokens:
                break
            if sequence.in_flight or not sequence.blocks:  # no blocks: an earlier turn of this loop preempted it
                continue
            gathered += len(sequence.tokens) + sequence.request.num_source_tokens
            if gathered > self.limits.max_gather_tokens and batch.items:
                break
            if self._reserve_decode(sequence, batch):
                self._take(sequence, 1, batch)
                batch.num_decodes += 1

    def _prefills(self, batch: Batch) -> None:
        pending = [
            sequence
            for request in self.running
            for sequence in request.sequences
            if not (sequence.finished or sequence.parked or sequence.in_flight)
            and (request.is_reading or sequence.remaining > 1)
        ]
        crowded = len(pending) + bool(self.waiting) > 1
        for sequence in pending:
            self._take_chunk(sequence, batch, crowded=crowded)

    def _take_chunk(self, sequence: Sequence, batch: Batch, *, crowded: bool) -> None:
        end = self.limits.max_batch_tokens
        if crowded:
            # A long prompt leaves half of the step to the others.
            end = min(end, batch.num_tokens + max(self.limits.block_size, end // 2))
        self.sources.schedule(sequence.request, batch, end)
        room = end - batch.num_tokens
        if sequence.request.is_reading:
            return
        if room > 0 and len(batch.items) < self.limits.max_batch_sequences:
            self._take(sequence, min(room, sequence.remaining), batch)

    def _take(self, sequence: Sequence, length: int, batch: Batch) -> None:
        request = sequence.request
        start = sequence.computed
        sequence.scheduled = start + length
        draws: list[Sequence] = []
        if sequence.remaining == 0 and request.max_new_tokens > 0:
            draws = [sequence]
            # The others start from the same logits; beams from the candidates of one.
            if len(request.sequences) > 1 and not sequence.num_generated and not request.is_beam:
                draws += [s for s in request.sequences if s.parked and not s.finished]
        item = Item(sequence, start, length, draws)
        if request.wants_scores:
            item.score_from = max(start, request.num_scored)
            item.score_to = max(item.score_from, min(start + length, request.num_prompt - 1))
        batch.items.append(item)
        batch.num_tokens += length

    # Admission ------------------------------------------------------------------------------------------------

    def _admit(self, batch: Batch, now_s: float) -> None:
        while (
            self.waiting
            and batch.num_tokens < self.limits.max_batch_tokens
            and len(batch.items) < self.limits.max_batch_sequences
        ):
            request = min(self.waiting, key=lambda r: waiting_order(r, now_s))
            if self._blocked == (request, self.pool.releases) and self.running:
                return
            if not self._may_join(request, batch):
                return
            if not self._acquire(request):
                self._blocked = (request, self.pool.releases)
                return
            self._blocked = None
            self.waiting.remove(request)
            insort(self.running, request, key=running_order)
            if request.started_s is None:
                request.started_s = now_s
                batch.started.append(request)
            lead = request.live[0]
            self._take_chunk(lead, batch, crowded=bool(self.waiting))

    def _may_join(self, request: Request, batch: Batch) -> bool:
        """Bounds on sequences at once and on prompts that are only partly computed."""
        if not self.running:
            return True
        num_running = sum(len(r.live) for r in self.running)
        if num_running + len(request.live) > self.limits.max_batch_sequences * self.limits.slots:
            return False
        room = self.limits.max_batch_tokens - batch.num_tokens
        unfinished = (s for r in self.running for s in r.live if not s.parked)
        partial = sum(1 for sequence in unfinished if sequence.remaining > 1 or sequence.request.is_reading)
        size = len(request.live[0].tokens) + request.num_source_tokens
        return partial < MAX_PARTIAL_PREFILLS or size <= room

    def _acquire(self, request: Request) -> bool:
        """Blocks for all tokens that the request has now, as few as the prefix cache and sharing allow."""
        size = self.limits.block_size
        lead, *others = request.live
        readable = request.num_readable(len(lead.tokens)) if self.limits.prefix_cache else 0
        hits: list[int] = []
        if readable:
            num_readable = readable // size
            self._extend_keys(lead, num_readable)
            hits = self.pool.lookup(lead.keys[:num_readable])
        # After a preemption every answer has tokens of its own: full blocks of the prompt stay shared, the rest isn't.
        shared = request.num_prompt // size if lead.num_generated else 0
        tails = [math.ceil(len(s.tokens) / size) - shared for s in others] if lead.num_generated else []
        num_new = math.ceil(len(lead.tokens) / size) - len(hits) + sum(tails)
        spare = sum(len(r.live) for r in self.running)
        found = self.sources.find(request)
        available = self.pool.num_available - self.pool.count_unheld(hits) - self.sources.count_taken(request, found)
        if available < num_new + spare:
            return False
        self.pool.claim(hits)
        asked, hit = self.sources.take(request, found)
        lead.blocks = hits + self.pool.allocate(num_new - sum(tails))
        lead.computed = lead.scheduled = len(hits) * size
        lead.num_registered = len(hits)
        lead.parked = False
        if readable:
            asked, hit = asked + len(lead.tokens), hit + lead.computed
        if request.started_s is None:
            self.queried_tokens += asked
            self.hit_tokens += hit
            request.num_cached = hit
        for sequence in others:
            sequence.parked = True
        for sequence, tail in zip(others, tails, strict=False):
            self.pool.claim(lead.blocks[:shared])
            sequence.blocks = lead.blocks[:shared] + self.pool.allocate(tail)
        self._unpark(lead)
        return True

    # Blocks ---------------------------------------------------------------------------------------------------

    def _reserve_decode(self, sequence: Sequence, batch: Batch) -> bool:
        """A writable slot for the sequence's next token, by preempting others if need be."""
        index = sequence.computed // self.limits.block_size
        is_new = index == len(sequence.blocks)
        if not is_new and not self.pool.is_shared(sequence.blocks[index]):
            return True
        while not self.pool.num_available:
            victim = self._victim()
            if victim is None:
                return False
            self._preempt(victim)
            if victim is sequence.request:
                return False
            if not is_new and not self.pool.is_shared(sequence.blocks[index]):
                return True
        (block,) = self.pool.allocate(1)
        if is_new:
            sequence.blocks.append(block)
        else:  # copy on write
            shared = sequence.blocks[index]
            batch.copies.append((shared, block))
            self.pool.release([shared])
            sequence.blocks[index] = block
        return True

    def _victim(self) -> Request | None:
        oldest = min(self.running, key=lambda r: r.id)
        for request in reversed(self.running):
            if request is not oldest and not request.in_flight:
                return request
        return None

    def _preempt(self, request: Request) -> None:
        for sequence in request.live:
            self.pool.release(sequence.blocks)
            sequence.blocks = []
            sequence.computed = sequence.scheduled = sequence.num_registered = 0
        self.sources.release(request)
        self.running.remove(request)
        self.waiting.append(request)
        request.preemptions += 1
        self.preemptions += 1

    def _register(self, sequence: Sequence) -> None:
        """Tell the prefix cache about blocks that are now full."""
        request = sequence.request
        if not self.limits.prefix_cache or request.submit.bypass_cache:
            return
        size = self.limits.block_size
        num_full = sequence.computed // size
        if num_full > sequence.num_registered:
            self._extend_keys(sequence, num_full)
            for index in range(sequence.num_registered, num_full):
                self.pool.register(sequence.blocks[index], sequence.keys[index])
            sequence.num_registered = num_full

    def _extend_keys(self, sequence: Sequence, num_blocks: int) -> None:
        """Give the sequence the keys of its leading full blocks."""
        request, size = sequence.request, self.limits.block_size
        for start in range(len(sequence.keys) * size, num_blocks * size, size):
            parent = sequence.keys[-1] if sequence.keys else request.root
            sequence.keys.append(
                block_key(
                    parent,
                    sequence.tokens[start : start + size],
                    types=request.types(start, size),
                    positions=request.positions(start, size),
                )
            )

    def _unpark(self, lead: Sequence) -> None:
        """
        Let the parked sequences of a request go once the lead has computed what they share.

        Before the first token that is the whole prompt, held together block by block (the partly filled last one is
        copied on write). After a preemption it is the prompt's full blocks: each has blocks of its own for the rest.
        """
        size = self.limits.block_size
        for sequence in lead.request.sequences:
            if not sequence.parked or sequence.finished:
                continue
            is_born = bool(sequence.blocks)
            shared = lead.request.num_prompt // size * size if is_born else lead.request.num_prompt
            if lead.computed < shared:
                return
            if not is_born:
                self.pool.claim(lead.blocks)
                sequence.blocks = list(lead.blocks)
            self._start_at(sequence, shared, like=lead)

    def _start_at(self, sequence: Sequence, computed: int, *, like: Sequence) -> None:
        """Unpark a sequence whose first `computed` tokens are in blocks that `like` has filled."""
        num_full = computed // self.limits.block_size
        sequence.computed = sequence.scheduled = computed
        sequence.keys = like.keys[:num_full]
        sequence.num_registered = min(like.num_registered, num_full)
        sequence.parked = False

    def _retire(self, sequence: Sequence) -> None:
        """Free a finished sequence's blocks; a lead that others still wait for hands its work over first."""
        heirs = [s for s in sequence.request.sequences if s.parked and not s.finished]
        if heirs and sequence.blocks and not sequence.parked:
            heir, size = heirs[0], self.limits.block_size
            if heir.blocks:
                done = min(sequence.computed, sequence.request.num_prompt // size * size)
            else:
                done = sequence.computed
                self.pool.claim(sequence.blocks)
                heir.blocks = list(sequence.blocks)
            self._start_at(heir, done, like=sequence)
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        self.sources.release_if_over(sequence.request)
