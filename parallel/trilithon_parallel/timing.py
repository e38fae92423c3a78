"""
How long a training step takes, by part: compute, tensor traffic, pipeline, bubble, data traffic, optimizer. No torch.

Compute is a roofline. Products run at `product_efficiency` of the peak; everything between them (norms, activations,
dropout, softmax) moves bytes, and what it moves forward is what the backward pass keeps, once written and once read.
So the rate falls as hidden size / tp does, and with attention that writes its scores out. The slowest stage, with the
head, sets the pace of a full pipeline; filling and draining it is the bubble. Letters as in `costs.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from trilithon_parallel.config import ModelConfig
from trilithon_parallel.costs import (
    NUM_ALL_REDUCES,
    PlannedLayout,
    data_elements,
    pipeline_elements,
    tensor_elements,
)
from trilithon_parallel.hardware import Hardware, HardwareError
from trilithon_parallel.memory import (
    ELEMENT_BYTES,
    GRADIENT_BYTES,
    Numerics,
    layer_parts,
    rank_layers,
    stage_parameters,
)
from trilithon_parallel.placement import local_sizes

# A stored activation is written once and read once.
_PASSES = 2.0
# Passes over the fp32 logits in the cross-entropy, forward and backward: cast, maximum, exponent, sum, gradient, cast.
_LOSS_PASSES = 6.0
# Bytes per parameter that a step moves. For every gradient: cleared. For every owned element: read for the norm 4,
# scaled 8, read 4, master and both moments read and written 24, the weight written 2.
_CLEAR_BYTES, _UPDATE_BYTES = 4.0, 42.0


@dataclass(frozen=True)
class StepTime:
    """
    Seconds of one optimizer step, by part; `total` is their sum.

    `compute`: products and elementwise work of the mean rank, recomputation included; `tensor`: its tensor-parallel
    collectives; `pipeline`: messages between stages; `imbalance`: waiting for the slowest stage; `bubble`: filling and
    draining; `data`: gradients (and with the distributed optimizer weights) over dp; `optimizer`: the update.
    """

    compute: float
    tensor: float
    pipeline: float
    imbalance: float
    bubble: float
    data: float
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return math.fsum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Traffic:
    """Bytes that the busiest rank sends in one step along each axis."""

    tensor: float
    pipeline: float
    data: float


def step_time(
    config: ModelConfig,
    layout: PlannedLayout,
    hardware: Hardware,
    numerics: Numerics,
    *,
    seq_len: int,
    global_batch: int,
    scatter_gather: bool = True,
) -> StepTime:
    """
    Predicted time of one step. All communication is exposed: none is assumed to hide behind compute.

    Raises:
        ModelError: `layout_invalid`, dp * micro-batch does not divide the global batch.
    """
    microbatches = layout.microbatches(global_batch)
    tokens = layout.micro_batch * seq_len
    layer_s = _layer_s(config, layout, hardware, numerics, seq_len)
    reduce_s = all_reduce_s(
        ELEMENT_BYTES[numerics.dtype] * tokens * config.hidden_size, layout.tp, hardware=hardware, stride=1
    )
    layer_tensor_s = NUM_ALL_REDUCES[layout.recompute] * reduce_s
    head_s = _head_s(config, layout, hardware, tokens=tokens)
    message_s = _messages_s(config, layout, hardware, numerics, seq_len, scatter_gather)
    first, last = (
        rank_layers(config.num_layers, pp=layout.pp, virtual=layout.virtual, pp_rank=rank)
        for rank in (0, layout.pp - 1)
    )
    # The embedding's and the head's all-reduce stand on the first and the last stage.
    mean_s = (config.num_layers * layer_s + head_s) / layout.pp
    mean_tensor_s = (config.num_layers * layer_tensor_s + 2 * reduce_s) / layout.pp
    ends = [first * (layer_s + layer_tensor_s) + reduce_s, last * (layer_s + layer_tensor_s) + head_s + reduce_s]
    slowest_s = max(ends) if layout.pp > 1 else mean_s + mean_tensor_s
    typical_s = mean_s + mean_tensor_s + message_s
    data_s, update_s = _update_s(config, layout, hardware, numerics)
    return StepTime(
        compute=microbatches * mean_s,
        tensor=microbatches * mean_tensor_s,
        pipeline=microbatches * message_s,
        imbalance=microbatches * (slowest_s - mean_s - mean_tensor_s),
        bubble=(layout.pp - 1) / layout.virtual * typical_s,
        data=data_s,
        optimizer=update_s,
    )


def traffic(
    config: ModelConfig, layout: PlannedLayout, numerics: Numerics, *, seq_len: int, global_batch: int
) -> Traffic:
    """What the busiest rank sends in one step: the volumes of `costs.py` times the bytes of an element."""
    element, microbatches = ELEMENT_BYTES[numerics.dtype], layout.microbatches(global_batch)
    layers = _rank_layers(config, layout, 0)
    per_layer = tensor_elements(
        config, micro_batch=layout.micro_batch, seq_len=seq_len, tp=layout.tp, recompute=layout.recompute
    )
    message = pipeline_elements(config, micro_batch=layout.micro_batch, seq_len=seq_len, tp=layout.tp)
    # Activations from every chunk and gradients from every chunk, but for the two ends of the pipeline.
    messages = 0 if layout.pp == 1 else 2 * layout.virtual - (layout.pp == 2)
    elements = data_elements(_parameters(config, layout), dp=layout.dp)
    per_element = (GRADIENT_BYTES + element) / 2 if layout.distributed_optimizer else GRADIENT_BYTES
    return Traffic(
        tensor=element * microbatches * layers * per_layer,
        pipeline=element * microbatches * messages * message,
        data=per_element * elements,
    )


def all_reduce_s(nbytes: float, size: int, *, hardware: Hardware, stride: int) -> float:
    """
    Seconds of a ring all-reduce of `nbytes` among `size` ranks that are `stride` apart in rank order.

    2 (size - 1) / size of the bytes pass each rank's link. Ranks of a group that share a node share their network
    links, so between nodes a group has as many as it has members on a node. A reduce-scatter or an all-gather takes
    half.
    """
    if size == 1:
        return 0.0
    members = min(size, max(1, hardware.devices_per_node // stride))
    bandwidth, nodes = hardware.intra_node_bandwidth, -(-size // members)
    if nodes > 1:
        bandwidth = min(bandwidth, members * hardware.inter_node_bandwidth)
    latency_s = (members - 1) * hardware.intra_node_latency_s + (nodes - 1) * hardware.inter_node_latency_s
    return 2.0 * (nbytes * (size - 1) / size / (bandwidth * hardware.link_efficiency) + latency_s)


@dataclass(frozen=True)
class MeasuredStep:
    """One step that was really run: what, and how many seconds it took."""

    config: ModelConfig
    layout: PlannedLayout
    numerics: Numerics
    seq_len: int
    global_batch: int
    seconds: float


def predicted_s(step: MeasuredStep, hardware: Hardware) -> float:
    """What `step_time` says of a step that was measured, in seconds."""
    return step_time(
        step.config, step.layout, hardware, step.numerics, seq_len=step.seq_len, global_batch=step.global_batch
    ).total


def fit_efficiencies(hardware: Hardware, steps: Sequence[MeasuredStep]) -> Hardware:
    """
    The hardware with the product and memory efficiencies that explain measured steps best (least squares).

    Two steps with different shares of products and elementwise work are enough: time is linear in the inverses of both.

    Raises:
        HardwareError: fewer than two steps, steps too alike, or times that no efficiency from 0 to 1 explains.
    """
    if len(steps) < 2:
        raise HardwareError(
            f"measured steps must be at least two. Given: {len(steps)}.", hint="Measure another model or layout."
        )
    # Rows [a, b, c]: a / product + b / memory + c = seconds, in shares of the seconds.
    rows = []
    for step in steps:
        at_one, half_product, half_memory = (
            predicted_s(step, replace(hardware, product_efficiency=product, memory_efficiency=memory)) / step.seconds
            for product, memory in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.5))
        )
        a, b = half_product - at_one, half_memory - at_one
        rows.append((a, b, 1.0 - (at_one - a - b)))
    aa, ab, bb = (math.fsum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    ay, by = (math.fsum(row[i] * row[2] for row in rows) for i in (0, 1))
    determinant = aa * bb - ab * ab
    if determinant <= 1e-6 * aa * bb:
        raise HardwareError(
            "measured steps are too alike to tell products from memory.", hint="Vary hidden size or tp."
        )
    inverses = (ay * bb - by * ab) / determinant, (by * aa - ay * ab) / determinant
    if min(inverses) < 1.0:
        raise HardwareError(
            "measured steps are not explained by efficiencies from 0 to 1. "
            f"Given: inverses {inverses[0]:.3g} (products) and {inverses[1]:.3g} (memory).",
            hint="Check peak_flops, memory_bandwidth and the links.",
        )
    return replace(hardware, product_efficiency=1 / inverses[0], memory_efficiency=1 / inverses[1])


def _product_rate(hardware: Hardware, tokens: int) -> float:
    return hardware.peak_flops * hardware.product_efficiency * tokens / (tokens + hardware.half_tokens)


def _layer_s(config: ModelConfig, layout: PlannedLayout, hardware: Hardware, numerics: Numerics, seq_len: int) -> float:
    """Compute of one layer and micro-batch: forward, twice that backward, and what is computed again."""
    sizes, tokens = local_sizes(config, layout.tp), layout.micro_batch * seq_len
    rate, bandwidth = _product_rate(hardware, tokens), hardware.memory_bandwidth * hardware.memory_efficiency
    width, kv_width = sizes.heads * config.head_dim, sizes.groups * config.head_dim
    weights = config.hidden_size * (2 * width + 2 * kv_width + sizes.ffn * (3 if config.gated_mlp else 2))
    attention_s = 4.0 * tokens * seq_len * width / rate
    linear, scores = layer_parts(config, layout, numerics, seq_len)
    scores_s = _PASSES * scores / bandwidth
    forward_s = 2.0 * tokens * weights / rate + attention_s + _PASSES * linear / bandwidth + scores_s
    again = {"none": 0.0, "selective": attention_s + scores_s, "full": forward_s}[layout.recompute]
    return 3 * forward_s + again


def _head_s(config: ModelConfig, layout: PlannedLayout, hardware: Hardware, *, tokens: int) -> float:
    """Logits, loss and their backward pass for one micro-batch."""
    if not config.has_head:
        return 0.0
    vocab = local_sizes(config, layout.tp).vocab
    loss_s = _LOSS_PASSES * 4 * tokens * vocab / (hardware.memory_bandwidth * hardware.memory_efficiency)
    return 6.0 * tokens * config.hidden_size * vocab / _product_rate(hardware, tokens) + loss_s


def _messages_s(
    config: ModelConfig,
    layout: PlannedLayout,
    hardware: Hardware,
    numerics: Numerics,
    seq_len: int,
    scatter_gather: bool,
) -> float:
    """One message forward and one backward for each chunk of a micro-batch; both directions of a link at once."""
    if layout.pp == 1:
        return 0.0
    is_near = layout.num_ranks <= hardware.devices_per_node
    bandwidth = hardware.intra_node_bandwidth if is_near else hardware.inter_node_bandwidth
    latency_s = hardware.intra_node_latency_s if is_near else hardware.inter_node_latency_s
    elements = pipeline_elements(
        config, micro_batch=layout.micro_batch, seq_len=seq_len, tp=layout.tp, scatter_gather=scatter_gather
    )
    message_s = ELEMENT_BYTES[numerics.dtype] * elements / (bandwidth * hardware.link_efficiency) + latency_s
    return 2 * layout.virtual * message_s


def _rank_layers(config: ModelConfig, layout: PlannedLayout, pp_rank: int) -> int:
    return rank_layers(config.num_layers, pp=layout.pp, virtual=layout.virtual, pp_rank=pp_rank)


def _parameters(config: ModelConfig, layout: PlannedLayout) -> int:
    layers = _rank_layers(config, layout, 0)
    return stage_parameters(config, tp=layout.tp, num_layers=layers, is_first=True, is_last=layout.pp == 1)


def _update_s(
    config: ModelConfig, layout: PlannedLayout, hardware: Hardware, numerics: Numerics
) -> tuple[float, float]:
    """(gradients over dp and the tied embedding's over its two stages, the optimizer's update) of a step."""
    parameters, shards = _parameters(config, layout), layout.dp if layout.distributed_optimizer else 1
    nbytes: float = GRADIENT_BYTES * parameters
    if layout.distributed_optimizer:
        nbytes = (GRADIENT_BYTES + ELEMENT_BYTES[numerics.dtype]) / 2 * parameters
    data_s = all_reduce_s(nbytes, layout.dp, hardware=hardware, stride=layout.tp)
    if layout.pp > 1 and config.has_head and config.tied_embeddings:
        table = GRADIENT_BYTES * local_sizes(config, layout.tp).vocab * config.hidden_size
        data_s += all_reduce_s(table, 2, hardware=hardware, stride=layout.tp * layout.dp)
    moved = parameters * (_CLEAR_BYTES + _UPDATE_BYTES / shards)
    return data_s, moved / (hardware.memory_bandwidth * hardware.memory_efficiency)
