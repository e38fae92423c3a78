"""
What can be known to be wrong before any process starts: the model's name, its files, the layout, memory, the ports.
No torch.
"""

from __future__ import annotations

import errno
import math
import os
import socket
from pathlib import Path
from typing import Literal

from trilithon_server.config import EngineConfig, ServeConfig
from trilithon_server.config_sources import ConfigError
from trilithon_server.engine.spec import EngineSpec

ModelKind = Literal["decoder", "encoder", "encoder-decoder"]

_SERVER_FILES = ("api_keys_file", "tls_cert", "tls_key", "tls_client_ca")
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class ModelRefused(ValueError):
    """A model that can't be served as asked; the message is one sentence for the user."""


def find_model(name_or_path: str) -> Path:
    """
    The directory of a model: a path that exists, or else a name in the model store.

    Raises:
        ModelRefused: there is neither.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path.resolve()
    from trilithon._store import resolve

    try:
        return resolve(name_or_path)
    except (ValueError, LookupError, OSError) as error:
        raise ModelRefused(str(error.args[0]) if error.args else str(error)) from None


def check_model(engine: EngineConfig) -> ModelKind:
    """
    Read the model's config, check the layout and that the weights alone can fit; says what kind of model it is.

    Raises:
        ModelRefused: with the rule, the value and what to do.
    """
    from trilithon_parallel.config import ModelError, load_config
    from trilithon_parallel.placement import check_layout, global_shapes

    try:
        model = load_config(Path(engine.model))
        check_layout(model, tp=engine.tp, pp=engine.pp)
    except ModelError as error:
        raise ModelRefused(f"engine {engine.name}: {error}") from None
    if model.is_seq2seq and engine.batch_invariant:
        raise ModelRefused(
            f"engine {engine.name} batch_invariant must be false for an encoder-decoder, which has no such mode. "
            f"Given: true for {model.architecture}. Leave it out."
        )
    if engine.max_context is not None and engine.max_context > model.max_context:
        raise ModelRefused(
            f"engine {engine.name} max_context must be at most the model's window of {model.max_context} tokens. "
            f"Given: {engine.max_context}. Lower --max-context."
        )
    if engine.device == "cpu":
        weights = sum(math.prod(shape) for shape in global_shapes(model).values()) * _BYTES.get(engine.dtype, 4)
        available = available_memory_bytes()
        if available is not None and weights > available:
            raise ModelRefused(
                f"engine {engine.name} weights must fit into the available memory of {available / 2**30:.1f} GiB. "
                f"Given: {weights / 2**30:.1f} GiB as {engine.dtype}. Free memory, or serve a smaller model."
            )
    if model.is_seq2seq:
        return "encoder-decoder"
    return "decoder" if model.is_causal else "encoder"


def engine_spec(engine: EngineConfig, *, limits_queue: int, takes_adapters: bool = False) -> EngineSpec:
    """
    What the ranks of a resolved engine are told.

    Args:
        limits_queue: requests that the front lets wait.
        takes_adapters: whether any adapter can be named: without one its slots would reserve memory for nothing.
    """
    assert engine.dtype != "auto"  # resolved
    return EngineSpec(
        name=engine.name,
        model_dir=engine.model,
        tp=engine.tp,
        pp=engine.pp,
        dtype=engine.dtype,
        device=engine.device,
        backend=engine.backend,
        max_context=engine.max_context or 0,
        kv_cache_bytes=engine.kv_cache_bytes,
        memory_fraction=engine.memory_fraction or 0.5,
        max_batch_tokens=engine.max_batch_tokens or 256,
        max_batch_sequences=engine.max_batch_sequences or 64,
        max_queued_requests=2 * limits_queue,  # a hard bound only; the front's own count is the one that refuses
        prefix_cache=engine.prefix_cache,
        batch_invariant=bool(engine.batch_invariant),
        num_threads=engine.num_threads or 1,
        max_adapters=engine.max_adapters if takes_adapters else 0,
        max_adapter_rank=engine.max_adapter_rank,
    )


def check_files(config: ServeConfig) -> None:
    """
    Every file that the settings name must be readable.

    Raises:
        ConfigError: one sentence for each that is not.
    """
    server = config.server
    named = {f"server.{field}": getattr(server, field) for field in _SERVER_FILES}
    named |= {f"engines.{index}.chat_template": engine.chat_template for index, engine in enumerate(config.engines)}
    violations = [
        f"{path} must be a readable file. Given: {name}."
        for path, name in named.items()
        if name is not None and not (Path(name).is_file() and os.access(name, os.R_OK))
    ]
    if server.uds is not None:
        path = Path(server.uds)
        if path.exists() and not path.is_socket():
            violations.append(f"server.uds must be free or an old socket. Given: {path}, which is something else.")
        elif not os.access(path.absolute().parent, os.W_OK):
            violations.append(f"server.uds must lie in a writable directory. Given: {path}.")
    if violations:
        raise ConfigError(violations)


def choose_ports(config: ServeConfig) -> ServeConfig:
    """
    Check that every port is free, and put a free one where 0 was asked for.

    Raises:
        ConfigError: one sentence for each port that can't be bound.
    """
    server, violations = config.server, []
    chosen: dict[str, int] = {}
    held: list[socket.socket] = []
    try:
        for field in ("http_port", "grpc_port", "metrics_port"):
            port = getattr(server, field)
            if port is None:
                continue
            try:
                listener = _listen(server.host, port)
            except OSError as error:
                violations.append(
                    f"server.{field} {_why(error)}. Given: {port} on {server.host}. {_FIX.format(field=field)}"
                )
                continue
            held.append(listener)
            chosen[field] = listener.getsockname()[1]
    finally:
        for listener in held:
            listener.close()
    if violations:
        raise ConfigError(violations)
    return config.model_copy(update={"server": server.model_copy(update=chosen)})


_FIX = "Stop the other server, or choose another port with server.{field} (0 takes any free one)."


def _why(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "must be free, and another process listens there"
    if error.errno == errno.EACCES:
        return "must be one that this user may bind"
    if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
        return "needs a host address of this machine"
    return f"cannot be bound ({error.strerror})"


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1)  # two listeners may bind alike with SO_REUSEADDR; only one may listen
    except OSError:
        listener.close()
        raise
    return listener


def available_memory_bytes() -> int | None:
    """Memory that can be had without swapping: the machine's, or the container's limit when that is lower."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        if limit != "max":
            found.append(int(limit) - used)
    except (OSError, ValueError, IndexError):
        pass  # not Linux, or no cgroup: what was found until here counts
    return min(found) if found else None
