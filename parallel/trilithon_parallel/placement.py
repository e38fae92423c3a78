"""
Where every parameter lives: one ordered rule table, read by trainer, loader, exporter and planner alike. No torch.

Canonical names are unfused, Hugging Face style, with global layer ids; they are the same on every rank, backend and
layout, for every family (GPT-2 and BERT are renamed to them when read):

    model.embed_tokens.weight  [V, H]                  model.embed_positions.weight [max_context, H]
    model.embed_types.weight   [token_types, H]        model.embed_norm.{weight,bias} [H]              (BERT)
    model.layers.N.self_attn.{q,k,v}_proj.{weight,bias}  [A*C | G*C | G*C, H]
    model.layers.N.self_attn.o_proj.{weight,bias}        [H, A*C]
    model.layers.N.mlp.{gate,up}_proj.{weight,bias}      [F, H]     (no gate where the MLP is not gated)
    model.layers.N.mlp.down_proj.{weight,bias}           [H, F]
    model.layers.N.input_layernorm.{weight,bias}         [H]        before attention (pre-norm families)
    model.layers.N.post_attention_layernorm.{weight,bias} [H]       before the MLP; BERT: after attention's residual
    model.layers.N.output_layernorm.{weight,bias}        [H]        BERT: after the MLP's residual
    model.norm.{weight,bias}   [H]                     lm_head.weight [V, H]
    lm_transform.{dense.weight [H, H], dense.bias, norm.weight, norm.bias [H]}, lm_head.bias [V]    masked-LM head
    task_head.{weight [L, H], bias [L]}, pooler.dense.{weight [H, H], bias [H]}     task head of L labels, its pooler
    task_head.{first.{weight [H, H], bias [H]}, last.weight [H, H], score.weight [1, H]}     task head of joint spans

An adapter's tensors are named after their products (`lora/spec.py`).

An encoder-decoder (T5) has two stacks, `encoder.` and `decoder.`, with layers as above; the decoder's have besides

    decoder.layers.N.cross_attn.{q,k,v,o}_proj.weight, decoder.layers.N.cross_attention_layernorm.weight (before it)
    {encoder,decoder}.relative_bias.weight [buckets, A]   {encoder,decoder}.norm.weight [H]

A reader of passages has besides, while it is trained, a scalar that is in no model's files, and the encoder that
chooses the passages (for models of one stage); an encoder of passages may have one of questions. Both have names as
above

    passage_strength [1]    retriever.*    query.*

Files hold true sizes. A rank's tensor may be padded: heads by whole zero groups, ffn and vocabulary by zero rows or
columns. Padding always follows the real part, so a rank's tensor is one slice of the file's tensor and then zeros.

Some tensors are needed on several pipeline stages. One stage owns such a tensor, the others hold copies under names of
their own (`lm_head.weight` where tied, `decoder.embed_tokens.weight`, `*.relative_bias_copy.weight`): no file has them,
`source_name` says whose values they take, and training sums the gradients of all (`shared_stages`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from trilithon_parallel.config import QUERY_DIR, RETRIEVER_DIR, ModelConfig, ModelError
from trilithon_parallel.shapes import STRENGTH, model_of
from trilithon_parallel.shapes import global_shapes as global_shapes  # part of what this module offers

Cut = Literal["q", "kv", "heads", "ffn", "vocab"]
Stage = Literal["first", "layer", "encoder_end", "decoder_start", "last"]

# The vocabulary is padded to a multiple of this times tp (Megatron-LM's `make_vocab_size_divisible_by`).
VOCAB_MULTIPLE = 128
# A long sum that tp cuts is made of at most so many terms (`sum_terms`): tp = 1, 2, 3, 4, 6 and 12 share their borders.
SUM_TERMS = 12


@dataclass(frozen=True)
class Placement:
    """
    One rule: the names it covers, along which dim and by what they are cut (None: replicated), and their stage.

    `is_whole`: every tp rank computes the whole gradient, under sequence parallelism too. `is_partial`: each computes a
    part of it, without sequence parallelism too.
    """

    pattern: re.Pattern[str]
    cut: Cut | None
    dim: int | None
    stage: Stage
    tied_to: str | None = None
    is_whole: bool = False
    is_partial: bool = False


def _rule(
    pattern: str,
    stage: Stage,
    cut: Cut | None = None,
    dim: int | None = None,
    tied_to: str | None = None,
    *,
    is_whole: bool = False,
    is_partial: bool = False,
) -> Placement:
    return Placement(re.compile(pattern), cut, dim, stage, tied_to, is_whole, is_partial)


_LAYER = r"model\.layers\.\d+\."
RULES: tuple[Placement, ...] = (
    _rule(r"model\.embed_tokens\.weight", "first", "vocab", 0),
    _rule(r"model\.embed_(positions|types)\.weight", "first"),
    _rule(r"model\.embed_norm\.(weight|bias)", "first"),
    _rule(_LAYER + r"self_attn\.q_proj\.(weight|bias)", "layer", "q", 0),
    _rule(_LAYER + r"self_attn\.[kv]_proj\.(weight|bias)", "layer", "kv", 0),
    _rule(_LAYER + r"self_attn\.o_proj\.weight", "layer", "q", 1),
    _rule(_LAYER + r"self_attn\.o_proj\.bias", "layer"),
    _rule(_LAYER + r"mlp\.(gate|up)_proj\.(weight|bias)", "layer", "ffn", 0),
    _rule(_LAYER + r"mlp\.down_proj\.weight", "layer", "ffn", 1),
    _rule(_LAYER + r"mlp\.down_proj\.bias", "layer"),
    _rule(_LAYER + r"(input|post_attention|output)_layernorm\.(weight|bias)", "layer"),
    _rule(r"model\.norm\.(weight|bias)", "last"),
    _rule(r"lm_head\.weight", "last", "vocab", 0, tied_to="model.embed_tokens.weight"),
)
MASKED_LM_RULES: tuple[Placement, ...] = (
    _rule(r"lm_transform\.(dense|norm)\.(weight|bias)", "last"),
    _rule(r"lm_head\.bias", "last", "vocab", 0),
)
# Small, so every rank has them whole and runs them over all tokens, those of other ranks' too (`is_whole`).
TASK_RULES: tuple[Placement, ...] = (
    _rule(r"task_head\.((first|last|score)\.)?(weight|bias)", "last", is_whole=True),
    _rule(r"pooler\.dense\.(weight|bias)", "last", is_whole=True),
)
# Of an adapter, the half that is cut follows its product's weight; every rank has the other one, and sees through it a
# part of what the ranks make together (`is_partial`).
LORA_RULES: tuple[Placement, ...] = (
    _rule(_LAYER + r"self_attn\.q_proj\.lora_B\.weight", "layer", "q", 0),
    _rule(_LAYER + r"self_attn\.[kv]_proj\.lora_B\.weight", "layer", "kv", 0),
    _rule(_LAYER + r"mlp\.(gate|up)_proj\.lora_B\.weight", "layer", "ffn", 0),
    _rule(_LAYER + r"self_attn\.o_proj\.lora_A\.weight", "layer", "q", 1),
    _rule(_LAYER + r"mlp\.down_proj\.lora_A\.weight", "layer", "ffn", 1),
    _rule(_LAYER + r"(self_attn\.[qkv]|mlp\.(gate|up))_proj\.lora_A\.weight", "layer", is_partial=True),
    _rule(_LAYER + r"(self_attn\.o|mlp\.down)_proj\.lora_B\.weight", "layer", is_partial=True),
)
_STACK = r"(encoder|decoder)\.layers\.\d+\."
SEQ2SEQ_RULES: tuple[Placement, ...] = (
    _rule(_STACK + r"(self|cross)_attn\.q_proj\.weight", "layer", "q", 0),
    _rule(_STACK + r"(self|cross)_attn\.[kv]_proj\.weight", "layer", "kv", 0),
    _rule(_STACK + r"(self|cross)_attn\.o_proj\.weight", "layer", "q", 1),
    _rule(_STACK + r"mlp\.(gate|up)_proj\.weight", "layer", "ffn", 0),
    _rule(_STACK + r"mlp\.down_proj\.weight", "layer", "ffn", 1),
    _rule(_STACK + r"(input|cross_attention|post_attention)_layernorm\.weight", "layer"),
    _rule(r"encoder\.relative_bias\.weight", "first", "heads", 1),
    _rule(r"encoder\.norm\.weight", "encoder_end"),
    _rule(r"decoder\.relative_bias\.weight", "decoder_start", "heads", 1),
    _rule(r"decoder\.norm\.weight", "last"),
)
READER_RULES: tuple[Placement, ...] = (_rule(STRENGTH, "last", is_whole=True),)
# Copies on other stages than their owner's; where they are, `stage_names` says.
COPY_RULES: tuple[Placement, ...] = (
    _rule(r"decoder\.embed_tokens\.weight", "decoder_start", "vocab", 0, tied_to="model.embed_tokens.weight"),
    _rule(r"encoder\.relative_bias_copy\.weight", "layer", "heads", 1, tied_to="encoder.relative_bias.weight"),
    _rule(r"decoder\.relative_bias_copy\.weight", "layer", "heads", 1, tied_to="decoder.relative_bias.weight"),
)


_BESIDE = re.compile(rf"^(({RETRIEVER_DIR}|{QUERY_DIR})\.)*")


def placement_of(name: str) -> Placement:
    """The one rule that covers a canonical name; KeyError where none does."""
    name = _BESIDE.sub("", name)
    for rule in (*RULES, *MASKED_LM_RULES, *TASK_RULES, *LORA_RULES, *SEQ2SEQ_RULES, *READER_RULES, *COPY_RULES):
        if rule.pattern.fullmatch(name):
            return rule
    raise KeyError(name)


@dataclass(frozen=True)
class LocalSizes:
    """What one tensor-parallel rank holds: padded, sharded sizes, equal on every rank."""

    heads: int
    groups: int
    ffn: int
    vocab: int
    # How many ranks hold the same key/value group (1 unless tp is above the number of groups and replication fits).
    kv_replicas: int
    # Key/value groups over all ranks, zero groups included and replicas counted once.
    padded_groups: int


def local_sizes(config: ModelConfig, tp: int) -> LocalSizes:
    """
    Sizes on each of `tp` ranks.

    tp <= groups: groups are padded to a multiple of tp. tp > groups: groups are replicated where tp / groups is whole
    and divides the query heads of a group, else padded to tp with zero groups.
    """
    groups, per_group = config.num_kv_heads, config.heads_per_group
    ffn, vocab = -(-config.ffn_size // tp), -(-config.vocab_size // (VOCAB_MULTIPLE * tp)) * VOCAB_MULTIPLE
    if tp > groups and tp % groups == 0 and per_group % (tp // groups) == 0:
        return LocalSizes(config.num_heads // tp, 1, ffn, vocab, tp // groups, groups)
    padded = -(-groups // tp) * tp
    return LocalSizes(padded // tp * per_group, padded // tp, ffn, vocab, 1, padded)


@dataclass(frozen=True)
class LocalSlice:
    """
    How a rank's tensor is made from the file's: allocate zeros of `shape`, copy `global[slices]` to its start.

    `slices` has one slice per dim of the global tensor (possibly empty, where a rank holds padding alone).
    """

    slices: tuple[slice, ...]
    shape: tuple[int, ...]

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Shape of `global[slices]`; the local tensor's leading corner of this shape receives it."""
        return tuple(s.stop - s.start for s in self.slices)


def local_slice(name: str, global_shape: tuple[int, ...], *, config: ModelConfig, tp: int, tp_rank: int) -> LocalSlice:
    """The part of the canonical tensor `name` that a tensor-parallel rank holds. Pure; KeyError for unknown names."""
    rule = placement_of(name)
    config = model_of(name, config)[1]
    whole = tuple(slice(0, size) for size in global_shape)
    if rule.cut is None or rule.dim is None:
        return LocalSlice(whole, tuple(global_shape))
    local, start = _extent(rule.cut, config, tp, tp_rank)
    true_size = global_shape[rule.dim]
    start = min(start, true_size)
    cut = slice(start, min(start + local, true_size))
    dim = rule.dim
    return LocalSlice((*whole[:dim], cut, *whole[dim + 1 :]), (*global_shape[:dim], local, *global_shape[dim + 1 :]))


def _extent(cut: Cut, config: ModelConfig, tp: int, tp_rank: int) -> tuple[int, int]:
    """(elements a rank holds along the cut dim, the first of them in the padded global tensor)."""
    sizes = local_sizes(config, tp)
    if cut == "ffn":
        return sizes.ffn, tp_rank * sizes.ffn
    if cut == "vocab":
        return sizes.vocab, tp_rank * sizes.vocab
    if cut == "heads":
        return sizes.heads, tp_rank * sizes.heads
    if cut == "q":
        return sizes.heads * config.head_dim, tp_rank * sizes.heads * config.head_dim
    first_group = tp_rank // sizes.kv_replicas * sizes.groups
    return sizes.groups * config.head_dim, first_group * config.head_dim


def sum_terms(cut: Cut, config: ModelConfig, *, tp: int, tp_rank: int) -> list[int]:
    """
    How a rank's share of a row-parallel product's inputs is cut into terms: their sizes, in order.

    The borders lie where the whole model has them, so a layout moves terms between ranks and leaves each as it is:
    where the terms are added exactly enough, every layout has the same sum (`layers.py`). A rank's border that is none
    of the model's (`tp` does not divide its heads or ffn by whole terms) cuts a term in two.
    """
    local, start = _extent(cut, config, tp, tp_rank)
    if cut == "ffn":
        term = config.ffn_size // math.gcd(config.ffn_size, SUM_TERMS)
    else:
        term = config.num_heads // math.gcd(config.num_heads, SUM_TERMS) * config.head_dim
    inner = range(start - start % term + term, start + local, term)
    return [stop - first for first, stop in pairwise([start, *inner, start + local])]


def stage_layers(num_layers: int, pp: int, counts: Sequence[int] | None = None) -> list[range]:
    """
    Layers of each of `pp` pipeline stages: `counts` says how many each has.

    None: as even as possible, the longer stages first (the last stage has the head to run).

    >>> stage_layers(5, 2)
    [range(0, 3), range(3, 5)]
    >>> stage_layers(5, 2, counts=(2, 3))
    [range(0, 2), range(2, 5)]
    """
    base, extra = divmod(num_layers, pp)
    counts = [base + (stage < extra) for stage in range(pp)] if counts is None else counts
    assert len(counts) == pp
    assert sum(counts) == num_layers
    starts = [sum(counts[:stage]) for stage in range(pp + 1)]
    return [range(starts[stage], starts[stage + 1]) for stage in range(pp)]


def source_name(name: str, config: ModelConfig) -> str:
    """The tensor in the files that fills the parameter `name`: its owner's, where it is a copy."""
    tied_to = placement_of(name).tied_to
    if tied_to is None or (name == "lm_head.weight" and not config.tied_embeddings):
        return name
    return tied_to


def stage_names(config: ModelConfig, *, pp: int, pp_rank: int, counts: Sequence[int] | None = None) -> list[str]:
    """
    Canonical names of the parameters that one stage holds, in a fixed order; `counts` as for `stage_layers`.

    A copy appears (filled from `source_name`) only where its owner lives on another stage; on one stage both are one
    parameter.
    """
    layers = stage_layers(config.num_layers, pp, counts)[pp_rank]
    first_layers = {"encoder_end": config.num_encoder_layers - 1, "decoder_start": config.num_encoder_layers}
    names = []
    for full_name in global_shapes(config):
        name, model = model_of(full_name, config)
        stage = placement_of(name).stage
        if model.is_seq2seq != config.is_seq2seq:
            keep = True  # a reader's retriever: there is one stage
        elif stage == "layer":
            keep = _layer_id(name, config) in layers
        elif stage in first_layers:
            keep = first_layers[stage] in layers
        else:
            keep = pp_rank == (0 if stage == "first" else pp - 1)
        if keep:
            names.append(full_name)
    return names + _copies(config, layers, pp_rank=pp_rank, is_last=pp_rank == pp - 1)


def _copies(config: ModelConfig, layers: range, *, pp_rank: int, is_last: bool) -> list[str]:
    names = []
    has_embedding = pp_rank == 0
    if config.is_seq2seq:
        start = config.num_encoder_layers
        if start in layers and pp_rank > 0:
            names.append("decoder.embed_tokens.weight")
            has_embedding = True
        if pp_rank > 0 and any(layer < start for layer in layers):
            names.append("encoder.relative_bias_copy.weight")
        if layers and layers[0] > start:
            names.append("decoder.relative_bias_copy.weight")
    if is_last and config.has_head and config.tied_embeddings and not has_embedding:
        names.append("lm_head.weight")
    return names


def shared_stages(
    config: ModelConfig, *, pp: int, counts: Sequence[int] | None = None
) -> Mapping[str, tuple[tuple[int, str], ...]]:
    """
    The tensors that several stages hold: owner's name -> (stage, name there) of each, the owner first. Pure.

    Every holder's gradient is a part of the tensor's: training sums them over these stages and steps each copy alike.
    """
    held: dict[str, list[tuple[int, str]]] = {}
    for stage in range(pp):
        for name in stage_names(config, pp=pp, pp_rank=stage, counts=counts):
            held.setdefault(source_name(name, config), []).append((stage, name))
    return {owner: tuple(places) for owner, places in held.items() if len(places) > 1}


def _layer_id(name: str, config: ModelConfig) -> int:
    """A layer's place in the order of stages: the decoder's layers follow the encoder's."""
    stack, _, layer, *_ = name.split(".")
    return int(layer) + (config.num_encoder_layers if stack == "decoder" else 0)


def check_layout(config: ModelConfig, *, tp: int, pp: int) -> None:
    """
    Refuse a layout that the model does not fit, before any process starts. Pure.

    Raises:
        ModelError: `layout_invalid`, with the values that are allowed.
    """
    if not 1 <= tp <= config.num_heads:
        raise ModelError(
            f"layout tp must be from 1 to the model's number of heads. Given: {tp}.",
            code="layout_invalid",
            hint=f"Allowed: 1 to {config.num_heads}.",
        )
    if not 1 <= pp <= config.num_layers:
        raise ModelError(
            f"layout pp must be from 1 to the model's number of layers. Given: {pp}.",
            code="layout_invalid",
            hint=f"Allowed: 1 to {config.num_layers}.",
        )
    if config.reads is not None and pp > 1:
        raise ModelError(
            f"layout pp must be 1 for a reader of passages. Given: {pp}.",
            code="layout_invalid",
            hint="Allowed: 1. Use tp or dp for more ranks.",
        )
    for model in config.beside.values():
        check_layout(model, tp=tp, pp=pp)


def layout_waste(config: ModelConfig, tp: int) -> float:
    """
    Share of attention work spent on zero groups at this tp, from 0 (none) up; the start-up log says it.

    Example: 3 groups at tp=2 are padded to 4, so a quarter of the attention work is padding.
    """
    sizes = local_sizes(config, tp)
    return 1.0 - config.num_kv_heads / sizes.padded_groups
