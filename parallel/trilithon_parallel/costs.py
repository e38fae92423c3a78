"""
What training costs, as pure functions: parameters, FLOPs, bubble, communicated elements, time. No torch.

The formulas are those of "Efficient Large-Scale Language Model Training on GPU Clusters" (PTD-P, arXiv 2104.04473),
made exact for grouped heads and gated MLPs. Letters in the formulas: P parameters, l layers, h hidden size, s sequence
length, V vocabulary, B sequences of a global batch, b sequences of a micro-batch, m micro-batches of a pipeline,
t, p, d the tensor, pipeline and data-parallel sizes, v chunks of layers on each pipeline rank, n = t * p * d ranks,
X FLOP/s of one device, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from trilithon_parallel.config import ModelConfig, ModelError
from trilithon_parallel.placement import global_shapes
from trilithon_parallel.schedule import group_size

Recompute = Literal["none", "selective", "full"]
Schedule = Literal["gpipe", "1f1b", "interleaved"]
RECOMPUTE_KINDS: tuple[Recompute, ...] = ("none", "selective", "full")
SCHEDULES: tuple[Schedule, ...] = ("gpipe", "1f1b", "interleaved")

# Tensor-parallel all-reduces of one layer and micro-batch: two forward, two backward; full recomputation runs the
# forward ones again (PTD-P section 3.2).
NUM_ALL_REDUCES: Mapping[Recompute, int] = {"none": 4, "selective": 4, "full": 6}
SECONDS_PER_DAY = 86400.0


@dataclass(frozen=True)
class PlannedLayout:
    """
    How a model is trained on n = tp * pp * dp ranks, as the planner sees it.

    `virtual` chunks of layers on each pipeline rank (above 1 only with the interleaved schedule); `micro_batch` in
    sequences; `sequence_parallel` shards norms and residuals over tp (arXiv 2205.05198); `distributed_optimizer`
    shards the fp32 weights and Adam's moments over dp (ZeRO-1).
    """

    tp: int
    pp: int
    dp: int
    micro_batch: int
    virtual: int = 1
    recompute: Recompute = "none"
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    schedule: Schedule = "1f1b"

    @property
    def num_ranks(self) -> int:
        """Ranks of all axes together."""
        return self.tp * self.pp * self.dp

    def microbatches(self, global_batch: int) -> int:
        """Micro-batches of each pipeline; ModelError as `num_microbatches`."""
        return num_microbatches(global_batch, dp=self.dp, micro_batch=self.micro_batch)


def num_parameters(config: ModelConfig) -> int:
    """Exact count, from the placement table: true sizes, a tied head once."""
    return sum(math.prod(shape) for shape in global_shapes(config).values())


def formula_parameters(config: ModelConfig) -> int:
    """
    P = 12 l h^2 + 13 l h + (V + s) h with s = max_context (PTD-P eq. 2).

    The exact count of a GPT with learned positions and a tied head is 2h more: the final norm.
    """
    layers, hidden = config.num_layers, config.hidden_size
    return 12 * layers * hidden**2 + 13 * layers * hidden + (config.vocab_size + config.max_context) * hidden


def layer_product_flops(config: ModelConfig, *, tokens: float) -> float:
    """
    FLOPs of one layer's weight products, forward: 2 per weight and token.

    For a GPT: 24 B s h^2, with tokens = B s.
    """
    width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    weights = config.hidden_size * (2 * width + 2 * kv_width)
    weights += config.hidden_size * config.ffn_size * (3 if config.gated_mlp else 2)
    return 2.0 * weights * tokens


def layer_attention_flops(config: ModelConfig, *, batch: float, seq_len: int) -> float:
    """
    FLOPs of one layer's scores and weighted sums, forward: 4 B s^2 A C (4 B s^2 h for a GPT).

    The whole square is counted, causal or not, as the papers do; grouped keys don't change it.
    """
    return 4.0 * batch * seq_len**2 * config.num_heads * config.head_dim


def head_flops(config: ModelConfig, *, tokens: float) -> float:
    """FLOPs of the logits, forward: 2 tokens h V (masked-LM: its transform too, at every token); 0 without a head."""
    if not config.has_head:
        return 0.0
    return 2.0 * tokens * config.hidden_size * (config.vocab_size + config.mlm_head * config.hidden_size)


def model_flops(
    config: ModelConfig, *, batch: float, seq_len: int, target_len: int | None = None, recompute: Recompute = "none"
) -> float:
    """
    FLOPs of one training step over `batch` sequences of `seq_len` tokens: forward, and backward at twice that.

    Args:
        batch: sequences of the global batch, over all ranks.
        seq_len: tokens of a sequence; of its source, for an encoder-decoder.
        target_len: tokens of an encoder-decoder's target; `seq_len` where None.
        recompute: "none" counts what the model needs (the numerator of MFU); "selective" adds attention's second
            forward, "full" every layer's (what the hardware does, the numerator of HFU). Logits never run twice.
    Returns:
        FLOPs; divide by seconds * ranks * peak for the utilisation.
    Source: PTD-P section 5.1: 96 B s l h^2 (1 + s/(6h) + V/(16 l h)) for a GPT with full recomputation.
    """
    if config.is_seq2seq:
        products, attention, tokens = _seq2seq_flops(config, batch, seq_len, target_len or seq_len)
    else:
        tokens = batch * seq_len
        products = config.num_layers * layer_product_flops(config, tokens=tokens)
        attention = config.num_layers * layer_attention_flops(config, batch=batch, seq_len=seq_len)
    again = {"none": 0.0, "selective": attention, "full": products + attention}[recompute]
    return 3 * (products + attention) + again + 3 * head_flops(config, tokens=tokens)


def _seq2seq_flops(config: ModelConfig, batch: float, source: int, target: int) -> tuple[float, float, float]:
    """Forward FLOPs of both stacks' (weight products, attention), and the tokens that reach the head."""
    encoders, decoders = config.num_encoder_layers, config.num_decoder_layers
    width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    # Cross-attention: queries and outputs of the target, keys and values of the source.
    cross = 4.0 * batch * config.hidden_size * (width * target + kv_width * source)
    products = encoders * layer_product_flops(config, tokens=batch * source)
    products += decoders * (layer_product_flops(config, tokens=batch * target) + cross)
    pairs = encoders * source**2 + decoders * (target**2 + target * source)
    return products, 4.0 * batch * pairs * width, batch * target


def num_microbatches(global_batch: int, *, dp: int, micro_batch: int) -> int:
    """
    m = B / (d b), the micro-batches that each pipeline runs for one optimizer step.

    Raises:
        ModelError: `layout_invalid`: a size is below 1, or d * b does not divide B.
    """
    for name, value in (("global batch", global_batch), ("dp", dp), ("micro-batch", micro_batch)):
        if value < 1:
            raise ModelError(f"{name} must be at least 1. Given: {value}.", code="layout_invalid")
    if global_batch % (dp * micro_batch):
        below = global_batch // (dp * micro_batch) * dp * micro_batch
        allowed = [size for size in (below, below + dp * micro_batch) if size]
        raise ModelError(
            f"global batch must be a multiple of dp * micro-batch. Given: B = {global_batch}, d = {dp}, "
            f"b = {micro_batch}.",
            code="layout_invalid",
            hint=f"The nearest that fit: {', '.join(map(str, allowed))}.",
        )
    return global_batch // (dp * micro_batch)


def bubble_fraction(*, pp: int, microbatches: int, virtual: int = 1) -> float:
    """
    Idle time of a pipeline as a fraction of its ideal time: (p - 1) / (v m), for m >= p where v > 1.

    GPipe and 1F1B have the same bubble (v = 1); they differ in memory. Source: PTD-P sections 2.2.1 and 2.2.2.
    """
    return (pp - 1) / (virtual * microbatches)


def in_flight(schedule: Schedule, *, pp: int, pp_rank: int, microbatches: int, virtual: int = 1) -> float:
    """
    Micro-batches whose activations a stage keeps at its fullest, counted over all of its layers.

    GPipe m; 1F1B min(m, p - r); interleaved min(m v, 2 (p - r - 1) + (v - 1) g + 1) / v, so p + (p - 1) / v on
    rank 0 when p divides m (PTD-P section 2.2).
    """
    if schedule == "gpipe":
        return microbatches
    if virtual == 1:
        return min(microbatches, pp - pp_rank)
    group = group_size(pp, microbatches)
    return min(microbatches * virtual, 2 * (pp - pp_rank - 1) + (virtual - 1) * group + 1) / virtual


def pipeline_elements(
    config: ModelConfig, *, micro_batch: int, seq_len: int, tp: int = 1, scatter_gather: bool = True
) -> float:
    """
    Elements that a rank sends to the next stage per micro-batch and chunk border, in each direction.

    b s h; b s h / t where each tensor-parallel rank sends its share (PTD-P section 4.1, or sequence parallelism).
    """
    return micro_batch * seq_len * config.hidden_size / (tp if scatter_gather else 1)


def all_reduce_elements(elements: float, size: int) -> float:
    """Elements that each of `size` ranks sends in a ring all-reduce: 2 (size - 1) / size of the tensor."""
    return 2.0 * elements * (size - 1) / size


def tensor_elements(
    config: ModelConfig, *, micro_batch: int, seq_len: int, tp: int, recompute: Recompute = "none"
) -> float:
    """
    Elements that a rank sends to its tensor-parallel peers per layer and micro-batch: 8 b s h (t - 1) / t.

    12 instead of 8 with full recomputation. Sequence parallelism moves the same, as all-gathers and reduce-scatters.
    Source: PTD-P section 3.2; arXiv 2205.05198, section 4.2.2.
    """
    activation = micro_batch * seq_len * config.hidden_size
    return NUM_ALL_REDUCES[recompute] * all_reduce_elements(activation, tp)


def data_elements(local_parameters: float, *, dp: int) -> float:
    """Elements that a rank sends to its data-parallel peers per step: 2 (d - 1) / d of its parameters."""
    return all_reduce_elements(local_parameters, dp)


def num_iterations(tokens: float, *, global_batch: int, seq_len: int) -> float:
    """I = T / (B s) optimizer steps."""
    return tokens / (global_batch * seq_len)


def approximate_training_s(*, parameters: float, tokens: float, gpus: int, flops_per_s: float) -> float:
    """
    8 T P / (n X): the time of a whole run with full recomputation (PTD-P eq. 4).

    2 to 3 % low for large GPTs, whose attention and logits it leaves out.
    """
    return 8.0 * tokens * parameters / (gpus * flops_per_s)


def best_num_checkpoints(num_layers: int, *, input_bytes: float, intermediate_bytes: float) -> float:
    """
    How many layer inputs to keep for the least memory under full recomputation: c = sqrt(l A_intermediate / A_input).

    c kept inputs cost c A_input, the group of l / c layers that is computed again (l / c) A_intermediate (PTD-P section
    3.5: a group of 1 or 2 layers is mostly best).
    """
    return math.sqrt(num_layers * intermediate_bytes / input_bytes)


@dataclass(frozen=True)
class Achieved:
    """What a measured step amounts to: FLOP/s of one device, its shares of the peak, tokens per second over all."""

    flops_per_s: float
    hfu: float
    mfu: float
    tokens_per_s: float


def achieved(
    config: ModelConfig,
    *,
    batch: int,
    seq_len: int,
    gpus: int,
    seconds: float,
    peak_flops: float,
    recompute: Recompute,
) -> Achieved:
    """
    Utilisation of a step that took `seconds` on `gpus` devices of `peak_flops` each.

    `flops_per_s` and `hfu` count recomputation, `mfu` doesn't (arXiv 2205.05198, section 6).
    """
    device_seconds = gpus * seconds
    done = model_flops(config, batch=batch, seq_len=seq_len, recompute=recompute) / device_seconds
    needed = model_flops(config, batch=batch, seq_len=seq_len) / device_seconds
    return Achieved(done, done / peak_flops, needed / peak_flops, batch * seq_len / seconds)
