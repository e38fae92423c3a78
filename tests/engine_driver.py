"""Drives an engine through the messages that the front sends, and collects its answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from trilithon_server.engine.request import answers_told
from trilithon_server.engine.wire_pb2 import Abort, Sampling, SequenceDelta, Stats, StepResult, Submit, ToEngine


def make_sampling(**changes: Any) -> Sampling:
    """Greedy, 12 tokens, everything else off."""
    values: dict[str, Any] = {
        "num_sequences": 1,
        "top_p": 1.0,
        "typical_p": 1.0,
        "top_p_decay": 1.0,
        "repetition_penalty": 1.0,
        "max_tokens": 12,
        "logprobs": 0,
        "prompt_logprobs": -1,
    }
    return Sampling(**(values | changes))


@dataclass
class Answer:
    """One answer as it came, delta by delta."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    deltas: list[SequenceDelta] = field(default_factory=list)

    @property
    def last(self) -> SequenceDelta:
        return self.deltas[-1]

    @property
    def prompt_logprobs(self) -> list[float]:
        return [token.logprob for delta in self.deltas for token in delta.prompt_tokens]

    @property
    def cached_tokens(self) -> int:
        return next(delta.started.cached_tokens for delta in self.deltas if delta.HasField("started"))


class Engine(Protocol):
    def send(self, message: ToEngine) -> None: ...
    def steps(self, *, timeout_s: float = ...) -> Iterator[StepResult]: ...


class Driver:
    """Submits requests and collects answers by (handle, index)."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.answers: dict[tuple[int, int], Answer] = {}
        self.stats = Stats()
        self.num_steps = 0
        self._handle = 0
        self._open: set[tuple[int, int]] = set()

    def submit(self, prompt: Sequence[int], *, sampling: dict[str, Any] | None = None, **fields: Any) -> int:
        self._handle += 1
        chosen = make_sampling(**(sampling or {}))
        message = Submit(handle=self._handle, prompt=prompt, **fields)
        if not message.HasField("pooling"):
            message.sampling.CopyFrom(chosen)
        for index in range(answers_told(message)):
            self._open.add((self._handle, index))
            self.answers[self._handle, index] = Answer()
        self.engine.send(ToEngine(submit=message))
        return self._handle

    def abort(self, handle: int, *, index: int = -1, cause: str = "cancelled") -> None:
        self.engine.send(ToEngine(abort=Abort(handle=handle, index=index, cause=cause)))

    def run(self, *, until: Callable[[], bool] | None = None) -> None:
        """Take results until every answer has finished, or until `until` holds."""
        if until is not None and until():
            return
        for step in self.engine.steps(timeout_s=60.0):
            self.stats = step.stats
            self.num_steps += 1
            for delta in step.deltas:
                key = (delta.handle, delta.index)
                answer = self.answers[key]
                answer.deltas.append(delta)
                answer.tokens += [token.id for token in delta.tokens]
                answer.logprobs += [token.logprob for token in delta.tokens]
                if delta.finish:
                    self._open.discard(key)
            if not self._open or (until is not None and until()):
                return

    def answer(self, prompt: Sequence[int], *, sampling: dict[str, Any] | None = None, **fields: Any) -> Answer:
        """Submit one request alone and wait for its first answer."""
        handle = self.submit(prompt, sampling=sampling, **fields)
        self.run()
        return self.answers[handle, 0]
