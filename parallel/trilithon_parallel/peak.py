"""What one device can do at most, for utilisation (MFU): the vendor's figure of a known GPU, otherwise measured."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable

import torch

from trilithon_parallel.backend.native_product import NativeProduct, even_terms, takes
from trilithon_parallel.hardware import PRESETS

_HALF = (torch.bfloat16, torch.float16)
# Pattern of torch.cuda.get_device_name -> preset whose dense 16-bit peak is that card's. PCIe H100s are slower.
_KNOWN_GPUS = ((re.compile(r"A100"), "a100-80gb"), (re.compile(r"H100 80GB HBM3|H200"), "h100-sxm"))
_CPU_SIZE, _GPU_SIZE = 1024, 8192


def measured_peak(
    dtype: torch.dtype, *, num_threads: int, device: str | torch.device = "cpu", seconds: float = 0.3
) -> float:
    """
    FLOP/s that this device reaches in products of large square matrices.

    On a GPU that a preset describes, the vendor's dense figure for 16-bit types (no measurement); elsewhere the best of
    many products within about `seconds`. Where ranks share the host's cores, measure before the ranks start to work,
    with the threads of one rank.

    Args:
        dtype: in which training computes.
        num_threads: of this process, on the CPU; as before afterwards.
    """
    device = torch.device(device)
    if device.type == "cuda" and dtype in _HALF:
        name = torch.cuda.get_device_name(device)
        for pattern, preset in _KNOWN_GPUS:
            if pattern.search(name):
                return PRESETS[preset].peak_flops
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        return _measure(dtype, device, seconds)
    finally:
        torch.set_num_threads(before)


def _measure(dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    size = _GPU_SIZE if device.type == "cuda" else _CPU_SIZE
    square = torch.ones(size, size, dtype=dtype, device=device)
    multiply = _product(square)
    best_s, end = math.inf, time.monotonic() + seconds
    while best_s == math.inf or time.monotonic() < end:
        start = time.perf_counter()
        multiply()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best_s = min(best_s, time.perf_counter() - start)
    return 2.0 * size**3 / best_s


def _product(square: torch.Tensor) -> Callable[[], object]:
    """The product that training uses: on CPUs our kernel, where it is at hand (torch's can be half as fast)."""
    terms = even_terms(len(square))
    if square.device.type == "cpu" and takes(square.dtype, terms):
        packed = NativeProduct(square, None, terms=terms)
        return lambda: packed(square)
    out = torch.empty_like(square)
    return lambda: torch.mm(square, square, out=out)
