"""Stages filled from model directories: every layout puts the same model together, and nothing odd passes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_bert, tiny_gpt2, tiny_llama

from trilithon_parallel.backend import select
from trilithon_parallel.config import ModelConfig, ModelError, load_config
from trilithon_parallel.grid import Axis, Grid
from trilithon_parallel.models import build_stage
from trilithon_parallel.placement import global_shapes
from trilithon_parallel.weights.export import full_state
from trilithon_parallel.weights.loader import LoadReport, check_weights, load_stage, load_state
from trilithon_parallel.weights.names import Direct, Fused, Source, Transposed, file_shape, file_slices, name_table


def place(*, tp: int, pp: int, tp_rank: int, pp_rank: int) -> Grid:
    """One rank's grid without a process group: enough to build and fill a stage."""
    axis = {"tp": (tp_rank, tp), "pp": (pp_rank, pp), "dp": (0, 1), "world": (tp_rank + tp * pp_rank, tp * pp)}
    made = {name: Axis(name, rank, size, tuple(range(size))) for name, (rank, size) in axis.items()}
    return Grid(**made, device=torch.device("cpu"))


def load(
    model_dir: Path, *, tp: int = 1, pp: int = 1, tp_rank: int = 0, pp_rank: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[torch.nn.Module, Grid, LoadReport]:
    config = load_config(model_dir)
    grid = place(tp=tp, pp=pp, tp_rank=tp_rank, pp_rank=pp_rank)
    stage = build_stage(config, grid=grid, backend=select("torch"), dtype=dtype)
    for parameter in stage.parameters():
        torch.nn.init.constant_(parameter, 7.0)  # what is left unfilled shows
    return stage, grid, load_stage(stage, model_dir, config=config, grid=grid)


MODELS: dict[str, Callable[[Path], Path]] = {
    "llama": lambda p: tiny_llama(p),
    "llama-3-groups-of-9": lambda p: tiny_llama(p, heads=9, groups=3, hidden=72, ffn=100, vocab=389, layers=4),
    "llama-untied-sharded-bf16": lambda p: tiny_llama(p, tied=False, shards=3, dtype="bfloat16", vocab=509),
    "llama-biases": lambda p: _with_biases(tiny_llama(p)),
    "gpt2": lambda p: tiny_gpt2(p),
    "gpt2-first-names": lambda p: tiny_gpt2(p, prefix="", shards=2),
    "bert": lambda p: tiny_bert(p),
    "bert-prefixed": lambda p: tiny_bert(p, prefix="bert.", pooler=False),
}


def _with_biases(model_dir: Path) -> Path:
    """The same Llama with a bias on every product."""
    edit_json(model_dir / "config.json", attention_bias=True, mlp_bias=True)
    path = model_dir / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    generator = torch.Generator().manual_seed(3)
    for name, tensor in list(tensors.items()):
        if name.endswith("_proj.weight"):
            tensors[name.replace(".weight", ".bias")] = torch.randn(tensor.shape[0], generator=generator)
    safetensors.torch.save_file(tensors, path)
    return model_dir


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2)])
def test_E7_slices_of_every_layout_make_up_the_whole_model(model: str, tp: int, pp: int, tmp_path: Path) -> None:
    """
    The slices of all ranks, padding removed, are bitwise the file's tensors, and all padding is zero.

    Seen elsewhere: conversion only at tp=1 (Megatron-LM#966, #1708), padded vocabularies that change results (#1754),
    fewer key/value heads than ranks (ms-swift#8219), tied heads over stages (nanotron#221).
    Inverse: reading q rows from k's place in GPT-2's fused matrix, and leaving the padding unset, were seen to fail.
    """
    model_dir = MODELS[model](tmp_path / "m")
    config = load_config(model_dir)
    dtype = torch.bfloat16 if "bf16" in model else torch.float32
    expected = load_state(model_dir, config=config)
    parts = [load(model_dir, tp=tp, pp=pp, tp_rank=t, pp_rank=p, dtype=dtype)[:2] for t in range(tp) for p in range(pp)]

    state = full_state(parts, config)

    assert set(global_shapes(config)) == set(state)
    assert all(torch.equal(expected[name], tensor) for name, tensor in state.items())
    # Each element of the files lies on some rank once or (replicas) several times; all others are padding.
    assert not any((parameter == 7.0).any() for stage, _ in parts for parameter in stage.parameters())


def test_names_agree_with_the_tensors_of_transformers(tmp_path: Path) -> None:
    """GPT-2's q, k, v rows and transposes land where transformers has them."""
    model_dir = tiny_gpt2(tmp_path / "m")
    raw = safetensors.torch.load_file(model_dir / "model.safetensors")
    state = load_state(model_dir, config=load_config(model_dir))

    fused = raw["transformer.h.1.attn.c_attn.weight"]

    hidden = fused.shape[0]
    assert torch.equal(fused[:, :hidden].t(), state["model.layers.1.self_attn.q_proj.weight"])
    assert torch.equal(fused[:, hidden : 2 * hidden].t(), state["model.layers.1.self_attn.k_proj.weight"])
    assert torch.equal(fused[:, 2 * hidden :].t(), state["model.layers.1.self_attn.v_proj.weight"])
    bias = raw["transformer.h.1.attn.c_attn.bias"]
    assert torch.equal(bias[2 * hidden :], state["model.layers.1.self_attn.v_proj.bias"])
    assert torch.equal(raw["transformer.h.0.mlp.c_fc.weight"].t(), state["model.layers.0.mlp.up_proj.weight"])


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_file_slices_are_the_same_block_in_the_file(data: st.DataObject) -> None:
    """For random shapes and blocks, cutting the file tensor and transposing gives the canonical block."""
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=2)))
    kinds: list[Source] = [Direct("x"), Transposed("x"), *(Fused("x", part, 3) for part in range(3))]
    source = data.draw(st.sampled_from(kinds))
    file_tensor = torch.randn(file_shape(source, shape))
    whole, transpose = file_slices(source, shape, tuple(slice(0, size) for size in shape))
    canonical = file_tensor[whole].t() if transpose else file_tensor[whole]
    block = tuple(
        slice(begin, data.draw(st.integers(begin, size)))
        for size in shape
        for begin in [data.draw(st.integers(0, size))]
    )

    where, transpose = file_slices(source, shape, block)

    assert tuple(canonical.shape) == shape
    assert torch.equal(canonical[block], file_tensor[where].t() if transpose else file_tensor[where])


def test_load_reports_only_the_bytes_of_its_own_slices(tmp_path: Path) -> None:
    """At tp=2 a rank reads half of what is sharded; replicated norms are read whole."""
    model_dir = tiny_llama(tmp_path / "m", vocab=512, layers=1)
    file_bytes = sum(t.numel() * 4 for t in safetensors.torch.load_file(model_dir / "model.safetensors").values())
    norms = 3 * 64 * 4

    halves = [load(model_dir, tp=2, tp_rank=rank)[2].num_bytes for rank in range(2)]

    assert [(file_bytes - norms) // 2 + norms] * 2 == halves


def test_last_stage_reads_its_own_copy_of_a_tied_head(tmp_path: Path) -> None:
    """With tied embeddings over two stages, the last one's head holds the embedding's rows."""
    model_dir = tiny_llama(tmp_path / "m")
    first, last = (load(model_dir, pp=2, pp_rank=rank)[0] for rank in range(2))

    embedding = dict(first.named_parameters())["model.embed_tokens.weight"]
    head = dict(last.named_parameters())["lm_head.weight"]

    assert torch.equal(embedding, head)


def change_tensors(model_dir: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = model_dir / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


DOWN = "model.layers.1.mlp.down_proj.weight"

FAULTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str, str]] = {
    "missing": (lambda t: t.pop(DOWN), "weights_missing", f"tensor {DOWN} is missing"),
    "missing layer": (
        lambda t: [t.pop(name) for name in list(t) if ".layers.1." in name],
        "weights_missing",
        "(and 8 more",
    ),
    "extra": (lambda t: t.update({"model.extra.weight": torch.ones(3)}), "weights_extra", "tensor model.extra.weight"),
    "extra layer": (
        lambda t: t.update({name.replace("s.1.", "s.2."): x.clone() for name, x in t.items() if "s.1." in name}),
        "weights_extra",
        "model.layers.2.",
    ),
    "wrong shape": (
        lambda t: t.update({DOWN: t[DOWN][:, :-1]}),
        "weights_shape",
        f"tensor {DOWN} must have shape [64, 96] by config.json. Given: [64, 95]",
    ),
    "transposed": (lambda t: t.update({DOWN: t[DOWN].t()}), "weights_shape", "Given: [96, 64]"),
    "integers": (
        lambda t: t.update({DOWN: torch.zeros(64, 96, dtype=torch.int8)}),
        "weights_dtype",
        f"tensor {DOWN} must be F32, BF16, F16 or F64. Given: I8",
    ),
    "NaN": (
        lambda t: t[DOWN].__setitem__((5, 90), torch.nan),
        "weights_nonfinite",
        f"tensor {DOWN} must hold finite numbers. Given: nan at [5, 90]",
    ),
    "infinity": (
        lambda t: t[DOWN].__setitem__((63, 95), -torch.inf),
        "weights_nonfinite",
        "Given: -inf at [63, 95]",
    ),
    "a head that is not the tied embedding": (
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
        "weights_invalid",
        "tensor lm_head.weight must equal the embedding",
    ),
}


@pytest.mark.parametrize("case", FAULTS, ids=list(FAULTS))
def test_R11_weights_that_do_not_fit_are_one_sentence(case: str, tmp_path: Path) -> None:
    """
    Every fault names file, tensor, what was expected and given. Inverse: untouched, the directory loads.

    Seen elsewhere: weights that did not fit were left out, and the model began from scratch (DeepSpeed#6691).
    """
    model_dir = tiny_llama(tmp_path / "m")
    load(model_dir)
    change, code, words = FAULTS[case]
    change_tensors(model_dir, change)

    with pytest.raises(ModelError) as caught:
        load(model_dir)

    assert code == caught.value.code
    assert words in caught.value.message
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_R11_each_rank_finds_nan_in_its_own_slice(tmp_path: Path) -> None:
    """The rank that holds the bad value refuses; its position is told in the whole tensor's indices."""
    model_dir = tiny_llama(tmp_path / "m")
    change_tensors(model_dir, FAULTS["NaN"][0])
    load(model_dir, tp=2, tp_rank=0)

    with pytest.raises(ModelError, match=r"nan at \[5, 90\]"):
        load(model_dir, tp=2, tp_rank=1)


def test_R11_value_too_large_for_the_dtype_says_so(tmp_path: Path) -> None:
    """1e30 fits the file's fp32 and not float16: the cast is blamed, not the file."""
    model_dir = tiny_llama(tmp_path / "m")
    change_tensors(model_dir, lambda t: t[DOWN].__setitem__((1, 2), 1e30))

    with pytest.raises(ModelError, match=r"at \[1, 2\] that float16 cannot hold") as caught:
        load(model_dir, dtype=torch.float16)

    assert "bfloat16" in caught.value.hint
    load(model_dir, dtype=torch.bfloat16)


def test_copies_and_buffers_of_real_files_are_known(tmp_path: Path) -> None:
    """A tied head saved as a copy, rotary tables, GPT-2's masks and BERT's pooler load; BERT's old names too."""
    llama = tiny_llama(tmp_path / "llama")
    change_tensors(
        llama,
        lambda t: t.update(
            {
                "lm_head.weight": t["model.embed_tokens.weight"].clone(),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
            }
        ),
    )
    gpt2 = tiny_gpt2(tmp_path / "gpt2", prefix="")
    change_tensors(gpt2, lambda t: t.update({"h.0.attn.bias": torch.ones(1, 1, 8, 8)}))
    bert = tiny_bert(tmp_path / "bert")
    expected = load_state(bert, config=load_config(bert))

    def older(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            new = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[new] = tensors.pop(name)
        tensors["embeddings.position_ids"] = torch.arange(128)[None]

    change_tensors(bert, older)

    for model_dir in (llama, gpt2, bert):
        check_weights(model_dir, config=load_config(model_dir))
        load(model_dir, tp=2)
    assert all(torch.equal(expected[n], t) for n, t in load_state(bert, config=load_config(bert)).items())


def test_ignorable_names_are_few_and_listed() -> None:
    """What may be left out is a closed list: a pooler is known to BERT alone."""
    fields = {"vocab_size": 8, "hidden_size": 4, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 4}
    shape = {"ffn_size": 4, "max_context": 8, "norm_eps": 1e-5, "gated_mlp": False}
    bert = ModelConfig(
        family="bert", architecture="BertModel", norm="layer", norm_order="post", activation="gelu",
        position="learned", token_types=2, qkv_bias=True, out_bias=True, mlp_bias=True, **fields, **shape,  # type: ignore[arg-type]
    )  # fmt: skip
    gpt2 = ModelConfig(
        family="gpt2", architecture="GPT2LMHeadModel", norm="layer", norm_order="pre", activation="gelu",
        position="learned", qkv_bias=True, out_bias=True, mlp_bias=True, tied_embeddings=True, **fields, **shape,  # type: ignore[arg-type]
    )  # fmt: skip

    assert name_table(bert).is_ignorable("bert.pooler.dense.weight")
    assert not name_table(gpt2).is_ignorable("pooler.dense.weight")
    assert name_table(gpt2).is_ignorable("transformer.h.11.attn.bias")
    assert not name_table(gpt2).is_ignorable("transformer.h.11.attn.extra")


def test_minilm_loads_with_its_pooler_and_position_buffer_left_out(minilm_dir: Path) -> None:
    """The published sentence encoder: 6 layers, names without prefix, an unused pooler, an integer buffer."""
    config = load_config(minilm_dir)
    raw = safetensors.torch.load_file(minilm_dir / "model.safetensors")

    stage, _, report = load(minilm_dir, tp=2, tp_rank=1)

    assert (config.pooling, config.normalize) == ("mean", True)
    rows = raw["encoder.layer.3.attention.self.query.weight"]
    assert torch.equal(rows[192:], dict(stage.named_parameters())["model.layers.3.self_attn.q_proj.weight"])
    assert report.num_bytes < 0.55 * (minilm_dir / "model.safetensors").stat().st_size


_MEMORY = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from test_weights_load import load_config, place, build_stage, select, load_stage

model_dir = Path(sys.argv[1])
config = load_config(model_dir)
grid = place(tp=2, pp=1, tp_rank=int(sys.argv[3]), pp_rank=0)

def peak():  # not getrusage's, which is that of the process that forked this one
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

select("torch")
torch.zeros(8).aminmax()
before = peak()
stage = build_stage(config, grid=grid, backend=select("torch"), dtype=torch.float32)
load_stage(stage, model_dir, config=config, grid=grid)
print(peak() - before)
"""


@pytest.mark.parametrize("tp_rank", [0, 1])
def test_peak_memory_of_a_rank_stays_near_its_share(smollm2_dir: Path, tp_rank: int) -> None:
    """
    Loading SmolLM2 at tp=2 adds at most 0.6 of the model plus one tensor to a rank's peak resident memory.

    Inverse: with the file memory-mapped, whose touched pages stay resident, it was seen to fail.
    """
    sizes = [entry.numel() * 4 for entry in load_state_shapes(smollm2_dir)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    tests = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

    done = subprocess.run(
        [sys.executable, "-c", _MEMORY, str(smollm2_dir), tests[1], str(tp_rank)],
        env={**environment, "PYTHONPATH": os.pathsep.join([*tests, os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )

    assert int(done.stdout) <= 0.6 * sum(sizes) + max(sizes)


def load_state_shapes(model_dir: Path) -> list[torch.Tensor]:
    return [torch.empty(shape, device="meta") for shape in global_shapes(load_config(model_dir)).values()]
