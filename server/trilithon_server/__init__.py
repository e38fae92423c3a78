"""
Serving: an engine of tensor- and pipeline-parallel ranks behind a gRPC and an HTTP front.

`LLM` and `SamplingParams` use the engine inside a Python process; they are loaded when first asked for, since the front
must stay without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trilithon_server.llm import LLM
    from trilithon_server.sampling import SamplingParams

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from trilithon_server.llm import LLM

        return LLM
    if name == "SamplingParams":
        from trilithon_server.sampling import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'trilithon_server' has no attribute {name!r}")
