"""
One name table per model family: what Hugging Face files call a tensor, and what we call it. Imports no torch.

`placement.py` has the one canonical, unfused set for every family; files keep the names that `transformers` writes.
The table says, for each canonical name, which file tensor holds it and how:

- `Direct`: as it stands.
- `Transposed`: stored as its transpose (GPT-2 keeps `[in, out]`).
- `Fused`: one of several equal parts, side by side in a transposed tensor (GPT-2's `c_attn` is `[in, q|k|v]`).
- `Block`: a block of a larger tensor, zero elsewhere (adapters of GPT-2's `c_attn`).

Reading and writing use the same table, so an export is the inverse of a load.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from trilithon_parallel.config import Family, ModelConfig
from trilithon_parallel.placement import global_shapes


@dataclass(frozen=True, slots=True)
class Direct:
    """The file tensor is the canonical one."""

    file_name: str


@dataclass(frozen=True, slots=True)
class Transposed:
    """The file tensor is the transpose: `file[i, o] = canonical[o, i]`."""

    file_name: str


@dataclass(frozen=True, slots=True)
class Fused:
    """
    Part `part` of `parts` equal ones along the file's last dimension.

    Matrices are stored transposed as well: `file[i, part * rows + o] = canonical[o, i]`; vectors are plain.
    """

    file_name: str
    part: int
    parts: int


@dataclass(frozen=True, slots=True)
class Block:
    """
    The block of a larger file tensor that begins at `start`; where no block of it lies, the file tensor is zero.

    `shape` is the file tensor's.
    """

    file_name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]


Source = Direct | Transposed | Fused
Place = Source | Block

Slices = tuple[slice, ...]


def file_shape(source: Place, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape that the file tensor must have, from the canonical shape.

    >>> file_shape(Fused("c_attn.weight", 1, 3), (8, 4))
    (4, 24)
    """
    match source:
        case Direct():
            return tuple(shape)
        case Transposed():
            return tuple(reversed(shape))
        case Fused(parts=parts):
            return (*reversed(shape[1:]), shape[0] * parts)
        case Block(shape=whole):
            return whole


def file_slices(source: Place, shape: Sequence[int], slices: Slices) -> tuple[Slices, bool]:
    """
    Where a canonical block lies in the file tensor, and whether it must be transposed after reading.

    >>> file_slices(Fused("c_attn.weight", 1, 3), (8, 4), (slice(2, 4), slice(0, 4)))
    ((slice(0, 4, None), slice(10, 12, None)), True)

    Args:
        shape: the canonical shape of the whole tensor.
        slices: the block, in canonical dimensions.
    """
    match source:
        case Direct():
            return slices, False
        case Transposed():
            return tuple(reversed(slices)), len(slices) == 2
        case Fused(part=part):
            offset = part * shape[0]
            rows = slice(offset + slices[0].start, offset + slices[0].stop)
            return (*reversed(slices[1:]), rows), len(slices) == 2
        case Block(start=start):
            return tuple(slice(at + item.start, at + item.stop) for at, item in zip(start, slices, strict=True)), False


@dataclass(frozen=True, slots=True)
class NameTable:
    """
    The names of one model.

    Attributes:
        sources: canonical name -> where it lies in the files, for every tensor of `placement.global_shapes`.
        prefixes: what may stand before the trunk's file names; the first is what exports write.
        ignorable: file names, without prefix, that may be there and are left out: unused heads and buffers. `*`
            stands for a layer number.
    """

    sources: Mapping[str, Source]
    prefixes: tuple[str, ...]
    ignorable: frozenset[str]

    def spellings(self, file_name: str) -> tuple[str, ...]:
        """Every way in which published files spell a name; exports write the first."""
        prefixes = ("",) if file_name.startswith(_HEADS) else self.prefixes
        named = tuple(prefix + file_name for prefix in prefixes)
        # The first BERT files, converted from TensorFlow, kept its names for gain and shift.
        older = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        return named + tuple(
            name.removesuffix(new) + old for name in named for new, old in older.items() if name.endswith(new)
        )

    def is_ignorable(self, file_name: str) -> bool:
        """Whether a file tensor without a place in the model is known to be unneeded."""
        return any(
            file_name.startswith(prefix) and _star_layers(file_name[len(prefix) :]) in self.ignorable
            for prefix in (*self.prefixes, "")
        )


def name_table(config: ModelConfig, *, also: Iterable[str] = ()) -> NameTable:
    """The names of a model: every tensor that its config implies, and those of `also`; no other."""
    family = _GATED_T5 if config.is_seq2seq and config.gated_mlp else _FAMILIES[config.family]
    sources: dict[str, Source] = {}
    for name in (*global_shapes(config), *also):
        layer = name.split(".")[2] if ".layers." in name else ""
        rule = family.rules[_star_layers(name)]
        if name.startswith("task_head.") and config.task_head is not None and config.task_head.kind == "span":
            rule = Direct(name.replace("task_head", "qa_outputs"))
        file = rule.file_name.replace("*", layer)
        sources[name] = Fused(file, rule.part, rule.parts) if isinstance(rule, Fused) else type(rule)(file)
    # A bare BERT has no prefix where it is exported, one beside a head has.
    has_head = config.mlm_head or config.task_head is not None
    prefixes = family.prefixes[::-1] if has_head else family.prefixes
    return NameTable(sources, prefixes, family.ignorable)


_HEADS = (
    "lm_head.",
    "cls.",
    "classifier.",
    "qa_outputs.",
)  # heads stand beside the trunk, so the trunk's prefix is not theirs


@dataclass(frozen=True, slots=True)
class _Family:
    """`rules` maps canonical to file names, with `*` for a layer number on both sides."""

    rules: Mapping[str, Source]
    prefixes: tuple[str, ...]
    ignorable: frozenset[str]


def _star_layers(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _both(canonical: str, file: str) -> dict[str, Source]:
    """A weight and its bias, as they stand."""
    return {f"{canonical}.{part}": Direct(f"{file}.{part}") for part in ("weight", "bias")}


def _conv1d(canonical: str, file: str) -> dict[str, Source]:
    """GPT-2's linear layer: weight stored as its transpose."""
    return {f"{canonical}.weight": Transposed(f"{file}.weight"), f"{canonical}.bias": Direct(f"{file}.bias")}


def _llama() -> _Family:
    layer = "model.layers.*"
    rules: dict[str, Source] = {}
    for name in (
        "model.embed_tokens",
        f"{layer}.input_layernorm",
        *(f"{layer}.self_attn.{part}_proj" for part in "qkvo"),
        f"{layer}.post_attention_layernorm",
        *(f"{layer}.mlp.{part}_proj" for part in ("gate", "up", "down")),
        "model.norm",
        "model.embed_types",
        "lm_head",
    ):
        rules |= _both(name, name)
    # Old conversions saved the rotary frequencies, which are computed.
    ignorable = {"model.layers.*.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"}
    return _Family(rules, ("",), frozenset(ignorable))


def _gpt2() -> _Family:
    layer, file = "model.layers.*", "h.*"
    rules: dict[str, Source] = {
        "model.embed_tokens.weight": Direct("wte.weight"),
        "model.embed_positions.weight": Direct("wpe.weight"),
        "model.embed_types.weight": Direct("wtt.weight"),
        "lm_head.weight": Direct("lm_head.weight"),
    }
    for i, part in enumerate("qkv"):
        for kind in ("weight", "bias"):
            rules[f"{layer}.self_attn.{part}_proj.{kind}"] = Fused(f"{file}.attn.c_attn.{kind}", i, 3)
    rules |= _conv1d(f"{layer}.self_attn.o_proj", f"{file}.attn.c_proj")
    rules |= _conv1d(f"{layer}.mlp.up_proj", f"{file}.mlp.c_fc")
    rules |= _conv1d(f"{layer}.mlp.down_proj", f"{file}.mlp.c_proj")
    rules |= _both(f"{layer}.input_layernorm", f"{file}.ln_1")
    rules |= _both(f"{layer}.post_attention_layernorm", f"{file}.ln_2")
    rules |= _both("model.norm", "ln_f")
    # The first published files carry the causal mask as a buffer in every layer.
    return _Family(rules, ("transformer.", ""), frozenset({"h.*.attn.bias", "h.*.attn.masked_bias"}))


def _bert() -> _Family:
    layer, file = "model.layers.*", "encoder.layer.*"
    rules: dict[str, Source] = {
        "model.embed_tokens.weight": Direct("embeddings.word_embeddings.weight"),
        "model.embed_positions.weight": Direct("embeddings.position_embeddings.weight"),
        "model.embed_types.weight": Direct("embeddings.token_type_embeddings.weight"),
    }
    rules |= _both("model.embed_norm", "embeddings.LayerNorm")
    for part, name in (("q", "query"), ("k", "key"), ("v", "value")):
        rules |= _both(f"{layer}.self_attn.{part}_proj", f"{file}.attention.self.{name}")
    rules |= _both(f"{layer}.self_attn.o_proj", f"{file}.attention.output.dense")
    rules |= _both(f"{layer}.post_attention_layernorm", f"{file}.attention.output.LayerNorm")
    rules |= _both(f"{layer}.mlp.up_proj", f"{file}.intermediate.dense")
    rules |= _both(f"{layer}.mlp.down_proj", f"{file}.output.dense")
    rules |= _both(f"{layer}.output_layernorm", f"{file}.output.LayerNorm")
    rules |= _both("lm_transform.dense", "cls.predictions.transform.dense")
    rules |= _both("lm_transform.norm", "cls.predictions.transform.LayerNorm")
    rules["lm_head.bias"] = Direct("cls.predictions.bias")
    rules |= _both("pooler.dense", "pooler.dense") | _both("task_head", "classifier")
    for part in ("first", "last", "score"):
        rules |= _both(f"task_head.{part}", f"classifier.{part}")
    # The pooler and the pretraining heads play no part in hidden states or sentence vectors: where the model has no
    # masked-LM head they are left out. The head's matrix is the embedding, of which some files keep a copy.
    ignorable = {"embeddings.position_ids", "cls.predictions.bias"} | {
        f"{part}.{kind}"
        for part in (
            "pooler.dense",
            "cls.predictions.transform.dense",
            "cls.predictions.transform.LayerNorm",
            "cls.predictions.decoder",
            "cls.seq_relationship",
        )
        for kind in ("weight", "bias", "gamma", "beta")
    }
    return _Family(rules, ("", "bert."), frozenset(ignorable))


def _t5(gate_and_up: dict[str, str]) -> _Family:
    rules: dict[str, Source] = {
        "model.embed_tokens.weight": Direct("shared.weight"),
        "lm_head.weight": Direct("lm_head.weight"),
    }
    # The parts of a block by their number in it, and the norm that stands before each.
    encoder = (("self_attn", "SelfAttention", "input"), ("mlp", "DenseReluDense", "post_attention"))
    decoder = (encoder[0], ("cross_attn", "EncDecAttention", "cross_attention"), encoder[1])
    for stack, parts in (("encoder", encoder), ("decoder", decoder)):
        layer, file = f"{stack}.layers.*", f"{stack}.block.*.layer"
        for number, (ours, theirs, norm) in enumerate(parts):
            rules[f"{layer}.{norm}_layernorm.weight"] = Direct(f"{file}.{number}.layer_norm.weight")
            for part in "qkvo" if ours != "mlp" else "":
                rules[f"{layer}.{ours}.{part}_proj.weight"] = Direct(f"{file}.{number}.{theirs}.{part}.weight")
        mlp = f"{file}.{len(parts) - 1}.DenseReluDense"
        for ours, theirs in (gate_and_up | {"down": "wo"}).items():
            rules[f"{layer}.mlp.{ours}_proj.weight"] = Direct(f"{mlp}.{theirs}.weight")
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        rules[f"{stack}.relative_bias.weight"] = Direct(table)
        rules[f"{stack}.norm.weight"] = Direct(f"{stack}.final_layer_norm.weight")
    # Copies of `shared`; and a table of cross-attention's that the first files carry and nothing reads.
    unread = "decoder.block.*.layer.*.EncDecAttention.relative_attention_bias.weight"
    return _Family(rules, ("",), frozenset({"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", unread}))


_FAMILIES: Final[Mapping[Family, _Family]] = {
    "llama": _llama(),
    "gpt2": _gpt2(),
    "bert": _bert(),
    "t5": _t5({"up": "wi"}),
}
_GATED_T5: Final = _t5({"gate": "wi_0", "up": "wi_1"})
