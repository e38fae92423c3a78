"""How many threads a rank has. No torch."""

from __future__ import annotations

import os

from trilithon_finetune.config import JobConfig


def cores() -> int:
    """Of this host, those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of_a_rank(config: JobConfig) -> int:
    """The host's cores shared out among the job's ranks, all of them on this host."""
    sizes = config.parallel
    return max(1, cores() // (sizes.tp * sizes.pp * sizes.dp))
