"""
What a cluster is, to the planner: rates, sizes and links as data, preset or read from a file. No torch.

All bandwidths are bytes per second of one device in one direction; rates are of dense products at the training dtype.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any


class HardwareError(ValueError):
    """
    A user's mistake about hardware: an unknown preset, or a calibration file that says something impossible.

    `code` is `hardware_unknown` or `hardware_invalid`; `message` says what, where and the value given, `hint` what to
    do.
    """

    def __init__(self, message: str, *, code: str = "hardware_invalid", hint: str = "") -> None:
        super().__init__(f"{message} {hint}".strip())
        self.code = code
        self.message = message
        self.hint = hint


@dataclass(frozen=True)
class Hardware:
    """
    One kind of device, and how many of them stand how near.

    Peak and bandwidths are the vendor's; what is reached of them is said by the efficiencies, 0 < x <= 1, of which the
    first two make the efficiency curve: time = FLOPs / (peak * product) + bytes / (memory bandwidth * memory), which
    falls with hidden size / tp, and `product` is reached at many tokens (half of it at `half_tokens`).
    """

    name: str
    peak_flops: float
    memory_bytes: float
    memory_bandwidth: float
    devices_per_node: int
    intra_node_bandwidth: float
    inter_node_bandwidth: float
    intra_node_latency_s: float
    inter_node_latency_s: float
    product_efficiency: float
    memory_efficiency: float
    link_efficiency: float
    half_tokens: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "name":
                continue
            is_share, may_be_zero = field.name.endswith("efficiency"), field.name in _MAY_BE_ZERO
            fits = math.isfinite(value) and (value > 0 or (may_be_zero and value == 0)) and not (is_share and value > 1)
            if not fits:
                raise HardwareError(
                    f"hardware {field.name} must be {'at most 1 and ' * is_share}"
                    f"{'at least' if may_be_zero else 'above'} 0. Given: {value!r}.",
                    hint="Bandwidths are bytes/s of one device in one direction, rates FLOP/s.",
                )


_MAY_BE_ZERO = ("intra_node_latency_s", "inter_node_latency_s", "half_tokens")

# Memory: 80e9 of the 85.9e9 bytes on the card; the rest is left to the context, NCCL's buffers and fragmentation.
# NVLink and InfiniBand as the vendors print them, halved where they print both directions. Latencies are assumed.
# The A100's two efficiencies are `timing.fit_efficiencies` of rows 1.7B and 529.6B of PTD-P's Table 1; the other eight
# rows then come out within 7 %. The H100's are the A100's shares: no H100 was measured.
PRESETS: Mapping[str, Hardware] = {
    hardware.name: hardware
    for hardware in (
        Hardware(
            name="a100-80gb",
            peak_flops=312e12,
            memory_bytes=80e9,
            memory_bandwidth=2.039e12,
            devices_per_node=8,
            intra_node_bandwidth=300e9,
            inter_node_bandwidth=25e9,
            intra_node_latency_s=4e-6,
            inter_node_latency_s=12e-6,
            product_efficiency=0.74,
            memory_efficiency=0.79,
            link_efficiency=0.8,
            half_tokens=150,
        ),
        Hardware(
            name="h100-sxm",
            peak_flops=989e12,
            memory_bytes=80e9,
            memory_bandwidth=3.35e12,
            devices_per_node=8,
            intra_node_bandwidth=450e9,
            inter_node_bandwidth=50e9,
            intra_node_latency_s=4e-6,
            inter_node_latency_s=12e-6,
            product_efficiency=0.74,
            memory_efficiency=0.79,
            link_efficiency=0.8,
            half_tokens=150,
        ),
    )
}


def read_calibration(path: Path) -> dict[str, Any]:
    """One object of names and values from a JSON or YAML file. Raises HardwareError `hardware_invalid`."""
    try:
        text = path.read_text("utf-8")
        if path.suffix == ".json":
            raw = json.loads(text)
        else:
            import yaml

            try:
                raw = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(str(error)) from None
    except (OSError, ValueError) as error:
        raise HardwareError(
            f"{path.name} cannot be read: {error}.", hint="Give a JSON or YAML file of names and values."
        ) from None
    if not isinstance(raw, dict):
        raise HardwareError(
            f"{path.name} must hold names and values. Given: {type(raw).__name__}.",
            hint="A first line could be `base: a100-80gb`.",
        )
    return raw


def hardware_from(values: Mapping[str, Any], *, where: str) -> Hardware:
    """
    Hardware of names and values; `base` names the preset that fills what is left out.

    Raises:
        HardwareError: a name or a value is wrong, or one is missing without a base.
    """
    given = dict(values)
    base = given.pop("base", None)
    if base is not None and base not in PRESETS:
        raise HardwareError(f"{where} base is not known. Given: {base!r}.", hint=f"Allowed: {', '.join(PRESETS)}.")
    names = [field.name for field in fields(Hardware)]
    if unknown := [name for name in given if name not in names]:
        raise HardwareError(
            f"{where} has a name that hardware does not have. Given: {unknown[0]!r}.",
            hint=f"Allowed: base, measured_steps, {', '.join(names)}.",
        )
    for name, value in given.items():
        given[name] = value if name == "name" else _number(value, name, where)
    given.setdefault("name", where)
    if base is not None:
        return replace(PRESETS[base], **given)
    if missing := [name for name in names if name not in given]:
        raise HardwareError(
            f"{where} lacks {', '.join(missing)}.", hint="Add them, or a `base` that has them: one of the presets."
        )
    return Hardware(**given)


def _number(value: object, name: str, where: str) -> float | int:
    # YAML reads 312e12 as a string: its floats need a dot.
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if math.isnan(number) or (name == "devices_per_node" and not number.is_integer()):
        raise HardwareError(f"{where} {name} must be a number. Given: {value!r}.")
    return int(number) if name == "devices_per_node" else number
