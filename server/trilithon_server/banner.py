"""What `trilithon serve` prints when it is ready: how to call it, in lines that can be pasted."""

from __future__ import annotations

import json
import shlex
from typing import Any

from trilithon_server.config import ServeConfig, authority
from trilithon_server.preflight import ModelKind


def ready_block(config: ServeConfig, *, kind: ModelKind, needs_key: bool) -> str:
    """
    Addresses, one curl line, an openai and a trilithon snippet, and the playground's address.

    Args:
        kind: of the first model, which the examples ask for what it does.
        needs_key: callers must send an API key.
    """
    server = config.server
    model = config.engines[0].served_name or config.engines[0].name
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.host, server.host)
    scheme = "https" if server.tls_cert else "http"
    url, grpc_url = f"{scheme}://{authority(host, server.http_port)}", f"grpc://{authority(host, server.grpc_port)}"
    key = "YOUR_KEY" if needs_key else "none"
    route, body, openai_call, trilithon_call = _EXAMPLES[kind]
    openai_call = openai_call.replace("MODEL", repr(model))
    asked = shlex.quote(json.dumps({"model": model, **body}))
    header = " -H 'Authorization: Bearer YOUR_KEY'" if needs_key else ""
    api_key = ", api_key='YOUR_KEY'" if needs_key else ""
    names = ", ".join(engine.served_name or engine.name for engine in config.engines)
    lines = [
        "",
        f"Serving {names}",
        f"  HTTP        {url}",
        f"  gRPC        {grpc_url}",
        *([f"  socket      {server.uds}"] if server.uds else []),
        f"  playground  {url}/",
        "",
        "curl:",
        f"  curl -s {url}{route}{header} -H 'Content-Type: application/json' -d {asked}",
        "openai:",
        f"  from openai import OpenAI; client = OpenAI(base_url='{url}/v1', api_key='{key}')",
        f"  print({openai_call})",
        "trilithon:",
        f"  from trilithon import Client; client = Client('{grpc_url}'{api_key})",
        f"  print({trilithon_call})",
        "",
    ]
    if not needs_key:
        lines.insert(-1, "No API key is set: every local caller is let in. Stop with Ctrl-C.")
    return "\n".join(lines)


_MESSAGES = [{"role": "user", "content": "Hello"}]
# Route, body, and the same through openai's client and ours.
_EXAMPLES: dict[ModelKind, tuple[str, dict[str, Any], str, str]] = {
    "decoder": (
        "/v1/chat/completions",
        {"messages": _MESSAGES},
        f"client.chat.completions.create(model=MODEL, messages={_MESSAGES!r}).choices[0].message.content",
        f"client.chat({_MESSAGES!r}, max_tokens=32).text",
    ),
    "encoder-decoder": (
        "/v1/completions",
        {"prompt": "Hello"},
        "client.completions.create(model=MODEL, prompt='Hello').choices[0].text",
        "client.generate('Hello', max_tokens=32).text",
    ),
    "encoder": (
        "/v1/embeddings",
        {"input": "Hello"},
        "client.embeddings.create(model=MODEL, input='Hello').data[0].embedding",
        "client.embed(['Hello'])",
    ),
}
