"""Adapter directories and PEFT, both ways; merged models and transformers (bar E10)."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import load_script
from torch import Tensor

from trilithon_parallel.attention import PackedView
from trilithon_parallel.backend import select
from trilithon_parallel.config import ModelConfig, load_config
from trilithon_parallel.grid import Axis, Grid
from trilithon_parallel.layout import Layout
from trilithon_parallel.lora.merge import merge_adapter, merge_into
from trilithon_parallel.lora.peft import AdapterFiles, read_adapter, write_adapter
from trilithon_parallel.lora.spec import LoraSpec, lora_shapes, owned_shapes, targets_of
from trilithon_parallel.models import CausalStage, EncoderStage, build_stage
from trilithon_parallel.optimizer import AdamWSettings
from trilithon_parallel.step import TrainingModel
from trilithon_parallel.weights.loader import load_stage

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
runs = load_script(Path(__file__).with_name("lora_runs.py"))

TOKENS = torch.arange(3, 40)
FAMILIES = ("llama", "gpt2", "bert")
CASES: dict[str, dict[str, Any]] = {
    "per_projection": {},
    "fused": {"layout": "fused"},
    "patterns": {"rank_pattern": (("down_proj", 2),), "alpha_pattern": (("down_proj", 3.0),)},
    "some": {"targets": ("v_proj", "down_proj")},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model directory of each kind."""
    directory: Path = tmp_path_factory.mktemp("models")
    runs.make_models(directory)
    return directory


def _write(directory: Path, config: ModelConfig, spec: LoraSpec) -> dict[str, Tensor]:
    """An adapter of random numbers."""
    generator = torch.Generator().manual_seed(1)
    state = {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in owned_shapes(config, spec).items()}
    write_adapter(directory, state, config=config, spec=spec, base_model="some/base", facts={"step": 7})
    return state


def _peer_base(model_dir: Path) -> Any:
    config = load_config(model_dir)
    kind = "AutoModelForMaskedLM" if config.mlm_head else "AutoModelForCausalLM"
    return getattr(transformers, kind).from_pretrained(model_dir).eval()


def _with_peft(model_dir: Path, adapter: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of keys that it does not find or know
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about a name that peft still uses
        return peft.PeftModel.from_pretrained(_peer_base(model_dir), adapter).eval()


def _peer_logits(peer: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = peer(input_ids=TOKENS.view(1, -1)).logits[0]
    return logits


def _logits(stage: CausalStage | EncoderStage) -> Tensor:
    view = PackedView([0, len(TOKENS)], causal=isinstance(stage, CausalStage))
    with torch.no_grad():
        return stage.gather_logits(stage(TOKENS, positions_T=torch.arange(len(TOKENS)), view=view))


def _with_adapter(model_dir: Path, adapter: AdapterFiles) -> CausalStage | EncoderStage:
    """The stage that trains, beginning from an adapter."""
    model = TrainingModel(
        load_config(model_dir), Grid.single(), Layout(), select("torch"), dtype=torch.float32,
        optimizer=AdamWSettings(), lora=adapter.spec,
    )  # fmt: skip
    runs.begin(model, model_dir, seed=0, adapter=adapter)
    stage = model.chunks[0].stage
    assert isinstance(stage, CausalStage | EncoderStage)
    return stage


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_E10_written_adapters_load_in_peft(family: str, case: str, models: Path, tmp_path: Path) -> None:
    """
    PEFT loads what is written without a warning and gives our logits; merged, transformers gives them too.

    Seen red: with q's B in k's place; with a module's alpha written for its rank alone.
    """
    config = load_config(models / family)
    spec = runs.spec_of(config, **CASES[case])
    state = _write(tmp_path / "adapter", config, spec)
    adapter = read_adapter(tmp_path / "adapter", config=config)
    ours = _logits(_with_adapter(models / family, adapter))
    merge_adapter(models / family, tmp_path / "adapter", tmp_path / "merged")

    assert adapter.spec == spec
    assert adapter.base_model == "some/base"
    assert adapter.facts["step"] == 7
    assert all(torch.equal(adapter.tensor(name), tensor) for name, tensor in state.items())
    peer = _peer_logits(_with_peft(models / family, tmp_path / "adapter"))
    assert (peer - ours).abs().max() <= 1e-4
    merged = _peer_logits(_peer_base(tmp_path / "merged"))
    assert (merged - peer).abs().max() <= 1e-5 * peer.abs().max()
    assert (_peer_logits(_peer_base(models / family)) - peer).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_E10_adapters_that_peft_made_are_read(family: str, models: Path, tmp_path: Path) -> None:
    """
    An adapter saved by PEFT, of another alpha and some products only, gives PEFT's logits here, merged and not.

    Seen red: with the parts of `c_attn` in another order.
    """
    config = load_config(models / family)
    names = {
        "llama": ["q_proj", "v_proj", "down_proj"],
        "gpt2": ["c_attn", "mlp.c_proj"],
        "bert": ["query", "value", "intermediate.dense"],
    }
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=names[family], init_lora_weights=False, lora_dropout=0.1
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(_peer_base(models / family), settings).eval()
        made.save_pretrained(tmp_path / "adapter")
    expected = _peer_logits(made)
    adapter = read_adapter(tmp_path / "adapter", config=config)
    stage = build_stage(config, grid=Grid.single(), backend=select("torch"), dtype=torch.float32)
    load_stage(stage, models / family, config=config, grid=Grid.single())
    has_effect = merge_into(stage, tmp_path / "adapter", config=config, grid=Grid.single())

    assert (adapter.spec.rank, adapter.spec.alpha, adapter.spec.dropout) == (3, 5.0, 0.1)
    assert adapter.spec.layout == ("fused" if family == "gpt2" else "per_projection")
    assert has_effect
    scale = expected.abs().max()
    assert (_logits(_with_adapter(models / family, adapter)) - expected).abs().max() <= 1e-4
    assert (_logits(stage) - expected).abs().max() <= 1e-5 * scale


def test_files_say_what_peft_needs(models: Path, tmp_path: Path) -> None:
    """The directory holds PEFT's two files and ours, unfused names with a shared A under each, and no other key."""
    config = load_config(models / "llama")
    spec = runs.spec_of(config, layout="fused")
    state = _write(tmp_path / "adapter", config, spec)
    adapter = read_adapter(tmp_path / "adapter", config=config)
    document = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())

    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "trilithon.json",
    ]  # fmt: skip
    expected = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none"}
    assert {key: document[key] for key in expected} == expected
    assert document["inference_mode"] is True
    assert document["target_modules"] == list(targets_of(config))
    key = "model.layers.1.self_attn.{}_proj.lora_A.weight"
    assert all(torch.equal(adapter.tensor(key.format(part)), state[key.format("q")]) for part in "kv")
    assert len(lora_shapes(config, spec)) == 2 * 7 * 4


def test_a_digest_is_the_tensors_and_the_configuration(models: Path, tmp_path: Path) -> None:
    """Equal adapters have equal digests wherever they lie; one changed bit, or another alpha, has another."""
    config = load_config(models / "llama")
    digests = []
    for i, (alpha, bump) in enumerate([(8.0, 0.0), (8.0, 0.0), (9.0, 0.0), (8.0, 1e-7)]):
        spec = runs.spec_of(config, alpha=alpha)
        state = {name: torch.full(shape, 1.0) for name, shape in owned_shapes(config, spec).items()}
        state["model.layers.0.mlp.up_proj.lora_A.weight"][0, 0] += 3 * bump
        write_adapter(tmp_path / str(i), state, config=config, spec=spec, base_model="", facts={"job": str(i)})
        digests.append(read_adapter(tmp_path / str(i), config=config).digest)

    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    assert all(len(digest) == 64 for digest in digests)


def test_blocks_are_filled_as_a_rank_needs_them(models: Path, tmp_path: Path) -> None:
    """`fill` gives a block of a tensor, cast, in the leading corner, and zeros beyond it."""
    config = load_config(models / "gpt2")
    spec = runs.spec_of(config)
    state = _write(tmp_path / "adapter", config, spec)
    adapter = read_adapter(tmp_path / "adapter", config=config)
    name = "model.layers.1.self_attn.v_proj.lora_B.weight"
    out = torch.full((40, 4), 7.0, dtype=torch.float64)
    adapter.fill(out, name, (slice(16, 48), slice(0, 4)))

    assert torch.equal(out[:32], state[name][16:48].double())
    assert not out[32:].any()


@pytest.mark.parametrize("tp", [2, 3])
def test_a_rank_merges_its_own_part(tp: int, models: Path, tmp_path: Path) -> None:
    """An adapter merged into each rank's weights makes that rank's part of the merged model, padding included."""
    config = load_config(models / "llama")
    _write(tmp_path / "adapter", config, runs.spec_of(config, layout="fused"))
    merge_adapter(models / "llama", tmp_path / "adapter", tmp_path / "merged")
    for rank in range(tp):
        grid = replace(Grid.single(), tp=Axis("tp", rank, tp, tuple(range(tp))))
        stages = []
        for directory in (models / "llama", tmp_path / "merged"):
            stages.append(build_stage(config, grid=grid, backend=select("torch"), dtype=torch.float32))
            load_stage(stages[-1], directory, config=config, grid=grid)
        merge_into(stages[0], tmp_path / "adapter", config=config, grid=grid)

        parts = [dict(stage.named_parameters()) for stage in stages]
        assert all(torch.equal(parameter, parts[1][name]) for name, parameter in parts[0].items())


def test_nothing_is_overwritten(models: Path, tmp_path: Path) -> None:
    """A directory that is there stays as it is."""
    config = load_config(models / "llama")
    (tmp_path / "adapter").mkdir()
    with pytest.raises(ValueError, match="adapter exists already, and exports never overwrite"):
        _write(tmp_path / "adapter", config, runs.spec_of(config))

    assert not list((tmp_path / "adapter").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
