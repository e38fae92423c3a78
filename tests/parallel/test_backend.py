"""Products behind one seam, and Transformer Engine behind the same: guard, wrappers, names."""

from __future__ import annotations

import ast
import functools
import importlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_gpt2, tiny_llama
from torch import Tensor, nn

import trilithon_parallel
from trilithon_parallel.attention import PackedView
from trilithon_parallel.backend import native, select, te_ops, torch_ops
from trilithon_parallel.backend.native_product import NativeProduct, takes
from trilithon_parallel.config import ModelError, load_config
from trilithon_parallel.grid import Axis, Grid
from trilithon_parallel.layers import Product
from trilithon_parallel.models import build_stage
from trilithon_parallel.placement import stage_names
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


@pytest.fixture
def fresh_guard() -> Iterator[None]:
    """Forget what the import guard found, before and after."""
    te_ops._load.cache_clear()
    te_ops._classes.cache_clear()
    yield
    te_ops._load.cache_clear()
    te_ops._classes.cache_clear()


@pytest.mark.usefixtures("fresh_guard")
@pytest.mark.parametrize(
    "error",
    [
        ImportError("no wheel"),
        OSError("libcuda.so.1: cannot open"),
        RuntimeError("found 0 devices"),
        AssertionError("bad install"),
        FileNotFoundError("libtransformer_engine.so"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_broken_transformer_engine_is_a_reason_not_a_crash(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "te" says why it cannot be; "auto" falls back to torch."""

    def broken(name: str) -> ModuleType:
        raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib, "import_module", broken)

    assert select("auto", device="cuda").name == "torch"
    with pytest.raises(ModelError, match=str(error)) as caught:
        select("te")
    assert type(error).__name__ in str(caught.value)


@pytest.mark.usefixtures("fresh_guard")
def test_without_a_device_transformer_engine_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """No CUDA device: the reason says so and nothing is imported."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(ModelError, match="no CUDA device is visible"):
        select("te")
    assert "transformer_engine" not in sys.modules


class StubLinear(nn.Module):
    """te.Linear's documented signature and parameter names; computes the local product."""

    calls: ClassVar[list[dict[str, Any]]] = []

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sequence_parallel: bool,
        fuse_wgrad_accumulation: bool,
        tp_group: Any,
        tp_size: int,
        get_rng_state_tracker: Any,
        init_method: Any,
        bias: bool,
        return_bias: bool,
        params_dtype: torch.dtype,
        parallel_mode: str,
        parameters_split: Any,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.calls.append({key: value for key, value in locals().items() if key not in ("self", "__class__")})
        shape = [out_features, in_features]
        shape[0 if parallel_mode == "column" else 1] //= tp_size
        self.weight = nn.Parameter(torch.empty(shape, dtype=params_dtype, device=device))
        width = out_features // (tp_size if parallel_mode == "column" else 1)
        self.bias = nn.Parameter(torch.empty(width, dtype=params_dtype, device=device)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def get_extra_state(self) -> bytes:
        return b"pickled histories"

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError("extra state must never be read")


class StubNorm(nn.Module):
    """te.RMSNorm and te.LayerNorm by their shared arguments."""

    def __init__(
        self, normalized_shape: int, *, eps: float, zero_centered_gamma: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        assert zero_centered_gamma is False
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(normalized_shape, dtype=dtype, device=device))

    def get_extra_state(self) -> bytes:
        return b"state"


class StubRMSNorm(StubNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class StubLayerNorm(StubNorm):
    def __init__(self, normalized_shape: int, **options: Any) -> None:
        super().__init__(normalized_shape, **options)
        self.bias = nn.Parameter(torch.empty_like(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@pytest.fixture
def stub_te(monkeypatch: pytest.MonkeyPatch, fresh_guard: None) -> None:
    """A machine where Transformer Engine imports: torch-made classes of its documented shape."""
    module: Any = ModuleType("transformer_engine.pytorch")
    module.Linear, module.RMSNorm, module.LayerNorm = StubLinear, StubRMSNorm, StubLayerNorm
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)
    monkeypatch.setattr(StubLinear, "calls", [])


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


@pytest.mark.usefixtures("stub_te")
@pytest.mark.parametrize("family", MODELS)
def test_E10_transformer_engine_models_load_the_same_files(family: str, tmp_path: Path) -> None:
    """
    Same keys and shapes as the torch backend's, no extra state, each loads the other's; logits agree.

    Inverse: without `_Stateless` the state dict holds `_extra_state` keys and this fails.
    """
    model_dir = MODELS[family](tmp_path / "model")
    config, grid = load_config(model_dir), Grid.single()
    stages = [build_stage(config, grid=grid, backend=select(name), dtype=torch.float32) for name in ("te", "torch")]
    states = [stage.state_dict() for stage in stages]

    assert {k: v.shape for k, v in states[0].items()} == {k: v.shape for k, v in states[1].items()}
    assert not any("extra_state" in name for name in states[0])
    assert set(dict(stages[0].named_parameters())) == set(stage_names(config, pp=1, pp_rank=0))

    load_stage(stages[0], model_dir, config=config, grid=grid)
    stages[1].load_state_dict(stages[0].state_dict())
    tokens_T, view = torch.arange(30), PackedView([0, 30], causal=True)
    with torch.no_grad():
        stages[0].prepare()
        logits = [stage.gather_logits(stage(tokens_T, positions_T=tokens_T, view=view)) for stage in stages]

    assert (logits[0] - logits[1]).abs().max() <= 1e-4


@pytest.mark.usefixtures("stub_te")
def test_transformer_engine_is_given_global_sizes_and_its_group(tmp_path: Path) -> None:
    """It divides by tp itself; every option that has a default of its own is passed explicitly."""
    config = load_config(tiny_llama(tmp_path / "model", hidden=64, heads=4, groups=2, ffn=96))
    single = Grid.single()
    tp = Axis("tp", 1, 2, (0, 1), None)
    grid = Grid(tp, single.pp, single.dp, Axis("world", 1, 2, (0, 1)), single.device)

    stage = build_stage(config, grid=grid, backend=select("te"), dtype=torch.bfloat16)

    sizes = {(call["in_features"], call["out_features"], call["parallel_mode"]) for call in StubLinear.calls}
    assert sizes == {(64, 64, "column"), (64, 32, "column"), (64, 64, "row"), (64, 96, "column"), (96, 64, "row")}
    for call in StubLinear.calls:
        assert (call["tp_size"], call["sequence_parallel"], call["return_bias"]) == (2, False, False)
        assert call["params_dtype"] == torch.bfloat16
    assert stage.get_parameter("model.layers.0.self_attn.q_proj.weight").shape == (32, 64)


@pytest.mark.usefixtures("stub_te")
def test_transformer_engine_has_no_batch_invariant_mode() -> None:
    """Asking for both is refused, not ignored."""
    with pytest.raises(ModelError, match="no batch-invariant mode"):
        select("te", batch_invariant=True)


def test_only_one_module_mentions_transformer_engine_in_code() -> None:
    """Syntax trees: no import of it, and no string that names it for an import, outside te_ops.py."""
    root = Path(trilithon_parallel.__file__).parent
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
            hits = [name for name in names if name.startswith("transformer_engine")]
            assert not hits or path.name == "te_ops.py", path.name


@pytest.mark.gpu
def test_transformer_engine_equals_torch_on_a_gpu(tmp_path: Path) -> None:
    """bf16 on one device: log-probabilities within 1e-2 relative loss and gradient cosine above 0.999."""
    if te_ops.unavailable_reason():
        pytest.skip(te_ops.unavailable_reason())
    model_dir = tiny_llama(tmp_path / "model", hidden=256, heads=4, groups=2, ffn=512, layers=4, scale=0.3)
    config, grid = load_config(model_dir), Grid.single("cuda")
    tokens_T = (torch.arange(256) * 37 % 200).cuda()
    losses, grads = [], []
    for name in ("torch", "te"):
        stage = build_stage(config, grid=grid, backend=select(name, device="cuda"), dtype=torch.bfloat16)  # type: ignore[arg-type]  # both are names
        load_stage(stage, model_dir, config=config, grid=grid)
        view = PackedView([0, 100, 256], causal=True)
        hidden_TH = stage(tokens_T, positions_T=torch.cat((torch.arange(100), torch.arange(156))).cuda(), view=view)
        loss = F.cross_entropy(stage.logits(hidden_TH)[:-1], tokens_T[1:])
        loss.backward()
        losses.append(float(loss))
        grads.append(torch.cat([p.grad.flatten().float() for _, p in sorted(stage.named_parameters())]))

    assert abs(losses[0] - losses[1]) <= 1e-2 * abs(losses[0])
    assert F.cosine_similarity(grads[0], grads[1], dim=0) > 0.999
