"""Training through Transformer Engine, on its stub: gradients, parallel products, 8-bit regions, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import te_runs
import te_stub
import torch
from ranks import LIMIT_S, run_ranks
from te_runs import GPT2, LLAMA, assert_near, train
from training_runs import make_run

from trilithon_parallel.backend import select
from trilithon_parallel.config import ModelConfig, ModelError
from trilithon_parallel.fp8 import Fp8Recipe, check_fp8
from trilithon_parallel.layout import Layout
from trilithon_parallel.pretrain.config import load_pretrain_config
from trilithon_parallel.pretrain.setup import prepare

RECIPES: dict[Fp8Recipe, tuple[str, dict[str, Any]]] = {
    "delayed": (
        "DelayedScaling",
        {
            "margin": 0,
            "fp8_format": "hybrid",
            "amax_history_len": 1024,
            "amax_compute_algo": "max",
            "reduce_amax": True,
        },
    ),
    "current": ("Float8CurrentScaling", {"fp8_format": "hybrid"}),
    "mxfp8": ("MXFP8BlockScaling", {"fp8_format": "e4m3"}),
}


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """The import guard looks again before and after."""
    te_stub.forget()
    yield
    te_stub.forget()


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_E8_fused_gradients_reach_the_buckets(
    config: ModelConfig, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Products that add to `main_grad` and hand autograd nothing train as torch's do, and every hook has run.

    Inverse seen red: with `grad_added_to_main_grad` on the parameters gradients are NaN and every step is skipped.
    """
    te_stub.install(monkeypatch)

    found, expected = (
        train(select("te"), config=config, dtype=dtype),
        train(select("torch"), config=config, dtype=dtype),
    )

    assert_near(found, expected, {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype])
    assert {bucket.waiting for bucket in found.model.buckets.buckets} == {0}
    assert not any(hasattr(slot.parameter, "grad_added_to_main_grad") for _, slot in found.model.buckets.slots())
    assert found.losses[-1] < found.losses[0]


def test_gradients_are_fused_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that serves, or learns without buckets, has products that need no `main_grad`."""
    te_stub.install(monkeypatch)
    backend = select("te")
    model = train(backend, steps=0).model
    fused = {part.fuse_wgrad_accumulation for part in model.chunks[0].stage.modules() if hasattr(part, "tp_group")}

    assert fused == {True}
    assert {call["fuse_wgrad_accumulation"] for call in te_stub.StubLinear.calls} == {False}


@pytest.mark.timeout(LIMIT_S + 60)
def test_E8_its_tensor_parallel_products_fit_our_blocks(tmp_path: Path) -> None:
    """
    Two ranks, with and without sequence parallelism: products that gather and scatter on dim 0 inside train as ours do.

    Delayed scaling agrees over one group of both ranks. Inverse seen red: attention that counts tokens before
    its products.
    """
    reports = run_ranks(Path(te_runs.__file__), 2, tmp_path, "cpu")

    cases = dict.fromkeys(("llama", "llama-sp", "gpt2", "gpt2-sp"), "ok")
    assert reports == [cases | {"ranks that scale alike": "[2]"}] * 2


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("is_old", [False, True], ids=["autocast", "fp8_autocast"])
def test_each_micro_batch_is_a_region_of_its_own(
    recipe: Fp8Recipe, is_old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One region a micro-batch and chunk, around the forward pass alone, with the recipe's every option said."""
    regions = te_stub.install(monkeypatch, is_old=is_old)

    train(select("te", fp8=recipe), layout=Layout(micro_batch_size=1), steps=2)

    made = te_stub.StubRecipe(*RECIPES[recipe])
    names = ("fp8_recipe", "fp8_group") if is_old else ("recipe", "amax_reduction_group")
    assert regions.entered == [{"enabled": True, names[0]: made, names[1]: None}] * (2 * te_runs.SAMPLES)
    assert regions.depth == 0


def test_without_fp8_there_are_no_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 training enters none."""
    regions = te_stub.install(monkeypatch)

    train(select("te"), steps=1)

    assert regions.entered == []


@pytest.mark.parametrize("is_old", [False, True], ids=["new", "old"])
def test_a_device_without_such_products_says_so(is_old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's own reason is in the message; recipes that the device has are taken."""
    te_stub.install(monkeypatch, is_old=is_old, missing={"mxfp8": "Compute capability 10.0 or higher is required."})

    assert select("te", fp8="current").name == "te"
    with pytest.raises(ModelError, match=r"fp8 mxfp8 is not available on backend te: Compute capability 10\.0 or hi"):
        select("te", fp8="mxfp8")


def test_an_engine_without_the_recipe_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older version lacks the class."""
    te_stub.install(monkeypatch)
    recipes = __import__("sys").modules["transformer_engine.common.recipe"]
    monkeypatch.delattr(recipes, "Float8CurrentScaling")

    with pytest.raises(ModelError, match="this version of Transformer Engine has no Float8CurrentScaling"):
        select("te", fp8="current")


@pytest.mark.parametrize(
    ("name", "device", "words"),
    [
        ("torch", "cpu", "backend torch has no 8-bit products"),
        ("torch", "cuda", "backend torch has no 8-bit products"),
        ("auto", "cpu", "the device is not CUDA"),
        ("te", "cpu", "no CUDA device is visible"),
    ],
)
def test_R11_fp8_is_refused_where_nothing_has_it(
    name: Any, device: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is never dropped in silence: not even backend auto goes on without it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(ModelError, match=rf"fp8 delayed is not available on backend {name}: {words}"):
        select(name, device=device, fp8="delayed")


SOUND: dict[str, Any] = {
    "config": LLAMA,
    "recipe": "current",
    "tp": 1,
    "sequence_parallel": False,
    "tokens_per_micro_batch": 32,
    "dtype": "bfloat16",
    "recompute": "selective",
}


def check(**changes: Any) -> None:
    """`check_fp8` of a sound run with changes."""
    options = SOUND | changes
    check_fp8(options.pop("config"), options.pop("recipe"), **options)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"config": replace(LLAMA, ffn_size=100)},
            r"multiples of 16\. Given: ffn_size of a rank 100",
        ),
        ({"tokens_per_micro_batch": 24}, r"Given: tokens of a micro-batch on a rank 24\."),
        ({"tp": 4, "sequence_parallel": True}, r"ffn_size of a rank 24, tokens of a micro-batch on a rank 8\."),
        ({"config": replace(LLAMA, head_dim=20)}, r"query channels of a rank 80|key channels of a rank 40"),
        (
            {"recipe": "mxfp8", "config": replace(LLAMA, ffn_size=112)},
            r"multiples of 32\. Given: ffn_size of a rank 112",
        ),
        ({"dtype": "float32"}, r"needs dtype bfloat16\. Given: float32\."),
        ({"recompute": "full"}, r"goes with recompute none or selective\. Given: full\."),
        ({"dtype": "float16", "recompute": "full"}, r"bfloat16\. Given: float16\. training fp8 current goes with"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value),
)
def test_R11_fp8_that_cannot_be_is_refused_at_the_start(changes: dict[str, Any], words: str) -> None:
    """Sizes, dtype and recomputation: which, what was given, what is allowed; the sound case passes."""
    check()

    with pytest.raises(ModelError, match=words) as caught:
        check(**changes)
    assert caught.value.code == "layout_invalid"


@pytest.mark.parametrize(
    ("fp8", "words"),
    [
        ("current", r"multiples of 16\. Given: ffn_size of a rank 100\. .* needs dtype bfloat16\. Given: float32\."),
        ("fp4", r"training\.fp8: .*'delayed', 'current' or 'mxfp8'\. Given: 'fp4'"),
    ],
)
def test_R11_a_file_that_asks_for_it_is_checked(fp8: str, words: str, tmp_path: Path) -> None:
    """Before any rank starts, in the words of the file."""
    with pytest.raises(ModelError, match=words):
        prepare(load_pretrain_config(make_run(tmp_path).change("training", fp8=fp8).config))
