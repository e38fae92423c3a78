"""Batches for encoders: whole sequences up to the budgets of tokens and answers, no cache, done in one plan."""

from __future__ import annotations

from trilithon_server.engine.batch import Batch, Item, Limits
from trilithon_server.engine.blocks import BlockPool
from trilithon_server.engine.request import Request, Sequence, waiting_order

MAX_OUTPUT_BYTES = 8 << 20  # of the task logits of one plan, and so of one request: well below what a frame may hold


class EncoderScheduler:
    """The scheduler's interface for requests that are answered by one forward pass."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pool = BlockPool(0)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.preemptions = 0
        self.queried_tokens = 0
        self.hit_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether any request is here."""
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def schedule(self, now_s: float) -> Batch | None:
        """The best waiting sequences that fit into the budgets together; one that exceeds that of tokens runs alone."""
        if not self.waiting:
            return None
        batch, num_bytes = Batch(), 0
        self.waiting.sort(key=lambda request: waiting_order(request, now_s))
        for request in self.waiting:
            fits = batch.num_tokens + request.num_prompt <= self.limits.max_batch_tokens
            fits = fits and num_bytes + request.output_bytes <= MAX_OUTPUT_BYTES
            if batch.items and (not fits or len(batch.items) >= self.limits.max_batch_sequences):
                break
            sequence = request.sequences[0]
            sequence.scheduled = request.num_prompt
            request.started_s = now_s
            batch.started.append(request)
            batch.items.append(Item(sequence, 0, request.num_prompt, []))
            batch.num_tokens += request.num_prompt
            num_bytes += request.output_bytes
        del self.waiting[: len(batch.items)]
        self.running.extend(batch.started)
        return batch

    def complete(self, batch: Batch) -> None:
        """A plan has come back."""
        for item in batch.items:
            item.sequence.computed = item.sequence.scheduled

    def finish(self, sequence: Sequence) -> None:
        """End a sequence, and with it its request."""
        sequence.finished = True
        for queue in (self.waiting, self.running):
            if sequence.request in queue:
                queue.remove(sequence.request)

    def reset_prefix_cache(self) -> None:
        """Nothing is cached."""

    def check(self) -> None:
        """Nothing is held between plans."""
