"""
What an adapter is, by its small files: `adapter_config.json` of PEFT, and `trilithon.json` where the adapter is ours.
No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from trilithon_parallel.config import ModelConfig, ModelError
from trilithon_parallel.lora.files import CONFIG_FILE, FACTS_FILE, adapter_config
from trilithon_parallel.lora.peft_config import PeftConfig, invalid, parse_config
from trilithon_parallel.lora.spec import LoraSpec, products
from trilithon_parallel.weights.names import name_table


def foreign_spec(parsed: PeftConfig, config: ModelConfig, tensors: Sequence[str]) -> LoraSpec:
    """
    What an adapter from elsewhere is by its configuration, and by its tensors' names where that gives a pattern.

    Raises:
        ModelError: `adapter_unsupported`, a product is not adapted alike in every layer; `adapter_invalid`, none is.
    """
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    held = {key.rsplit(".lora_", 1)[0] for key in tensors}
    for leaf, modules in _modules(config).items():
        if parsed.targets is None:
            adapted = [m for m in modules if any(key.endswith(f".{m}") for key in held) and parsed.is_target(m)]
        else:
            adapted = [module for module in modules if parsed.is_target(module)]
        if not adapted:
            continue
        kinds = {(parsed.rank_of(module), parsed.alpha_of(module)) for module in adapted}
        if len(adapted) < len(modules) or len(kinds) > 1:
            rule = (
                "adapt it in all layers" if len(adapted) < len(modules) else "give it one rank and alpha in all layers"
            )
            raise ModelError(
                f"{CONFIG_FILE} of {leaf} must {rule}. Given: {len(adapted)} of {len(modules)} layers, (rank, alpha) "
                f"{sorted(kinds)!r:.100}.",
                code="adapter_unsupported",
                hint="Train it alike in every layer, or merge the adapter into its base with PEFT.",
            )
        ranks[leaf], alphas[leaf] = next(iter(kinds))
    if not ranks:
        raise invalid(CONFIG_FILE, "target_modules must name at least one product of the layers", sorted(held)[:3])
    return LoraSpec(
        parsed.rank,
        parsed.alpha,
        parsed.dropout,
        tuple(ranks),
        "fused" if config.family == "gpt2" else "per_projection",
        tuple((leaf, rank) for leaf, rank in ranks.items() if rank != parsed.rank),
        tuple((leaf, alpha) for leaf, alpha in alphas.items() if alpha != parsed.alpha),
    )


def own_spec(raw: Any, parsed: PeftConfig, config: ModelConfig) -> LoraSpec:
    """
    What `trilithon.json` says an adapter is, held against `adapter_config.json`.

    Raises:
        ModelError: `adapter_invalid`, a broken field or two files that disagree; `lora_invalid`, as `LoraSpec.check`.
    """
    names = {item.name for item in fields(LoraSpec)}
    patterns = ("rank_pattern", "alpha_pattern")
    if (
        not isinstance(raw, dict)
        or set(raw) != names
        or not all(
            isinstance(raw[name], list) and all(isinstance(item, list) and len(item) == 2 for item in raw[name])
            for name in patterns
        )
    ):
        raise invalid(FACTS_FILE, f"lora must have the fields {', '.join(sorted(names))}", raw)
    if not isinstance(raw["targets"], list) or not all(isinstance(leaf, str) for leaf in raw["targets"]):
        raise invalid(FACTS_FILE, "lora targets must list names", raw["targets"])
    pairs = {name: tuple((leaf, value) for leaf, value in raw[name]) for name in patterns}
    spec = LoraSpec(**(raw | pairs | {"targets": tuple(raw["targets"])}))
    try:
        spec.check(config)
        expected = parse_config(adapter_config(config, spec, base_model=""), config)
    except TypeError as error:
        raise invalid(FACTS_FILE, f"lora has a value of the wrong kind ({error})", raw) from None
    for modules in _modules(config).values():
        for module in modules:
            ours, theirs = (
                (item.rank_of(module), item.alpha_of(module)) if item.is_target(module) else None
                for item in (expected, parsed)
            )
            if ours != theirs:
                raise invalid(
                    CONFIG_FILE,
                    f"must give {module} the rank and alpha that {FACTS_FILE} means, {ours}",
                    theirs,
                    f"The two files are of different adapters: copy both from one place, or remove {FACTS_FILE}.",
                )
    return spec


def _modules(config: ModelConfig) -> dict[str, list[str]]:
    """Leaf name -> the paths of its modules, layer by layer."""
    table = name_table(config)
    found: dict[str, list[str]] = {}
    for leaf, (path, _, _) in products(config).items():
        names = [f"model.layers.{layer}.{path}.weight" for layer in range(config.num_layers)]
        found[leaf] = [table.spellings(table.sources[name].file_name)[0].removesuffix(".weight") for name in names]
    return found
