"""
What a low-rank adapter is (LoRA, arXiv 2106.09685): y = W x + b + scale * B (A x), with W and b frozen. No torch.

A is [R, in] and B [out, R], one pair for each adapted product of each layer, named after the product:

    model.layers.N.self_attn.{q,k,v,o}_proj.lora_{A,B}.weight
    model.layers.N.mlp.{gate,up,down}_proj.lora_{A,B}.weight

With the `fused` layout the products of one input share one A. It is then a parameter of the first of them alone
(`owner_of`); files have it under each name.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trilithon_parallel.fields import ModelError

if TYPE_CHECKING:
    from trilithon_parallel.config import ModelConfig

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Leaf names of the products that may be adapted; a model without a gate has no `gate_proj`."""

ROW_PARALLEL = ("o_proj", "down_proj")
"""The products whose inputs are cut by tp: their A is sharded, their B replicated; of the others it is the reverse."""

SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Products of one input: with the `fused` layout each group has one A."""

Layout = Literal["per_projection", "fused"]
Half = Literal["A", "B"]

_NAME = re.compile(r"(model\.layers\.\d+\.(?:self_attn|mlp)\.(\w+_proj))\.lora_([AB])\.weight")


@dataclass(frozen=True)
class LoraSpec:
    """
    One adapter's description.

    Attributes:
        rank: rows of A, from 1.
        alpha: above 0; a product gains alpha / rank times B (A x).
        dropout: share of the adapter's input that is dropped while training, 0 <= share < 1.
        targets: leaf names out of `TARGETS`.
        layout: `fused`, q, k and v share one A, and gate and up another; `per_projection`, each has its own.
        rank_pattern, alpha_pattern: (leaf name, value) where a product's differs.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS
    layout: Layout = "per_projection"
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()

    def rank_of(self, leaf: str) -> int:
        """The rank of the product named `leaf`."""
        return dict(self.rank_pattern).get(leaf, self.rank)

    def alpha_of(self, leaf: str) -> float:
        """Its alpha."""
        return dict(self.alpha_pattern).get(leaf, self.alpha)

    def scale_of(self, leaf: str) -> float:
        """Its alpha / rank."""
        return self.alpha_of(leaf) / self.rank_of(leaf)

    def owner_of(self, leaf: str) -> str:
        """The leaf that names the A of `leaf`: its own, or its group's first target where they share one."""
        group = next((group for group in SHARED if leaf in group), (leaf,))
        return leaf if self.layout == "per_projection" else next(name for name in group if name in self.targets)

    def described(self) -> dict[str, tuple[int, float, str]]:
        """What its tensors are: leaf name -> (rank, alpha, leaf that names its A). Dropout is not part of it."""
        return {leaf: (self.rank_of(leaf), self.alpha_of(leaf), self.owner_of(leaf)) for leaf in self.targets}

    def check(self, config: ModelConfig) -> None:
        """
        Refuse a description that does not fit the model. Pure.

        Raises:
            ModelError: `lora_invalid`: an unknown target, one that the model lacks, a rank, alpha or dropout out of its
                range, a pattern without its target, a shared A of two ranks.
        """
        if config.is_seq2seq:
            raise _invalid("model must be a decoder or an encoder", config.architecture, "Finetune all of it instead.")
        if config.has_twin:
            raise _invalid("model must be one encoder", "two", "Finetune all of them instead.")
        self._check_targets(config)
        self._check_numbers()
        for field, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            names = [leaf for leaf, _ in pattern]
            if strange := [leaf for leaf in names if leaf not in self.targets or names.count(leaf) > 1]:
                raise _invalid(
                    f"{field} must name targets, each once", strange[0], f"Targets: {', '.join(self.targets)}."
                )
        for group in SHARED:
            held = [leaf for leaf in group if leaf in self.targets]
            if self.layout == "fused" and len({self.rank_of(leaf) for leaf in held}) > 1:
                raise _invalid(
                    f"layout fused gives {', '.join(held)} one A, so one rank",
                    {leaf: self.rank_of(leaf) for leaf in held},
                    "Use one rank for them, or layout per_projection.",
                )
        attention = [leaf for leaf in SHARED[0] if leaf in self.targets]
        if config.family == "gpt2" and len({self.scale_of(leaf) for leaf in attention}) > 1:
            raise _invalid(
                f"{', '.join(attention)} of a GPT-2 are one product in files, so they need one alpha / rank",
                {leaf: self.scale_of(leaf) for leaf in attention},
                "Give them equal alpha / rank.",
            )

    def _check_targets(self, config: ModelConfig) -> None:
        allowed = targets_of(config)
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise _invalid("targets must name each product once, at least one", self.targets, f"Allowed: {allowed}.")
        for leaf in self.targets:
            if leaf in allowed:
                continue
            listed = f"Allowed: {', '.join(allowed)}."
            if leaf in TARGETS:
                raise _invalid(f"target is not a product of a {config.architecture}", leaf, listed)
            near = difflib.get_close_matches(leaf, allowed, n=1)
            raise _invalid("target is unknown", leaf, f"Did you mean {near[0]}? {listed}" if near else listed)

    def _check_numbers(self) -> None:
        for leaf in self.targets:
            rank, alpha = self.rank_of(leaf), self.alpha_of(leaf)
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise _invalid(f"rank of {leaf} must be a whole number from 1", rank, "16 is a good start.")
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
                raise _invalid(f"alpha of {leaf} must be a number above 0", alpha, "Twice the rank is a good start.")
        if not 0.0 <= self.dropout < 1.0:
            raise _invalid("dropout must be from 0 to below 1", self.dropout, "0 drops nothing.")
        if self.layout not in ("per_projection", "fused"):
            raise _invalid("layout is unknown", self.layout, "Allowed: per_projection, fused.")


def _invalid(rule: str, given: object, hint: str) -> ModelError:
    return ModelError(f"lora {rule}. Given: {given!r}.", code="lora_invalid", hint=hint)


def products(config: ModelConfig) -> Mapping[str, tuple[str, int, int]]:
    """Leaf name -> (path within a layer, outputs, inputs) of the products of every layer."""
    hidden, width = config.hidden_size, config.num_heads * config.head_dim
    kv_width, ffn = config.num_kv_heads * config.head_dim, config.ffn_size
    found = {
        "q_proj": ("self_attn.q_proj", width, hidden),
        "k_proj": ("self_attn.k_proj", kv_width, hidden),
        "v_proj": ("self_attn.v_proj", kv_width, hidden),
        "o_proj": ("self_attn.o_proj", hidden, width),
        "gate_proj": ("mlp.gate_proj", ffn, hidden),
        "up_proj": ("mlp.up_proj", ffn, hidden),
        "down_proj": ("mlp.down_proj", hidden, ffn),
    }
    return found if config.gated_mlp else {leaf: product for leaf, product in found.items() if leaf != "gate_proj"}


def targets_of(config: ModelConfig) -> tuple[str, ...]:
    """Every product of the model's layers that may be adapted."""
    return tuple(products(config))


def lora_shapes(config: ModelConfig, spec: LoraSpec) -> Mapping[str, tuple[int, ...]]:
    """Every A [R, in] and B [out, R] by canonical name, unfused: a shared A is listed under each name."""
    table = products(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(config.num_layers):
        for leaf in (leaf for leaf in table if leaf in spec.targets):
            path, outputs, inputs = table[leaf]
            rank = spec.rank_of(leaf)
            shapes[f"model.layers.{layer}.{path}.lora_A.weight"] = (rank, inputs)
            shapes[f"model.layers.{layer}.{path}.lora_B.weight"] = (outputs, rank)
    return shapes


def owned_shapes(config: ModelConfig, spec: LoraSpec) -> Mapping[str, tuple[int, ...]]:
    """The same, but a shared A under its owner's name alone: the parameters that there are."""
    return {name: shape for name, shape in lora_shapes(config, spec).items() if owner_name(name, spec) == name}


def parse_name(name: str) -> tuple[str, str, Half] | None:
    """
    (product, leaf, half) of an adapter's tensor; None of every other name.

    >>> parse_name("model.layers.3.mlp.up_proj.lora_B.weight")
    ('model.layers.3.mlp.up_proj', 'up_proj', 'B')
    """
    if (match := _NAME.fullmatch(name)) is None:
        return None
    product, leaf, half = match.groups()
    return product, leaf, "A" if half == "A" else "B"


def owner_name(name: str, spec: LoraSpec) -> str:
    """The adapter tensor that fills `name`: the owner's where A is shared."""
    parsed = parse_name(name)
    assert parsed is not None, name
    product, leaf, half = parsed
    if half == "B":
        return name
    return f"{product.removesuffix(leaf)}{spec.owner_of(leaf)}.lora_A.weight"
