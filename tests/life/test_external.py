"""Ranks that torchrun starts, on one machine or several: the front attaches to them, and tells of their loss."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from served import COMMAND, Server, free_ports, serving
from under_load import Load, readiness, wait_until

from trilithon import Client

KV = ("--set", "engines.0.kv_cache_bytes=16MiB", "--set", "engines.0.num_threads=1")


@dataclass(frozen=True)
class Node:
    """One machine: the words before each command that runs on it, and its network interface."""

    prefix: tuple[str, ...] = ()
    interface: str = "lo"


@contextlib.contextmanager
def agents(
    model: Path, flags: Sequence[str], *, nodes: Sequence[Node], ranks_per_node: int, address: str, folder: Path
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """One torchrun agent a node, each with a run directory of its own; the first is `folder / "run0"`."""
    spec = folder / "engine.json"
    subprocess.run([*COMMAND, "serve", str(model), *flags, "--write-spec", str(spec)], check=True, timeout=60)
    (port,) = free_ports(1)
    started: list[subprocess.Popen[bytes]] = []
    try:
        for number, node in enumerate(nodes):
            run_dir = folder / f"run{number}"
            run_dir.mkdir(mode=0o700)
            launch = ["--nnodes", str(len(nodes)), "--nproc-per-node", str(ranks_per_node), "--node-rank", str(number)]
            launch += ["--master-addr", address, "--master-port", str(port)]
            rank = ["-m", "trilithon_server.engine.rank", "--spec", str(spec), "--run-dir", str(run_dir)]
            command = [*node.prefix, sys.executable, "-m", "torch.distributed.run", *launch, *rank]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": node.interface}
            with (folder / f"agent{number}.log").open("wb") as log:
                started.append(
                    subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
                )
        yield started
    finally:
        for agent in started:
            agent.terminate()
        for agent in started:
            agent.wait(60)


def ranks_of(agent: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The ranks that an agent has started, in the order of their start."""
    return [
        p for p in psutil.Process(agent.pid).children(recursive=True) if "trilithon_server.engine.rank" in p.cmdline()
    ]


def serve_and_lose_a_rank(server: Server, victim: psutil.Process) -> None:
    """Short requests succeed; when the victim is killed, long ones end as `engine_lost` and readiness goes off."""
    with Load(server, max_tokens=4) as short:
        short.wait(seconds=60)
    with Load(server) as load:
        victim.kill()
        load.wait(seconds=10)
    wait_until(lambda: readiness(server) == 503, seconds=2)

    assert {"max_tokens"} == {outcome.ended for outcome in short.outcomes}
    assert {"engine_lost"} == {outcome.ended for outcome in load.outcomes}


def test_R1_a_torchrun_engine_is_attached_to_and_its_loss_is_told(tiny_dir: Path, sockets: Path) -> None:
    """
    `--write-spec` tells the ranks, torchrun starts them, `--launch external` serves them; when one is killed, every
    request ends as `engine_lost` and readiness goes off; stopping the server leaves the run directory to its owner.

    Inverse seen: with the client not failing its streams at the end of the leader's socket the load never ends.
    """
    flags, run_dir = ("--tp", "2", *KV), sockets / "run0"
    with (
        agents(tiny_dir, flags, nodes=[Node()], ranks_per_node=2, address="127.0.0.1", folder=sockets) as (agent,),
        serving(tiny_dir, *flags, "--launch", "external", "--run-dir", str(run_dir)) as server,
    ):
        serve_and_lose_a_rank(server, ranks_of(agent)[1])

        assert server.stop() == 0
        assert {path.name for path in run_dir.iterdir()} <= {"main.sock", "main.beats"}


@contextlib.contextmanager
def two_nodes(kind: str) -> Iterator[tuple[list[Node], str]]:
    """Two nodes and the address of the first: both on loopback, or the second in a network namespace of its own."""
    if kind == "loopback":
        yield [Node(), Node()], "127.0.0.1"
        return
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("a network namespace needs root and iproute2")
    name = f"tri{os.getpid()}"
    near, far, network = f"{name}a", f"{name}b", f"10.213.{os.getpid() % 250}"
    steps = [
        f"ip netns add {name}",
        f"ip link add {near} type veth peer name {far} netns {name}",
        f"ip addr add {network}.1/30 dev {near}",
        f"ip link set {near} up",
        f"ip -n {name} addr add {network}.2/30 dev {far}",
        f"ip -n {name} link set {far} up",
        f"ip -n {name} link set lo up",
    ]
    try:
        for step in steps:
            done = subprocess.run(step.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"this machine makes no network namespaces: {done.stderr.strip()}")
        yield [Node((), near), Node(("ip", "netns", "exec", name), far)], f"{network}.1"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.parametrize("kind", ["loopback", "namespaces"])
def test_E1_R1_two_machines_serve_one_model(kind: str, tiny_dir: Path, sockets: Path) -> None:
    """
    Two agents of two ranks each (tp = 2 inside, pp = 2 across): the answers of one rank; a rank that dies on the second
    machine, whose run directory the server never sees, ends every request as `engine_lost`.

    Inverse: an agent that isn't started leaves the server without its ranks, and it never becomes ready.
    """
    flags = ("--tp", "2", "--pp", "2", "--dtype", "fp32", *KV)
    ask = {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    with serving(tiny_dir, "--dtype", "fp32", *KV) as single, Client(single.url) as client:
        expected = client.generate(**ask)
    with (
        two_nodes(kind) as (nodes, address),
        agents(tiny_dir, flags, nodes=nodes, ranks_per_node=2, address=address, folder=sockets) as started,
        serving(tiny_dir, *flags, "--launch", "external", "--run-dir", str(sockets / "run0")) as server,
    ):
        with Client(server.url) as client:
            actual = client.generate(**ask)
        serve_and_lose_a_rank(server, ranks_of(started[1])[0])

    assert [token.id for token in actual.tokens] == [token.id for token in expected.tokens]
    assert [t.logprob for t in actual.tokens] == pytest.approx([t.logprob for t in expected.tokens], abs=1e-5)
