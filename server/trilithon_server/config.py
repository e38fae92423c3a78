"""
Every setting of the server: one frozen tree that flags, environment names, config files and help are made from.

    ServeConfig
      engines[]   what is served, and on which ranks        engines.0.tp        TRILITHON_ENGINES__0__TP
      server      listeners, keys, TLS, drain, logs         server.http_port    TRILITHON_SERVER__HTTP_PORT
      limits      what one request or client may ask        limits.max_n        TRILITHON_LIMITS__MAX_N
      telemetry   traces                                    telemetry.otlp_endpoint
      jobs        the store of finetuning jobs              jobs.store

`config_sources.load` reads the sources and keeps the origin of every value; nothing else in the server reads the
environment. A key unknown to the tree is an error. Two further environment names stand outside the tree:
`TRILITHON_HOME` (the model store) and `TRILITHON_API_KEYS` (keys as in the keys file, one a line or separated by
commas), which is never written to disk or shown.
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from trilithon_server.config_values import Dtype, Paths, Port, Seconds, Size, StringList


class _Node(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class EngineConfig(_Node):
    """One engine: a model directory on tp x pp ranks. `None` is filled by `config_sources.resolve`."""

    name: str = Field(
        default="main",
        pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$",
        description="name of the engine in logs, metrics and files",
    )
    model: str = Field(min_length=1, description="model directory, or a name in the model store")
    served_name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9._:/@-]{1,128}$",
        description="name that clients use; unset: the directory's name",
    )
    tp: int = Field(default=1, ge=1, le=64, description="tensor-parallel ranks")
    pp: int = Field(default=1, ge=1, le=64, description="pipeline stages")
    dtype: Dtype = Field(
        default="auto", description="number format of the model: auto, fp32, bf16, fp16; auto follows the processor"
    )
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda)$", description="cpu or cuda")
    backend: Literal["auto", "torch", "te"] = Field(
        default="auto", description="products and norms: torch, te (Transformer Engine) or auto"
    )
    quantization: str = Field(default="none", description="none; this version serves unquantised weights only")
    max_context: Size | None = Field(
        default=None, ge=1, description="tokens of prompt and answer together; unset: the model's own window"
    )
    kv_cache_bytes: Size | None = Field(
        default=None,
        ge=1,
        description="key/value cache of one rank; unset: from memory_fraction, on cpu for 65536 tokens",
    )
    memory_fraction: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of the memory that weights leave for the cache; unset: 0.5 on cpu, 0.9 on cuda",
    )
    max_batch_tokens: Size | None = Field(
        default=None, ge=16, le=1 << 20, description="tokens of one step; unset: 256 on cpu, 2048 on cuda"
    )
    max_batch_sequences: int | None = Field(
        default=None, ge=1, le=4096, description="sequences of one step; unset: 64 on cpu, 256 on cuda"
    )
    adapters: Paths = Field(
        default={}, description="adapters that are served by name, each a PEFT directory: NAME=PATH, repeated"
    )
    max_adapters: int = Field(
        default=8, ge=0, le=256, description="adapters that are loaded at once; 0: none is served"
    )
    max_adapter_rank: int = Field(default=64, ge=1, le=256, description="largest rank of an adapter")
    prefix_cache: bool = Field(default=True, description="reuse the cache of shared prompt beginnings")
    batch_invariant: bool | None = Field(
        default=None,
        description="the same bits in any batch and layout; unset: on where it is nearly free (cpu with a C compiler)",
    )
    num_threads: int | None = Field(
        default=None, ge=1, le=1024, description="processor threads of one rank; unset: the cores shared out"
    )
    chat_template: str | None = Field(
        default=None, description="file of a chat template that replaces the model directory's"
    )

    @field_validator("quantization")
    @classmethod
    def _quantization(cls, value: str) -> str:
        if value != "none":
            raise ValueError("must be none: this version serves unquantised weights only")
        return value

    @property
    def num_ranks(self) -> int:
        """Processes of this engine."""
        return self.tp * self.pp


class ServerConfig(_Node):
    """Listeners and the life of the server."""

    host: str = Field(default="127.0.0.1", min_length=1, description="address of both listeners")
    http_port: Port = Field(default=8000, description="HTTP port; 0 takes a free one")
    grpc_port: Port = Field(default=8001, description="gRPC port; 0 takes a free one")
    metrics_port: Port | None = Field(
        default=None, description="own listener for /metrics, without a key; unset: /metrics on the HTTP port"
    )
    uds: str | None = Field(default=None, description="also serve HTTP on this Unix socket")
    api_keys_file: str | None = Field(default=None, description="file of API keys, readable by its owner alone")
    insecure: bool = Field(default=False, description="allow an address other than loopback without keys")
    tls_cert: str | None = Field(default=None, description="certificate chain, PEM; reloaded when it changes")
    tls_key: str | None = Field(default=None, description="private key, PEM")
    tls_client_ca: str | None = Field(
        default=None, description="authority that must have signed the clients' certificates, PEM"
    )
    public_ui: bool = Field(default=False, description="playground, docs page and OpenAPI document without a key")
    allow_origin: StringList = Field(default=(), description="origins that browsers may call from, separated by commas")
    reflection: bool = Field(default=True, description="gRPC reflection")
    drain_seconds: Seconds = Field(
        default=30.0, ge=0, le=3600, description="how long in-flight work may go on after SIGTERM"
    )
    on_rank_loss: Literal["restart", "exit"] = Field(
        default="restart", description="what follows the loss of a rank: restart or exit (code 6)"
    )
    catalog: str | None = Field(
        default=None, min_length=1, description="directory of the finetuned models that are served beside the engines"
    )
    store: str | None = Field(
        default=None,
        min_length=1,
        description="directory of what clients keep: actors, knowledge bases, indexes; unset: nothing is kept",
    )
    concepts: str | None = Field(
        default=None,
        min_length=1,
        description="facts for stories: a .tsv file, or a folder of them and of synsets (.jsonl); unset: none",
    )
    max_hosted_models: int = Field(
        default=4, ge=1, le=64, description="finetuned models that run at once beside the engines, started on demand"
    )
    hosted_memory_fraction: float = Field(
        default=0.1, gt=0, le=1, description="share of the memory left that the cache of one such model may take"
    )
    startup_seconds: Seconds = Field(
        default=600.0, gt=0, le=86400, description="how long an engine may take to be ready"
    )
    log_format: Literal["auto", "json", "text"] = Field(
        default="auto", description="json lines, text, or auto: text on a terminal"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="lowest level that is logged"
    )


class LimitsConfig(_Node):
    """What is checked before any work is done for a request."""

    max_body_bytes: Size = Field(default=2 << 20, ge=1024, description="request body")
    max_headers: int = Field(default=64, ge=8, description="headers of one request")
    max_header_bytes: Size = Field(default=16 << 10, ge=1024, description="headers of one request, together")
    max_metadata_bytes: Size = Field(default=8 << 10, ge=1024, description="gRPC metadata of one call")
    max_connections: int = Field(default=1024, ge=1, description="connections at once")
    max_streams_per_connection: int = Field(default=100, ge=1, description="gRPC calls at once on one connection")
    body_timeout_s: Seconds = Field(default=30.0, gt=0, description="time to read a request body")
    max_prompts: int = Field(default=64, ge=1, description="prompts of one completion request")
    max_messages: int = Field(default=1024, ge=1, description="messages of one chat")
    max_message_bytes: Size = Field(default=1 << 20, ge=1, description="one chat message")
    max_prompt_chars_per_token: int = Field(
        default=16, ge=1, description="prompt characters per token of context, checked before tokenising"
    )
    max_embedding_inputs: int = Field(default=256, ge=1, description="inputs of one embedding request")
    max_extract_texts: int = Field(default=64, ge=1, description="texts of one extraction request")
    max_extract_chars: Size = Field(
        default=262_144, ge=1, description="characters of one extraction request, checked before tokenising"
    )
    max_extract_windows: int = Field(
        default=256, ge=1, description="sequences that the texts of one extraction request may become"
    )
    max_extract_pairs: int = Field(default=200, ge=1, description="pairs of mentions of one request for relations")
    max_n: int = Field(default=16, ge=1, le=128, description="n and best_of")
    max_beam: int = Field(default=16, ge=1, le=64, description="beam_width")
    max_stop: int = Field(default=16, ge=0, description="stop strings")
    max_stop_bytes: Size = Field(default=256, ge=1, description="one stop string")
    max_stop_token_ids: int = Field(default=64, ge=0, description="stop_token_ids")
    max_bad_words: int = Field(default=256, ge=0, description="bad_words")
    max_bad_word_tokens: int = Field(default=64, ge=1, description="tokens of one bad word")
    max_logit_bias: int = Field(default=1024, ge=0, description="logit_bias entries")
    max_allowed_token_ids: int = Field(default=16384, ge=1, description="allowed_token_ids")
    max_logprobs: int = Field(default=20, ge=0, le=100, description="log-probabilities per position")
    max_logprob_token_ids: int = Field(default=64, ge=0, description="logprob_token_ids")
    default_max_tokens: int = Field(default=1024, ge=1, description="max_tokens when a request sets none")
    max_output_tokens: int | None = Field(default=None, ge=1, description="largest max_tokens; unset: the context")
    max_time_limit_ms: int = Field(
        default=600_000, ge=1, le=3_600_000, description="time_limit_ms, and its value when unset"
    )
    default_queue_timeout_ms: int = Field(
        default=60_000, ge=1, le=600_000, description="queue_timeout_ms when a request sets none"
    )
    max_constraint_bytes: Size = Field(default=64 << 10, ge=1, description="source of a constraint")
    constraint_compile_s: Seconds = Field(default=2.0, gt=0, le=60, description="time to compile a constraint")
    constraint_memory_bytes: Size = Field(default=64 << 20, ge=1 << 20, description="memory of a compiled constraint")
    max_queue_requests: int = Field(default=256, ge=1, description="requests that may wait for an engine")
    max_queue_tokens: Size = Field(default=262_144, ge=1, description="prompt tokens that may wait for an engine")
    max_requests_per_key: int = Field(default=64, ge=1, description="requests in flight of one key")
    requests_per_minute_per_key: int | None = Field(
        default=None, ge=1, description="request rate of one key; unset: off"
    )
    tokens_per_minute_per_key: int | None = Field(default=None, ge=1, description="token rate of one key; unset: off")
    max_stream_bytes: Size = Field(default=1 << 20, ge=1024, description="unread bytes of one stream; more are merged")
    max_stream_events: int = Field(default=1024, ge=1, description="unread events of one stream; more are merged")
    slow_reader_s: Seconds = Field(
        default=60.0, gt=0, description="time without a read after which a stream is aborted"
    )
    max_jobs_per_tenant: int = Field(default=100, ge=1, description="finetuning jobs of one tenant that are not over")
    max_file_bytes: Size = Field(default=512 << 20, ge=1, description="one uploaded file")
    max_files_bytes: Size = Field(default=10 << 30, ge=1, description="files of one tenant, together")
    max_files: int = Field(default=1000, ge=1, description="files of one tenant")
    max_event_streams: int = Field(default=256, ge=1, description="streams of job events at once")


class TelemetryConfig(_Node):
    """Traces. Prompts and answers are never recorded."""

    otlp_endpoint: str | None = Field(
        default=None, pattern=r"^https?://", description="OTLP collector over HTTP; unset: no traces"
    )
    service_name: str = Field(default="trilithon", min_length=1, description="service name in traces")
    sample_ratio: float = Field(default=1.0, ge=0, le=1, description="share of requests that are traced")


class JobsConfig(_Node):
    """Finetuning jobs on the same server."""

    store: str | None = Field(
        default=None, min_length=1, description="directory of finetuning jobs and files; unset: no jobs"
    )
    database: str | None = Field(
        default=None,
        pattern=r"^postgresql://([^:@/]+@)?[^@]*$",
        description="PostgreSQL instead of SQLite in the store: postgresql://USER@HOST/NAME; "
        "the password is read from the file that PGPASSFILE names",
    )
    slots: int = Field(default=1, ge=0, le=64, description="jobs that run here at once; 0: no worker on this machine")
    reserve_memory: Size | None = Field(
        default=None,
        ge=0,
        description="memory of this host that jobs leave to the server; unset: its weights, and caches of a set size",
    )
    reserve_cores: int = Field(
        default=0, ge=0, le=1024, description="cores of this host that jobs leave to the server; one rank always runs"
    )


class ServeConfig(_Node):
    """The whole configuration of one server."""

    engines: tuple[EngineConfig, ...] = Field(min_length=1, max_length=16)
    server: ServerConfig = ServerConfig()
    limits: LimitsConfig = LimitsConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    jobs: JobsConfig = JobsConfig()

    @model_validator(mode="after")
    def _cross_checks(self) -> ServeConfig:
        """Rules over several fields. Each message begins with the field that it blames."""
        broken: list[str] = []
        server = self.server
        for what in ("name", "served_name"):
            values = [getattr(engine, what) for engine in self.engines if getattr(engine, what) is not None]
            twice = sorted({value for value in values if values.count(value) > 1})
            broken += [f"engines {what} must differ between engines. Given: {value} twice." for value in twice]
        if (server.tls_cert is None) != (server.tls_key is None):
            missing = "server.tls_key" if server.tls_key is None else "server.tls_cert"
            broken.append(f"{missing} must be set when its pair is. Given: nothing. Set both tls_cert and tls_key.")
        if server.tls_client_ca is not None and server.tls_cert is None:
            broken.append("server.tls_client_ca needs tls_cert and tls_key. Given: neither. Set both.")
        ports = [port for port in (server.http_port, server.grpc_port, server.metrics_port) if port]
        if len(ports) != len(set(ports)):
            given = ", ".join(map(str, ports))
            broken.append(f"server.http_port, grpc_port and metrics_port must differ. Given: {given}.")
        if broken:
            raise ValueError("\n".join(broken))
        return self


def is_loopback(host: str) -> bool:
    """
    Whether only this machine can reach a listener bound to `host`.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def authority(host: str, port: int) -> str:
    """
    Host and port as addresses and URLs write them.

    >>> authority("127.0.0.1", 8000), authority("::1", 8001)
    ('127.0.0.1:8000', '[::1]:8001')
    """
    bare = host.strip("[]")
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


def environment_api_keys() -> str | None:
    """The value of `TRILITHON_API_KEYS`, or None. The caller must not store or log it."""
    return os.environ.get("TRILITHON_API_KEYS") or None


def environment_runtime_dir() -> str:
    """The user's own directory for sockets (`XDG_RUNTIME_DIR`), or an empty text."""
    return os.environ.get("XDG_RUNTIME_DIR", "")


def check_exposure(server: ServerConfig) -> str | None:
    """The reason why this address must not be bound (no key guards it), or None (bar S4)."""
    if is_loopback(server.host) or server.insecure or server.api_keys_file or environment_api_keys():
        return None
    return (
        f"server.host must be a loopback address when no API key is set. Given: {server.host}. "
        "Set --api-keys-file FILE, or --insecure to serve everyone."
    )


def write_config(config: ServeConfig, path: Path) -> None:
    """Write the tree for the front process, readable by its owner alone."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(config.model_dump_json())


def read_config(path: Path) -> ServeConfig:
    """Read what `write_config` wrote."""
    return ServeConfig.model_validate_json(path.read_bytes())


def config_schema() -> dict[str, Any]:
    """The JSON Schema of the tree, as `trilithon config schema` prints it."""
    return ServeConfig.model_json_schema()
