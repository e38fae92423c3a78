"""
The C kernels for CPUs: compiled once with the system's C compiler, then cached.

Optional: without a compiler torch computes the same. Plain C behind ctypes (no torch headers), so all of it compiles in
a few seconds, and it shares torch's OpenMP threads. Attention over the paged cache is `paged_attention.c`, products are
`product.c`, adapters' products `lora.c`, the gated activation is `activation.c`; `gemm.c` and `attention_backward.c`
are the backward pass.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from trilithon_parallel.weights.store import home

SOURCES = [
    Path(__file__).with_name(name)
    for name in ("paged_attention.c", "product.c", "lora.c", "activation.c", "gemm.c", "attention_backward.c")
]
HEADERS = [Path(__file__).with_name(name) for name in ("vector.h", "product.h", "gemm.h")]
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-std=gnu11")
COMPILE_LIMIT_S = 60


def unavailable_reason() -> str:
    """Why the kernels cannot be used here; empty where they can."""
    found = _load()
    return found if isinstance(found, str) else ""


def library() -> ctypes.CDLL:
    """The compiled kernels; call it only where `unavailable_reason` is empty."""
    found = _load()
    assert isinstance(found, ctypes.CDLL), found
    return found


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The compiled kernels, or why there are none: found out once."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return "no C compiler (gcc or cc) is on the path"
    try:
        try:
            return _open(_compile(compiler, home() / "kernels"))
        except OSError:  # a store that can't be written to, or that others can: compile for this process alone
            with tempfile.TemporaryDirectory(prefix="trilithon-kernels-") as folder:
                return _open(_compile(compiler, Path(folder)))
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def _open(path: Path) -> ctypes.CDLL:
    """Load the library and say what its functions take."""
    found = ctypes.CDLL(str(path))
    pointer, size, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    found.paged_attention.argtypes = [pointer, pointer, pointer, size, pointer, size, pointer, size, pointer]
    found.product.argtypes = [pointer, size, pointer, size, pointer, pointer, pointer, small]
    found.lora.argtypes = [pointer, pointer, size, pointer, pointer, size, pointer, small]
    found.gated_silu.argtypes = [pointer, pointer, size, pointer, size, size, small, small]
    found.gated_silu_backward.argtypes = [pointer, pointer, size, pointer, pointer, pointer, size, size, small, small]
    found.gemm.argtypes = [pointer, pointer, size, size, size, pointer, size, small, small]
    found.attention_backward.argtypes = [pointer]
    for function in (found.paged_attention, found.product, found.lora, found.gated_silu, found.gated_silu_backward):
        function.restype = None
    return found


def _compile(compiler: str, cache_dir: Path) -> Path:
    """
    The shared library for these sources, compiler, flags and CPU, compiled if it is not in the cache.

    The folder is private to the user, and one that others could write to is refused: what lies there is executed.
    """
    cpu = Path("/proc/cpuinfo").read_text().split("\n\n")[0] if Path("/proc/cpuinfo").exists() else platform.processor()
    features = "\n".join(line for line in cpu.splitlines() if line.startswith(("flags", "Features", "model name")))
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=COMPILE_LIMIT_S).stdout
    key = hashlib.sha256(
        b"\0".join(
            (
                *(path.read_bytes() for path in (*HEADERS, *SOURCES)),
                version,
                " ".join(FLAGS).encode(),
                features.encode(),
            )
        )
    )
    cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = cache_dir.stat()
    if state.st_uid != os.getuid() or state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError("the kernel cache folder is not private to this user")
    target = cache_dir / f"kernels-{key.hexdigest()[:32]}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".tmp-") as work_dir:
            made = Path(work_dir) / target.name
            subprocess.run(
                [compiler, *FLAGS, *map(str, SOURCES), "-o", str(made), "-lm"],
                capture_output=True,
                check=True,
                timeout=COMPILE_LIMIT_S,
            )
            made.replace(target)  # ranks may compile at once; the last rename wins, all files are equal
    return target
