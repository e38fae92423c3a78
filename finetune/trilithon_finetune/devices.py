"""The CUDA devices that a job's ranks would have on this host. Torch is imported only where a job asks for them."""

from __future__ import annotations

import socket

from trilithon_finetune.config import Parallel
from trilithon_finetune.errors import refuse


def free_device_bytes(parallel: Parallel) -> int:
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


def device_name(device: str) -> str:
    """What peaks of a CUDA device are kept under: its model."""
    import torch

    return torch.cuda.get_device_name(device)
