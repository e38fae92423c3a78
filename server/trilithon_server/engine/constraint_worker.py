"""
A process that compiles constraints for the front under limits of memory; the front kills it when it takes too long.

Reads framed wire.Constraint messages on stdin and answers each on stdout: an empty frame when it compiles, else why
it does not. `python -m trilithon_server.engine.constraint_worker --model-dir DIR --memory-bytes N`.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import sys
from pathlib import Path

from trilithon_parallel.tokenizer import load_tokenizer
from trilithon_server.engine.children import die_with_parent
from trilithon_server.engine.constraint_check import READY
from trilithon_server.engine.constraints import CompileError, ConstraintCompiler
from trilithon_server.engine.framing import FrameReader, frame
from trilithon_server.engine.wire_pb2 import Constraint


def main(arguments: list[str] | None = None) -> int:
    """Serve until stdin ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-dir", type=Path, required=True)
    parser.add_argument("--memory-bytes", type=int, required=True)
    options = parser.parse_args(arguments)
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tokenizer = load_tokenizer(options.model_dir)
    compiler = ConstraintCompiler(lambda: tokenizer)
    compiler.warm_up()
    with open("/proc/self/statm", encoding="ascii") as statm:
        mapped_bytes = int(statm.read().split()[0]) * resource.getpagesize()
    limit = mapped_bytes + options.memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _answer(READY)
    reader = FrameReader()
    while data := os.read(sys.stdin.fileno(), 65536):
        for message in reader.feed(data):
            try:
                compiler.compile(Constraint.FromString(message))
            except CompileError as error:
                _answer(str(error).encode())
            else:
                _answer(b"")
    return 0


def _answer(message: bytes) -> None:
    sys.stdout.buffer.write(frame(message))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
