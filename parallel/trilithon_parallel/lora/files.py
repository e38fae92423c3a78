"""
Where an adapter's tensors lie in its files, and what its `adapter_config.json` says: the layout of PEFT. No torch.

    base_model.model.<the product's path in files>.lora_A.weight [R, in]      ....lora_B.weight [out, R]

Files name what `transformers` has, so a GPT-2's q, k and v are one module, `c_attn`, with one A and one B. Three
adapters of their own are written there side by side: their A one above the other, their B as blocks on the diagonal
with zeros beside them, which computes the same. Where they share one A (`fused`), it is the module's as it stands.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import JsonValue

from trilithon_parallel.config import Family, ModelConfig
from trilithon_parallel.lora.spec import SHARED, LoraSpec, lora_shapes, owner_name, parse_name, products
from trilithon_parallel.weights.names import Block, Direct, Place, name_table

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
FACTS_FILE = "trilithon.json"
TEMPLATE_FILE = "chat_template.jinja"

FACTS_FORMAT = 1
"""Of trilithon.json; a newer one is refused."""

PREFIX = "base_model.model."

# Leaf name -> what PEFT calls the module: the end of its path. Of a BERT "output.dense" ends two paths.
MODULES: Final[Mapping[Family, Mapping[str, str]]] = {
    "llama": {leaf: leaf for group in (*SHARED, ("o_proj",), ("down_proj",)) for leaf in group},
    "gpt2": {
        "q_proj": "c_attn",
        "k_proj": "c_attn",
        "v_proj": "c_attn",
        "o_proj": "attn.c_proj",
        "up_proj": "c_fc",
        "down_proj": "mlp.c_proj",
    },
    "bert": {
        "q_proj": "query",
        "k_proj": "key",
        "v_proj": "value",
        "o_proj": "attention.output.dense",
        "up_proj": "intermediate.dense",
        "down_proj": "output.dense",
    },
}


@dataclass(frozen=True)
class FileLayout:
    """
    The tensors of one adapter.

    Attributes:
        places: every name of `lora_shapes` -> where it lies.
        copies: an owned name -> where else its values stand: a shared A under the names of the other products.
        shapes: file tensor -> its shape.
        spellings: other names under which files from elsewhere hold a file tensor -> the one that is written.
    """

    places: Mapping[str, Place]
    copies: Mapping[str, tuple[Place, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    spellings: Mapping[str, str]


def file_layout(config: ModelConfig, spec: LoraSpec) -> FileLayout:
    """The layout of an adapter's tensors. Pure."""
    places: dict[str, Place] = {}
    copies: dict[str, tuple[Place, ...]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    spellings: dict[str, str] = {}
    table = name_table(config.without_lora())
    for name, shape in lora_shapes(config, spec).items():
        parsed = parse_name(name)
        assert parsed is not None
        product, leaf, half = parsed
        spelled = table.spellings(table.sources[f"{product}.weight"].file_name)
        file_name, *others = [f"{PREFIX}{weight.removesuffix('.weight')}.lora_{half}.weight" for weight in spelled]
        place: Place = Direct(file_name)
        if config.family == "gpt2" and leaf in SHARED[0]:
            place = _in_attention(file_name, leaf, half, shape, config, spec)
        places[name] = place
        shapes[file_name] = place.shape if isinstance(place, Block) else shape
        spellings |= dict.fromkeys(others, file_name)
        owner = owner_name(name, spec)
        if owner != name and place != places[owner]:
            copies[owner] = (*copies.get(owner, ()), place)
    return FileLayout(places, copies, shapes, spellings)


def _in_attention(
    file_name: str, leaf: str, half: str, shape: tuple[int, ...], config: ModelConfig, spec: LoraSpec
) -> Place:
    """Where one of q, k and v lies in the adapter of GPT-2's `c_attn`."""
    held = [other for other in SHARED[0] if other in spec.targets]
    if spec.layout == "fused":
        start, total = 0, spec.rank_of(leaf)
    else:
        start = sum(spec.rank_of(other) for other in held[: held.index(leaf)])
        total = sum(spec.rank_of(other) for other in held)
    if half == "A":
        return Direct(file_name) if total == shape[0] else Block(file_name, (total, shape[1]), (start, 0))
    part = SHARED[0].index(leaf)
    return Block(file_name, (len(SHARED[0]) * shape[0], total), (part * shape[0], start))


def adapter_config(config: ModelConfig, spec: LoraSpec, *, base_model: str) -> dict[str, JsonValue]:
    """The content of `adapter_config.json`, with which PEFT makes the modules that the tensors are for."""
    names = MODULES[config.family]
    ranks = {leaf: spec.rank_of(leaf) for leaf in products(config) if leaf in spec.targets}
    alphas = {leaf: spec.alpha_of(leaf) for leaf in ranks}
    held = [leaf for leaf in SHARED[0] if leaf in ranks]
    if config.family == "gpt2" and spec.layout == "per_projection" and held:
        total = sum(ranks[leaf] for leaf in held)
        alphas |= {leaf: alphas[leaf] * total / ranks[leaf] for leaf in held}
        ranks |= dict.fromkeys(held, total)
    # Of a BERT the longer name stands first: PEFT takes the first pattern that ends a path.
    by_rank = {names[leaf]: rank for leaf, rank in ranks.items()}
    by_alpha = {names[leaf]: _number(alpha) for leaf, alpha in alphas.items()}
    rank = spec.rank if len(set(by_rank.values())) > 1 else next(iter(by_rank.values()))
    alpha = _number(spec.alpha) if len(set(by_alpha.values())) > 1 else next(iter(by_alpha.values()))
    task = "CAUSAL_LM" if config.is_causal else "FEATURE_EXTRACTION" if config.architecture == "BertModel" else None
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base_model,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": spec.dropout,
        "target_modules": _target_modules(config, list(by_rank)),
        "rank_pattern": {} if set(by_rank.values()) == {rank} else dict(by_rank),
        "alpha_pattern": {} if set(by_alpha.values()) == {alpha} else dict(by_alpha),
        "bias": "none",
        "fan_in_fan_out": config.family == "gpt2",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def _target_modules(config: ModelConfig, names: list[str]) -> list[JsonValue]:
    """The modules by the ends of their paths; layer by layer where an end would take in another product as well."""
    longer, shorter = MODULES["bert"]["o_proj"], MODULES["bert"]["down_proj"]
    if config.family != "bert" or shorter not in names or longer in names:
        return list(names)
    by_layer = [f"layer.{layer}.{shorter}" for layer in range(config.num_layers)]
    return [*(name for name in names if name != shorter), *by_layer]


def _number(value: float) -> int | float:
    """PEFT's alpha is a whole number where it can be one."""
    return int(value) if float(value).is_integer() else value


def adapter_facts(spec: LoraSpec, facts: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """The content of `trilithon.json`: `facts`, and what PEFT's file can't say of the adapter."""
    lora: dict[str, JsonValue] = {
        "rank": spec.rank,
        "alpha": spec.alpha,
        "dropout": spec.dropout,
        "targets": list(spec.targets),
        "layout": spec.layout,
        "rank_pattern": [[leaf, rank] for leaf, rank in spec.rank_pattern],
        "alpha_pattern": [[leaf, alpha] for leaf, alpha in spec.alpha_pattern],
    }
    return {"format": FACTS_FORMAT, **facts, "lora": lora}


def small_files(
    config: ModelConfig, spec: LoraSpec, *, base_model: str, facts: Mapping[str, JsonValue]
) -> dict[str, bytes]:
    """File name -> content of an adapter directory's JSON files."""
    documents = {
        CONFIG_FILE: adapter_config(config, spec, base_model=base_model),
        FACTS_FILE: adapter_facts(spec, facts),
    }
    return {name: encoded(document) for name, document in documents.items()}


def encoded(document: Mapping[str, Any]) -> bytes:
    """A JSON file's bytes."""
    return (json.dumps(document, indent=2, allow_nan=False) + "\n").encode()
