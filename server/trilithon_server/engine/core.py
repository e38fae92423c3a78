"""
The leader's mind: requests in, plans out, outputs in, results out. No sockets, no processes, no clock of its own.

    submit -> waiting -> schedule -> StepPlan ->(ranks)-> StepOutput -> tokens, finish reasons -> Outbox
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from trilithon_server.engine.adapters import AdapterSlots
from trilithon_server.engine.batch import Batch, Limits
from trilithon_server.engine.beam import EARLY, BeamSearch, Candidate, End, Hypothesis
from trilithon_server.engine.blocks import BlockPool
from trilithon_server.engine.constraints import CompileError, ConstraintCompiler, Matcher
from trilithon_server.engine.encoder_scheduler import EncoderScheduler
from trilithon_server.engine.intake import Facts, Refusal, check, output_bytes
from trilithon_server.engine.outbox import Outbox, wire_token
from trilithon_server.engine.pace import Pace
from trilithon_server.engine.plan import Encoding, Kind, Score, StepOutput, StepPlan
from trilithon_server.engine.prefix import reading_root, root_key
from trilithon_server.engine.request import Request, Sequence, answers_told
from trilithon_server.engine.sampler import DEAD_END, NUMERICAL_FAILURE, Draw, Drawn, Fork
from trilithon_server.engine.scheduler import Scheduler
from trilithon_server.engine.sources import reads_of, sources_of
from trilithon_server.engine.wire_pb2 import Error, Finish, Stats, Submit, Token

ADAPTER_LOAD_S = 60.0  # that a step may take longer in which ranks wait for each other's reading of an adapter

ABORT_FINISH: dict[str, Finish.ValueType] = {"deadline": Finish.TIME_LIMIT, "shutdown": Finish.SHUTDOWN}


@dataclass(slots=True, eq=False)
class _Flight:
    """A plan that has been handed out and not come back."""

    batch: Batch
    began_s: float
    host_s: float


@dataclass(slots=True, eq=False)
class _Extra:
    """What only the leader keeps of a request: its answers' matchers and beams, prompt scores so far, time limits."""

    matchers: dict[int, Matcher] = field(default_factory=dict)
    scores: list[Token] = field(default_factory=list)
    beam: BeamSearch | None = None
    candidates: dict[int, tuple[Candidate, ...]] = field(default_factory=dict)  # of beams that wait for the others
    gathered_at: int = 0  # preemptions of the request when they came; later ones make them void
    queue_end_s: float | None = None
    end_s: float | None = None


class EngineCore:
    """
    Args:
        facts: what the model and the cache allow.
        limits: budgets of a step.
        compiler: turns constraints into matchers, off the stepping thread.
        check_blocks: verify the conservation law after every step (tests); when idle it is verified always.
    """

    def __init__(
        self, facts: Facts, limits: Limits, *, compiler: ConstraintCompiler, check_blocks: bool = False
    ) -> None:
        self.facts = facts
        self.outbox = Outbox()
        self.pace = Pace(slots=limits.slots)
        self.scheduler: Scheduler | EncoderScheduler = (
            EncoderScheduler(limits) if facts.is_encoder else Scheduler(limits, BlockPool(facts.num_blocks))
        )
        self.adapters = AdapterSlots(facts.max_adapters)
        self.draining = False
        self._limits = limits
        self._compiler = compiler
        self._check_blocks = check_blocks
        self._requests: dict[tuple[int, int], Request] = {}  # by (connection, handle)
        self._extras: dict[int, _Extra] = {}  # by request id
        self._compiling: list[tuple[Request, ConstraintCompiler.Job]] = []
        self._flights: dict[int, _Flight] = {}
        self._forks: list[Fork] = []
        self._forgotten: list[int] = []
        self._next_plan = 0
        self._errand: int | None = None  # the number of a plan for adapters alone that is out
        self._next_request = 0
        self._next_sequence = 0
        self._checked_idle = True

    # Requests -------------------------------------------------------------------------------------------------

    def submit(self, connection: int, submit: Submit, now_s: float) -> None:
        """Take a request in, or refuse it with a typed error in the outbox."""
        num_sequences = max(1, submit.sampling.num_sequences)
        key = (connection, submit.handle)
        try:
            if self.draining:
                raise Refusal("engine_lost", "the engine is shutting down.")
            if self._num_waiting >= self.facts.max_queued_requests:
                raise Refusal("queue_full", f"the engine holds {self.facts.max_queued_requests} waiting requests.")
            check(submit, self.facts)
        except Refusal as refusal:
            error = Error(code=refusal.code, message=str(refusal))
            self.outbox.refuse(connection, submit.handle, error, num_sequences=answers_told(submit))
            return
        adapter_digest = submit.adapter.digest
        root = root_key(model_digest=self.facts.model_digest, adapter_digest=adapter_digest, salt=submit.cache_salt)
        sources = sources_of(submit, root, block_size=self.facts.block_size)
        root = reading_root(root, [(source.keys[0], source.bias) for source in sources])
        request = Request(self._next_request, connection, submit, now_s, root=root, sources=sources)
        request.output_bytes = output_bytes(submit, self.facts)
        prompt = list(submit.prompt)
        for index in range(num_sequences):
            request.sequences.append(Sequence(self._next_sequence + index, request, index, list(prompt)))
        self._next_request += 1
        self._next_sequence += num_sequences
        extra = self._extras[request.id] = _Extra()
        if request.is_beam:
            beam = submit.sampling.beam
            extra.beam = BeamSearch(
                num_sequences,
                num_answers=beam.num_answers,
                length_penalty=beam.length_penalty,
                early=EARLY[beam.early],
                max_new_tokens=request.max_new_tokens,
            )
        if submit.queue_timeout_ms:
            extra.queue_end_s = now_s + submit.queue_timeout_ms * 1e-3
        if submit.time_limit_ms:
            extra.end_s = now_s + submit.time_limit_ms * 1e-3
        self._requests[key] = request
        self._checked_idle = False
        if submit.sampling.HasField("constraint"):
            self._compiling.append((request, self._compiler.start(submit.sampling.constraint)))
        else:
            self._queue(request)

    def abort(self, connection: int, handle: int, index: int, cause: str, now_s: float) -> None:
        """End a request (index -1) or one of its answers; unknown ones have ended already."""
        request = self._requests.get((connection, handle))
        if request is None:
            return
        finish = ABORT_FINISH.get(cause, Finish.CANCELLED)
        if request.is_beam:  # its sequences are one search
            self._end(request, finish, now_s)
            return
        for sequence in request.live:
            if index in (-1, sequence.index):
                self._finish(sequence, finish, now_s=now_s)

    def disconnect(self, connection: int, now_s: float) -> None:
        """A front is gone: so are its requests."""
        for owner, handle in list(self._requests):
            if owner == connection:
                self.abort(owner, handle, -1, "disconnect", now_s)
        self.outbox.drop(connection)

    def shut_down(self, now_s: float) -> None:
        """End everything with SHUTDOWN and take nothing more."""
        self.draining = True
        for owner, handle in list(self._requests):
            self.abort(owner, handle, -1, "shutdown", now_s)

    def expire(self, now_s: float) -> None:
        """End what has waited or run too long; admit what has finished compiling."""
        for request in list(self._requests.values()):
            extra = self._extras[request.id]
            if extra.end_s is not None and now_s >= extra.end_s:
                self._end(request, Finish.TIME_LIMIT, now_s)
            elif extra.queue_end_s is not None and request.started_s is None and now_s >= extra.queue_end_s:
                waited_ms = round((now_s - request.arrival_s) * 1e3)
                self._fail(request, "queue_timeout", f"the request waited {waited_ms} ms without starting.", now_s)
        if self._compiling:
            self._admit_compiled(now_s)
        for request in self.adapters.admit():
            self.scheduler.add(request)
        self.outbox.adapters += self.adapters.events
        self.adapters.events.clear()

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished, any plan is out or any adapter on its way."""
        return bool(self._requests or self._flights or self.adapters.is_busy)

    @property
    def num_in_flight(self) -> int:
        """Plans that are out."""
        return len(self._flights)

    @property
    def max_in_flight(self) -> int:
        """Plans that may be out at once."""
        return self._limits.slots

    def on_compiled(self, wake_fd: int) -> None:
        """Have a byte written to this descriptor whenever a constraint is compiled."""
        self._compiler.wake(wake_fd)

    def _admit_compiled(self, now_s: float) -> None:
        still = []
        for request, job in self._compiling:
            if not request.live:
                continue
            if not job.done():
                still.append((request, job))
                continue
            try:
                matcher = job.result()
            except CompileError as error:
                self._fail(request, "invalid_constraint", str(error), now_s)
                continue
            matchers = self._extras[request.id].matchers
            for sequence in request.live:
                matchers[sequence.index] = matcher.copy()
            self._queue(request)
        self._compiling = still

    # Adapters -------------------------------------------------------------------------------------------------

    def _queue(self, request: Request) -> None:
        """To the scheduler, by way of the slots where it needs one."""
        if request.submit.HasField("adapter"):
            self.adapters.add(request)
        else:
            self.scheduler.add(request)

    @property
    def _num_waiting(self) -> int:
        return len(self._compiling) + len(self.adapters.waiting) + len(self.scheduler.waiting)

    # Plans ----------------------------------------------------------------------------------------------------

    def plan(self, now_s: float) -> StepPlan | None:
        """The next plan, or None when there is nothing to do before one comes back."""
        if len(self._flights) >= self._limits.slots:
            return None
        began_s = time.perf_counter()
        batch = self.scheduler.schedule(now_s)
        if batch is None:
            return None
        plan = StepPlan(self._next_plan)
        self._fill(plan, batch, now_s)
        self._next_plan += 1
        plan.deadline_s = self.pace.deadline_s(batch.num_tokens)
        self._command(plan)
        host_s = time.perf_counter() - began_s
        self._flights[plan.number] = _Flight(batch, began_s, host_s)
        return plan

    def signal(self, kind: Kind) -> StepPlan:
        """A plan without work: a sign of life, or the end."""
        plan = StepPlan(self._next_plan, kind, deadline_s=self.pace.deadline_s(0))
        self._tell_sampler(plan)
        if kind is Kind.TICK:
            self._command(plan)
        self._next_plan += 1
        return plan

    def errand(self) -> StepPlan | None:
        """A plan without work where ranks have adapters to load and no step is due; one at a time."""
        if not self.adapters.has_errand or self._flights or self._errand is not None:
            return None
        plan = self.signal(Kind.TICK)
        self._errand = plan.number
        return plan

    def _command(self, plan: StepPlan) -> None:
        plan.adapters = self.adapters.take_commands()
        if plan.adapters:
            plan.deadline_s += ADAPTER_LOAD_S

    def _fill(self, plan: StepPlan, batch: Batch, now_s: float) -> None:
        plan.copies = batch.copies
        for request in batch.started:
            self.outbox.started(request, now_s=now_s)
            if request.submit.HasField("sampling"):
                plan.registrations.append((request.sequences[0].id, request.submit))
        for entry, item in enumerate(batch.items):
            sequence = item.sequence
            request = sequence.request
            plan.tokens += sequence.tokens[item.start : item.start + item.length]
            plan.starts.append(item.start)
            plan.lengths.append(item.length)
            plan.tables.append(list(sequence.blocks))
            matchers = self._extras[request.id].matchers
            for drawer in item.draws:
                matcher = matchers.get(drawer.index)
                mask = None if matcher is None else matcher.mask(may_end=bool(request.end_ids))
                plan.draws.append(Draw(entry, drawer.id, mask))
            if item.score_to > item.score_from:
                plan.scores.append(Score(entry, sequence.id, item.score_from, item.score_to))
            if self.facts.is_encoder:
                plan.pools.append(request.submit.pooling)
            elif self.facts.is_seq2seq:
                plan.reads.append(reads_of(request))
        sources = [source for encode in batch.encodes for source in encode.sources]
        plan.encodings = [Encoding(source.tokens, source.blocks) for source in sources]
        plan.types, plan.positions = batch.types(), batch.positions()
        slots = [self.adapters.slot_of(item.sequence.request) for item in batch.items]
        plan.slots = slots if any(slot >= 0 for slot in slots) else []
        self._tell_sampler(plan)

    def _tell_sampler(self, plan: StepPlan) -> None:
        """Where beams went, and who has ended: together, since a beam that went on may have ended since."""
        plan.forks, self._forks = self._forks, []
        plan.forgotten, self._forgotten = self._forgotten, []

    # Outputs --------------------------------------------------------------------------------------------------

    def land(self, output: StepOutput, now_s: float) -> Stats | None:
        """A plan has come back: hand out its tokens. Returns the step's statistics; None for a sign of life."""
        for failure in self.adapters.land(output.adapters):
            for request in failure.requests:
                self._fail(request, failure.code, failure.message, now_s)
        if output.number == self._errand:
            self._errand = None
        flight = self._flights.pop(output.number, None)
        if flight is None:
            return None
        began_s = time.perf_counter()
        self.scheduler.complete(flight.batch)
        drawn, scores = iter(output.drawn), iter(output.scores)
        for entry, item in enumerate(flight.batch.items):
            request = item.sequence.request
            if item.score_to > item.score_from:
                infos = next(scores)
                if infos is None:
                    self._fail(request, "numerical_failure", "the model's logits are not finite.", now_s)
                else:
                    self._extras_scores(request, [wire_token(info) for info in infos])
            for sequence in item.draws:
                self._take(sequence, next(drawn), now_s)
            if self.facts.is_encoder:
                self._take_vector(item.sequence, output.vectors[entry], now_s)
            elif not item.draws and request.max_new_tokens == 0 and item.sequence.remaining == 0:
                self._deliver_scores(item.sequence)
                if not item.sequence.finished:
                    self._finish(item.sequence, Finish.MAX_TOKENS, now_s=now_s)
        if self._check_blocks:
            self.scheduler.check()
            self.adapters.check()
        ended_s = time.perf_counter()
        local = self._limits.slots == 1
        host_s = ended_s - flight.began_s - output.model_s if local else flight.host_s + ended_s - began_s
        self.pace.landed(flight.batch.num_tokens, seconds=ended_s - flight.began_s, busy_s=output.busy_s, now_s=ended_s)
        return self._stats(flight.batch, step_s=ended_s - flight.began_s, host_s=host_s)

    def verify_idle(self) -> None:
        """With no request left no block may be held. Cheap when called again without work between."""
        if self._checked_idle or self.has_work:
            return
        self._checked_idle = True
        self.scheduler.check()
        self.adapters.check()
        if self.scheduler.pool.num_in_use:
            raise RuntimeError(f"KV blocks leaked: {self.scheduler.pool.num_in_use} in use with no request left.")

    def _take(self, sequence: Sequence, drawn: Drawn, now_s: float) -> None:
        if sequence.finished:
            return
        request = sequence.request
        if drawn.token == NUMERICAL_FAILURE:
            self._fail(request, "numerical_failure", "the model's logits are not finite.", now_s)
            return
        if request.is_beam:
            self._gather(sequence, drawn, now_s)
            return
        if drawn.token == DEAD_END:
            message = "the constraint and the other masks of this request forbid every token."
            self._fail(request, "constraint_dead_end", message, now_s)
            return
        if request.first_token_s is None:
            request.first_token_s = now_s
        self._deliver_scores(sequence)
        sequence.tokens.append(drawn.token)
        self.outbox.token(sequence, drawn.token, drawn.info)
        self._finish_if_due(sequence, drawn.token, now_s)

    # Beam search ----------------------------------------------------------------------------------------------

    def _gather(self, sequence: Sequence, drawn: Drawn, now_s: float) -> None:
        """Keep a beam's candidates until the request's other beams have theirs, then go on with the best."""
        request = sequence.request
        extra = self._extras[request.id]
        assert extra.beam is not None
        if request.first_token_s is None:
            request.first_token_s = now_s
        self._deliver_scores(sequence)
        if extra.gathered_at != request.preemptions:  # those from before are computed again
            extra.candidates, extra.gathered_at = {}, request.preemptions
        extra.candidates[sequence.index] = drawn.candidates  # none where every token is forbidden
        if len(extra.candidates) < extra.beam.beams_used:
            return
        rows = [extra.candidates.get(index, ()) for index in range(extra.beam.width)]
        extra.candidates = {}
        taken: dict[tuple[int, int], Matcher] = {}
        moves = extra.beam.advance(rows, lambda beam, info: self._end_of(request, beam, info.id, taken))
        if not moves:
            self._conclude(request, extra.beam.answers(), now_s)
            return
        if extra.matchers:
            extra.matchers = {index: taken[move.parent, move.token].copy() for index, move in enumerate(moves)}
        ids = [one.id for one in request.sequences]
        self._forks += [Fork(ids[index], ids[move.parent], move.token) for index, move in enumerate(moves)]
        assert isinstance(self.scheduler, Scheduler)
        self.scheduler.move_beams(request, moves)

    def _end_of(self, request: Request, beam: int, token: int, taken: dict[tuple[int, int], Matcher]) -> End | None:
        """Whether a token ends a beam; where there is a constraint, `taken` gains the place after the token."""
        is_end, is_stop = token in request.end_ids, token in request.stop_ids
        matcher = self._extras[request.id].matchers.get(beam)
        if matcher is not None:
            matcher = taken[beam, token] = matcher.copy()
            matcher.accept(token)
        complete = matcher is not None and matcher.is_complete()
        if is_end or is_stop:
            return End(Finish.EOS_TOKEN if is_end else Finish.STOP_TOKEN, matched=token, complete=complete)
        if matcher is not None and matcher.is_exhausted():
            return End(Finish.CONSTRAINT_END, complete=complete)
        num_tokens = len(request.sequences[beam].tokens) + 1
        if num_tokens - request.num_prompt >= request.max_new_tokens:
            return End(Finish.MAX_TOKENS, complete=complete)
        return End(Finish.CONTEXT_LENGTH, complete=complete) if num_tokens >= self.facts.max_context else None

    def _conclude(self, request: Request, hypotheses: list[Hypothesis], now_s: float) -> None:
        """Tell the answers of a beam search, all at once, and end it."""
        if len(hypotheses) < request.num_answers:
            message = (
                f"the constraint and the other masks of this request leave {len(hypotheses)} answers. "
                f"Given: `n` {request.num_answers}."
            )
            self._fail(request, "constraint_dead_end", message, now_s)
            return
        for sequence, one in zip(request.sequences, hypotheses, strict=False):
            for info in one.path.tokens() if one.path is not None else ():
                self.outbox.token(sequence, info.id, info)
            end = one.end
            self._finish(sequence, end.finish, now_s=now_s, matched=end.matched, complete=end.complete)
        for sequence in request.live:  # beams that nobody is told of
            self._finish(sequence, Finish.CANCELLED, now_s=now_s)

    def _end(self, request: Request, finish: Finish.ValueType, now_s: float) -> None:
        """End all of a request; where its time is up, with what there is."""
        extra = self._extras[request.id]
        if extra.beam is not None and finish == Finish.TIME_LIMIT:
            self._conclude(request, extra.beam.interrupted(finish), now_s)
            return
        for sequence in request.live:
            self._finish(sequence, finish, now_s=now_s)

    # Ends -----------------------------------------------------------------------------------------------------

    def _finish_if_due(self, sequence: Sequence, token: int, now_s: float) -> None:
        request = sequence.request
        matcher = self._extras[request.id].matchers.get(sequence.index)
        is_end, is_stop = token in request.end_ids, token in request.stop_ids
        if matcher is not None and not matcher.accept(token) and not (is_end or is_stop):
            message = f"the constraint cannot go on: {matcher.error() or 'token refused'}."
            self._fail(request, "constraint_dead_end", message, now_s)
            return
        finish: Finish.ValueType | None = None
        if is_end:
            finish = Finish.EOS_TOKEN
        elif is_stop:
            finish = Finish.STOP_TOKEN
        elif matcher is not None and matcher.is_exhausted():
            finish = Finish.CONSTRAINT_END
        elif len(sequence.tokens) - request.num_prompt >= request.max_new_tokens:
            finish = Finish.MAX_TOKENS
        elif len(sequence.tokens) >= self.facts.max_context:
            finish = Finish.CONTEXT_LENGTH
        if finish is not None:
            matched = token if is_end or is_stop else 0
            complete = matcher is not None and matcher.is_complete()
            self._finish(sequence, finish, now_s=now_s, matched=matched, complete=complete)

    def _take_vector(self, sequence: Sequence, packed: bytes, now_s: float) -> None:
        if sequence.finished:
            return
        sequence.request.first_token_s = now_s
        values = np.frombuffer(packed, np.float32)
        if not np.isfinite(values).all():
            self._fail(sequence.request, "numerical_failure", "the model's output is not finite.", now_s)
            return
        if sequence.request.submit.pooling.task_logits:
            self.outbox.delta(sequence).task_logits = packed
        else:
            self.outbox.delta(sequence).embedding.extend(values.tolist())
        self._finish(sequence, Finish.EOS_TOKEN, now_s=now_s)

    def _extras_scores(self, request: Request, tokens: list[Token]) -> None:
        extra = self._extras.get(request.id)
        if extra is not None:
            extra.scores += tokens

    def _deliver_scores(self, sequence: Sequence) -> None:
        extra = self._extras.get(sequence.request.id)
        if extra is not None and extra.scores:
            self.outbox.delta(sequence).prompt_tokens.extend(extra.scores)
            extra.scores = []

    def _fail(self, request: Request, code: str, message: str, now_s: float) -> None:
        for sequence in request.live:
            self._finish(sequence, Finish.ERROR, now_s=now_s, error=Error(code=code, message=message))

    def _finish(
        self,
        sequence: Sequence,
        finish: Finish.ValueType,
        *,
        now_s: float,
        matched: int = 0,
        complete: bool = False,
        error: Error | None = None,
    ) -> None:
        request = sequence.request
        if sequence.index < request.num_answers:
            self.outbox.finish(sequence, finish, now_s=now_s, matched=matched, complete=complete, error=error)
        self.scheduler.finish(sequence)
        if request.started_s is not None:
            self._forgotten.append(sequence.id)
        if not request.live:
            self.adapters.release(request)
            del self._requests[request.connection, request.submit.handle]
            del self._extras[request.id]

    def stats(self) -> Stats:
        """Gauges and counters without a step."""
        return self._stats(None, step_s=0.0, host_s=0.0)

    def _stats(self, batch: Batch | None, *, step_s: float, host_s: float) -> Stats:
        scheduler, pool = self.scheduler, self.scheduler.pool
        waiting = self._num_waiting
        return Stats(
            running=len(scheduler.running),
            waiting=waiting,
            queue_tokens=sum(r.num_prompt + r.num_source_tokens for r in scheduler.waiting) if waiting else 0,
            blocks_free=pool.num_free,
            blocks_cached=pool.num_cached,
            blocks_in_use=pool.num_in_use,
            prefix_queried_tokens=scheduler.queried_tokens,
            prefix_hit_tokens=scheduler.hit_tokens,
            preemptions=scheduler.preemptions,
            step_seconds=step_s,
            step_host_seconds=host_s,
            step_tokens=batch.num_tokens if batch else 0,
            step_decodes=batch.num_decodes if batch else 0,
            pipeline_bubble_ratio=self.pace.bubble_ratio,
            adapters_loaded=self.adapters.num_loaded,
            adapter_loads=self.adapters.loads,
            adapter_load_failures=self.adapters.failures,
        )
