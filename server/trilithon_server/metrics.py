"""
What `/metrics` shows. Names start with `trilithon_`, units are base units, every label is bounded.

Requests are counted where they end (`Metrics.request_ended`); engines are read at the moment of a scrape, from the
statistics that came with their last step, so a step costs two histogram observations and nothing else.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from trilithon_server.engine import wire_pb2 as wire
from trilithon_server.engine_client import EngineClient

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


@dataclass(slots=True)
class RequestRecord:
    """What is counted of one request; times in seconds, None where that moment never came."""

    route: str
    model: str
    code: str = "ok"
    finish_reason: str = ""
    duration_s: float = 0.0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    queue_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None
    first_token_s: float | None = None


class Metrics:
    """
    All metrics of one server process, in a registry of their own.

    Args:
        version: for `trilithon_build_info`.
    """

    def __init__(self, *, version: str = "") -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._collectors: dict[str, _EngineCollector] = {}  # by engine name
        r = self.registry
        self._requests = Counter(
            "trilithon_requests", "Requests by how they ended.", ["model", "route", "finish_reason", "code"], registry=r
        )
        self._duration = _histogram("request_duration_seconds", "From arrival to the end.", _SECONDS, r)
        self._first_token = _histogram("time_to_first_token_seconds", "From arrival to the first token.", _SECONDS, r)
        self._inter_token = _InterToken()
        r.register(self._inter_token)
        self._per_token = _histogram(
            "time_per_output_token_seconds", "Mean time per token after the first, per request.", _STEP_SECONDS, r
        )
        self._queue = _histogram("queue_seconds", "From arrival to the first step.", _SECONDS, r)
        self._prefill = _histogram("prefill_seconds", "From the first step to the end of the prompt.", _SECONDS, r)
        self._decode = _histogram("decode_seconds", "From the first token to the last.", _SECONDS, r)
        self._prompt_size = _histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS, r)
        self._answer_size = _histogram("request_generated_tokens", "Generated tokens of a request.", _TOKENS, r)
        self._prompt_tokens = Counter("trilithon_prompt_tokens", "Prompt tokens.", ["model"], registry=r)
        self._generated = Counter("trilithon_generated_tokens", "Generated tokens.", ["model"], registry=r)
        self._aborts = Counter(
            "trilithon_aborts", "Requests ended before their time.", ["model", "cause", "phase"], registry=r
        )
        self._rejected = Counter("trilithon_rejected", "Requests refused before any work.", ["reason"], registry=r)
        self.constraint_compile = Histogram(
            "trilithon_constraint_compile_seconds", "Time to compile a constraint.", buckets=_SECONDS, registry=r
        )
        self.constraint_failures = Counter(
            "trilithon_constraint_failures", "Constraints that did not compile or ended.", ["reason"], registry=r
        )
        self._step_seconds = Histogram(
            "trilithon_step_seconds", "Time of one step.", ["model", "phase"], buckets=_STEP_SECONDS, registry=r
        )
        self._step_host = _histogram(
            "step_host_seconds", "The part of a step spent outside the model.", _STEP_SECONDS, r
        )
        self._step_tokens = _histogram("step_tokens", "Tokens of one step.", _BATCH, r)
        Gauge("trilithon_build_info", "Version of the server.", ["version"], registry=r).labels(version).set(1)

    def watch_engine(self, model: str, engine: EngineClient, *, block_size: int = 16) -> None:
        """Show an engine's state and statistics, and observe each of its steps."""
        collector = _EngineCollector(model, engine)
        self.registry.register(collector)
        self._collectors[engine.name] = collector
        seconds = {phase: self._step_seconds.labels(model, phase) for phase in ("prefill", "decode", "mixed")}
        host, tokens = self._step_host.labels(model), self._step_tokens.labels(model)

        def on_step(step: wire.StepResult) -> None:
            stats = step.stats
            if stats.step_tokens == 0:
                return
            phase = (
                "decode" if stats.step_decodes == stats.step_tokens else "mixed" if stats.step_decodes else "prefill"
            )
            seconds[phase].observe(stats.step_seconds)
            host.observe(stats.step_host_seconds)
            tokens.observe(stats.step_tokens)

        engine.step_listeners.append(on_step)

    def forget_engine(self, engine: EngineClient) -> None:
        """An engine is gone for good; what its requests were counted under stays."""
        self.registry.unregister(self._collectors.pop(engine.name))

    def inter_token(self, model: str) -> Intervals:
        """Where the time between two events of a sequence goes; looked up once per request, not per token."""
        return self._inter_token.of(model)

    def request_ended(self, record: RequestRecord) -> None:
        """Count one request at its end."""
        model = record.model
        self._requests.labels(model, record.route, record.finish_reason, record.code).inc()
        self._duration.labels(model).observe(record.duration_s)
        if not model:
            return
        if record.prompt_tokens:
            self._prompt_tokens.labels(model).inc(record.prompt_tokens)
            self._prompt_size.labels(model).observe(record.prompt_tokens)
        if record.generated_tokens:
            self._generated.labels(model).inc(record.generated_tokens)
            self._answer_size.labels(model).observe(record.generated_tokens)
        for histogram, value in (
            (self._queue, record.queue_s),
            (self._prefill, record.prefill_s),
            (self._decode, record.decode_s),
            (self._first_token, record.first_token_s),
        ):
            if value is not None:
                histogram.labels(model).observe(value)
        if record.decode_s is not None and record.generated_tokens > 1:
            self._per_token.labels(model).observe(record.decode_s / (record.generated_tokens - 1))

    def aborted(self, model: str, cause: str, phase: str) -> None:
        """Count an abort: why, and whether the request was queued, in prefill or in decode."""
        self._aborts.labels(model, cause, phase).inc()

    def rejected(self, reason: str) -> None:
        """Count a request that a limit refused."""
        self._rejected.labels(reason).inc()

    def render(self) -> bytes:
        """The Prometheus text."""
        return generate_latest(self.registry)


def _histogram(name: str, text: str, buckets: Iterable[float], registry: CollectorRegistry) -> Histogram:
    return Histogram(f"trilithon_{name}", text, ["model"], buckets=tuple(buckets), registry=registry)


class Intervals:
    """A histogram that costs a tenth of the library's to observe: it is used for every token."""

    __slots__ = ("counts", "total_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(_STEP_SECONDS) + 1)
        self.total_s = 0.0

    def observe(self, seconds: float) -> None:
        """Count one interval."""
        self.counts[bisect_left(_STEP_SECONDS, seconds)] += 1
        self.total_s += seconds


class _InterToken(Collector):
    def __init__(self) -> None:
        self._by_model: dict[str, Intervals] = {}

    def of(self, model: str) -> Intervals:
        return self._by_model.setdefault(model, Intervals())

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(
            "trilithon_inter_token_seconds", "Between two events of one sequence.", labels=["model"]
        )
        bounds = [*map(str, _STEP_SECONDS), "+Inf"]
        for model, intervals in self._by_model.items():
            buckets = list(zip(bounds, map(float, accumulate(intervals.counts)), strict=True))
            family.add_metric([model], buckets, sum_value=intervals.total_s)
        yield family


class _EngineCollector(Collector):
    """Reads one engine at each scrape."""

    def __init__(self, model: str, engine: EngineClient) -> None:
        self._model = model
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine, stats, hello = self._engine, self._engine.stats or wire.Stats(), self._engine.hello or wire.Hello()
        yield self._gauge("requests_running", "Requests that the engine works on.", stats.running)
        yield self._gauge("requests_waiting", "Requests waiting for the engine.", engine.queued_requests)
        yield self._gauge("queue_tokens", "Prompt tokens of the requests that wait.", engine.queued_tokens)
        blocks = GaugeMetricFamily("trilithon_kv_blocks", "Cache blocks by state.", labels=["model", "state"])
        counts = {"free": stats.blocks_free, "cached": stats.blocks_cached, "in_use": stats.blocks_in_use}
        for state, count in counts.items():
            blocks.add_metric([self._model, state], count)
        yield blocks
        total = sum(counts.values())
        yield self._gauge("kv_usage_ratio", "Share of cache blocks in use.", counts["in_use"] / total if total else 0.0)
        yield self._counter(
            "prefix_cache_queried_tokens", "Prompt tokens looked up in the prefix cache.", stats.prefix_queried_tokens
        )
        yield self._counter("prefix_cache_hit_tokens", "Prompt tokens found there.", stats.prefix_hit_tokens)
        yield self._counter("preemptions", "Requests put back for lack of memory.", stats.preemptions)
        yield self._gauge("pipeline_bubble_ratio", "Share of stage time spent waiting.", stats.pipeline_bubble_ratio)
        yield self._gauge("adapters_loaded", "Adapters that are loaded.", stats.adapters_loaded)
        loads = CounterMetricFamily("trilithon_adapter_loads", "Loads of adapters.", labels=["model", "result"])
        loads.add_metric([self._model, "ok"], stats.adapter_loads)
        loads.add_metric([self._model, "failed"], stats.adapter_load_failures)
        yield loads
        up = GaugeMetricFamily("trilithon_rank_up", "Whether a rank answers.", labels=["model", "rank", "tp", "pp"])
        alive = 1.0 if engine.state in ("ready", "draining") else 0.0
        for rank in range(hello.tp * hello.pp):
            up.add_metric([self._model, str(rank), str(rank % hello.tp), str(rank // hello.tp)], alive)
        yield up
        restarts = CounterMetricFamily(
            "trilithon_engine_restarts", "Engine losses by cause.", labels=["model", "cause"]
        )
        for cause, count in engine.losses.items():
            restarts.add_metric([self._model, cause], count)
        yield restarts
        startup = GaugeMetricFamily("trilithon_startup_seconds", "Start-up time by phase.", labels=["model", "phase"])
        for phase, seconds in hello.startup_seconds.items():
            startup.add_metric([self._model, phase], seconds)
        yield startup
        config = GaugeMetricFamily(
            "trilithon_cache_config_info",
            "Settings of the cache.",
            labels=["model", "block_size", "capacity_tokens", "dtype"],
        )
        config.add_metric([self._model, str(hello.block_size), str(hello.kv_capacity_tokens), hello.dtype], 1)
        yield config

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"trilithon_{name}", text, labels=["model"])
        family.add_metric([self._model], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"trilithon_{name}", text, labels=["model"])
        family.add_metric([self._model], value)
        return family
