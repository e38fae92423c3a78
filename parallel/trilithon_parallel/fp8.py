"""Which runs can multiply in 8 bits: checked before any rank starts. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from trilithon_parallel.config import ModelConfig, ModelError
from trilithon_parallel.placement import local_sizes

Fp8Recipe = Literal["delayed", "current", "mxfp8"]
# Both sides of every 8-bit product are multiples of this; MXFP8 scales blocks of 32 elements, in both directions.
MULTIPLES: Mapping[Fp8Recipe, int] = {"delayed": 16, "current": 16, "mxfp8": 32}


def check_fp8(
    config: ModelConfig,
    recipe: Fp8Recipe,
    *,
    tp: int,
    sequence_parallel: bool,
    tokens_per_micro_batch: int,
    dtype: str,
    recompute: str,
) -> None:
    """
    Refuse sizes and options that 8-bit products don't go with, all findings at once. Embedding and head stay in bf16.

    Args:
        tokens_per_micro_batch: over all tp ranks.
        dtype: of the parameters, as `training.dtype` names it.
        recompute: none, selective or full.
    Raises:
        ModelError: `layout_invalid`.
    Source: Transformer Engine's documentation of `autocast`.
    """
    multiple, sizes = MULTIPLES[recipe], local_sizes(config, tp)
    tokens = tokens_per_micro_batch // tp if sequence_parallel else tokens_per_micro_batch
    sides = {
        "hidden_size": config.hidden_size,
        "query channels of a rank": sizes.heads * config.head_dim,
        "key channels of a rank": sizes.groups * config.head_dim,
        "ffn_size of a rank": sizes.ffn,
        "tokens of a micro-batch on a rank": tokens,
    }
    wrong = [f"{name} {size}" for name, size in sides.items() if size % multiple]
    findings = [f"needs sizes that are multiples of {multiple}. Given: {', '.join(wrong)}."] if wrong else []
    if dtype != "bfloat16":
        findings.append(f"needs dtype bfloat16. Given: {dtype}.")
    if recompute == "full":
        findings.append("goes with recompute none or selective. Given: full.")
    if config.is_seq2seq:
        findings.append(f"is for decoders and encoders, not for encoder-decoders. Given: {config.architecture}.")
    if findings:
        raise ModelError(
            " ".join(f"training fp8 {recipe} {finding}" for finding in findings),
            code="layout_invalid",
            hint="Change these, or leave fp8 out.",
        )
