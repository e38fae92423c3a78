"""
Engines that the front asks for while the server runs: started, watched and restarted beside the configured ones.

    front --status pipe--> {"event": "engine_start", "name", "spec"} | {"event": "engine_stop", "name"}
    front <--control pipe- {"event": "engine", "name", "state": loading, ready, lost, failed or stopped, "cause" ...}

They never end the server: one that cannot start, or has been lost too often, is `failed` and its slot is free again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from trilithon_server.engine.group import EXIT_INVALID, EngineGroup, Loss
from trilithon_server.engine.restarts import Restarts
from trilithon_server.engine.spec import EngineSpec

GRACE_S = 3.0  # for ranks to end by themselves

_log = logging.getLogger(__name__)


class Tell(Protocol):
    """Tells the front of an engine's state."""

    def __call__(self, name: str, state: str, *, kind: str = "", cause: str = "", rank: int = -1) -> None: ...


class _Engine:
    def __init__(self, group: EngineGroup) -> None:
        self.group = group
        self.restarts = Restarts()
        self.restart_at: float | None = None
        self.stop_by: float | None = None


class HostedEngines:
    """
    Args:
        make_group: ranks for a spec; not started.
        tell: to the front.
        may_restart: whether a lost engine is started again at all, asked when one is lost.
        refusal: why none can be started here; empty where they can.
    """

    def __init__(
        self,
        *,
        make_group: Callable[[EngineSpec], EngineGroup],
        tell: Tell,
        may_restart: Callable[[], bool],
        refusal: str = "",
    ) -> None:
        self._make_group = make_group
        self._tell = tell
        self._may_restart = may_restart
        self._refusal = refusal
        self._engines: dict[str, _Engine] = {}

    def on_event(self, event: dict[str, Any]) -> None:
        """What the front asks for: `engine_start` or `engine_stop`."""
        name = str(event.get("name", ""))
        if event["event"] == "engine_stop":
            self._begin_stop(name)
            return
        try:
            self._start(name, event["spec"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            _log.error("engine_not_started", extra={"engine": name, "cause": str(error)})
            self._tell(name, "failed", kind="refused", cause=str(error))

    def _start(self, name: str, spec_json: str) -> None:
        if self._refusal:
            raise ValueError(self._refusal)
        spec = EngineSpec.from_json(spec_json)
        if spec.name != name or name in self._engines:
            raise ValueError(f"an engine {name!r} cannot be started: its name is taken, or not its spec's.")
        group = self._make_group(spec)
        group.start()
        self._engines[name] = _Engine(group)
        self._tell(name, "loading")

    def check(self) -> None:
        """Look at every engine once."""
        now = time.monotonic()
        for name, engine in list(self._engines.items()):
            if engine.stop_by is not None:
                if not engine.group.running or now >= engine.stop_by:
                    self._remove(name, "stopped")
            elif engine.restart_at is not None:
                if now >= engine.restart_at:
                    engine.restart_at = None
                    engine.group.start()
                    self._tell(name, "loading")
            else:
                loss = engine.group.check()
                if loss is not None:
                    self._on_loss(name, engine, loss)
                elif engine.group.take_peer_lost():
                    self._tell(name, "lost", kind="exited", cause="a rank lost its peer")

    def stalled(self, name: str, seconds: float) -> None:
        """The front says that work is queued and no step ends."""
        engine = self._engines.get(name)
        if engine is not None and engine.stop_by is None and engine.group.state == "ready":
            self._on_loss(name, engine, engine.group.stalled(seconds))

    @property
    def groups(self) -> Iterator[EngineGroup]:
        """All of them, for who looks for a culprit."""
        return (engine.group for engine in self._engines.values())

    def kill(self) -> None:
        """End all at once: nobody is there to use them, or the server ends."""
        for engine in self._engines.values():
            engine.group.discard()
        self._engines.clear()

    def stop(self, *, grace_s: float) -> None:
        """End all, letting them finish what they are at."""
        for engine in self._engines.values():
            engine.group.begin_stop()
        end = time.monotonic() + grace_s
        for engine in self._engines.values():
            engine.group.wait(timeout_s=max(0.0, end - time.monotonic()))
        self.kill()

    def _begin_stop(self, name: str) -> None:
        engine = self._engines.get(name)
        if engine is None:
            self._tell(name, "stopped")
            return
        engine.group.begin_stop()
        engine.stop_by = time.monotonic() + GRACE_S

    def _remove(self, name: str, state: str, *, kind: str = "", cause: str = "", rank: int = -1) -> None:
        self._engines.pop(name).group.discard()
        self._tell(name, state, kind=kind, cause=cause, rank=rank)

    def _on_loss(self, name: str, engine: _Engine, loss: Loss) -> None:
        engine.group.log_loss(loss)
        if not self._may_restart() or loss.exit_code == EXIT_INVALID or not engine.restarts.left:
            reason = loss.message or loss.cause
            self._remove(name, "failed", kind=loss.kind, cause=reason, rank=loss.rank)
            return
        self._tell(name, "lost", kind=loss.kind, cause=loss.cause, rank=loss.rank)
        engine.group.kill()
        delay_s = engine.restarts.count()
        engine.restart_at = time.monotonic() + delay_s
        _log.warning("engine_restarts", extra={"engine": name, "in_s": delay_s, "left": engine.restarts.left})
