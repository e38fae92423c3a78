"""
A strict reader of `adapter_config.json`: what is used is checked, what would change the numbers and is not computed
here is refused, what only training knew is left. No torch.

Patterns are compared as names. PEFT reads them as regular expressions; those of strangers are not run.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trilithon_parallel.config import ModelConfig, ModelError
from trilithon_parallel.lora.files import CONFIG_FILE, MODULES

MAX_JSON_BYTES = 1024 * 1024
"""Of the small files of an adapter."""

# Fields that change what an adapter computes, and the only values that are computed here (an absent field is one).
_REQUIRED: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # others change the base's weights
    "fan_in_fan_out": (True, False),  # how the base is stored, which is known
}
# Fields that only training or other software knew.
_FREE = frozenset(
    (
        "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "megatron_core", "loftq_config",
        "eva_config", "qalora_group_size", "ensure_weight_tying", "runtime_config", "ephemeral_gpu_offload",
    )
)  # fmt: skip
_USED = frozenset(
    (
        "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern",
        "base_model_name_or_path",
    )
)  # fmt: skip
_NEUTRAL: tuple[object, ...] = (None, False, [], {}, "")
_HINTS: Mapping[str, str] = {
    "use_rslora": "Save it with lora_alpha multiplied by sqrt(r) and use_rslora false: the same numbers.",
    "use_dora": "Merge it into the base with PEFT, and use the merged model.",
    "modules_to_save": "Merge it into the base with PEFT, and use the merged model.",
    "bias": "Train with bias 'none', or merge the adapter into the base with PEFT.",
    "init_lora_weights": "Save it with path_initial_model_for_weight_conversion, which makes it a plain LoRA.",
}


@dataclass(frozen=True)
class PeftConfig:
    """
    What is used of the file.

    Attributes:
        targets: module names, matched by the end of a path; None where the file gives a pattern or "all-linear", and
            the tensors say which modules there are.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...] | None
    excluded: tuple[str, ...]
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    base_model: str

    def is_target(self, module: str) -> bool:
        """Whether the file's names take in the module of that path."""
        named = self.targets is None or _ends(module, self.targets)
        return named and not _ends(module, self.excluded)

    def rank_of(self, module: str) -> int:
        """The rank of the module of that path: the first pattern's that ends it, else the common one."""
        return next((rank for name, rank in self.ranks.items() if _ends(module, (name,))), self.rank)

    def alpha_of(self, module: str) -> float:
        """Its alpha."""
        return next((alpha for name, alpha in self.alphas.items() if _ends(module, (name,))), self.alpha)


def _ends(module: str, names: Sequence[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def read_document(path: Path) -> dict[str, Any]:
    """
    One small JSON object.

    Raises:
        ModelError: `adapter_invalid`: too large, not JSON, a key twice, not an object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise invalid(path.name, f"must have at most {MAX_JSON_BYTES} bytes", path.stat().st_size)
        document = json.loads(path.read_bytes().decode(), object_pairs_hook=_unique)
    except ModelError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{path.name} is not readable JSON: {error}.", code="adapter_invalid", hint="Copy or export it again."
        ) from None
    if not isinstance(document, dict):
        raise invalid(path.name, "must hold one JSON object", document)
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice")
    return dict(pairs)


def invalid(file: str, rule: str, given: object, hint: str = "Copy or export the adapter again.") -> ModelError:
    """The error of a broken file."""
    return ModelError(f"{file} {rule}. Given: {given!r:.200}.", code="adapter_invalid", hint=hint)


def parse_config(raw: Mapping[str, Any], config: ModelConfig) -> PeftConfig:
    """
    Check the content of `adapter_config.json` for a model.

    Raises:
        ModelError: `adapter_invalid`, a value is broken or names a module that the model lacks; `adapter_unsupported`,
            a part of PEFT that is not computed here.
    """
    for key, value in raw.items():
        allowed = _REQUIRED.get(key, _NEUTRAL)
        if key in _USED or key in _FREE or any(value == item and type(value) is type(item) for item in allowed):
            continue
        raise ModelError(
            f"{CONFIG_FILE} {key} is not supported. Given: {value!r:.200}. "
            f"Allowed: {', '.join(map(repr, allowed[:2] if key in _REQUIRED else allowed[:1]))}.",
            code="adapter_unsupported",
            hint=_HINTS.get(key, "Train without it, or merge the adapter into its base with PEFT."),
        )
    if "peft_type" not in raw:
        raise invalid(CONFIG_FILE, "peft_type must be 'LORA'", None, "It is no adapter of PEFT, or a broken one.")
    base = raw.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise invalid(CONFIG_FILE, "base_model_name_or_path must be a name or null", base)
    dropout = raw.get("lora_dropout", 0.0)
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise invalid(CONFIG_FILE, "lora_dropout must be from 0 to below 1", dropout)
    targets = _names(raw, "target_modules", pattern_is_none=True)
    parsed = PeftConfig(
        _rank(raw.get("r"), "r"),
        _alpha(raw.get("lora_alpha"), "lora_alpha"),
        float(dropout),
        targets,
        _names(raw, "exclude_modules", pattern_is_none=False) or (),
        {_name(key, "rank_pattern"): _rank(value, f"rank_pattern {key}") for key, value in _map(raw, "rank_pattern")},
        {
            _name(key, "alpha_pattern"): _alpha(value, f"alpha_pattern {key}")
            for key, value in _map(raw, "alpha_pattern")
        },
        base or "",
    )
    for target in targets or ():
        _check_target(target, config)
    return parsed


def _check_target(target: str, config: ModelConfig) -> None:
    """A name of `target_modules` must end a product's path; `layer.3.output.dense` may go further back."""
    known = list(dict.fromkeys(MODULES[config.family].values()))
    last = {name.rsplit(".", 1)[-1] for name in known}
    if any(_ends(target, (name,)) or _ends(name, (target,)) for name in known) and target.rsplit(".", 1)[-1] in last:
        return
    near = difflib.get_close_matches(target.rsplit(".", 1)[-1], last, n=1)
    raise invalid(
        CONFIG_FILE,
        f"target_modules must name products of the layers of a {config.architecture}",
        target,
        (f"Did you mean {near[0]}? " if near else "") + f"Allowed: {', '.join(known)}.",
    )


def _names(raw: Mapping[str, Any], key: str, *, pattern_is_none: bool) -> tuple[str, ...] | None:
    value = raw.get(key)
    if pattern_is_none and isinstance(value, str) and value:
        return None
    if value is None and not pattern_is_none:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise invalid(CONFIG_FILE, f"{key} must list module names", value)
    if not value and pattern_is_none:
        raise invalid(CONFIG_FILE, f"{key} must name at least one module", value)
    return tuple(value)


def _map(raw: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise invalid(CONFIG_FILE, f"{key} must map module names to numbers", value)
    return list(value.items())


def _name(key: str, field: str) -> str:
    """A pattern that is a name; dots may be escaped."""
    name = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if not name or not all(part.replace("_", "a").isalnum() for part in name.split(".")):
        raise ModelError(
            f"{CONFIG_FILE} {field} must have module names as keys. Given: {key!r:.200}.",
            code="adapter_unsupported",
            hint="Write the modules' names instead of a regular expression.",
        )
    return name


def _rank(value: Any, field: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**20:
        raise invalid(CONFIG_FILE, f"{field} must be a whole number from 1", value)
    return value


def _alpha(value: Any, field: str) -> float:
    if not _is_number(value) or not 0 < value < math.inf:
        raise invalid(CONFIG_FILE, f"{field} must be a number above 0", value)
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
