"""Hardware: presets, calibration files and their mistakes, and this machine."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from trilithon_parallel.calibration import find_hardware
from trilithon_parallel.config import ModelError
from trilithon_parallel.costs import PlannedLayout
from trilithon_parallel.hardware import PRESETS, HardwareError, hardware_from
from trilithon_parallel.measured import measure_step, measure_this_machine
from trilithon_parallel.memory import PAPER_NUMERICS, Numerics
from trilithon_parallel.presets import RECIPES, llama
from trilithon_parallel.timing import predicted_s

TINY = llama(layers=2, hidden=64, heads=4, groups=2, ffn=96, vocab=300, context=64, tied=True)


def test_presets_are_the_vendors_numbers() -> None:
    """Peaks and links as printed; bandwidths of one direction."""
    a100, h100 = PRESETS["a100-80gb"], PRESETS["h100-sxm"]

    assert (a100.peak_flops, 2 * a100.intra_node_bandwidth, a100.inter_node_bandwidth) == (312e12, 600e9, 25e9)
    assert (h100.peak_flops, 2 * h100.intra_node_bandwidth, h100.inter_node_bandwidth) == (989e12, 900e9, 50e9)
    assert find_hardware("h100-sxm") is h100


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_calibration_files_replace_values(suffix: str, tmp_path: Path) -> None:
    """JSON and YAML alike; what is left out is the base's, and YAML's 50e9, which it reads as text, is a number."""
    path = tmp_path / f"ours{suffix}"
    values = {"base": "a100-80gb", "name": "ours", "inter_node_bandwidth": 50e9, "devices_per_node": 4}
    path.write_text(
        json.dumps(values)
        if suffix == ".json"
        else "base: a100-80gb\nname: ours\ninter_node_bandwidth: 50e9\ndevices_per_node: 4\n"
    )

    got = find_hardware(str(path))

    assert (got.name, got.inter_node_bandwidth, got.devices_per_node) == ("ours", 50e9, 4)
    assert got.peak_flops == PRESETS["a100-80gb"].peak_flops


def test_measured_steps_set_the_efficiencies(tmp_path: Path) -> None:
    """Two measured steps of recipes fit the efficiency curve: the rows of Table 1 give the preset's."""
    path = tmp_path / "ours.yaml"
    path.write_text(
        "base: a100-80gb\nproduct_efficiency: 0.5\nmemory_efficiency: 0.5\nmeasured_steps:\n"
        "  - {model: gpt_1.7b, tp: 1, pp: 1, dp: 32, micro_batch_size: 16, recompute: full, seconds: 3.530}\n"
        "  - {model: gpt_529.6b, tp: 8, pp: 35, dp: 9, virtual: 3, micro_batch_size: 1, recompute: full, "
        "seconds: 54.08}\n"
    )

    got = find_hardware(str(path))

    assert got.product_efficiency == pytest.approx(0.74, abs=0.01)
    assert got.memory_efficiency == pytest.approx(0.79, abs=0.01)


STEP = {"model": "gpt_1.7b", "tp": 1, "pp": 1, "dp": 32, "micro_batch_size": 16, "seconds": 3.5}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base": "v100"}, "base is not known. Given: 'v100'. Allowed: a100-80gb, h100-sxm"),
        ({"base": "a100-80gb", "peak": 1}, "a name that hardware does not have. Given: 'peak'"),
        ({"base": "a100-80gb", "peak_flops": "fast"}, "peak_flops must be a number. Given: 'fast'"),
        ({"base": "a100-80gb", "peak_flops": -1}, "peak_flops must be above 0. Given: -1"),
        ({"base": "a100-80gb", "link_efficiency": 1.5}, "link_efficiency must be at most 1 and above 0. Given: 1.5"),
        ({"base": "a100-80gb", "devices_per_node": 2.5}, "devices_per_node must be a number. Given: 2.5"),
        ({"peak_flops": 1e12}, "lacks memory_bytes, memory_bandwidth"),
        ({"base": "a100-80gb", "measured_steps": 3}, "measured_steps must be a list. Given: int"),
        ({"base": "a100-80gb", "measured_steps": [3]}, "must hold names and values. Given: int"),
        ({"base": "a100-80gb", "measured_steps": [{**STEP, "b": 1}]}, "unknown name. Given: 'b'"),
        ({"base": "a100-80gb", "measured_steps": [{"model": "gpt_1.7b"}]}, "lacks tp, pp, dp"),
        ({"base": "a100-80gb", "measured_steps": [{**STEP, "tp": "two"}]},
         "tp must be a whole number above 0. Given: 'two'"),
        ({"base": "a100-80gb", "measured_steps": [{**STEP, "seconds": 0}]},
         "seconds must be a number above 0. Given: 0"),
        ({"base": "a100-80gb", "measured_steps": [{**STEP, "recompute": "all"}]},
         "recompute must be one of none, selective, full"),
        ({"base": "a100-80gb", "measured_steps": [STEP]}, "measured steps must be at least two. Given: 1"),
    ],
)  # fmt: skip
def test_mistakes_in_files_are_said(values: dict[str, object], message: str, tmp_path: Path) -> None:
    """Each mistake names the file, the field, the value and what is allowed."""
    path = tmp_path / "ours.json"
    path.write_text(json.dumps(values))

    with pytest.raises(HardwareError) as caught:
        find_hardware(str(path))

    assert message in str(caught.value)
    assert caught.value.code == "hardware_invalid"


def test_files_that_are_none(tmp_path: Path) -> None:
    """Unknown names, missing files, files that hold no object or do not parse."""
    with pytest.raises(HardwareError, match="hardware is not known") as caught:
        find_hardware("tpu")
    assert caught.value.code == "hardware_unknown"
    for name, text in (("a.json", "{"), ("b.yaml", "a: [1"), ("c.yaml", "- 1"), ("d.json", None)):
        path = tmp_path / name
        if text is not None:
            path.write_text(text)
        with pytest.raises(HardwareError, match=name):
            find_hardware(str(path))
    unknown = {"base": "a100-80gb", "measured_steps": [{**STEP, "model": "gpt9"}, STEP]}
    (tmp_path / "e.json").write_text(json.dumps(unknown))
    with pytest.raises(ModelError, match=r"model recipe is not known\. Given: 'gpt9'"):
        find_hardware(str(tmp_path / "e.json"))
    assert hardware_from({"base": "a100-80gb"}, where="x").name == "x"


def test_this_machine_and_a_measured_step() -> None:
    """
    This machine measures itself; a real step of a tiny model stands beside its prediction.

    Their ratio is printed, not asserted: other work on the machine decides it.
    """
    here = measure_this_machine(seconds=0.05)
    two = measure_this_machine(2, seconds=0.05)
    layout = PlannedLayout(1, 1, 1, 2, recompute="full")
    step = measure_step(TINY, layout, Numerics("float32"), seq_len=32, global_batch=4, seconds=0.0)

    assert here.devices_per_node == 1
    assert two.devices_per_node == 2
    assert two.memory_bytes == here.memory_bytes / 2
    assert step.seconds > 0
    assert math.isfinite(predicted_s(step, here))
    print(f"measured {step.seconds:.4f} s, predicted {predicted_s(step, here):.4f} s")


def test_what_cannot_be_measured_here() -> None:
    """Steps of several ranks, encoders, and numerics that this core does not run are refused."""
    numerics = Numerics("float32")
    with pytest.raises(ModelError, match=r"a measured step has one rank\. Given: 2"):
        measure_step(TINY, PlannedLayout(2, 1, 1, 1), numerics, seq_len=8, global_batch=1)
    with pytest.raises(ModelError, match="needs a decoder, fused attention and no dropout"):
        measure_step(RECIPES["gpt_1.7b"].config, PlannedLayout(1, 1, 1, 1), PAPER_NUMERICS, seq_len=8, global_batch=1)
