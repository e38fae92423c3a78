"""Adapters from strangers: whatever is wrong with one, a single sentence says it (bars R11 and S10)."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import load_script
from safetensors.torch import load_file, save_file
from torch import Tensor

from trilithon_parallel.config import ModelConfig, ModelError, load_config
from trilithon_parallel.lora.files import CONFIG_FILE, FACTS_FILE, TENSORS_FILE
from trilithon_parallel.lora.peft import read_adapter, write_adapter
from trilithon_parallel.lora.spec import owned_shapes

runs = load_script(Path(__file__).with_name("lora_runs.py"))

Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
DOWN_B = "base_model.model.model.layers.3.mlp.down_proj.lora_B.weight"
C_ATTN_B = "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"
Spoil = Callable[[Path], None]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model directory of each kind."""
    directory: Path = tmp_path_factory.mktemp("models")
    runs.make_models(directory)
    return directory


def _make(directory: Path, config: ModelConfig, **changes: Any) -> Path:
    """A good adapter."""
    spec = runs.spec_of(config, **changes)
    generator = torch.Generator().manual_seed(1)
    state = {name: torch.randn(shape, generator=generator) for name, shape in owned_shapes(config, spec).items()}
    write_adapter(directory, state, config=config, spec=spec, base_model="b", facts={})
    return directory


def _config(**changes: Any) -> Spoil:
    """Change fields of adapter_config.json; None removes nothing, it is null."""

    def spoil(directory: Path) -> None:
        path = directory / CONFIG_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def _facts(**changes: Any) -> Spoil:
    def spoil(directory: Path) -> None:
        path = directory / FACTS_FILE
        document = json.loads(path.read_text())
        path.write_text(json.dumps(document | {"lora": document["lora"] | changes}))

    return spoil


def _tensors(change: Callable[[dict[str, Tensor]], object]) -> Spoil:
    def spoil(directory: Path) -> None:
        tensors = load_file(directory / TENSORS_FILE)
        change(tensors)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / TENSORS_FILE)

    return spoil


def _put(key: str, tensor: Tensor) -> Spoil:
    return _tensors(lambda tensors: tensors.update({key: tensor}))


def _write(name: str, data: bytes) -> Spoil:
    return lambda directory: (directory / name).write_bytes(data) and None  # type: ignore[func-returns-value]  # a lambda's


def _pickled(directory: Path) -> None:
    (directory / TENSORS_FILE).rename(directory / "adapter_model.bin")


def _linked(directory: Path) -> None:
    (directory / TENSORS_FILE).rename(directory.parent / "elsewhere.safetensors")
    (directory / TENSORS_FILE).symlink_to("../elsewhere.safetensors")


def _cut(directory: Path) -> None:
    path = directory / TENSORS_FILE
    path.write_bytes(path.read_bytes()[:-100])


def _foreign(*then: Spoil) -> Spoil:
    """As it would come from PEFT, without our own file."""

    def spoil(directory: Path) -> None:
        (directory / FACTS_FILE).unlink()
        for step in then:
            step(directory)

    return spoil


HOLE = struct.pack("<Q", 54) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}' + b"x" * 8

CASES: dict[str, tuple[Spoil, str, str]] = {
    "missing_key": (
        _tensors(lambda tensors: tensors.pop(Q_A)),
        "adapter_invalid",
        rf"^{TENSORS_FILE} lacks tensor {Q_A}\. Given: 55 tensors\. .* of different adapters",
    ),
    "extra_key": (
        _put("base_model.model.lm_head.lora_A.weight", torch.zeros(4, 48)),
        "adapter_invalid",
        rf"^{TENSORS_FILE} tensor base_model\.model\.lm_head\.lora_A\.weight has no place .* nothing is left out",
    ),
    "wrong_shape": (
        _put(Q_A, torch.zeros(5, 48)),
        "adapter_invalid",
        rf"tensor {Q_A} must have shape \[4, 48\]\. Given: \[5, 48\]\. lora_A is",
    ),
    "transposed_B": (
        _tensors(lambda tensors: tensors.update({DOWN_B: tensors[DOWN_B].t()})),
        "adapter_invalid",
        rf"tensor {DOWN_B} must have shape \[48, 4\]\. Given: \[4, 48\], its transpose\. .* lora_B \[out, r\]",
    ),
    "NaN": (
        _tensors(lambda tensors: tensors[DOWN_B].__setitem__((3, 1), float("nan"))),
        "adapter_invalid",
        rf"tensor {DOWN_B} must hold finite numbers\. Given: nan at \[3, 1\]\. The adapter is broken",
    ),
    "integers": (_put(Q_A, torch.zeros(4, 48, dtype=torch.int8)), "adapter_invalid", r"must be F32, BF16.*int8"),
    "unknown_target": (
        _foreign(_config(target_modules=["q_proj", "qkv_proj"])),
        "adapter_invalid",
        rf"^{CONFIG_FILE} target_modules must name products .* Given: 'qkv_proj'\. Did you mean \w_proj\? Allowed: q_p",
    ),
    "head_as_target": (_foreign(_config(target_modules=["lm_head"])), "adapter_invalid", r"Given: 'lm_head'\. Allowed"),
    "no_target": (_foreign(_config(target_modules=[])), "adapter_invalid", r"target_modules must name at least one"),
    "rank_above_limit": (
        _config(),
        "adapter_rank",
        r"rank of \w+ is above the limit\. Given: 4\. Allowed: 1 to 3\. Raise the limit, or train an adapter of lower",
    ),
    "rank_pattern_by_layer": (
        _foreign(_config(rank_pattern={"layers.1.mlp.up_proj": 2})),
        "adapter_unsupported",
        r"of up_proj must give it one rank and alpha in all layers\. Given: .*\(2, 8\.0\), \(4, 8\.0\)",
    ),
    "rank_pattern_that_tensors_deny": (
        _foreign(_config(rank_pattern={"up_proj": 2})),
        "adapter_invalid",
        r"layers\.0\.mlp\.up_proj\.lora_A\.weight must have shape \[2, 48\]\. Given: \[4, 48\]",
    ),
    "alpha_pattern_by_expression": (
        _foreign(_config(alpha_pattern={r"(a+)+b": 2})),
        "adapter_unsupported",
        r"alpha_pattern must have module names as keys\. Given: '\(a\+\)\+b'\. Write the modules' names",
    ),
    "some_layers": (
        _config(layers_to_transform=[0, 1]),
        "adapter_unsupported",
        r"layers_to_transform is not supported\. Given: \[0, 1\]\. Allowed: None",
    ),
    "rslora": (_config(use_rslora=True), "adapter_unsupported", r"use_rslora is not supported\. Given: True\..*sqrt"),
    "dora": (_config(use_dora=True), "adapter_unsupported", r"use_dora is not supported\. Given: True\..* Merge it"),
    "bias": (_config(bias="all"), "adapter_unsupported", r"bias is not supported\. Given: 'all'\. Allowed: 'none'"),
    "lora_bias": (_config(lora_bias=True), "adapter_unsupported", r"lora_bias is not supported\. Given: True"),
    "modules_to_save": (
        _config(modules_to_save=["lm_head"]),
        "adapter_unsupported",
        r"modules_to_save is not supported\. Given: \['lm_head'\]\. .* Merge it into the base",
    ),
    "pissa": (_config(init_lora_weights="pissa"), "adapter_unsupported", r"init_lora_weights is not supp.*'pissa'"),
    "unknown_field": (_config(warp=3), "adapter_unsupported", r"warp is not supported\. Given: 3"),
    "other_kind": (_config(peft_type="IA3"), "adapter_unsupported", r"peft_type is not supported\. Given: 'IA3'.*LORA"),
    "rank_of_text": (_foreign(_config(r="4")), "adapter_invalid", r"r must be a whole number from 1\. Given: '4'"),
    "alpha_of_zero": (_foreign(_config(lora_alpha=0)), "adapter_invalid", r"lora_alpha must be a number above 0\. Giv"),
    "dropout": (_config(lora_dropout=1), "adapter_invalid", r"lora_dropout must be from 0 to below 1\. Given: 1"),
    "disagreeing_files": (
        _config(r=8),
        "adapter_invalid",
        r"must give model\.layers\.0\.self_attn\.q_proj the rank and alpha that trilithon\.json means, \(4, 8\.0\)\.",
    ),
    "facts_of_other_targets": (_facts(targets=["q_proj"]), "adapter_invalid", r"k_proj the rank and alpha.* means, No"),
    "facts_of_wrong_kind": (_facts(rank="4"), "lora_invalid", r"rank of q_proj must be a whole number from 1"),
    "facts_of_newer_format": (
        lambda directory: (directory / FACTS_FILE).write_text('{"format": 2}') and None,
        "adapter_invalid",
        r"trilithon\.json format must be 1\. Given: 2",
    ),
    "not_JSON": (_write(CONFIG_FILE, b"{"), "adapter_invalid", rf"^{CONFIG_FILE} is not readable JSON"),
    "not_UTF8": (_write(CONFIG_FILE, b'{"r": "\xff"}'), "adapter_invalid", rf"^{CONFIG_FILE} is not readable JSON"),
    "deep_JSON": (_write(CONFIG_FILE, b"[" * 100_000), "adapter_invalid", rf"^{CONFIG_FILE} is not readable JSON"),
    "key_twice": (_write(CONFIG_FILE, b'{"r": 1, "r": 2}'), "adapter_invalid", r"'r' stands twice"),
    "a_list": (_write(CONFIG_FILE, b"[]"), "adapter_invalid", r"must hold one JSON object\. Given: \[\]"),
    "large_JSON": (_write(CONFIG_FILE, b" " * 2**21), "adapter_invalid", r"must have at most 1048576 bytes\. Given:"),
    "no_config": (lambda d: (d / CONFIG_FILE).unlink(), "adapter_missing", rf"^{CONFIG_FILE} is missing in the adap"),
    "no_tensors": (lambda d: (d / TENSORS_FILE).unlink(), "adapter_missing", rf"^{TENSORS_FILE} is missing in the"),
    "pickled": (_pickled, "adapter_pickled", r"^adapter_model\.bin is pickled: loading it would run code .* never"),
    "cut_short": (_cut, "weights_truncated", rf"^{TENSORS_FILE} is cut short: its tensors need \d+ bytes\. Giv"),
    "no_safetensors": (_write(TENSORS_FILE, b"x" * 64), "weights_invalid", rf"^{TENSORS_FILE} is not a safetensors"),
    "hole": (
        _write(TENSORS_FILE, HOLE),
        "weights_invalid",
        r"tensor a leaves a hole before it",
    ),
    "way_out": (_linked, "adapter_invalid", rf"^{TENSORS_FILE} is a link that leads out of the adapter directory"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_R11_S10_a_broken_adapter_is_one_sentence(case: str, models: Path, tmp_path: Path) -> None:
    """
    Each way in which an adapter can be wrong is found, and told by file, field or tensor, the value, and what to do.

    Seen red: with the check of shapes, of names, and of links removed.
    """
    config = load_config(models / "llama")
    spoil, code, message = CASES[case]
    directory = _make(tmp_path / "adapter", config)
    limit = 3 if case == "rank_above_limit" else 4
    if limit == 4:
        read_adapter(directory, config=config, max_rank=limit)
    spoil(directory)

    with pytest.raises(ModelError, match=message) as caught:
        read_adapter(directory, config=config, max_rank=limit)
    assert caught.value.code == code
    assert caught.value.hint
    assert str(tmp_path) not in str(caught.value)


def test_S10_a_missing_directory_is_told(tmp_path: Path, models: Path) -> None:
    """A directory that does not exist is named by its last part alone."""
    with pytest.raises(
        ModelError, match=r"^adapter directory 'nowhere' does not exist\. Give a directory with adapter_c"
    ):
        read_adapter(tmp_path / "nowhere", config=load_config(models / "llama"))


@pytest.mark.parametrize(
    ("name", "changes", "key", "message"),
    [
        ("llama", {"layout": "fused"}, Q_A.replace("q_proj", "v_proj"), r"must equal that of the other products"),
        ("gpt2", {}, C_ATTN_B, r"must be zero beside the blocks that trilithon\.json means"),
    ],
)
def test_an_adapter_that_was_trained_further_is_not_ours(
    name: str, changes: dict[str, Any], key: str, message: str, models: Path, tmp_path: Path
) -> None:
    """What our own file says must hold of the tensors; without that file they are read as they are."""
    config = load_config(models / name)
    directory = _make(tmp_path / "adapter", config, **changes)
    _tensors(lambda tensors: tensors[key].__iadd__(1.0))(directory)
    with pytest.raises(ModelError, match=message):
        read_adapter(directory, config=config)
    (directory / FACTS_FILE).unlink()

    assert read_adapter(directory, config=config).spec.layout == ("fused" if name == "gpt2" else "per_projection")


def test_modules_named_otherwise_are_found(models: Path, tmp_path: Path) -> None:
    """Longer names, "all-linear" and other software's fields mean the same adapter."""
    config = load_config(models / "llama")
    directory = _make(tmp_path / "adapter", config)
    (directory / FACTS_FILE).unlink()
    expected = read_adapter(directory, config=config)
    for targets in (
        "all-linear",
        [f"self_attn.{part}_proj" for part in "qkvo"] + ["gate_proj", "up_proj", "down_proj"],
    ):
        _config(target_modules=targets, peft_version="0.99", eva_config=None, use_qalora=False)(directory)
        found = read_adapter(directory, config=config)
        assert found.spec == expected.spec
        for name in owned_shapes(config, expected.spec):
            assert torch.equal(found.tensor(name), expected.tensor(name))


def test_a_trunks_prefix_may_differ(models: Path, tmp_path: Path) -> None:
    """An adapter made on a BERT without a head is read for one with a head: the products are the same."""
    config = load_config(models / "bert")
    directory = _make(tmp_path / "adapter", config)
    (directory / FACTS_FILE).unlink()
    tensors = load_file(directory / TENSORS_FILE)
    save_file({key.replace(".bert.", "."): tensor for key, tensor in tensors.items()}, directory / TENSORS_FILE)

    name = "model.layers.1.mlp.up_proj.lora_B.weight"
    key = "base_model.model.bert.encoder.layer.1.intermediate.dense.lora_B.weight"
    assert torch.equal(read_adapter(directory, config=config).tensor(name), tensors[key])


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_FIELDS = st.sampled_from(
    ["r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "bias"]
)


@settings(max_examples=150, deadline=None)
@given(changes=st.dictionaries(_FIELDS, _JSON, min_size=1, max_size=2), ours=st.booleans())
def test_S9_any_configuration_is_read_or_refused(
    changes: dict[str, Any], ours: bool, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever stands in a field, the answer is an adapter or a typed error, never another exception."""
    config = load_config(models / "llama")
    directory = _make(tmp_path_factory.mktemp("fuzz") / "adapter", config, targets=("q_proj",))
    _config(**changes)(directory)
    if not ours:
        (directory / FACTS_FILE).unlink()

    assert _code(directory, config) in (None, "adapter_invalid", "adapter_unsupported", "lora_invalid")


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(["rank", "alpha", "dropout", "targets", "layout", "rank_pattern"]), value=_JSON)
def test_S9_any_description_of_ours_is_read_or_refused(
    name: str, value: Any, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The same of trilithon.json, which may be a stranger's too."""
    config = load_config(models / "llama")
    directory = _make(tmp_path_factory.mktemp("fuzz") / "adapter", config, targets=("q_proj",))
    _facts(**{name: value})(directory)

    assert _code(directory, config) in (None, "adapter_invalid", "lora_invalid")


def _code(directory: Path, config: ModelConfig) -> str | None:
    """The code of the error with which an adapter is refused; None where it is read."""
    try:
        read_adapter(directory, config=config)
    except ModelError as error:
        return error.code
    return None
