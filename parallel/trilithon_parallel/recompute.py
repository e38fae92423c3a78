"""
What a forward pass keeps for the backward pass, and what it makes again (arXiv 2104.04473, section 3.5; 2205.05198).

`selective` makes again the core of attention alone (scores, softmax, dropout): its 5 a s / h bytes a token are most of
what a layer keeps and little of its work. `full` keeps the input of every k-th layer and makes all else again; or, with
`first`, treats so many layers of a stage in that way and keeps all of the others. Random numbers need no care: a
dropout mask is a function of step, sample, layer and site (`dropout.py`), so it comes out the same again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Kind = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Recompute:
    """
    What is computed again.

    `every`: with "full", the layers from one kept input to the next, at least 1. `first`: with "full", the number of
    layers of each stage that are computed again, the others being kept whole; None for all.
    """

    kind: Kind = "none"
    every: int = 1
    first: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("none", "selective", "full"):
            raise ValueError(f"recompute kind is unknown. Given: {self.kind!r}. Allowed: none, selective, full.")
        if self.every < 1:
            raise ValueError(f"recompute every must be at least 1. Given: {self.every}.")


def again(function: Callable[..., Tensor], *arguments: object) -> Tensor:
    """`function(*arguments)`, of which the arguments alone are kept."""
    result: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result


def run_layers(layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor, policy: Recompute) -> Tensor:
    """The layers one after another; under a gradient, in groups whose insides are computed again."""
    again_count = 0
    if policy.kind == "full" and torch.is_grad_enabled():
        again_count = len(layers) if policy.first is None else min(policy.first, len(layers))
    for start in range(0, again_count, policy.every):
        group = layers[start : min(start + policy.every, again_count)]
        x = again(_chain(group), x)
    return _chain(layers[again_count:])(x)


def _chain(layers: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    return run
