"""
The paged-attention kernel for CPUs: compiled once from `paged_attention.c` with the system's C compiler, then cached.

Optional: without a compiler, or on a shape that it does not take, `attention.py` computes the same with torch alone.
It is plain C behind ctypes (no torch headers), so it compiles in a second, and it shares torch's OpenMP threads.
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
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from trilithon_parallel.weights.store import home

SOURCE = Path(__file__).with_name("paged_attention.c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-std=gnu11")
COMPILE_LIMIT_S = 60
# The kernel's own limits (see the C file): rows of queries in a tile, channels of a head.
MAX_ROWS, MAX_CHANNELS = 48, 256


class _Step(ctypes.Structure):
    """`struct step` of the C file."""

    _fields_ = (
        *[
            (name, ctypes.c_int32)
            for name in (
                "num_sequences",
                "num_tokens",
                "heads",
                "groups",
                "channels",
                "table_width",
                "is_bf16",
                "num_threads",
            )
        ],
        ("num_blocks", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("num_items", ctypes.c_int32),
        *[(name, ctypes.c_void_p) for name in ("slots", "bounds", "context_lens", "tables", "items")],
    )


@functools.cache
def _load(cache_dir: Path) -> ctypes.CDLL | str:
    """The compiled kernel, or why there is none."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return "no C compiler (gcc or cc) is on the path"
    try:
        library = ctypes.CDLL(str(_compile(compiler, cache_dir)))
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    pointer, stride = ctypes.c_void_p, ctypes.c_int64
    library.paged_attention.argtypes = [pointer, pointer, pointer, stride, pointer, stride, pointer, stride, pointer]
    library.paged_attention.restype = None
    return library


def _compile(compiler: str, cache_dir: Path) -> Path:
    """
    The shared library for this source, compiler, flags and CPU, compiled if it is not in the cache.

    The folder is private to the user, and one that others could write to is refused: what lies there is executed.
    """
    cpu = Path("/proc/cpuinfo").read_text().split("\n\n")[0] if Path("/proc/cpuinfo").exists() else platform.processor()
    features = "\n".join(line for line in cpu.splitlines() if line.startswith(("flags", "Features", "model name")))
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=COMPILE_LIMIT_S).stdout
    key = hashlib.sha256(b"\0".join((SOURCE.read_bytes(), version, " ".join(FLAGS).encode(), features.encode())))
    cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = cache_dir.stat()
    if state.st_uid != os.getuid() or state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError("the kernel cache folder is not private to this user")
    target = cache_dir / f"paged_attention-{key.hexdigest()[:32]}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".tmp-") as work_dir:
            made = Path(work_dir) / target.name
            subprocess.run(
                [compiler, *FLAGS, str(SOURCE), "-o", str(made), "-lm"],
                capture_output=True,
                check=True,
                timeout=COMPILE_LIMIT_S,
            )
            made.replace(target)  # ranks may compile at once; the last rename wins, all files are equal
    return target


def unavailable_reason() -> str:
    """Why the kernel cannot be used here; empty where it can."""
    found = _load(home() / "kernels")
    return found if isinstance(found, str) else ""


def takes(*, heads: int, groups: int, channels: int, dtype: torch.dtype) -> bool:
    """Whether the kernel computes attention of this shape (sizes are the rank's own)."""
    return (
        dtype in (torch.float32, torch.bfloat16)
        and channels % 16 == 0
        and channels <= MAX_CHANNELS
        and heads // groups <= MAX_ROWS
    )


class NativeStep:
    """One step's ragged batch, laid out for the kernel once and used by every layer."""

    def __init__(
        self,
        *,
        heads: int,
        groups: int,
        channels: int,
        num_blocks: int,
        dtype: torch.dtype,
        bounds: Sequence[int],
        context_lens: Sequence[int],
        tables: Sequence[Sequence[int]],
        slots_T: Tensor,
    ) -> None:
        library = _load(home() / "kernels")
        assert isinstance(library, ctypes.CDLL), library
        self._function = library.paged_attention
        tile = MAX_ROWS // (heads // groups)
        items = [
            (i, first, min(tile, stop - start - first))
            for i, (start, stop) in enumerate(pairwise(bounds))
            for first in range(0, stop - start, tile)
        ]
        # Long items first: the threads that take them share the short ones.
        items.sort(key=lambda item: -item[2] * (context_lens[item[0]] + item[1] + item[2]))
        width = max(map(len, tables), default=1)
        int32 = functools.partial(torch.tensor, dtype=torch.int32)
        # Held here: the structure has their addresses alone.
        self._tensors = (
            slots_T.contiguous(),
            int32(bounds),
            int32(context_lens),
            int32([[*table, *[0] * (width - len(table))] for table in tables]),
            int32(items),
        )
        self._step = _Step(
            len(tables),
            len(slots_T),
            heads,
            groups,
            channels,
            width,
            dtype == torch.bfloat16,
            torch.get_num_threads(),
            num_blocks,
            channels**-0.5,
            len(items),
            *[tensor.data_ptr() for tensor in self._tensors],
        )
        self._address = ctypes.addressof(self._step)

    def attend(self, layer_address: int, q_TAC: Tensor, k_TGC: Tensor, v_TGC: Tensor) -> Tensor:
        """Write keys and values into the layer's cache, then attend: [T, A, C]. A token's heads must be contiguous."""
        channels = q_TAC.shape[-1]
        assert all(x.stride()[1:] == (channels, 1) or x.shape[1] == 1 for x in (q_TAC, k_TGC, v_TGC))
        out_TAC = torch.empty(q_TAC.shape, dtype=q_TAC.dtype)
        self._function(
            self._address,
            layer_address,
            q_TAC.data_ptr(),
            q_TAC.stride(0),
            k_TGC.data_ptr(),
            k_TGC.stride(0),
            v_TGC.data_ptr(),
            v_TGC.stride(0),
            out_TAC.data_ptr(),
        )
        return out_TAC
