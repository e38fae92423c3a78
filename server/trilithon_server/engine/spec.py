"""What a group of engine ranks is told at start: one JSON file, read by every rank, no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

BLOCK_SIZE = 16  # tokens per KV block; the attention kernels are written for this size

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """
    One engine: a model, its layout and its budgets. Everything is decided before the ranks start.

    Args:
        name: the engine's name; names the socket and the heartbeat file in the run directory.
        model_dir: the model directory (Hugging Face layout).
        tp: tensor-parallel ranks per stage.
        pp: pipeline stages.
        dtype: the arithmetic of weights, activations and the KV cache.
        device: `cpu` or `cuda`.
        backend: `torch`, `te` or `auto`.
        max_context: window in tokens; 0 takes the model's own.
        kv_cache_bytes: KV cache of one rank in bytes; None sizes it by `memory_fraction`, on CPUs for 65,536 tokens.
        memory_fraction: share of the memory left after weights, activations and overhead that the KV cache may take.
        max_batch_tokens: token budget of one step.
        max_batch_sequences: sequences in one step.
        max_queued_requests: the leader's hard bound on requests it holds unstarted.
        prefix_cache: keep finished blocks for prompts that begin alike.
        batch_invariant: every row bitwise independent of its batch (E2) and of tp (E1), at a cost in speed.
        max_adapters: adapters that can be loaded at once; 0: the engine serves none.
        max_adapter_rank: the largest rank of an adapter.
        num_threads: compute threads of each rank; 0 leaves the choice to the rank.
        model_digest: identity of the weights in the prefix-cache key; empty makes the rank compute one.
        timeout_s: how long a rank waits for another before it gives up.

    >>> spec = EngineSpec(name="main", model_dir="models/tiny", tp=2)
    >>> EngineSpec.from_json(spec.to_json()) == spec
    True
    """

    name: str
    model_dir: str
    tp: int = 1
    pp: int = 1
    dtype: Dtype = "float32"
    device: str = "cpu"
    backend: Literal["torch", "te", "auto"] = "auto"
    max_context: int = 0
    kv_cache_bytes: int | None = None
    memory_fraction: float = 0.5
    max_batch_tokens: int = 256
    max_batch_sequences: int = 32
    max_queued_requests: int = 1024
    block_size: int = BLOCK_SIZE
    prefix_cache: bool = True
    batch_invariant: bool = False
    max_adapters: int = 0
    max_adapter_rank: int = 64
    num_threads: int = 0
    model_digest: str = ""
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        def check(name: str, holds: bool, rule: str) -> None:
            if not holds:
                raise ValueError(f"engine {self.name} `{name}` {rule}. Given: {getattr(self, name)!r}.")

        for name in ("tp", "pp", "max_batch_tokens", "max_batch_sequences", "max_queued_requests"):
            check(name, getattr(self, name) >= 1, "must be at least 1")
        check("dtype", self.dtype in ("float32", "bfloat16", "float16"), "must be float32, bfloat16 or float16")
        check("max_context", self.max_context >= 0, "must be 0 (the model's own) or more")
        check("kv_cache_bytes", self.kv_cache_bytes is None or self.kv_cache_bytes > 0, "must be positive")
        check("memory_fraction", 0.0 < self.memory_fraction <= 1.0, "must be above 0 and at most 1")
        check("max_adapters", self.max_adapters >= 0, "must be 0 (none) or more")
        check("max_adapter_rank", 1 <= self.max_adapter_rank <= 256, "must be from 1 to 256")
        check("block_size", self.block_size == BLOCK_SIZE, f"must be {BLOCK_SIZE}")
        check("timeout_s", self.timeout_s > 0, "must be positive")

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp

    def to_json(self) -> str:
        """The spec as the JSON text that `from_json` reads."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> EngineSpec:
        """Read what `to_json` wrote; unknown keys are errors, missing ones take their defaults."""
        values: dict[str, Any] = json.loads(text)
        unknown = sorted(values.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"engine spec has unknown keys. Given: {', '.join(unknown)}.")
        return cls(**values)

    @classmethod
    def load(cls, path: Path) -> EngineSpec:
        """Read a spec file."""
        return cls.from_json(path.read_text(encoding="utf-8"))

    def socket_path(self, run_dir: Path) -> Path:
        """Where the leader listens."""
        return run_dir / f"{self.name}.sock"

    def beats_path(self, run_dir: Path) -> Path:
        """The heartbeat file of this engine's ranks."""
        return run_dir / f"{self.name}.beats"
