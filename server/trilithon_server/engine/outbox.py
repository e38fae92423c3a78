"""What goes back to the fronts: one StepResult a step and connection, built as things happen."""

from __future__ import annotations

from trilithon_server.engine.logprobs import TokenInfo
from trilithon_server.engine.request import Request, Sequence
from trilithon_server.engine.wire_pb2 import (
    AdapterEvent,
    Error,
    Finish,
    FromEngine,
    SequenceDelta,
    Stats,
    Token,
    TopToken,
)


class Outbox:
    """Deltas by connection, request and answer; several events of one answer in one step share a delta."""

    def __init__(self) -> None:
        self._results: dict[int, FromEngine] = {}
        self._deltas: dict[int, SequenceDelta] = {}  # by sequence id
        self.adapters: list[AdapterEvent] = []  # for every front

    def delta(self, sequence: Sequence) -> SequenceDelta:
        """The delta of an answer in the step that is being put together."""
        delta = self._deltas.get(sequence.id)
        if delta is None:
            request = sequence.request
            result = self._results.get(request.connection)
            if result is None:
                result = self._results[request.connection] = FromEngine()
            delta = result.step.deltas.add(handle=request.submit.handle, index=sequence.index)
            self._deltas[sequence.id] = delta
        return delta

    def refuse(self, connection: int, handle: int, error: Error, *, num_sequences: int) -> None:
        """End a request that never became one."""
        result = self._results.setdefault(connection, FromEngine())
        for index in range(num_sequences):
            result.step.deltas.add(handle=handle, index=index, finish=Finish.ERROR, error=error)

    def token(self, sequence: Sequence, token: int, info: TokenInfo | None) -> None:
        """A new token."""
        tokens = self.delta(sequence).tokens
        if info is None:
            tokens.add(id=token)
        else:
            tokens.append(wire_token(info))

    def finish(
        self,
        sequence: Sequence,
        finish: Finish.ValueType,
        *,
        now_s: float,
        matched: int = 0,
        complete: bool = False,
        error: Error | None = None,
    ) -> None:
        """The end of an answer."""
        delta = self.delta(sequence)
        delta.finish = finish
        delta.matched_token_id = matched
        delta.constraint_complete = complete
        if error is not None:
            delta.error.CopyFrom(error)
        request = sequence.request
        started_s = now_s if request.started_s is None else request.started_s
        first_s = now_s if request.first_token_s is None else request.first_token_s
        timings = delta.timings
        timings.queue_ms = (started_s - request.arrival_s) * 1e3
        timings.prefill_ms = (first_s - started_s) * 1e3
        timings.decode_ms = (now_s - first_s) * 1e3
        timings.preemptions = request.preemptions

    def started(self, request: Request, *, now_s: float) -> None:
        """A request has entered its first step."""
        started = self.delta(request.live[0]).started
        started.cached_tokens = request.num_cached
        started.queue_ms = (now_s - request.arrival_s) * 1e3

    def drop(self, connection: int) -> None:
        """Nobody reads this connection any more."""
        self._results.pop(connection, None)

    def take(self, *, step: int, stats: Stats, connections: list[int], everyone: bool) -> dict[int, bytes]:
        """The messages of this step by connection, serialised; with `everyone` also to who has no delta."""
        messages = {}
        for connection in connections:
            result = self._results.get(connection)
            if result is None:
                if not (everyone or self.adapters):
                    continue
                result = FromEngine()
            result.step.step = step
            result.step.adapters.extend(self.adapters)
            result.step.stats.CopyFrom(stats)
            messages[connection] = result.SerializeToString()
        self._results.clear()
        self._deltas.clear()
        self.adapters = []
        return messages

    @property
    def is_empty(self) -> bool:
        """Whether nothing has happened since the last `take`."""
        return not self._results and not self.adapters


def wire_token(info: TokenInfo) -> Token:
    """A token with its log-probabilities as the front reads it."""
    top = [TopToken(id=token, logprob=logprob, rank=rank) for token, logprob, rank in info.top]
    return Token(id=info.id, logprob=info.logprob, rank=info.rank, top=top)
