"""The arithmetic of adapters: the C kernel against the backend's own products, and whose rows are whose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trilithon_parallel.backend import native_product
from trilithon_parallel.backend.native import unavailable_reason
from trilithon_parallel.backend.native_lora import Arena
from trilithon_parallel.backend.native_product import even_terms
from trilithon_parallel.backend.torch_ops import TorchBackend
from trilithon_parallel.config import load_config
from trilithon_parallel.grid import Grid
from trilithon_parallel.lora.bank import AdapterBank, bank_bytes
from trilithon_parallel.lora.sites import Factors, KernelSite, ProductSite, arrange
from trilithon_parallel.models import build_stage

NATIVE = pytest.mark.skipif(bool(unavailable_reason()), reason=f"no C kernels: {unavailable_reason()}")
DTYPES = [torch.float32, torch.bfloat16]


def _pair(
    dtype: torch.dtype, terms: list[int] | None, outputs: tuple[int, ...], inputs: int, ranks: list[int]
) -> tuple[KernelSite, ProductSite]:
    """A site of each kind with the same factors; every third product of an adapter is left as it is."""
    kernel = KernelSite(terms or even_terms(inputs), outputs, num_slots=len(ranks), dtype=dtype)
    products = ProductSite(terms, outputs, num_slots=len(ranks), backend=TorchBackend())
    generator = torch.Generator().manual_seed(3)
    for slot, rank in enumerate(ranks):
        factors = [
            None
            if (part + slot) % 3 == 2
            else Factors(
                torch.randn(rank, inputs, generator=generator).to(dtype),
                torch.randn(size, rank, generator=generator).to(dtype),
                1.7,
            )
            for part, size in enumerate(outputs)
        ]
        arena = Arena(kernel.room([rank] * len(outputs)))
        kernel.pack(factors, arena)(slot)
        products.pack(factors, arena)(slot)
    return kernel, products


@NATIVE
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("terms", "outputs", "inputs", "is_wide"),
    [
        (None, (576, 192, 192), 576, False),
        ([128] * 12, (576,), 1536, False),
        ([128, 128, 64], (40,), 320, True),
        (None, (33, 7), 1000, False),
    ],
    ids=["columns", "row", "share-of-a-sum", "ragged"],
)
def test_E3_kernel_equals_products(
    dtype: torch.dtype, terms: list[int] | None, outputs: tuple[int, ...], inputs: int, is_wide: bool
) -> None:
    """
    The kernel adds bit for bit what two packed products of the backend and one rounded sum add.

    Seen to fail with the scale taken after the second product.
    """
    if not native_product.takes(dtype, terms or even_terms(inputs)):
        pytest.skip("this machine's kernel does not multiply this dtype")
    kernel, products = _pair(dtype, terms, outputs, inputs, [16, 8, 40])
    generator = torch.Generator().manual_seed(5)
    rows = arrange([0, -1, 1, 2, 0], [0, 1, 3, 5, 16, 40], piece=8)
    x = torch.randn(40, inputs, generator=generator).to(dtype)
    y = torch.randn(40, sum(outputs), generator=generator).to(torch.float64 if is_wide else dtype)
    assert rows is not None
    by_kernel, by_products = y.clone(), y.clone()

    kernel.add(by_kernel, x, rows)
    products.add(by_products, x, rows)

    assert torch.equal(by_kernel, by_products)
    assert torch.equal(by_kernel[1:3], y[1:3])
    assert not torch.equal(by_kernel, y)


@NATIVE
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_E2_row_alone_equals_row_in_batch(dtype: torch.dtype) -> None:
    """A row's bits don't depend on how many rows of its adapter or of others a step has."""
    if not native_product.takes(dtype, [320]):
        pytest.skip("this machine's kernel does not multiply this dtype")
    kernel, _ = _pair(dtype, None, (96, 32), 320, [8, 16])
    generator = torch.Generator().manual_seed(6)
    x, y = (torch.randn(23, size, generator=generator).to(dtype) for size in (320, 128))
    together, rows = y.clone(), arrange([0, 1, 0], [0, 13, 14, 23], piece=8)
    assert rows is not None
    kernel.add(together, x, rows)

    for row, slot in ((0, 0), (12, 0), (13, 1), (22, 0)):
        alone, one = y[row : row + 1].clone(), arrange([slot], [0, 1], piece=8)
        assert one is not None
        kernel.add(alone, x[row : row + 1].contiguous(), one)
        assert torch.equal(alone[0], together[row])


def test_arrange_leaves_base_rows_out() -> None:
    """A step without adapters has nothing to add; otherwise every adapted row stands in exactly one group."""
    assert arrange([-1, -1], [0, 3, 4], piece=8) is None

    rows = arrange([2, -1, 0, 2], [0, 9, 10, 12, 30], piece=8)

    assert rows is not None
    assert rows.spans == ((0, 0, 2), (2, 2, 29))
    assert sorted(rows.rows.tolist()) == [*range(9), *range(10, 30)]
    assert rows.groups.tolist() == [[0, 0, 2], [2, 2, 8], [2, 10, 8], [2, 18, 8], [2, 26, 3]]


def test_bank_memory_is_bounded_by_its_estimate(model_dir: Path, adapter_dirs: list[Path]) -> None:
    """What full slots take is at most what the start reserves for them."""
    config, grid = load_config(model_dir), Grid.single("cpu")
    stage = build_stage(config, grid=grid, backend=TorchBackend(), dtype=torch.float32)
    for parameter in stage.parameters():
        torch.nn.init.zeros_(parameter)
    stage.prepare()
    bank = AdapterBank(stage, config=config, grid=grid, max_adapters=1, max_rank=20)
    held = []
    for put in bank.read(adapter_dirs[2]).puts:  # type: ignore[attr-defined]  # partials of `NativeSite.put`
        factors = getattr(put, "keywords", {}).get("factors", [])
        held += [f.a_panels.nbytes + f.b_panels.nbytes for f in factors if f is not None]
    if not held:
        pytest.skip("no C kernels: products are torch's to hold")

    assert 0 < sum(held) <= bank_bytes(config, grid=grid, dtype=torch.float32, max_adapters=1, max_rank=20)
