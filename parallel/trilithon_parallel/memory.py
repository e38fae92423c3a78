"""
How many bytes training keeps on one rank, by part. No torch.

Stored activations are counted as in "Reducing Activation Recomputation" (arXiv 2205.05198, section 4), from the sizes
that a rank really holds (`placement.local_sizes`), so grouped heads, gated MLPs and zero padding are in the count.
Letters as in `costs.py`; F ffn size, e bytes of an element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from trilithon_parallel.config import ModelConfig
from trilithon_parallel.costs import PlannedLayout, in_flight
from trilithon_parallel.placement import global_shapes, local_sizes, local_slice, placement_of

# Bytes of a weight or an activation; of the fp32 gradient of a weight; of its fp32 master copy and two Adam moments.
# In fp32 training the weight is its own master.
ELEMENT_BYTES = {"bfloat16": 2, "float32": 4}
GRADIENT_BYTES = 4
OPTIMIZER_BYTES = {"bfloat16": 12, "float32": 8}


@dataclass(frozen=True)
class Numerics:
    """
    What decides the bytes of an activation.

    `fused_attention`: scores and probabilities never reach memory (flash or memory-efficient attention), which leaves
    selective recomputation little to save (Megatron-LM#1225). `regathers_inputs`: with sequence parallelism the inputs
    of column-parallel products are kept cut and gathered again in the backward pass, as arXiv 2205.05198 does; this
    core keeps them whole.
    """

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    dropout: bool = False
    fused_attention: bool = True
    regathers_inputs: bool = False


# The numerics of the papers' GPT: dropout everywhere, scores written out.
PAPER_NUMERICS = Numerics(dropout=True, fused_attention=False, regathers_inputs=True)


@dataclass(frozen=True)
class Memory:
    """
    Bytes on one rank of a stage.

    `activations`: kept from forward to backward, over all micro-batches in flight; `working`: what recomputation makes
    again, one layer at a time; `ends`: token ids, embedding dropout, final norm, logits.
    """

    stage: Literal["first", "last"]
    weights: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    ends: float

    @property
    def total(self) -> float:
        """All parts together."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.working + self.ends


def stage_parameters(config: ModelConfig, *, tp: int, num_layers: int, is_first: bool, is_last: bool) -> int:
    """
    Parameters that one rank of a stage with `num_layers` layers holds, padding included; of an encoder-decoder, whose
    layers are of two kinds, all that there are.
    """
    if config.is_seq2seq:
        shapes = global_shapes(config).items()
        return sum(math.prod(local_slice(name, size, config=config, tp=tp, tp_rank=0).shape) for name, size in shapes)
    layer, first, last = _local_counts(config, tp)
    count = num_layers * layer + is_first * first + is_last * last
    if is_last and not is_first and config.has_head and config.tied_embeddings:
        count += local_sizes(config, tp).vocab * config.hidden_size
    return count


def formula_stage_parameters(config: ModelConfig, *, tp: int, pp: int) -> float:
    """((12 h^2 + 13 h) l / p + (V + s) h) / t: the first stage of a GPT, everything cut evenly."""
    hidden = config.hidden_size
    layers = (12 * hidden**2 + 13 * hidden) * config.num_layers / pp
    return (layers + (config.vocab_size + config.max_context) * hidden) / tp


def bytes_per_parameter(layout: PlannedLayout, numerics: Numerics) -> float:
    """18 in bf16; with the distributed optimizer 6 + 12 / d (fp32: 16, and 8 + 8 / d)."""
    shards = layout.dp if layout.distributed_optimizer else 1
    return ELEMENT_BYTES[numerics.dtype] + GRADIENT_BYTES + OPTIMIZER_BYTES[numerics.dtype] / shards


def layer_parts(config: ModelConfig, layout: PlannedLayout, numerics: Numerics, seq_len: int) -> tuple[float, float]:
    """
    What one layer makes in the forward pass of one micro-batch: (bytes that grow with tokens, those with their square).

    The first is s b h (10 + 24/t) or s b h 34/t, the second 5 a b s^2 / t for a GPT in bf16 with dropout; 0 where
    attention is fused.
    """
    element, sizes = ELEMENT_BYTES[numerics.dtype], local_sizes(config, layout.tp)
    tokens = layout.micro_batch * seq_len
    # Inputs of both norms and two dropout masks of one byte; inputs of q/k/v and of the MLP.
    whole = config.hidden_size * (2 * element + 2 * numerics.dropout) / _sequence_shards(layout)
    whole += config.hidden_size * 2 * element / _input_shards(layout, numerics)
    # q, k, v and the input of the output projection; up (and gate), and the input of down.
    attention = (2 * sizes.heads + 2 * sizes.groups) * config.head_dim
    cut = element * (attention + sizes.ffn * (3 if config.gated_mlp else 2))
    linear = tokens * (whole + cut)
    if numerics.fused_attention:
        return linear, 0.0
    # Probabilities; with dropout their mask and the dropped copy too.
    per_score = 2 * element + 1 if numerics.dropout else element
    return linear, float(per_score * sizes.heads * seq_len * tokens)


def stored_layer_bytes(config: ModelConfig, layout: PlannedLayout, numerics: Numerics, *, seq_len: int) -> float:
    """
    Activations that one layer keeps for the backward pass of one micro-batch on one rank.

    For a GPT in bf16 with dropout and unfused attention: s b h (10 + 24/t + 5 a s / (h t)) with "none"; with sequence
    parallelism s b h / t (34 + 5 a s / h); "selective" drops the last term; "full" keeps 2 s b h (/ t).
    """
    if layout.recompute == "full":
        tokens = layout.micro_batch * seq_len
        return ELEMENT_BYTES[numerics.dtype] * tokens * config.hidden_size / _sequence_shards(layout)
    linear, scores = layer_parts(config, layout, numerics, seq_len)
    return linear if layout.recompute == "selective" else linear + scores


def working_layer_bytes(config: ModelConfig, layout: PlannedLayout, numerics: Numerics, *, seq_len: int) -> float:
    """What recomputation makes again at a time: the scores of one layer, or all of it."""
    linear, scores = layer_parts(config, layout, numerics, seq_len)
    return {"none": 0.0, "selective": scores, "full": linear + scores}[layout.recompute]


def stage_memory(
    config: ModelConfig,
    layout: PlannedLayout,
    numerics: Numerics,
    *,
    seq_len: int,
    microbatches: int,
    stage: Literal["first", "last"],
) -> Memory:
    """
    Bytes on a rank of the first or the last pipeline rank.

    The first keeps the most micro-batches in flight and the embedding, the last has the logits.
    """
    is_first, is_last = stage == "first" or layout.pp == 1, stage == "last" or layout.pp == 1
    pp_rank = 0 if stage == "first" else layout.pp - 1
    layers = rank_layers(config.num_layers, pp=layout.pp, virtual=layout.virtual, pp_rank=pp_rank)
    parameters = stage_parameters(config, tp=layout.tp, num_layers=layers, is_first=is_first, is_last=is_last)
    kept = in_flight(layout.schedule, pp=layout.pp, pp_rank=pp_rank, microbatches=microbatches, virtual=layout.virtual)
    shards = layout.dp if layout.distributed_optimizer else 1
    ends = is_first * _embedding_bytes(config, layout, numerics, seq_len)
    ends += is_last * _head_bytes(config, layout, numerics, seq_len)
    return Memory(
        stage=stage,
        weights=ELEMENT_BYTES[numerics.dtype] * parameters,
        gradients=GRADIENT_BYTES * parameters,
        optimizer=OPTIMIZER_BYTES[numerics.dtype] * parameters / shards,
        activations=kept * layers * stored_layer_bytes(config, layout, numerics, seq_len=seq_len),
        working=working_layer_bytes(config, layout, numerics, seq_len=seq_len),
        ends=kept * ends,
    )


def peak_memory(
    config: ModelConfig, layout: PlannedLayout, numerics: Numerics, *, seq_len: int, microbatches: int
) -> Memory:
    """The fuller of the first and the last pipeline rank."""
    first, last = (
        stage_memory(config, layout, numerics, seq_len=seq_len, microbatches=microbatches, stage=stage)
        for stage in ("first", "last")
    )
    return first if first.total >= last.total else last


def rank_layers(num_layers: int, *, pp: int, virtual: int, pp_rank: int) -> int:
    """
    Layers of one pipeline rank, over its chunks: stage k = chunk * pp + rank, the longer stages first.

    >>> [rank_layers(10, pp=4, virtual=2, pp_rank=rank) for rank in range(4)]
    [3, 3, 2, 2]
    """
    base, extra = divmod(num_layers, pp * virtual)
    return base * virtual + len(range(pp_rank, extra, pp))


def _sequence_shards(layout: PlannedLayout) -> int:
    return layout.tp if layout.sequence_parallel else 1


def _input_shards(layout: PlannedLayout, numerics: Numerics) -> int:
    return _sequence_shards(layout) if numerics.regathers_inputs else 1


def _embedding_bytes(config: ModelConfig, layout: PlannedLayout, numerics: Numerics, seq_len: int) -> float:
    """int64 ids, and the mask of the embedding's dropout."""
    tokens = layout.micro_batch * seq_len
    return tokens * (8 + numerics.dropout * config.hidden_size / _sequence_shards(layout))


def _head_bytes(config: ModelConfig, layout: PlannedLayout, numerics: Numerics, seq_len: int) -> float:
    """Inputs of the final norm and of the head, and the logits in fp32: 4 s b h (1 + V / h) / t in bf16."""
    if not config.has_head:
        return 0.0
    tokens = layout.micro_batch * seq_len
    shares = 1 / _sequence_shards(layout) + 1 / _input_shards(layout, numerics)
    inputs = ELEMENT_BYTES[numerics.dtype] * config.hidden_size * shares
    return tokens * (inputs + 4 * local_sizes(config, layout.tp).vocab)


@cache
def _local_counts(config: ModelConfig, tp: int) -> tuple[int, int, int]:
    """Parameters of (one layer, the embedding, norm and head) on one tensor-parallel rank; the padded shapes."""
    counts = {"layer": 0, "first": 0, "last": 0}
    for name, shape in global_shapes(replace(config, num_layers=1)).items():
        counts[placement_of(name).stage] += math.prod(local_slice(name, shape, config=config, tp=tp, tp_rank=0).shape)
    return counts["layer"], counts["first"], counts["last"]
