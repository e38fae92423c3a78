"""
Hardware by name or from a calibration file, whose measured steps set the efficiencies. No torch.

    base: a100-80gb                 # what is left out is the preset's
    name: our cluster
    inter_node_bandwidth: 50e9      # bytes/s of one device, one direction
    measured_steps:                 # two or more; optional
      - {model: gpt_1.7b, tp: 1, pp: 1, dp: 32, micro_batch_size: 16, recompute: full, seconds: 3.53}
      - {model: gpt_18.4b, tp: 8, pp: 1, dp: 32, micro_batch_size: 8, recompute: full, seconds: 9.40}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trilithon_parallel.costs import RECOMPUTE_KINDS, SCHEDULES, PlannedLayout
from trilithon_parallel.hardware import PRESETS, Hardware, HardwareError, hardware_from, read_calibration
from trilithon_parallel.presets import find_recipe
from trilithon_parallel.timing import MeasuredStep, fit_efficiencies

_SUFFIXES = (".json", ".yaml", ".yml")
_SIZES = ("tp", "pp", "dp", "micro_batch_size", "virtual", "global_batch_size", "seq_len")
_FLAGS = ("sequence_parallel", "distributed_optimizer")
_CHOICES: Mapping[str, tuple[str, ...]] = {"recompute": RECOMPUTE_KINDS, "schedule": SCHEDULES}
_NEEDED = ("model", "tp", "pp", "dp", "micro_batch_size", "seconds")


def find_hardware(spec: str) -> Hardware:
    """
    A preset by name, or a calibration file by path (`.json`, `.yaml`, `.yml`).

    Raises:
        HardwareError: `hardware_unknown`, `hardware_invalid`.
        ModelError: a measured step names an unknown recipe, or a layout that does not divide its batch.
    """
    if spec in PRESETS:
        return PRESETS[spec]
    path = Path(spec)
    if path.suffix not in _SUFFIXES:
        raise HardwareError(
            f"hardware is not known. Given: {spec!r}.",
            code="hardware_unknown",
            hint=f"Allowed: {', '.join(PRESETS)}, or a {', '.join(_SUFFIXES)} file of measured values.",
        )
    values = read_calibration(path)
    steps = values.pop("measured_steps", None)
    hardware = hardware_from(values, where=path.name)
    if steps is None:
        return hardware
    if not isinstance(steps, list):
        raise HardwareError(f"{path.name} measured_steps must be a list. Given: {type(steps).__name__}.")
    read = [_step(step, f"{path.name} measured_steps[{place}]") for place, step in enumerate(steps)]
    return fit_efficiencies(hardware, read)


def _step(raw: object, where: str) -> MeasuredStep:
    if not isinstance(raw, dict):
        raise HardwareError(f"{where} must hold names and values. Given: {type(raw).__name__}.")
    _check_step(raw, where)
    recipe = find_recipe(raw["model"])
    given: dict[str, Any] = {
        name: raw[name] for name in ("tp", "pp", "dp", "virtual", *_FLAGS, *_CHOICES) if name in raw
    }
    if given.get("virtual", 1) > 1:
        given.setdefault("schedule", "interleaved")
    return MeasuredStep(
        config=recipe.config,
        layout=PlannedLayout(micro_batch=raw["micro_batch_size"], **given),
        numerics=recipe.numerics,
        seq_len=raw.get("seq_len", recipe.seq_len),
        global_batch=raw.get("global_batch_size", recipe.global_batch),
        seconds=float(raw["seconds"]),
    )


def _check_step(raw: Mapping[str, Any], where: str) -> None:
    known = ("model", "seconds", *_SIZES, *_FLAGS, *_CHOICES)
    if unknown := [name for name in raw if name not in known]:
        raise HardwareError(
            f"{where} has an unknown name. Given: {unknown[0]!r}.", hint=f"Allowed: {', '.join(known)}."
        )
    if missing := [name for name in _NEEDED if name not in raw]:
        raise HardwareError(f"{where} lacks {', '.join(missing)}.", hint=f"Needed: {', '.join(_NEEDED)}.")
    for name, value in raw.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = {
            **dict.fromkeys(_SIZES, is_number and isinstance(value, int) and value > 0),
            **dict.fromkeys(_FLAGS, isinstance(value, bool)),
            **{choice: value in allowed for choice, allowed in _CHOICES.items()},
            "model": isinstance(value, str),
            "seconds": is_number and value > 0,
        }[name]
        if not fits:
            rule = (
                f"one of {', '.join(_CHOICES[name])}"
                if name in _CHOICES
                else _RULES.get(name, "a whole number above 0")
            )
            raise HardwareError(f"{where} {name} must be {rule}. Given: {value!r}.")


_RULES = {"model": "a recipe's name", "seconds": "a number above 0", **dict.fromkeys(_FLAGS, "true or false")}
