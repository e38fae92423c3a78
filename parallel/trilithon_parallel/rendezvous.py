"""
How ranks find each other. The environment variables of `torchrun` are the launch contract.

Started locally (by the supervisor), the store listens on loopback alone: a `TCPStore`, so also `env://`, would
listen on every interface even when its host is 127.0.0.1, so rank 0 binds the socket itself and hands it over.
Under a real torchrun (`TORCHELASTIC_RUN_ID` is set) the store is torchrun's, and the cluster's network must close it.
"""

from __future__ import annotations

import gc
import ipaddress
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore


class RendezvousError(RuntimeError):
    """The ranks could not find each other; the message names the variable or the peer to look at."""


@dataclass(frozen=True)
class World:
    """Who joined: this process' global rank, its rank on this host, and how many ranks there are."""

    rank: int
    world_size: int
    local_rank: int


def join(*, device: str | torch.device = "cpu", timeout_s: float = 120.0) -> World:
    """
    Join the ranks that the environment names (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, LOCAL_RANK).

    Makes the default process group: gloo for CPU tensors, NCCL beside it when `device` is a CUDA device. One rank
    alone makes none. `timeout_s` bounds the rendezvous and becomes the group's default timeout.

    Raises:
        RendezvousError: a variable is missing or malformed, the port is taken, or a peer did not come in time.
    """
    rank, world_size = _env_int("RANK", 0), _env_int("WORLD_SIZE", 1)
    world = World(rank, world_size, _env_int("LOCAL_RANK", rank))
    if not 0 <= rank < world_size:
        raise RendezvousError(f"RANK must be from 0 to WORLD_SIZE - 1. Given: {rank} of {world_size}.")
    is_cuda = torch.device(device).type == "cuda"
    if is_cuda:
        torch.cuda.set_device(world.local_rank if torch.device(device).index is None else torch.device(device))
    if world_size == 1:
        return world
    backend = "cpu:gloo,cuda:nccl" if is_cuda else "gloo"
    timeout = timedelta(seconds=timeout_s)
    try:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            if _keeps_old_keys():
                kept = _agent_store(timeout)
                dist.init_process_group(backend, store=kept, rank=rank, world_size=world_size, timeout=timeout)
            else:
                dist.init_process_group(backend, init_method="env://", timeout=timeout)
        else:
            host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), _env_int("MASTER_PORT", 0)
            with _loopback_interface(host):
                store = _store(host, port, rank, world_size, timeout)
                dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (RuntimeError, OSError) as error:
        raise RendezvousError(
            f"rank {rank} of {world_size} could not join within {timeout_s:g} s: {str(error).splitlines()[0]}"
        ) from error
    return world


def leave() -> None:
    """
    Close the process group, if there is one. Never raises: it runs on the way out.

    A group's threads end with the last reference to it, and must end before the interpreter does (else it aborts). So
    what holds a grid should be gone by now; models, which are full of cycles, are collected here.
    """
    if dist.is_initialized():
        gc.collect()
        try:
            dist.destroy_process_group()
        except RuntimeError as error:  # a peer went first; nothing is left to close in order
            print(f"rendezvous: leaving, {error}", file=sys.stderr)


def _store(host: str, port: int, rank: int, world_size: int, timeout: timedelta) -> TCPStore:
    if not 0 < port < 65536:
        raise RendezvousError(f"MASTER_PORT must be from 1 to 65535. Given: {port}.")
    if rank != 0:
        return TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1024)
    except OSError:
        listener.close()
        raise
    # The store owns the descriptor from here and closes it when it goes.
    return TCPStore(
        host,
        port,
        world_size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _keeps_old_keys() -> bool:
    """
    Whether the store is that of a torchrun of one host, which outlives the attempts.

    Ranks that start again would read the addresses that ranks before them wrote, and wait for those in vain
    (pytorch#135712). With several hosts the attempts' numbers differ between agents, so there the launch must ask for
    a new store each time: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, as our own launches do.
    """
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and _env_int("GROUP_WORLD_SIZE", 1) == 1


def _agent_store(timeout: timedelta) -> PrefixStore:
    """torchrun's store, as this attempt's own."""
    host, port, world_size = os.environ["MASTER_ADDR"], _env_int("MASTER_PORT", 0), _env_int("WORLD_SIZE", 1)
    attempt = _env_int("TORCHELASTIC_RESTART_COUNT", 0)
    return PrefixStore(f"attempt{attempt}", TCPStore(host, port, world_size, is_master=False, timeout=timeout))


@contextmanager
def _loopback_interface(host: str) -> Iterator[None]:
    """On one host make gloo and NCCL use the loopback interface; elsewhere leave the operator's choice alone."""
    try:
        on_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        on_loopback = False
    name = "lo0" if sys.platform == "darwin" else "lo"
    for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if on_loopback else ():
        os.environ.setdefault(key, name)
    yield


def _env_int(name: str, default: int) -> int:
    raw = os.environ.get(name, str(default))
    try:
        return int(raw)
    except ValueError:
        raise RendezvousError(f"{name} must be an integer. Given: {raw!r}.") from None
