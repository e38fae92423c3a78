"""An engine of one rank inside the calling process: the same core and runner, no socket. `LocalEngine`'s interface."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import TracebackType

from trilithon_parallel.grid import Grid
from trilithon_server.engine import startup
from trilithon_server.engine.spec import EngineSpec
from trilithon_server.engine.wire_pb2 import Control, FromEngine, Hello, StepResult, ToEngine

_CONNECTION = 0
_COMPILE_POLL_S = 0.001


class InProcessEngine:
    """
    One rank, stepped by whoever iterates `steps`.

    Args:
        spec: with `tp` and `pp` 1.
        check_blocks: verify the conservation law after every step (tests).
    Raises:
        ModelError: the model can't be served, or the memory does not suffice.
    """

    def __init__(self, spec: EngineSpec, *, check_blocks: bool = False) -> None:
        if spec.world_size != 1:
            raise ValueError(f"an in-process engine has one rank. Given: tp {spec.tp} x pp {spec.pp}.")
        self.spec = spec
        self.loaded = startup.load(spec, Grid.single(spec.device), on_phase=lambda _name, _seconds: None)
        self.core = self.loaded.core(check_blocks=check_blocks)
        self.hello: Hello = self.loaded.hello()
        self._step = 0

    def send(self, message: ToEngine) -> None:
        """What `LocalEngine.send` does, taken in at once."""
        now_s = time.monotonic()
        kind = message.WhichOneof("kind")
        if kind == "submit":
            self.core.submit(_CONNECTION, message.submit, now_s)
        elif kind == "abort":
            abort = message.abort
            self.core.abort(_CONNECTION, abort.handle, abort.index, abort.cause, now_s)
        elif kind == "adapter":
            self.core.adapters.control(message.adapter)
        elif message.control.kind == Control.RESET_PREFIX_CACHE:
            self.core.scheduler.reset_prefix_cache()
        elif message.control.kind == Control.DRAIN:
            self.core.draining = True
        else:
            self.core.shut_down(now_s)

    def steps(self, *, timeout_s: float = 120.0) -> Iterator[StepResult]:
        """Step as long as there is work; yields each step's result, and what refusals and aborts have left."""
        while True:
            self.core.expire(time.monotonic())
            plan = self.core.plan(time.monotonic()) or self.core.errand()
            stats = None
            if plan is not None:
                output = self.loaded.runner.execute(plan)
                assert output is not None
                stats = self.core.land(output, time.monotonic())
                self._step += stats is not None
            if stats is not None or not self.core.outbox.is_empty:
                messages = self.core.outbox.take(
                    step=self._step,
                    stats=stats or self.core.stats(),
                    connections=[_CONNECTION],
                    everyone=stats is not None,
                )
                yield FromEngine.FromString(messages[_CONNECTION]).step
            elif not self.core.has_work:
                self.core.verify_idle()
                return
            else:
                time.sleep(_COMPILE_POLL_S)  # a constraint is being compiled, or an adapter read

    def close(self) -> None:
        """Nothing outlives the object."""

    def __enter__(self) -> InProcessEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
