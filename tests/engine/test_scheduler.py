"""The scheduler and its blocks under random schedules: the conservation law holds after every event (R6)."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trilithon_server.engine.batch import Batch, Limits
from trilithon_server.engine.blocks import BlockPool
from trilithon_server.engine.encoder_scheduler import EncoderScheduler
from trilithon_server.engine.prefix import reading_root, root_key
from trilithon_server.engine.request import Request, Sequence, Source, blocks_held, longest_answer
from trilithon_server.engine.scheduler import Scheduler
from trilithon_server.engine.sources import sources_of
from trilithon_server.engine.wire_pb2 import Sampling, Submit

MAX_CONTEXT = 200


class World:
    """
    A scheduler with a simulated cache: what each slot holds is the (position, token) written there, so that reading a
    wrong block, writing into a shared one or reusing one too early shows at once.
    """

    def __init__(self, *, blocks: int, slots: int, tokens: int, sequences: int, seed: int) -> None:
        self.limits = Limits(max_batch_tokens=tokens, max_batch_sequences=sequences, slots=slots)
        self.pool = BlockPool(blocks)
        self.scheduler = Scheduler(self.limits, self.pool)
        self.in_flight: deque[Batch] = deque()
        self.memory: dict[int, int] = {}  # slot -> hash of all tokens up to and including the one written there
        self.prefixes: dict[int, list[int]] = {}  # the same hashes as every sequence should find them
        self.scored: dict[int, int] = {}  # request -> prompt positions whose successor has its score
        self.random = random.Random(seed)
        self.requests: dict[int, Request] = {}
        self.now_s = 0.0
        self.num_requests = 0
        self.num_sequences = 0
        self.finished_requests = 0

    def submit(
        self,
        prompt: list[int],
        *,
        n: int = 1,
        new: int = 5,
        priority: int = 0,
        salt: bytes = b"",
        bypass: bool = False,
        scored_from: int = 0,
        sources: list[list[int]] | None = None,
    ) -> Request | None:
        """`scored_from`: the first prompt token that is scored; 0: none is."""
        sampling = Sampling(
            num_sequences=n,
            max_tokens=new,
            prompt_logprobs=0 if scored_from else -1,
            prompt_logprobs_from=scored_from,
        )
        message = Submit(prompt=prompt, sampling=sampling, priority=priority, cache_salt=salt, bypass_cache=bypass)
        for source in sources or []:
            message.source_tokens.extend(source)
            message.source_lengths.append(len(source))
        self.num_requests += 1
        root = root_key(model_digest="m", adapter_digest="", salt=salt)
        known = sources_of(message, root, block_size=16)
        root = reading_root(root, [(source.keys[0], source.bias) for source in known])
        request = Request(self.num_requests, 0, message, self.now_s, root=root, sources=known)
        for index in range(n):
            request.sequences.append(Sequence(self.num_sequences, request, index, list(prompt)))
            self.num_sequences += 1
        if request.worst_case_blocks(block_size=16, max_context=MAX_CONTEXT) > self.pool.total:
            return None
        self.scheduler.add(request)
        self.requests[request.id] = request
        return request

    def launch(self) -> bool:
        """Schedule one plan and run it on the simulated cache, as every rank would, in plan order."""
        if len(self.in_flight) >= self.limits.slots:
            return False
        batch = self.scheduler.schedule(self.now_s)
        if batch is None:
            return False
        longest = max((len(source.tokens) for one in batch.encodes for source in one.sources), default=0)
        assert batch.num_tokens <= self.limits.max_batch_tokens + longest
        assert len(batch.items) <= self.limits.max_batch_sequences
        flying = [item.sequence for other in self.in_flight for item in other.items]
        assert not {s.id for s in flying} & {item.sequence.id for item in batch.items}, "a sequence in two plans"
        for source, target in batch.copies:
            for offset in range(16):
                if source * 16 + offset in self.memory:
                    self.memory[target * 16 + offset] = self.memory[source * 16 + offset]
        for encode in batch.encodes:
            for source in encode.sources:
                self._write_source(source)
        for item in batch.items:
            sequence = item.sequence
            assert item.length >= 1
            assert not sequence.request.is_reading, "the decoder begins before its sources are encoded"
            for source in sequence.request.sources:
                self._check_source(source)
            if item.score_to > item.score_from:
                request = sequence.request
                due = self.scored.get(request.id, request.submit.sampling.prompt_logprobs_from - 1)
                assert item.score_from == due, "a prompt token is scored twice or not at all"
                self.scored[request.id] = item.score_to
            expected = self._prefix_hashes(sequence)
            for position in range(item.start):
                assert self.memory.get(self._slot(sequence, position)) == expected[position], "a wrong block is read"
            for position in range(item.start, item.start + item.length):
                is_prompt_block = position < sequence.request.num_prompt // 16 * 16
                shared = self.pool.is_shared(sequence.blocks[position // 16])
                assert is_prompt_block or not shared, "a block that others read is written"
                self.memory[self._slot(sequence, position)] = expected[position]
        self.in_flight.append(batch)
        return True

    def _write_source(self, source: Source) -> None:
        for place in range(len(source.tokens)):
            assert not self.pool.is_shared(source.blocks[place // 16]), "a block that others read is written"
            self.memory[source.blocks[place // 16] * 16 + place % 16] = hash((place, *source.tokens))

    def _check_source(self, source: Source) -> None:
        for place in range(len(source.tokens)):
            slot = source.blocks[place // 16] * 16 + place % 16
            assert self.memory.get(slot) == hash((place, *source.tokens)), "a wrong source is read"

    def _prefix_hashes(self, sequence: Sequence) -> list[int]:
        hashes = self.prefixes.setdefault(sequence.id, [])
        for token in sequence.tokens[len(hashes) :]:
            hashes.append(hash((hashes[-1] if hashes else 0, token)))
        return hashes

    @staticmethod
    def _slot(sequence: Sequence, position: int) -> int:
        return sequence.blocks[position // 16] * 16 + position % 16

    def land(self) -> None:
        """The oldest plan comes back: its draws are appended, answers of full length finish."""
        batch = self.in_flight.popleft()
        self.scheduler.complete(batch)
        for item in batch.items:
            for sequence in item.draws:
                if sequence.finished:
                    continue
                sequence.tokens.append(self.random.randrange(4))
                if sequence.num_generated >= sequence.request.max_new_tokens:
                    self.end(sequence)
            request = item.sequence.request
            if not item.draws and request.max_new_tokens == 0 and item.sequence.remaining == 0:
                first, due = request.submit.sampling.prompt_logprobs_from, request.num_prompt - 1
                assert not 0 < first <= due or self.scored[request.id] == due, "a prompt token was not scored"
                self.end(item.sequence)

    def end(self, sequence: Sequence) -> None:
        if not sequence.finished:
            self.scheduler.finish(sequence)
        if not sequence.request.live:
            self.requests.pop(sequence.request.id, None)
            self.finished_requests += 1

    def drain(self) -> None:
        for _ in range(20_000):
            launched = self.launch()
            if self.in_flight and (not launched or len(self.in_flight) >= self.limits.slots):
                self.land()
            elif not launched:
                break
            self.scheduler.check()
        assert not self.requests, "a request never finished"
        assert self.pool.num_in_use == 0, "blocks leaked"
        self.scheduler.check()


PROMPTS = st.builds(
    lambda head, tail: head + tail,
    st.sampled_from([[], [1] * 16, [1] * 32, [1] * 32 + [2] * 16, [3] * 40]),
    st.lists(st.integers(0, 3), min_size=1, max_size=40),
)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        blocks=st.integers(10, 40),
        slots=st.integers(1, 3),
        tokens=st.integers(4, 80),
        sequences=st.integers(1, 6),
        seed=st.integers(0, 100),
    )
    def start(self, blocks: int, slots: int, tokens: int, sequences: int, seed: int) -> None:
        self.world = World(blocks=blocks, slots=slots, tokens=tokens, sequences=sequences, seed=seed)

    @rule(
        prompt=PROMPTS,
        n=st.sampled_from([1, 1, 1, 2, 3, 4]),
        new=st.integers(0, 40),
        priority=st.integers(-2, 2),
        salt=st.sampled_from([b"", b"", b"a"]),
        bypass=st.sampled_from([False, False, False, True]),
        scored_from=st.sampled_from([0, 0, 1, 16, 17, 40]),
    )
    def submit(
        self, prompt: list[int], n: int, new: int, priority: int, salt: bytes, bypass: bool, scored_from: int
    ) -> None:
        n = n if new else 1
        self.world.submit(prompt, n=n, new=new, priority=priority, salt=salt, bypass=bypass, scored_from=scored_from)

    @rule(
        sources=st.lists(st.sampled_from([[1], [1] * 16, [1] * 17, [2] * 40, [3] * 5]), min_size=1, max_size=4),
        n=st.sampled_from([1, 1, 2, 3]),
        new=st.integers(0, 30),
        salt=st.sampled_from([b"", b"", b"a"]),
        bypass=st.sampled_from([False, False, False, True]),
        forced=st.sampled_from([0, 0, 0, 5, 20]),
    )
    def submit_with_sources(
        self, sources: list[list[int]], n: int, new: int, salt: bytes, bypass: bool, forced: int
    ) -> None:
        prompt = [0] * (1 + forced)
        self.world.submit(prompt, n=n if new else 1, new=new, salt=salt, bypass=bypass, sources=sources)

    @rule(count=st.integers(1, 12))
    def work(self, count: int) -> None:
        for _ in range(count):
            if not self.world.launch() and self.world.in_flight:
                self.world.land()
            self.world.scheduler.check()

    @rule()
    def launch(self) -> None:
        self.world.launch()

    @precondition(lambda self: self.world.in_flight)
    @rule()
    def land(self) -> None:
        self.world.land()

    @precondition(lambda self: self.world.requests)
    @rule(which=st.integers(0, 1000), index=st.integers(-1, 3))
    def abort(self, which: int, index: int) -> None:
        request = list(self.world.requests.values())[which % len(self.world.requests)]
        victims = request.live if index < 0 else [s for s in request.live if s.index == index]
        for sequence in victims:
            self.world.end(sequence)

    @rule()
    def reset_cache(self) -> None:
        self.world.scheduler.reset_prefix_cache()

    @rule(seconds=st.floats(0, 30))
    def wait(self, seconds: float) -> None:
        self.world.now_s += seconds

    @invariant()
    def conserved(self) -> None:
        if hasattr(self, "world"):
            self.world.scheduler.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()


TestR6RandomSchedules = SchedulerMachine.TestCase
TestR6RandomSchedules.__doc__ = """
Any mix of arrivals, chunks, aborts, preemptions, forks and prefix hits keeps the law, and everything finishes.

Inverse checks seen red: let the decoder begin before its sources are encoded; do not claim those that the cache had;
skip the copy on write; free blocks of a sequence in flight at once; let a hit cover the last
token; do not release a preempted sibling.
"""
TestR6RandomSchedules.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("seed", range(8))
def test_R6_thousands_of_events_keep_the_conservation_law(seed: int) -> None:
    """Long random schedules with tight memory, checked after each of their thousands of events."""
    rng = random.Random(seed)
    world = World(blocks=24, slots=1 + seed % 3, tokens=48, sequences=6, seed=seed)
    for _ in range(1500):
        action = rng.random()
        if action < 0.15:
            prompt = [1] * rng.choice([0, 32]) + [rng.randrange(2) for _ in range(rng.choice([1, 7, 33, 60]))]
            world.submit(prompt, n=rng.choice([1, 1, 2, 3]), new=rng.randrange(1, 50), priority=rng.randrange(-1, 2))
        elif action < 0.17:
            texts = [[rng.randrange(3)] * rng.choice([5, 16, 40]) for _ in range(rng.randrange(1, 5))]
            world.submit([1], n=rng.choice([1, 1, 2]), new=rng.randrange(1, 40), sources=texts)
        elif action < 0.22 and world.requests:
            request = rng.choice(list(world.requests.values()))
            for sequence in request.live if rng.random() < 0.5 else request.live[:1]:
                world.end(sequence)
        elif not world.launch() and world.in_flight:
            world.land()
        world.now_s += 0.05
        world.scheduler.check()

    world.drain()
    assert world.finished_requests > 100
    assert world.scheduler.preemptions > 0
    assert world.scheduler.hit_tokens > 0


def _world(**changes: int) -> World:
    return World(**{"blocks": 40, "slots": 1, "tokens": 64, "sequences": 8, "seed": 0} | changes)


def test_decodes_go_before_prompts_and_a_long_prompt_shares_the_step() -> None:
    """A long prompt neither holds up a running answer nor a short prompt behind it."""
    world = _world()
    running = world.submit([1] * 5, new=30)
    world.launch()
    world.land()
    long = world.submit([2] * 150, new=1)
    short = world.submit([3] * 10, new=1)
    batch = world.scheduler.schedule(world.now_s)

    assert batch is not None
    assert [(item.sequence.request, item.length) for item in batch.items] == [(running, 1), (long, 32), (short, 10)]


def test_at_most_two_prompts_are_partly_computed() -> None:
    """The third long prompt waits until one of the first two is through."""
    world = _world()
    first, second, third = (world.submit([token] * 100, new=1) for token in (1, 2, 3))
    batch = world.scheduler.schedule(world.now_s)

    assert batch is not None
    assert [item.sequence.request for item in batch.items] == [first, second]
    assert world.scheduler.waiting == [third]


def test_a_waiting_request_gains_a_priority_level_in_ten_seconds() -> None:
    """Ageing lets an old request of low priority pass a newer one of higher priority."""
    world = _world(sequences=1)
    low = world.submit([1] * 4, priority=0)
    world.now_s = 21.0
    high = world.submit([2] * 4, priority=1)
    batch = world.scheduler.schedule(world.now_s)

    assert batch is not None
    assert batch.items[0].sequence.request is low
    assert world.scheduler.waiting == [high]


def test_a_higher_priority_is_admitted_first() -> None:
    """Priority goes before arrival."""
    world = _world(sequences=1)
    world.submit([1] * 4, priority=0)
    high = world.submit([2] * 4, priority=1)
    batch = world.scheduler.schedule(world.now_s)

    assert batch is not None
    assert batch.items[0].sequence.request is high


def test_preemption_takes_the_newest_of_the_lowest_priority_and_never_the_oldest() -> None:
    """When blocks run out the oldest request goes on, whatever its priority."""
    world = _world(blocks=7)
    oldest = world.submit([1] * 16, new=40, priority=-2)
    middle = world.submit([2] * 16, new=40, priority=1)
    newest = world.submit([3] * 16, new=40, priority=0)
    preempted: list[Request] = []
    while not preempted:
        world.launch()
        world.land()
        preempted = [r for r in (oldest, middle, newest) if r is not None and r.preemptions]

    assert preempted == [newest]
    world.drain()
    assert oldest is not None
    assert oldest.preemptions == 0


def test_a_prefix_hit_skips_full_blocks_but_never_the_last_token() -> None:
    """A prompt of exactly two cached blocks still computes its second one."""
    world = _world()
    world.submit([1] * 32, new=1)
    world.drain()
    again = world.submit([1] * 32, new=1)
    longer = world.submit([1] * 33, new=1)
    batch = world.scheduler.schedule(world.now_s)

    assert batch is not None
    assert [(item.sequence.request, item.start, item.length) for item in batch.items] == [
        (again, 16, 16),
        (longer, 32, 1),
    ]


@pytest.mark.parametrize("change", [{"salt": b"other"}, {"bypass": True}, {"scored_from": 1}])
def test_S8_another_salt_bypass_or_prompt_scores_never_hit(change: dict[str, bytes | bool | int]) -> None:
    """
    Another tenant's salt misses; so does who asked to; prompt scores need the computation.

    Inverse check seen red: leave the salt out of `root_key`.
    """
    world = _world()
    world.submit([1] * 40, new=1)
    world.drain()
    world.submit([1] * 40, new=1, **change)  # type: ignore[arg-type]  # a table of keyword values
    batch = world.scheduler.schedule(world.now_s)

    assert batch is not None
    assert batch.items[0].start == 0


def test_two_pipeline_slots_share_the_decodes() -> None:
    """With two plans in flight each carries half of the answers."""
    world = _world(slots=2, tokens=64)
    for token in range(6):
        world.submit([token] * 4, new=30)
    world.launch()
    world.land()
    first, second = world.scheduler.schedule(0.0), world.scheduler.schedule(0.0)

    assert first is not None
    assert second is not None
    assert (len(first.items), len(second.items)) == (3, 3)


def test_encoder_batches_whole_sequences() -> None:
    """Encoder plans never cut a sequence, and one beyond the budget runs alone."""
    scheduler = EncoderScheduler(Limits(max_batch_tokens=10, max_batch_sequences=8))
    for number, length in enumerate([4, 5, 3, 12, 2]):
        request = Request(number, 0, Submit(prompt=[1] * length), 0.0)
        request.sequences.append(Sequence(number, request, 0, [1] * length))
        scheduler.add(request)
    lengths = []
    while (batch := scheduler.schedule(0.0)) is not None:
        lengths.append([item.length for item in batch.items])
        scheduler.complete(batch)
        for item in batch.items:
            scheduler.finish(item.sequence)

    assert lengths == [[4, 5], [3], [12], [2]]
    assert not scheduler.has_work


@given(prompt_len=st.integers(1, 200), num_blocks=st.integers(1, 40), num_sequences=st.integers(1, 6), size=st.just(16))
def test_the_front_promises_what_the_engine_takes(
    prompt_len: int, num_blocks: int, num_sequences: int, size: int
) -> None:
    """
    The longest answer that the front lets through fits by the engine's own count, and one token more does not.

    Inverse: counting tokens instead of blocks (capacity - prompt over n) turns it red.
    """
    longest = longest_answer(prompt_len, num_blocks, num_sequences=num_sequences, block_size=size)

    if longest:
        assert blocks_held(prompt_len, longest, num_sequences=num_sequences, block_size=size) <= num_blocks
    assert blocks_held(prompt_len, longest + 1, num_sequences=num_sequences, block_size=size) > num_blocks
