"""What this host offers a job's ranks: memory, disk, speed. Torch is imported only to measure, and for CUDA devices."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

from trilithon_finetune.config import JobConfig, Parallel
from trilithon_finetune.errors import refuse
from trilithon_finetune.estimate import Machine
from trilithon_finetune.peaks import peak_flops
from trilithon_finetune.train.threads import threads_of_a_rank


def this_machine(config: JobConfig, store: Path) -> Machine:
    """
    What this host offers each of the job's ranks, with its share of the cores, or a device of its own.

    Raises:
        FinetuneError: `estimate_exceeded`, the devices are not here.
    """
    parallel = config.parallel
    ranks = parallel.tp * parallel.pp * parallel.dp
    available = _available_bytes() // ranks if parallel.device == "cpu" else _free_device_bytes(parallel)
    peak = peak_flops(store, config.dtype, num_threads=threads_of_a_rank(config), device=parallel.device)
    return Machine(available, shutil.disk_usage(_existing(store)).free, peak)


def _available_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if place.exists())


def _free_device_bytes(parallel: Parallel) -> int:
    """
    Bytes that a rank may take of its device, the fullest device counting; each local rank has one of its own.

    Raises:
        FinetuneError: `estimate_exceeded`, there are fewer devices than ranks.
    """
    import torch

    ranks, found = parallel.tp * parallel.pp * parallel.dp, torch.cuda.device_count()
    if found < ranks:
        host = socket.gethostname()
        raise refuse(
            "estimate_exceeded",
            f"each of the job's {ranks} ranks takes a CUDA device of its own. Given: {found} on {host}.",
            param="parallel.device",
            hint="Use parallel.device cpu, fewer ranks, or run the worker where the devices are.",
        )
    return min(torch.cuda.mem_get_info(index)[0] for index in range(ranks))
