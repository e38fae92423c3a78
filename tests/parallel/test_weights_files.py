"""Safetensors files and indexes: what is read is what was written, and everything broken is one clear sentence."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_llama

from trilithon_parallel.config import ModelError
from trilithon_parallel.weights.directory import INDEX_FILE, WeightFiles
from trilithon_parallel.weights.safetensors_io import DTYPES, SafetensorsFile, TensorSpec, write_safetensors


def raw_file(path: Path, header: dict[str, Any] | str | bytes, data: bytes, *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def f32(begin: int, end: int, shape: list[int]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


BROKEN: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "empty": (lambda p: _write(p, b""), "weights_truncated", "8-byte header length"),
    "header length beyond the file": (
        lambda p: raw_file(p, {}, b"", length=900),
        "weights_truncated",
        "header needs 908 bytes",
    ),
    "header length absurd": (lambda p: raw_file(p, {}, b"", length=2**62), "weights_invalid", "header length must be"),
    "header not JSON": (lambda p: raw_file(p, "{nope", b""), "weights_invalid", "not JSON"),
    "header nested too deeply": (lambda p: raw_file(p, "[" * 200_000, b""), "weights_invalid", "not JSON"),
    "header not UTF-8": (lambda p: raw_file(p, b"\xff\xfe{}", b""), "weights_invalid", "not JSON"),
    "header a list": (lambda p: raw_file(p, "[]", b""), "weights_invalid", "must be a JSON object"),
    "data cut short": (lambda p: raw_file(p, {"a": f32(0, 16, [4])}, b"\0" * 9), "weights_truncated", "cut short"),
    "data too long": (lambda p: raw_file(p, {"a": f32(0, 16, [4])}, b"\0" * 20), "weights_invalid", "4 bytes after"),
    "overlap": (
        lambda p: raw_file(p, {"a": f32(0, 16, [4]), "b": f32(8, 24, [4])}, b"\0" * 24),
        "weights_invalid",
        "tensor b overlaps",
    ),
    "hole": (
        lambda p: raw_file(p, {"a": f32(0, 16, [4]), "b": f32(20, 36, [4])}, b"\0" * 36),
        "weights_invalid",
        "tensor b leaves a hole",
    ),
    "size does not fit the shape": (
        lambda p: raw_file(p, {"a": f32(0, 12, [4])}, b"\0" * 12),
        "weights_invalid",
        "must take 16 bytes. Given: 12",
    ),
    "negative offset": (
        lambda p: raw_file(p, {"a": f32(-4, 12, [4])}, b"\0" * 16),
        "weights_invalid",
        "data_offsets must be",
    ),
    "offsets backwards": (
        lambda p: raw_file(p, {"a": f32(16, 0, [4])}, b"\0" * 16),
        "weights_invalid",
        "data_offsets must be",
    ),
    "shape with a float": (
        lambda p: raw_file(p, '{"a": {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}}', b"\0" * 16),
        "weights_invalid",
        "shape must list sizes",
    ),
    "shape that overflows": (
        lambda p: raw_file(p, {"a": f32(0, 16, [2**62, 2**62])}, b"\0" * 16),
        "weights_invalid",
        "shape must list sizes",
    ),
    "unknown dtype": (
        lambda p: raw_file(p, {"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}, b"\0" * 4),
        "weights_invalid",
        "unknown dtype. Given: 'F8_E4M3'",
    ),
    "a tensor twice": (
        lambda p: raw_file(p, '{"a": %s, "a": %s}' % ((json.dumps(f32(0, 16, [4])),) * 2), b"\0" * 16),
        "weights_invalid",
        "names a twice",
    ),
    "extra field": (
        lambda p: raw_file(p, {"a": f32(0, 16, [4]) | {"code": "x"}}, b"\0" * 16),
        "weights_invalid",
        "must have exactly dtype, shape and data_offsets",
    ),
    "metadata not strings": (
        lambda p: raw_file(p, {"__metadata__": {"a": 1}}, b""),
        "weights_invalid",
        "__metadata__ must map strings",
    ),
}


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("case", BROKEN, ids=list(BROKEN))
def test_R11_broken_safetensors_is_one_sentence(case: str, tmp_path: Path) -> None:
    """Each kind of broken file is named with the rule it breaks. Inverse: the sound file of the next test opens."""
    make, code, words = BROKEN[case]
    path = make(tmp_path / "model.safetensors")

    with pytest.raises(ModelError) as caught:
        SafetensorsFile(path)

    assert code == caught.value.code
    assert words in caught.value.message
    assert caught.value.message.startswith("model.safetensors ")
    assert caught.value.hint
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL"])
def test_reads_what_the_reference_library_writes(name: str, tmp_path: Path) -> None:
    """Tensors written by the safetensors package come back bit for bit, whole and in part, scalars included."""
    dtype = DTYPES[name]
    tensors = {
        "matrix": torch.arange(35).reshape(5, 7).to(dtype),
        "scalar": torch.tensor(3).to(dtype),
        "empty": torch.empty(0, 4, dtype=dtype),
        "cube": torch.arange(24).reshape(2, 3, 4).to(dtype),
    }
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path)

    with SafetensorsFile(path) as file:
        part = torch.empty(2, 3, dtype=dtype)
        file.read_into("matrix", (slice(1, 3), slice(4, 7)), part)

        assert set(tensors) == set(file.tensors)
        assert all(torch.equal(tensor, file.read(key)) for key, tensor in tensors.items())
        assert torch.equal(tensors["matrix"][1:3, 4:7], part)


def test_the_reference_library_reads_what_we_write(tmp_path: Path) -> None:
    """A file of ours opens in the safetensors package with equal tensors, cast to the dtype of the spec."""
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).to(torch.bfloat16), "c": torch.randn(6, 2).t()}
    specs = [TensorSpec(name, torch.bfloat16, tuple(tensor.shape)) for name, tensor in tensors.items()]
    path = tmp_path / "x.safetensors"
    write_safetensors(path, specs, lambda spec: tensors[spec.name])

    loaded = safetensors.torch.load_file(path)

    assert list(tensors) == list(SafetensorsFile(path).tensors)
    assert all(torch.equal(tensor.to(torch.bfloat16), loaded[name]) for name, tensor in tensors.items())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_block_is_the_slice_of_the_whole(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """For random shapes, blocks, dtypes and target strides, reading a block equals slicing the whole tensor."""
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    slices = []
    for size in shape:
        begin = data.draw(st.integers(0, size))
        slices.append(slice(begin, data.draw(st.integers(begin, size))))
    source = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    target = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(source)
    path = tmp_path_factory.getbasetemp() / "block.safetensors"
    write_safetensors(path, [TensorSpec("w", source, tuple(shape))], lambda spec: whole)
    expected = whole[tuple(slices)].to(target)
    roomy = torch.zeros([size + 2 for size in expected.shape], dtype=target)
    out = roomy[tuple(slice(0, size) for size in expected.shape)]

    with SafetensorsFile(path) as file:
        file.read_into("w", slices, out)

    assert torch.equal(expected, out)


def test_R11_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    """A file cut after it was opened gives a sentence. Inverse: with a memory map the process died by SIGBUS."""
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(1000)}, path)
    with SafetensorsFile(path) as file:
        with path.open("r+b") as handle:
            handle.truncate(500)

        with pytest.raises(ModelError, match=r"model.safetensors tensor w ends at byte 500") as caught:
            file.read("w")

    assert caught.value.code == "weights_truncated"


def edit_index(model_dir: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = model_dir / INDEX_FILE
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


INDEX_FAULTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "reaches outside": (
        lambda d: edit_index(d, lambda i: i["weight_map"].update({"model.norm.weight": "../secret.safetensors"})),
        "weights_invalid",
        "must name a .safetensors file of the same directory. Given: '../secret.safetensors'",
    ),
    "absolute path": (
        lambda d: edit_index(d, lambda i: i["weight_map"].update({"model.norm.weight": "/etc/x.safetensors"})),
        "weights_invalid",
        "Given: '/etc/x.safetensors'",
    ),
    "pickled shard": (
        lambda d: edit_index(d, lambda i: i["weight_map"].update({"model.norm.weight": "pytorch_model.bin"})),
        "weights_invalid",
        "Given: 'pytorch_model.bin'",
    ),
    "shard missing": (
        lambda d: (d / "model-00002-of-00002.safetensors").unlink(),
        "weights_missing",
        "model-00002-of-00002.safetensors is missing",
    ),
    "tensor promised and not there": (
        lambda d: edit_index(d, lambda i: i["weight_map"].update({"ghost": "model-00001-of-00002.safetensors"})),
        "weights_missing",
        "holds tensor ghost, which it does not",
    ),
    "tensor there and not listed": (
        lambda d: edit_index(d, lambda i: i["weight_map"].pop("model.norm.weight")),
        "weights_invalid",
        "tensor model.norm.weight must be listed",
    ),
    "not an object": (
        lambda d: (d / INDEX_FILE).write_text('{"weight_map": []}'),
        "weights_invalid",
        "weight_map must map tensor names",
    ),
    "not JSON": (lambda d: (d / INDEX_FILE).write_text("{"), "weights_invalid", "not readable JSON"),
    "two models at once": (
        lambda d: (d / "model-00001-of-00002.safetensors").rename(d / "model.safetensors"),
        "weights_invalid",
        "holds both model.safetensors and",
    ),
}


@pytest.mark.parametrize("case", INDEX_FAULTS, ids=list(INDEX_FAULTS))
def test_R11_index_that_does_not_fit_is_one_sentence(case: str, tmp_path: Path) -> None:
    """Each way in which an index and its shards disagree is named. Inverse: untouched, the directory opens."""
    model_dir = tiny_llama(tmp_path / "m", shards=2)
    with WeightFiles(model_dir) as files:
        assert len(files.tensors) == 20
    breaks, code, words = INDEX_FAULTS[case]
    breaks(model_dir)

    with pytest.raises(ModelError) as caught:
        WeightFiles(model_dir)

    assert code == caught.value.code
    assert words in caught.value.message


def test_S1_pickled_weights_are_refused_with_the_reason(tmp_path: Path) -> None:
    """A directory with only pickled weights is refused, and the sentence says why and what to do instead."""
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")

    with pytest.raises(ModelError, match="would run code") as caught:
        WeightFiles(tmp_path)

    assert caught.value.code == "weights_pickled"
    assert "save_pretrained" in caught.value.hint


def test_R11_directory_without_weights_says_so(tmp_path: Path) -> None:
    """An empty directory is told apart from a broken one."""
    with pytest.raises(ModelError, match="holds no weights") as caught:
        WeightFiles(tmp_path)

    assert caught.value.code == "weights_missing"
