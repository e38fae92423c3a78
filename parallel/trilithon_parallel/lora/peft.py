"""Adapter directories in the layout of PEFT: read strictly, written as it reads them, merged into a model directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trilithon_parallel.config import ModelConfig
from trilithon_parallel.lora.spec import LoraSpec
from trilithon_parallel.weights.names import Slices


@dataclass(frozen=True)
class AdapterFiles:
    """
    An adapter that was read whole and found good; it holds its tensors in host memory, and no file.

    Attributes:
        spec: what the adapter is; of GPT-2 adapters from elsewhere the layout is `fused`, since theirs share one A.
        digest: SHA-256 over adapter_config.json and adapter_model.safetensors.
        base_model: what the adapter says of its base; "" where it is silent.
        facts: of trilithon.json; {} where there is none.
    """

    spec: LoraSpec
    digest: str
    base_model: str
    facts: Mapping[str, Any]
    _tensors: Mapping[str, Tensor]

    def fill(self, out: Tensor, name: str, slices: Slices) -> None:
        """
        Copy a block of a tensor into the leading corner of `out`, zero the rest.

        Args:
            name: of `lora_shapes(config, spec)`: unfused, so that a shared A has each name.
            slices: one per dim, within the true shape, as `placement.local_slice` gives them.
        """
        raise NotImplementedError


def read_adapter(directory: Path, *, config: ModelConfig, max_rank: int | None = None) -> AdapterFiles:
    """Read an adapter directory; `max_rank` None for no limit. Every failure is a ModelError `adapter_...`."""
    raise NotImplementedError
