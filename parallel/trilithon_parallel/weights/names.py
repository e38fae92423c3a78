"""
One name table per model family: what Hugging Face files call a tensor, and what we call it. Imports no torch.

We have one canonical, unfused set for every family (the Llama names of Hugging Face); files keep the names that
`transformers` writes. The table says, for each canonical name, which file tensor holds it and how:

- `Direct`: as it stands.
- `Transposed`: stored as its transpose (GPT-2 keeps `[in, out]`).
- `Fused`: one of several equal parts, side by side in a transposed tensor (GPT-2's `c_attn` is `[in, q|k|v]`).

Reading and writing use the same table, so an export is the inverse of a load.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from trilithon_parallel.config import Family, ModelConfig


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


Source = Direct | Transposed | Fused

Slices = tuple[slice, ...]


def file_shape(source: Source, shape: Sequence[int]) -> tuple[int, ...]:
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


def file_slices(source: Source, shape: Sequence[int], slices: Slices) -> tuple[Slices, bool]:
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


@dataclass(frozen=True, slots=True)
class NameTable:
    """
    The names of one model.

    Attributes:
        sources: canonical name -> where it lies in the files, with global layer numbers; in file order.
        prefixes: what may stand before every file name; the first is what exports write.
        ignorable: file names, without prefix, that may be there and are left out: unused heads and buffers. `*`
            stands for a layer number.
    """

    sources: Mapping[str, Source]
    prefixes: tuple[str, ...]
    ignorable: frozenset[str]

    def is_ignorable(self, file_name: str) -> bool:
        """Whether a file tensor without a place in the model is known to be unneeded."""
        return any(
            file_name.startswith(prefix) and _numbers_starred(file_name[len(prefix) :]) in self.ignorable
            for prefix in (*self.prefixes, "")
        )


def name_table(config: ModelConfig) -> NameTable:
    """The names of a model: every parameter that its config implies, no other."""
    rules = _RULES[config.family]
    present = [rule for rule in rules.rules if rule.when(config)]
    sources: dict[str, Source] = {}
    for rule in present:
        for layer in _layers(rule, config):
            sources[rule.canonical.replace("*", layer)] = rule.source(layer)
    return NameTable(sources, rules.prefixes, rules.ignorable)


@dataclass(frozen=True, slots=True)
class _Rule:
    """`canonical` and `file`, with `*` for a layer number; `needs` names the config property that it depends on."""

    canonical: str
    file: str
    kind: str = "direct"
    part: int = 0
    needs: str = ""

    def source(self, layer: str) -> Source:
        file = self.file.replace("*", layer)
        if self.kind == "fused":
            return Fused(file, self.part, 3)
        return Transposed(file) if self.kind == "transposed" else Direct(file)

    def when(self, config: ModelConfig) -> bool:
        """Whether a model of this config has the tensor."""
        match self.needs:
            case "":
                return True
            case "untied":
                return not config.tied_embeddings
            case "token_types":
                return config.token_types > 0
            case flag:
                return bool(getattr(config, flag))


@dataclass(frozen=True, slots=True)
class _FamilyRules:
    rules: tuple[_Rule, ...]
    prefixes: tuple[str, ...]
    ignorable: frozenset[str]


def _layers(rule: _Rule, config: ModelConfig) -> Iterator[str]:
    if "*" in rule.canonical:
        yield from map(str, range(config.num_layers))
    else:
        yield ""


def _numbers_starred(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _pair(canonical: str, file: str, *, kind: str = "direct", bias_kind: str = "direct", part: int = 0) -> list[_Rule]:
    """A weight and its bias."""
    return [
        _Rule(f"{canonical}.weight", f"{file}.weight", kind, part),
        _Rule(f"{canonical}.bias", f"{file}.bias", bias_kind, part),
    ]


def _llama() -> _FamilyRules:
    rules = [_Rule("model.embed_tokens.weight", "model.embed_tokens.weight")]
    layer = "model.layers.*"
    rules.append(_Rule(f"{layer}.input_layernorm.weight", f"{layer}.input_layernorm.weight"))
    for part, bias in (
        ("self_attn.q_proj", "qkv_bias"),
        ("self_attn.k_proj", "qkv_bias"),
        ("self_attn.v_proj", "qkv_bias"),
        ("self_attn.o_proj", "out_bias"),
        ("mlp.gate_proj", "mlp_bias"),
        ("mlp.up_proj", "mlp_bias"),
        ("mlp.down_proj", "mlp_bias"),
    ):
        rules.append(_Rule(f"{layer}.{part}.weight", f"{layer}.{part}.weight"))
        rules.append(_Rule(f"{layer}.{part}.bias", f"{layer}.{part}.bias", needs=bias))
    rules.append(_Rule(f"{layer}.post_attention_layernorm.weight", f"{layer}.post_attention_layernorm.weight"))
    rules.append(_Rule("model.norm.weight", "model.norm.weight"))
    rules.append(_Rule("lm_head.weight", "lm_head.weight", needs="untied"))
    # Old conversions saved the rotary frequencies, which are computed. A tied head may be saved as a copy.
    return _FamilyRules(
        tuple(rules), ("",), frozenset({"model.layers.*.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"})
    )


def _gpt2() -> _FamilyRules:
    layer, file = "model.layers.*", "h.*"
    rules = [
        _Rule("model.embed_tokens.weight", "wte.weight"),
        _Rule("model.embed_positions.weight", "wpe.weight"),
        *_pair(f"{layer}.input_layernorm", f"{file}.ln_1"),
    ]
    for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
        rules += _pair(f"{layer}.self_attn.{name}", f"{file}.attn.c_attn", kind="fused", bias_kind="fused", part=part)
    rules += [
        *_pair(f"{layer}.self_attn.o_proj", f"{file}.attn.c_proj", kind="transposed"),
        *_pair(f"{layer}.post_attention_layernorm", f"{file}.ln_2"),
        *_pair(f"{layer}.mlp.up_proj", f"{file}.mlp.c_fc", kind="transposed"),
        *_pair(f"{layer}.mlp.down_proj", f"{file}.mlp.c_proj", kind="transposed"),
        *_pair("model.norm", "ln_f"),
        _Rule("lm_head.weight", "lm_head.weight", needs="untied"),
    ]
    # The first published files carry the causal mask as a buffer in every layer.
    return _FamilyRules(tuple(rules), ("transformer.", ""), frozenset({"h.*.attn.bias", "h.*.attn.masked_bias"}))


def _bert() -> _FamilyRules:
    layer, file = "model.layers.*", "encoder.layer.*"
    rules = [
        _Rule("model.embed_tokens.weight", "embeddings.word_embeddings.weight"),
        _Rule("model.embed_positions.weight", "embeddings.position_embeddings.weight"),
        _Rule("model.embed_token_types.weight", "embeddings.token_type_embeddings.weight", needs="token_types"),
        *_pair("model.embed_norm", "embeddings.LayerNorm"),
        *_pair(f"{layer}.self_attn.q_proj", f"{file}.attention.self.query"),
        *_pair(f"{layer}.self_attn.k_proj", f"{file}.attention.self.key"),
        *_pair(f"{layer}.self_attn.v_proj", f"{file}.attention.self.value"),
        *_pair(f"{layer}.self_attn.o_proj", f"{file}.attention.output.dense"),
        *_pair(f"{layer}.post_attention_layernorm", f"{file}.attention.output.LayerNorm"),
        *_pair(f"{layer}.mlp.up_proj", f"{file}.intermediate.dense"),
        *_pair(f"{layer}.mlp.down_proj", f"{file}.output.dense"),
        *_pair(f"{layer}.post_mlp_layernorm", f"{file}.output.LayerNorm"),
    ]
    # The pooler and the pretraining heads play no part in hidden states or sentence vectors.
    heads = {
        "pooler.dense.weight",
        "pooler.dense.bias",
        "embeddings.position_ids",
        "cls.predictions.bias",
        "cls.predictions.transform.dense.weight",
        "cls.predictions.transform.dense.bias",
        "cls.predictions.transform.LayerNorm.weight",
        "cls.predictions.transform.LayerNorm.bias",
        "cls.predictions.decoder.weight",
        "cls.predictions.decoder.bias",
        "cls.seq_relationship.weight",
        "cls.seq_relationship.bias",
    }
    return _FamilyRules(tuple(rules), ("", "bert."), frozenset(heads))


_RULES: Final[Mapping[Family, _FamilyRules]] = {"llama": _llama(), "gpt2": _gpt2(), "bert": _bert()}
