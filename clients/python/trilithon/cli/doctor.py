"""`trilithon doctor`: is this machine fit to serve? One line for each check, with what to do."""

from __future__ import annotations

import argparse
import os
import platform
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trilithon.cli import _machine
from trilithon.cli._output import EXIT_CHECK_FAILED, EXIT_OK, add_output_argument, print_json, printable
from trilithon.cli._parser import Parser
from trilithon.cli.version import installed

GIB = 2**30
_VECTOR_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check found; `todo` says what to do unless it is ok."""

    check: str
    state: Literal["ok", "warning", "failed"]
    found: str
    todo: str = ""


Findings = Iterator[Finding]


def add_arguments(parser: Parser) -> None:
    """Add what the verb takes."""
    parser.add_argument("--http-port", type=int, default=8000, help="the port to be served on [8000]")
    parser.add_argument("--grpc-port", type=int, default=8001, help="the port to be served on [8001]")
    parser.add_argument("--api-keys-file", metavar="FILE", help="the server's file of keys, when there is one")
    add_output_argument(parser)
    parser.add_examples("trilithon doctor", "trilithon doctor --http-port 8080 -o json")


def run(args: argparse.Namespace) -> int:
    """Check everything; exit code 7 when something failed."""
    findings = [
        finding
        for check in (
            _python,
            _torch,
            _gloo,
            _cpu,
            _memory,
            _shared_memory,
            lambda: _port("http port", args.http_port),
            lambda: _port("grpc port", args.grpc_port),
            _store,
            lambda: _keys_file(args.api_keys_file),
            _clock,
        )
        for finding in check()
    ]
    if args.output == "json":
        print_json(findings)
    else:
        for finding in findings:
            todo = f" {finding.todo}" if finding.todo else ""
            print(f"{finding.state:<8} {finding.check:<14} {printable(finding.found)}.{printable(todo)}")
    return EXIT_CHECK_FAILED if any(finding.state == "failed" for finding in findings) else EXIT_OK


def _python() -> Findings:
    # The package's own metadata refuses older ones at installation.
    yield Finding(check="python", state="ok", found=f"{platform.python_version()} on {platform.machine()}")


def _torch() -> Findings:
    version = installed("torch")
    if version is None:
        yield Finding(
            check="torch",
            state="warning",
            found="not installed: this machine can be a client only",
            todo="To serve: pip install 'trilithon[serve]'.",
        )
        return
    parts = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    old = parts < (2, 13)
    todo = "Install 2.13 or newer." if old else ""
    yield Finding(check="torch", state="failed" if old else "ok", found=version, todo=todo)


def _gloo() -> Findings:
    if installed("torch") is None:
        return
    import torch.distributed as distributed

    there = distributed.is_available() and distributed.is_gloo_available()
    yield Finding(
        check="gloo",
        state="ok" if there else "failed",
        found="available" if there else "missing from this build of torch",
        todo="" if there else "Install a torch that was built with distributed support; ranks talk over it on CPUs.",
    )


def _cpu() -> Findings:
    machine = _machine.describe()
    flags = [flag for flag in _VECTOR_FLAGS if flag in machine.cpu_flags]
    bf16 = "avx512_bf16" in flags or "amx_bf16" in flags
    few = machine.num_cpus < 2
    todo = "With one core the front and the ranks share it." if few else ""
    if machine.arch in ("x86_64", "AMD64") and not bf16:
        todo = "bfloat16 is slower than float32 here: serve with --dtype float32." + (f" {todo}" if todo else "")
    yield Finding(
        check="cpu",
        state="warning" if todo else "ok",
        found=f"{machine.num_cpus} cores, {machine.cpu}, {' '.join(flags) or 'no known vector instructions'}",
        todo=todo,
    )


def _memory() -> Findings:
    machine = _machine.describe()
    if machine.memory_bytes is None:
        return
    free = machine.available_bytes or 0
    low = free < 2 * GIB
    yield Finding(
        check="memory",
        state="warning" if low else "ok",
        found=f"{free / GIB:.1f} GiB available of {machine.memory_bytes / GIB:.1f}",
        todo="SmolLM2-135M alone needs about 1 GiB. Stop something, or serve a smaller model." if low else "",
    )


def _shared_memory() -> Findings:
    size = _machine.shared_memory_bytes()
    if size is None:
        return
    low = size < 64 * 2**20
    yield Finding(
        check="shared memory",
        state="warning" if low else "ok",
        found=f"{size / 2**20:.0f} MiB in /dev/shm",
        todo="Give the container more, for example with --shm-size 1g." if low else "",
    )


def _port(name: str, port: int) -> Findings:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            yield Finding(
                check=name,
                state="warning",
                found=f"{port} cannot be taken ({error})",
                todo=f"Stop what holds it, or serve with --{name.replace(' ', '-')} and another one.",
            )
            return
    yield Finding(check=name, state="ok", found=f"{port} is free")


def _store() -> Findings:
    from trilithon import _store

    home = _store.home()
    existing = next(path for path in (home, *home.parents) if path.exists())
    writable = os.access(existing, os.W_OK)
    count = len(_store.list_models())
    yield Finding(
        check="model store",
        state="ok" if writable else "failed",
        found=f"{count} models in {home}" if writable else f"{home} cannot be written",
        todo="" if writable else "Set TRILITHON_HOME to a directory of yours.",
    )


def _keys_file(path: str | None) -> Findings:
    if path is None:
        return
    try:
        mode = Path(path).stat().st_mode & 0o777
    except OSError as error:
        yield Finding(
            check="keys file", state="failed", found=f"{path} ({error.strerror})", todo="Name a readable file."
        )
        return
    exposed = bool(mode & 0o077)
    yield Finding(
        check="keys file",
        state="failed" if exposed else "ok",
        found=f"{path} has mode {mode:04o}",
        todo=f"Others can read the keys: chmod 600 {path}." if exposed else "",
    )


def _clock() -> Findings:
    resolution_s = time.get_clock_info("monotonic").resolution
    # No copy of this program is older than itself: a clock before its files' time is wrong.
    behind = time.time() < Path(__file__).stat().st_mtime - 86_400
    coarse = resolution_s > 1e-3
    todo = "Set the clock: certificates and logs depend on it." if behind else ""
    todo = todo or ("Times below a millisecond will not be measured." if coarse else "")
    yield Finding(
        check="clock",
        state="warning" if todo else "ok",
        found=f"monotonic to {resolution_s * 1e9:.0f} ns",
        todo=todo,
    )
