"""Products behind one seam: packed forms, kernels, their sums."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_llama
from torch import Tensor

from trilithon_parallel.attention import PackedView
from trilithon_parallel.backend import native, select, torch_ops
from trilithon_parallel.backend.native_product import NativeProduct, takes
from trilithon_parallel.config import ModelError, load_config
from trilithon_parallel.grid import Grid
from trilithon_parallel.layers import Product
from trilithon_parallel.models import build_stage
from trilithon_parallel.weights.loader import load_stage


def widened(weight: Tensor, bias: Tensor) -> torch_ops._WidenedProduct:
    return torch_ops._WidenedProduct(torch_ops._OneDnnProduct(weight.float(), bias.float()))


def native_product(weight: Tensor, bias: Tensor | None, terms: Sequence[int] = (8, 20, 12)) -> NativeProduct:
    if not takes(weight.dtype, terms):
        pytest.skip(native.unavailable_reason() or "this CPU has no instruction for this dtype")
    return NativeProduct(weight, bias, terms=terms)


KINDS = {
    "native": native_product,
    "onednn": torch_ops._OneDnnProduct,
    "widened": widened,
    "plain": torch_ops._PlainProduct,
    "terms": functools.partial(torch_ops._TermsProduct, terms=[8, 20, 12], make=torch_ops._PlainProduct),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 7, 33, 200])
def test_packed_products_equal_linear(kind: str, dtype: torch.dtype, rows: int) -> None:
    """Each form of product, with bias and residual, gives what F.linear gives in fp32, to the dtype's rounding."""
    if kind == "onednn" and not torch_ops._can_pack(dtype):
        pytest.skip("this CPU has no packed product of this dtype")
    if kind == "terms" and dtype != torch.float32:
        pytest.skip("terms are fp32 always: lower precisions are widened first")
    generator = torch.Generator().manual_seed(1)
    x, weight, bias, residual = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((rows, 40), (70, 40), (70,), (rows, 70))
    )
    expected = F.linear(x.float(), weight.float(), bias.float())

    product = KINDS[kind](weight, bias)

    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(product(x).float(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        product(x, residual).float(), expected + residual.float(), rtol=tolerance, atol=2 * tolerance
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["native", "tiled"])
def test_E2_products_do_not_see_their_batch(kind: str, dtype: torch.dtype) -> None:
    """A row's bits are the same at any place in any number of rows, and at any number of threads."""
    weight, x = torch.randn(100, 96).to(dtype), torch.randn(250, 96).to(dtype)
    if kind == "native":
        product: Product = native_product(weight, None, terms=(48, 48))
    else:
        product = torch_ops._TiledProduct(torch_ops._PlainProduct(weight, None))
    whole = product(x)

    assert torch.equal(torch.cat([product(row) for row in x.split(1)]), whole)
    assert torch.equal(product(x.flip(0)).flip(0), whole)
    assert torch.equal(product(x.repeat(1, 2)[:, 96:]), whole)  # rows that lie apart in memory
    torch.set_num_threads(2)
    assert torch.equal(product(x), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shares", [[4, 4, 4], [6, 6], [1, 11], [3, 3, 3, 3]], ids=str)
def test_E1_sums_do_not_see_how_they_are_shared(dtype: torch.dtype, shares: list[int]) -> None:
    """
    Ranks with whole terms add up to the bits that one rank has; one long fp32 sum cut in two does not.

    Inverse: a NativeProduct that is not `wide` rounds each share and fails it.
    """
    generator = torch.Generator().manual_seed(2)
    weight, x, residual = (
        torch.randn(n, k, generator=generator).to(dtype) for n, k in ((64, 1536), (9, 1536), (9, 64))
    )
    if not takes(dtype, [128]):
        pytest.skip(native.unavailable_reason() or "this CPU has no instruction for this dtype")
    whole = NativeProduct(weight, None, terms=[128] * 12, wide=True)(x, residual)
    sizes = [128 * share for share in shares]
    parts = zip(weight.split(sizes, 1), x.split(sizes, 1), shares, strict=True)

    totals = [NativeProduct(w, None, terms=[128] * n, wide=True)(part) for w, part, n in parts]

    assert all(total.dtype == torch.float64 for total in totals)
    assert torch.equal((residual + torch.stack(totals).sum(0)).to(dtype), whole)


def test_a_plain_sum_sees_how_it_is_shared() -> None:
    """What the test above is for: F.linear over halves does not add up to F.linear over all."""
    generator = torch.Generator().manual_seed(2)
    weight, x = torch.randn(64, 1536, generator=generator), torch.randn(9, 1536, generator=generator)
    halves = [F.linear(a, w) for a, w in zip(x.split(768, 1), weight.split(768, 1), strict=True)]

    assert not torch.equal(halves[0] + halves[1], F.linear(x, weight))


@pytest.fixture
def fresh_kernels() -> Iterator[None]:
    """Forget what was compiled, before and after."""
    native._load.cache_clear()
    yield
    native._load.cache_clear()


@pytest.mark.usefixtures("fresh_kernels")
def test_kernels_need_no_writable_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Where the store can't keep them they are compiled for the process alone, and nothing stays behind.

    Inverse: without the second try the reason is the store's.
    """
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler here")
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("TRILITHON_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    assert native.unavailable_reason() == ""
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


@pytest.mark.usefixtures("fresh_kernels")
def test_missing_kernels_have_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler on the path is said in words."""
    monkeypatch.setenv("PATH", "/nonexistent")

    assert native.unavailable_reason() == "no C compiler (gcc or cc) is on the path"


def test_without_a_compiler_the_products_are_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model serves the same numbers, to fp32's rounding."""
    model_dir = tiny_llama(tmp_path / "model")
    config, grid = load_config(model_dir), Grid.single()
    tokens_T, logits = torch.arange(30), []
    for reason in (native.unavailable_reason(), "no C compiler"):
        monkeypatch.setattr(native, "unavailable_reason", lambda reason=reason: reason)
        stage = build_stage(config, grid=grid, backend=select("torch"), dtype=torch.float32)
        load_stage(stage, model_dir, config=config, grid=grid)
        stage.prepare()
        view = PackedView([0, 30], causal=True)
        with torch.inference_mode():
            logits.append(stage.gather_logits(stage(tokens_T, positions_T=tokens_T, view=view)))
    kind = type(stage.model.layers["0"].mlp.fused).__name__

    assert kind != "NativeProduct"
    assert (logits[0] - logits[1]).abs().max() <= 1e-4


def test_packing_keeps_one_copy(tmp_path: Path) -> None:
    """After `prepare` only lookup tables and norms are parameters still: products own their weights."""
    model_dir = tiny_llama(tmp_path / "model")
    config, grid = load_config(model_dir), Grid.single()
    stage = build_stage(config, grid=grid, backend=select("torch"), dtype=torch.float32)
    load_stage(stage, model_dir, config=config, grid=grid)
    stage.prepare()

    assert all("norm" in name or "embed" in name for name, _ in stage.named_parameters())


def test_an_unknown_backend_is_refused() -> None:
    """The message lists the backends."""
    with pytest.raises(ModelError, match=r"Given: 'tensorflow'\. Allowed: torch, te, auto"):
        select("tensorflow")  # type: ignore[arg-type]  # the mistake under test
