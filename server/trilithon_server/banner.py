"""What `trilithon serve` prints when it is ready: how to call it, in lines that can be pasted."""

from __future__ import annotations

import json
import shlex

from trilithon_server.config import ServeConfig, authority


def ready_block(config: ServeConfig, *, encoder: bool, needs_key: bool) -> str:
    """
    Addresses, one curl line, an openai and a trilithon snippet, and the playground's address.

    Args:
        encoder: the first model is an encoder: its example asks for embeddings.
        needs_key: callers must send an API key.
    """
    server = config.server
    model = config.engines[0].served_name or config.engines[0].name
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.host, server.host)
    scheme = "https" if server.tls_cert else "http"
    url, grpc_url = f"{scheme}://{authority(host, server.http_port)}", f"grpc://{authority(host, server.grpc_port)}"
    key = "YOUR_KEY" if needs_key else "none"
    body = {"model": model, "input": "Hello"} if encoder else {"model": model, "messages": _MESSAGES}
    route = "/v1/embeddings" if encoder else "/v1/chat/completions"
    header = " -H 'Authorization: Bearer YOUR_KEY'" if needs_key else ""
    if encoder:
        openai_call = f"client.embeddings.create(model={model!r}, input='Hello').data[0].embedding"
        trilithon_call = "client.embed(['Hello'])"
    else:
        openai_call = (
            f"client.chat.completions.create(model={model!r}, messages={_MESSAGES!r}).choices[0].message.content"
        )
        trilithon_call = f"client.chat({_MESSAGES!r}, max_tokens=32).text"
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
        f"  curl -s {url}{route}{header} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}",
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
