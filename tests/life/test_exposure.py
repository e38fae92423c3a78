"""What a started server opens, imports and refuses: S2, no torch outside the ranks, and errors before any process."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from served import COMMAND, free_ports, serving
from tiny import tiny_llama
from under_load import Processes, wait_until

from trilithon import Client

FLAGS = ("--log-format", "json", "--set", "engines.0.kv_cache_bytes=16MiB")
# 127.0.0.1, ::1 and ::ffff:127.0.0.1 (gRPC's way to bind the first) as the kernel writes them.
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


def listening(pids: set[int]) -> dict[int, set[str]]:
    """Port -> addresses (hexadecimal) on which one of these processes listens, from the kernel's own tables."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = str(link.readlink())
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found: dict[int, set[str]] = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:  # 0A = LISTEN
                address, _, port = fields[1].partition(":")
                found.setdefault(int(port, 16), set()).add(address)
    return found


def run(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`trilithon serve` with these words, to its end."""
    import os

    command = [*COMMAND, "serve", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **(env or {})})


def test_S2_nothing_listens_beyond_this_machine(tiny_dir: Path, sockets: Path) -> None:
    """
    Four ranks, their stores and gloo pairs, both fronts and the metrics listener: every TCP socket that listens is on
    loopback, and the meeting directory is closed to others.

    Inverse seen: with `--host 0.0.0.0 --insecure` the address 00000000 appears and the assertion fails.
    """
    (metrics_port,) = free_ports(1)
    flags = ("--tp", "2", "--pp", "2", "--metrics-port", str(metrics_port), *FLAGS)
    with serving(tiny_dir, *flags, env={"XDG_RUNTIME_DIR": str(sockets)}) as server:
        found = listening({process.pid for process in Processes(server).all})
        (run_dir,) = sockets.iterdir()

        assert {server.http_port, server.grpc_port, metrics_port} <= set(found)
        assert set().union(*found.values()) <= LOOPBACK
        assert run_dir.stat().st_mode & 0o777 == 0o700
        assert "trilithon_build_info" in httpx.get(f"http://127.0.0.1:{metrics_port}/metrics").text


def test_the_supervisor_and_the_front_load_no_torch(tiny_dir: Path, sockets: Path) -> None:
    """
    Torch is mapped in the ranks alone: the front starts in a second and its memory stays small.

    Inverse seen: with `import torch` at the top of front.py the front's maps name libtorch.
    """
    uds = sockets / "http"
    with serving(tiny_dir, "--uds", str(uds), *FLAGS, env={"XDG_RUNTIME_DIR": str(sockets)}) as server:
        processes = Processes(server)
        with Client(server.url) as client:
            client.generate("a", max_tokens=2)
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(uds))) as client_:
            over_socket = client_.get("http://local/readyz").status_code
        mode = uds.stat().st_mode & 0o777
        maps = {
            process.pid: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()
            for process in (processes.supervisor, processes.front, processes.rank(0))
        }

        assert list(maps.values()) == [False, False, True]
        assert (over_socket, mode) == (200, 0o600)
    assert not uds.exists()


@pytest.mark.parametrize("module", ["cli", "front", "engine.supervisor", "engine_client", "service"])
def test_no_torch_is_imported_outside_the_ranks(module: str) -> None:
    """Importing the processes' modules loads no torch."""
    program = f"import sys, trilithon_server.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_R11_a_used_port_is_one_sentence_before_anything_starts(tiny_dir: Path, sockets: Path) -> None:
    """A taken port: exit code 2, one sentence with field, value and what to do, no process, no directory."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = run(str(tiny_dir), "--http-port", str(port), "--grpc-port", "0", env={"XDG_RUNTIME_DIR": str(sockets)})

    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    expected = f"server.http_port must be free, and another process listens there. Given: {port} on 127.0.0.1."
    assert expected in done.stderr
    assert list(sockets.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["no-such-model"], 2, "no-such-model"),
        (["{model}", "--tp", "64"], 3, "layout tp must be from 1 to the model's number of heads. Given: 64."),
        (["{model}", "--pp", "9"], 3, "layout pp must be from 1 to the model's number of layers. Given: 9."),
        (["{model}", "--max-context", "1M"], 3, "max_context must be at most the model's window of 512 tokens"),
        (["{model}", "--quantization", "int4"], 2, "engines.0.quantization must be none"),
        (["{model}", "--host", "0.0.0.0"], 2, "server.host must be a loopback address when no API key is set"),
        (
            ["{model}", "--tls-cert", "missing.pem", "--tls-key", "missing.pem"],
            2,
            "server.tls_cert must be a readable file",
        ),
        (["{model}", "--api-keys-file", "missing"], 2, "server.api_keys_file must be a readable file"),
        (["{model}", "--launch", "external"], 2, "--launch external needs --run-dir"),
    ],
    ids=["model", "tp", "pp", "context", "quantization", "host", "tls", "keys", "external"],
)
def test_R11_what_cannot_work_is_refused_before_any_process(
    words: list[str], code: int, sentence: str, tmp_path: Path
) -> None:
    """Each refusal is a sentence with the rule and the value, and the exit code of its kind."""
    model = tiny_llama(tmp_path / "tiny")
    done = run(*[word.format(model=model) for word in words], "--http-port", "0", "--grpc-port", "0")

    assert done.returncode == code
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_R11_weights_that_cannot_fit_are_refused(tmp_path: Path) -> None:
    """A model larger than the machine's memory is refused from its config alone, with both sizes."""
    model = tiny_llama(tmp_path / "tiny")
    config = json.loads((model / "config.json").read_text())
    config |= {"num_hidden_layers": 500_000, "hidden_size": 4096, "intermediate_size": 16384, "head_dim": 1024}
    (model / "config.json").write_text(json.dumps(config))
    done = run(str(model), "--http-port", "0", "--grpc-port", "0")

    assert done.returncode == 3
    assert "weights must fit into the available memory" in done.stderr


def test_R11_a_truncated_shard_ends_the_start_with_its_name(tmp_path: Path, sockets: Path) -> None:
    """What only the ranks can see (a broken weights file) ends in one sentence and exit code 3, with no restart."""
    model = tiny_llama(tmp_path / "tiny")
    shard = model / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-64])
    ports = ("--http-port", "0", "--grpc-port", "0")
    done = run(str(model), *ports, "--log-format", "json", env={"XDG_RUNTIME_DIR": str(sockets)})
    events = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]

    assert done.returncode == 3
    (end,) = [event for event in events if event["event"] == "server_ends"]
    assert "model.safetensors" in end["reason"]
    assert not any(event["event"] == "engine_restarts" for event in events)
    assert list(sockets.iterdir()) == []


def test_both_protocols_listen_on_an_ipv6_address(tiny_dir: Path, sockets: Path) -> None:
    """`--host ::1`: HTTP and gRPC answer there, and what is printed can be pasted."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with serving(tiny_dir, *FLAGS, "--host", "::1", wait=False) as server:
        wait_until(lambda: "playground" in server.output(), seconds=60)
        for url in (f"http://[::1]:{server.http_port}", f"grpc://[::1]:{server.grpc_port}"):
            assert url in server.output()
            with Client(url) as client:
                assert client.generate("a", max_tokens=2).usage.generated_tokens == 2


def test_S5_R4_connections_beyond_the_limit_get_the_body_of_every_error(tiny_dir: Path, sockets: Path) -> None:
    """The third of two allowed connections: 429 in JSON, counted, advice to try again, and the connection is closed."""
    with (
        serving(tiny_dir, *FLAGS, "--set", "limits.max_connections=2") as server,
        contextlib.ExitStack() as stack,
    ):
        first, second, third = (stack.enter_context(httpx.Client(base_url=server.url)) for _ in range(3))
        held = [client.get("/livez").status_code for client in (first, second)]
        refused = third.get("/livez")
        second.close()
        wait_until(lambda: httpx.get(f"{server.url}/livez").status_code == 200, seconds=5)
        metrics = first.get("/metrics").text

    assert held == [200, 200]
    assert 'trilithon_rejected_total{reason="too_many_connections"}' in metrics
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "too_many_connections"
    assert (refused.headers["retry-after"], refused.headers["connection"]) == ("1", "close")
    assert refused.headers["x-request-id"] == refused.json()["error"]["request_id"]
