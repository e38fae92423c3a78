"""GGUF import: numbers, row order, tokenizer and template survive; broken files are one sentence."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_llama
from tiny_gguf import permute_rope, write_gguf
from tiny_tokenizers import CHAT_TEMPLATE

from trilithon_parallel.attention import PackedView
from trilithon_parallel.backend import select
from trilithon_parallel.config import ModelError, load_config
from trilithon_parallel.grid import Grid
from trilithon_parallel.models import CausalStage, build_stage
from trilithon_parallel.tokenizer import load_tokenizer
from trilithon_parallel.weights.gguf import import_gguf, unpermute_rope
from trilithon_parallel.weights.gguf_file import GgufFile
from trilithon_parallel.weights.loader import load_stage, load_state

Q = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("source") / "m", heads=6, groups=3, hidden=96, ffn=160)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", source)


def imported(path: Path, out: Path, *, dtype: str = "float32") -> Path:
    out.mkdir()
    import_gguf(path, out, dtype=dtype)
    return out


def test_fp32_import_is_the_original_bit_for_bit(source: Path, whole: Path, tmp_path: Path) -> None:
    """Weights, shape, end tokens, template and token ids of the original come back from its GGUF."""
    out = imported(whole, tmp_path / "out")

    expected, config = load_state(source, config=load_config(source)), load_config(out)
    state = load_state(out, config=config)
    assert load_config(source) == config
    assert set(expected) == set(state)
    assert all(torch.equal(expected[name], tensor) for name, tensor in state.items())
    assert (out / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    theirs, ours = load_tokenizer(source), load_tokenizer(out)
    text = "<|im_start|>user\nThe mason: 144 st\u00f6nes, 'twas 3.14!<|im_end|>\n"
    assert theirs.encode(text, add_special_tokens=True) == ours.encode(text, add_special_tokens=True)
    assert (theirs.bos_id, theirs.eos_ids, theirs.special_ids) == (ours.bos_id, ours.eos_ids, ours.special_ids)


@settings(max_examples=50, deadline=None)
@given(heads=st.integers(1, 5), half=st.integers(1, 6), columns=st.integers(0, 3))
def test_unpermute_inverts_the_definition(heads: int, half: int, columns: int) -> None:
    """For any head shape, undoing llama.cpp's order restores the rows. Seen elsewhere: torchtitan#1291, #1441."""
    shape = (heads * half * 2, *([columns] if columns else []))
    rows = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)

    assert np.array_equal(rows, unpermute_rope(permute_rope(rows, heads), heads))


@pytest.mark.parametrize("kind", [Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_1], ids=lambda kind: kind.name)
def test_quantised_import_is_the_dequantised_file(
    kind: gguf.GGMLQuantizationType, source: Path, tmp_path: Path
) -> None:
    """Each tensor is what the gguf package makes of its own type; norms stay fp32 and exact."""
    path = write_gguf(tmp_path / "q.gguf", source, kind=kind)

    state = load_state(imported(path, tmp_path / "out"), config=load_config(source))

    exact = load_state(source, config=load_config(source))
    name = "model.layers.1.mlp.down_proj.weight"
    expected = gguf.dequantize(gguf.quantize(exact[name].numpy(), kind), kind)
    assert np.array_equal(expected, state[name].numpy())
    assert torch.equal(exact["model.norm.weight"], state["model.norm.weight"])


def test_bf16_import_halves_the_file(whole: Path, tmp_path: Path) -> None:
    """On request the weights are rounded to bf16, and config.json says so."""
    full, half = imported(whole, tmp_path / "a"), imported(whole, tmp_path / "b", dtype="bfloat16")

    sizes = [(path / "model.safetensors").stat().st_size for path in (full, half)]
    assert 0.45 < sizes[1] / sizes[0] < 0.6
    assert load_config(half).dtype == "bfloat16"
    states = [load_state(path, config=load_config(path)) for path in (full, half)]
    assert all(torch.equal(tensor.bfloat16(), states[1][name]) for name, tensor in states[0].items())


def test_E10_converted_smollm2_is_what_transformers_computes(smollm2_dir: Path) -> None:
    """
    The converted SmolLM2 gives the same logits in transformers and here (1e-4), and greedy text that makes sense.

    Inverse: with q and k rows left in llama.cpp's order both agreed and the answer was empty: seen to fail.
    """
    import transformers

    tokenizer = load_tokenizer(smollm2_dir)
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    config = load_config(smollm2_dir)
    stage = build_stage(config, grid=Grid.single(), backend=select("torch"), dtype=torch.float32)
    load_stage(stage, smollm2_dir, config=config, grid=Grid.single())
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    tokens_T = torch.tensor(tokenizer.encode(prompt, add_special_tokens=True))

    with torch.no_grad():
        view = PackedView([0, len(tokens_T)], causal=True)
        assert isinstance(stage, CausalStage)
        ours_TV = stage.gather_logits(stage(tokens_T, positions_T=torch.arange(len(tokens_T)), view=view))
        theirs_TV = theirs(tokens_T[None]).logits[0]
        answer = theirs.generate(tokens_T[None], max_new_tokens=12, do_sample=False, pad_token_id=2)[0]

    assert (ours_TV - theirs_TV).abs().max() <= 1e-4
    text = tokenizer.decode(answer[len(tokens_T) :].tolist(), skip_special_tokens=True)
    assert text == "The capital of France is Paris."


def test_smollm2_config_and_template_are_those_of_the_file(smollm2_dir: Path) -> None:
    """Shape, end tokens and chat template of the published model."""
    config = load_config(smollm2_dir)
    template = (smollm2_dir / "chat_template.jinja").read_text()

    assert (
        config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads, config.ffn_size,
    ) == (30, 576, 9, 3, 1536)  # fmt: skip
    assert (config.vocab_size, config.max_context, config.rope_theta, config.norm_eps) == (49152, 8192, 1e5, 1e-5)
    assert (config.tied_embeddings, config.bos_id, config.eos_ids) == (True, 1, (2,))
    assert template.startswith("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}")
    assert template.endswith("{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


FIELD_FAULTS: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "another architecture": ({"general.architecture": "mamba"}, (), "general.architecture is not supported"),
    "experts": ({"llama.expert_count": 8}, (), "llama.expert_count is not supported. Given: 8"),
    "no layers": ({}, ("llama.block_count",), "llama.block_count must be a positive whole number. Given: None"),
    "heads by layer": ({"llama.attention.head_count_kv": [3, 3]}, (), r"head_count_kv must be a positive whole"),
    "partial rotary": ({"llama.rope.dimension_count": 8}, (), "rope.dimension_count is not supported. Given: 8"),
    "yarn": ({"llama.rope.scaling.type": "yarn"}, (), "rope.scaling.type is not supported. Given: 'yarn'"),
    "epsilon zero": ({"llama.attention.layer_norm_rms_epsilon": 0.0}, (), "epsilon must be a positive number"),
    "sentencepiece": ({"tokenizer.ggml.model": "llama"}, (), "tokenizer.ggml.model is not converted. Given: 'llama'"),
    "unknown cut": ({"tokenizer.ggml.pre": "mystery"}, (), "tokenizer.ggml.pre is not converted. Given: 'mystery'"),
    "types too short": ({"tokenizer.ggml.token_type": [1, 1]}, (), "token_type must be 384 numbers"),
    "a merge of nothing": ({"tokenizer.ggml.merges": ["a \u00ff\u00ff"]}, (), "must join two tokens into a third"),
    "eos outside": ({"tokenizer.ggml.eos_token_id": 9999}, (), "eos_token_id must be from 0 to 383. Given: 9999"),
    "alignment": ({"general.alignment": 24}, (), "general.alignment must be a power of two"),
}


@pytest.mark.parametrize("case", FIELD_FAULTS, ids=list(FIELD_FAULTS))
def test_R11_unsupported_or_odd_metadata_is_one_sentence(case: str, source: Path, tmp_path: Path) -> None:
    """What cannot be converted exactly is refused by key and value. Inverse: without the fault the file imports."""
    fields, leave_out, words = FIELD_FAULTS[case]
    if "general.architecture" in fields:
        path = _other_architecture(write_gguf(tmp_path / "x.gguf", source), fields["general.architecture"])
    else:
        path = write_gguf(tmp_path / "x.gguf", source, fields=fields, leave_out=leave_out)

    with pytest.raises(ModelError, match=words) as caught:
        imported(path, tmp_path / "out")

    assert caught.value.code in ("gguf_unsupported", "gguf_invalid")
    assert caught.value.hint


def _other_architecture(path: Path, name: str) -> Path:
    """The writer itself refuses to name an architecture twice, so the bytes are changed."""
    path.write_bytes(path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0" + name.encode(), 1))
    return path


def test_R11_tensors_without_a_place_are_refused(source: Path, tmp_path: Path) -> None:
    """An unknown tensor and Llama 3's per-frequency factors are named, not left out."""
    for name in ("blk.0.attn_q_norm.weight", "rope_freqs.weight"):
        path = write_gguf(tmp_path / "x.gguf", source, tensors={name: np.ones(16, dtype=np.float32)})

        with pytest.raises(ModelError, match=f"tensor {name}") as caught:
            imported(path, tmp_path / name)

        assert caught.value.code == "gguf_unsupported"


def test_R11_nan_in_a_gguf_is_refused(source: Path, tmp_path: Path) -> None:
    """A broken scale makes NaN; the tensor is named."""
    bad = np.full(96, np.nan, dtype=np.float32)
    path = write_gguf(tmp_path / "x.gguf", source, tensors={"output_norm.bias": bad})

    with pytest.raises(ModelError, match=r"output_norm.bias must hold finite numbers"):
        imported(path, tmp_path / "out")


def patched(whole: Path, out: Path, change: Callable[[bytearray], object]) -> Path:
    data = bytearray(whole.read_bytes())
    change(data)
    out.write_bytes(data)
    return out


HEAD_FAULTS: dict[str, tuple[Callable[[bytearray], object], str, str]] = {
    "empty": (lambda d: d.clear(), "gguf_invalid", "cannot be read"),
    "another magic": (lambda d: d.__setitem__(slice(0, 4), b"GGML"), "gguf_invalid", "not a GGUF file"),
    "version 1": (lambda d: struct.pack_into("<I", d, 4, 1), "gguf_invalid", "version 2 or 3, little-endian. Given: 1"),
    "big-endian": (lambda d: struct.pack_into(">I", d, 4, 3), "gguf_invalid", "Given: 50331648"),
    "too many tensors": (lambda d: struct.pack_into("<Q", d, 8, 2**60), "gguf_invalid", "number of tensors must be at"),
    "more pairs than bytes": (lambda d: struct.pack_into("<Q", d, 16, 900_000), "gguf_", ""),
    "key longer than the file": (lambda d: struct.pack_into("<Q", d, 24, 50_000_000), "gguf_truncated", "is cut short"),
    "key absurdly long": (lambda d: struct.pack_into("<Q", d, 24, 2**63), "gguf_invalid", "must be at most"),
    "data cut": (lambda d: d.__delitem__(slice(-100, None)), "gguf_truncated", "is cut short: tensor"),
}


@pytest.mark.parametrize("case", HEAD_FAULTS, ids=list(HEAD_FAULTS))
def test_R11_broken_gguf_is_one_sentence(case: str, whole: Path, tmp_path: Path) -> None:
    """Each damage to the file's frame is named. Inverse: the undamaged file opens (first test)."""
    change, code, words = HEAD_FAULTS[case]

    with pytest.raises(ModelError) as caught:
        GgufFile(patched(whole, tmp_path / "x.gguf", change))

    assert caught.value.code.startswith(code)
    assert words in caught.value.message


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_S10_damaged_heads_never_do_more_than_raise(
    data: st.DataObject, whole: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Cut anywhere, or with any bytes of its head changed, a file imports or raises ModelError; nothing else."""
    original = whole.read_bytes()
    with GgufFile(whole) as file:
        head = min(tensor.start for tensor in file.tensors.values())
    changed = bytearray(original)
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, head - 1))
        changed[at] = data.draw(st.integers(0, 255))
    changed = changed[: data.draw(st.integers(0, len(original)) | st.just(len(original)))]
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "x.gguf").write_bytes(changed)

    with contextlib.suppress(ModelError):
        imported(folder / "x.gguf", folder / "out")


def test_overlapping_and_repeated_tensors_are_refused(source: Path, tmp_path: Path) -> None:
    """Two tensors on the same bytes, and one name twice."""
    extra = {"aaaa.weight": np.ones(16, dtype=np.float32), "bbbb.weight": np.ones(16, dtype=np.float32)}
    path = write_gguf(tmp_path / "x.gguf", source, tensors=extra)
    with GgufFile(path) as file:
        offset = file.tensors["bbbb.weight"].start - file.tensors["aaaa.weight"].start
    data = path.read_bytes()
    at = data.index(b"bbbb.weight") + len(b"bbbb.weight") + 4 + 8 + 4
    (own,) = struct.unpack_from("<Q", data, at)

    twice = tmp_path / "twice.gguf"
    twice.write_bytes(data.replace(b"bbbb.weight", b"aaaa.weight"))
    with pytest.raises(ModelError, match=r"names tensor aaaa.weight twice"):
        GgufFile(twice)
    over = tmp_path / "over.gguf"
    over.write_bytes(data[:at] + struct.pack("<Q", own - offset) + data[at + 8 :])
    with pytest.raises(ModelError, match=r"overlaps the one before it"):
        GgufFile(over)
