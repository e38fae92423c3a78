"""The backward pass of the C kernels against torch's own in fp64, and the forward pass against serving's bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilithon_parallel.activations import native_gate
from trilithon_parallel.attention import PackedView
from trilithon_parallel.backend import native
from trilithon_parallel.backend.native_product import NativeProduct
from trilithon_parallel.backend.native_training import TrainingProduct, matmul
from trilithon_parallel.layers import RMSNorm, lookup
from trilithon_parallel.transformer import rotate

pytestmark = pytest.mark.skipif(bool(native.unavailable_reason()), reason=native.unavailable_reason() or "no reason")

# Sums of a few hundred products in fp32 against fp64; bfloat16 keeps 8 bits.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True, params=[1, 2], ids=["1 thread", "2 threads"])
def _threads(request: pytest.FixtureRequest) -> None:
    torch.set_num_threads(request.param)


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], d_out: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    return list(torch.autograd.grad(function(*leaves), leaves, d_out))


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        scale = theirs.abs().max().clamp_min(1e-6)
        assert ((ours.double() - theirs).abs().max() / scale).item() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "depth"), [(1, 1, 1), (12, 32, 256), (13, 33, 257), (100, 7, 600), (5, 520, 3), (300, 40, 1)]
)
def test_matmul_takes_any_strides(rows: int, columns: int, depth: int, dtype: torch.dtype) -> None:
    """Either factor may be transposed or cut out of a larger one; with `out` the product is added."""
    a, b = seeded(rows, depth, dtype=dtype), seeded(depth, columns, seed=1, dtype=dtype)
    expected = a.double() @ b.double()
    wide = torch.zeros(rows, columns + 5)

    assert_near([matmul(a, b)], [expected], 1e-5)
    assert_near([matmul(a.t().contiguous().t(), b.t().contiguous().t())], [expected], 1e-5)
    matmul(a, b, matmul(a, b, wide[:, 2 : 2 + columns]))
    assert_near([wide[:, 2 : 2 + columns]], [2 * expected], 1e-5)
    assert wide[:, :2].abs().sum() + wide[:, 2 + columns :].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_E4_a_training_product_is_the_served_one_and_has_its_gradient(dtype: torch.dtype, residual: bool) -> None:
    """
    Forward bits are those of `NativeProduct`; gradients are F.linear's.

    Inverse seen red: return the transposed weight's product as the input's gradient.
    """
    if dtype == torch.bfloat16 and not native.library().product_takes_bf16():
        pytest.skip("this CPU multiplies no bfloat16")
    x, weight, bias = seeded(37, 96, dtype=dtype), seeded(50, 96, seed=1, dtype=dtype), seeded(50, seed=2, dtype=dtype)
    stream, d_out = seeded(37, 50, seed=3, dtype=dtype), seeded(37, 50, seed=4, dtype=dtype)

    def product(x: Tensor, weight: Tensor, bias: Tensor, stream: Tensor) -> Tensor:
        made = TrainingProduct(weight, bias, terms=[48, 48])  # type: ignore[arg-type]  # a leaf stands for a parameter
        return made(x, stream if residual else None) + (0.0 if residual else 0.0 * stream)

    def reference(x: Tensor, weight: Tensor, bias: Tensor, stream: Tensor) -> Tensor:
        return F.linear(x, weight, bias) + (stream if residual else 0.0 * stream)

    inputs = [x, weight, bias, stream]
    found = gradients(product, inputs, d_out)
    expected = gradients(reference, [item.double() for item in inputs], d_out.double())
    served = NativeProduct(weight, bias, terms=[48, 48])(x, stream if residual else None)

    assert_near(found, expected, TOLERANCE[dtype])
    assert torch.equal(product(*(nn.Parameter(item) for item in inputs)), served)


def test_a_weight_gradient_is_added_where_it_belongs() -> None:
    """With `main_grad` the kernel adds there and autograd gets nothing, but its hook runs once a pass all the same."""
    told = []
    weight = nn.Parameter(seeded(24, 16))
    weight.main_grad = torch.zeros(24, 16)  # type: ignore[attr-defined]
    weight.register_post_accumulate_grad_hook(lambda leaf: told.append(leaf.grad))
    product = TrainingProduct(weight, None, terms=[16])
    x, d_out = seeded(9, 16, seed=1), seeded(9, 24, seed=2)
    for _ in range(2):
        product(x).backward(d_out)  # type: ignore[no-untyped-call]

    assert weight.grad is None
    assert told == [None, None]
    assert_near([weight.main_grad], [2 * d_out.double().t() @ x.double()], 1e-5)  # type: ignore[attr-defined]


def test_weights_are_packed_again_when_told() -> None:
    """A product keeps its packed weights until `forget()`."""
    weight = nn.Parameter(seeded(8, 16))
    product = TrainingProduct(weight, None, terms=[16])
    x = seeded(3, 16, seed=1)
    before = product(x)
    weight.data.mul_(2)
    kept = product(x)
    product.forget()

    assert torch.equal(kept, before)
    assert torch.equal(product(x), 2 * before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "groups", "channels"), [(4, 4, 16), (6, 2, 32), (5, 1, 64)])
@pytest.mark.parametrize("lengths", [[1], [33], [100, 7, 193]], ids=str)
def test_attention_backward(lengths: list[int], heads: int, groups: int, channels: int, dtype: torch.dtype) -> None:
    """
    Gradients of queries, keys and values of packed causal sequences are those of the formula in fp64.

    Inverse seen red: sum the scores' gradients without the weights' mean.
    """
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    inputs = [seeded(bounds[-1], n, channels, seed=i, dtype=dtype) for i, n in enumerate((heads, groups, groups))]
    d_out = seeded(bounds[-1], heads, channels, seed=9, dtype=dtype)

    found = gradients(lambda q, k, v: PackedView(bounds, causal=True).attend(0, q, k, v), inputs, d_out)
    expected = gradients(
        lambda q, k, v: PackedView(bounds, causal=True).attend(0, q, k, v), [x.double() for x in inputs], d_out.double()
    )

    assert_near(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 16, 70])
def test_gated_silu_backward(width: int, dtype: torch.dtype) -> None:
    """Gradients of both factors, whatever the width; nothing beyond a row is written."""
    gate = native_gate("silu", dtype=dtype, device=torch.device("cpu"))
    assert gate is not None
    inputs = [4 * seeded(11, width, seed=i, dtype=dtype) for i in range(2)]
    d_out = seeded(11, width, seed=3, dtype=dtype)

    found = gradients(gate, inputs, d_out)
    expected = gradients(lambda g, u: F.silu(g) * u, [x.double() for x in inputs], d_out.double())

    assert_near(found, expected, TOLERANCE[dtype])


def test_norm_rotation_and_lookup_have_their_gradients() -> None:
    """The hand-written backward passes of layers equal autograd's through the same formula (fp64)."""
    norm = RMSNorm(24, 1e-5, dtype=torch.float64, device=torch.device("cpu"))
    norm.weight.data.copy_(seeded(24, seed=5))
    x, d_out = seeded(7, 24).double().requires_grad_(), seeded(7, 24, seed=1).double()

    def formula(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight

    found = torch.autograd.grad(norm(x), [x, norm.weight], d_out)
    expected = torch.autograd.grad(formula(x, norm.weight), [x, norm.weight], d_out)
    angles = seeded(7, 1, 12, seed=2).double()
    tables = torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)
    heads = seeded(7, 2, 24, seed=3).double().requires_grad_()
    table = nn.Parameter(seeded(10, 4).double())
    table.main_grad = torch.zeros(10, 4).double()  # type: ignore[attr-defined]
    index = torch.tensor([3, 3, 0])
    rows = lookup(table, index)
    rows.backward(torch.ones_like(rows))  # type: ignore[no-untyped-call]

    assert_near(list(found), list(expected), 1e-12)
    assert torch.autograd.gradcheck(lambda h: rotate(h, tables), [heads])
    assert table.main_grad.sum(1).tolist() == [4.0, 0, 0, 8.0, *[0.0] * 6]  # type: ignore[attr-defined]
