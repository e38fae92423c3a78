"""What is computed again comes out the same, and dropout masks don't know the layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from training.step_cases import STEPS, Case, train

from trilithon_parallel.dropout import Dropout
from trilithon_parallel.grid import Axis, Grid
from trilithon_parallel.layout import Layout
from trilithon_parallel.recompute import Recompute
from trilithon_parallel.step import DropoutRates

KINDS = {
    "selective": Recompute("selective"),
    "full": Recompute("full"),
    "full-every-3": Recompute("full", every=3),
    "full-first-2": Recompute("full", first=2),
}


@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_recomputation_changes_no_bit(name: str, dtype: torch.dtype, rate: float) -> None:
    """Losses, norms and weights of three steps have the same bits, whatever is kept, with dropout and without."""
    case = Case(name, {}, dropout=DropoutRates(rate, rate) if rate else None, dtype=dtype)
    layout = Layout(micro_batch_size=4)
    expected_model, expected = train(case, layout, Grid.single())
    for kind, recompute in KINDS.items():
        model, results = train(replace(case, recompute=recompute), layout, Grid.single())

        assert results == expected, kind
        for mine, theirs in zip(model.buckets.buckets, expected_model.buckets.buckets, strict=True):
            assert torch.equal(mine.data, theirs.data), kind


def test_dropout_is_felt() -> None:
    """A rate changes the loss, another step's masks are others, and an evaluation drops nothing."""
    layout, plain = Layout(micro_batch_size=4), Case("llama", {})
    dropped = replace(plain, dropout=DropoutRates(0.2, 0.2))
    losses = [[loss for loss, _, _ in train(case, layout, Grid.single())[1]] for case in (plain, dropped)]

    assert all(abs(a - b) > 1e-4 for a, b in zip(*losses, strict=True))
    assert len(losses[1]) == STEPS


def _place(size: int, rank: int, *, cut: bool) -> Grid:
    return replace(Grid.single(), tp=Axis("tp", rank, size, tuple(range(size))), sequence_parallel=cut)


def _dropout(grid: Grid, **changes: int) -> Dropout:
    given = {"seed": 1, "step": 2, "first_layer": 4} | changes
    return Dropout(0.3, 0.3, given["seed"], given["step"], [7, 9], [5, 3], grid, given["first_layer"])


def test_masks_are_parts_of_one_process_masks() -> None:
    """
    At tp 2 and 4 a rank drops what one process drops of its heads and tokens, with cut tokens and without.

    Inverse check: giving every rank the first rank's tokens of a mask fails here.
    """
    x_TH, weights_ASS = torch.ones(8, 6), torch.ones(4, 5, 5)
    alone = _dropout(Grid.single())
    hidden = alone.hidden(x_TH, layer=1, site="mlp")
    attention = alone.attention(weights_ASS, sample=1, layer=1)
    for size in (2, 4):
        for rank in range(size):
            heads = attention.chunk(size)[rank]
            whole, cut = (_dropout(_place(size, rank, cut=is_cut)) for is_cut in (False, True))

            assert torch.equal(whole.hidden(x_TH, layer=1, site="mlp"), hidden)
            assert torch.equal(cut.hidden(x_TH.chunk(size)[rank], layer=1, site="mlp"), hidden.chunk(size)[rank])
            for dropout in (whole, cut):
                assert torch.equal(dropout.attention(weights_ASS.chunk(size)[rank], sample=1, layer=1), heads)


def test_masks_follow_what_they_are_of() -> None:
    """Another seed, step, layer, site or sample is another mask; a layer's mask is the same from any stage."""
    x_TH = torch.ones(8, 6)
    base = _dropout(Grid.single()).hidden(x_TH, layer=1, site="mlp")
    changes = ({"seed": 2}, {"step": 3})
    others = [_dropout(Grid.single(), **change).hidden(x_TH, layer=1, site="mlp") for change in changes]
    others.append(_dropout(Grid.single()).hidden(x_TH, layer=2, site="mlp"))
    others.append(_dropout(Grid.single()).hidden(x_TH, layer=1, site="attention"))
    others.append(replace(_dropout(Grid.single()), sample_ids=[8, 9]).hidden(x_TH, layer=1, site="mlp"))

    assert not any(torch.equal(base, other) for other in others)
    assert torch.equal(base, _dropout(Grid.single(), first_layer=5).hidden(x_TH, layer=0, site="mlp"))
    assert base.unique().tolist() == pytest.approx([0.0, 1 / 0.7])


def test_what_is_kept_shrinks() -> None:
    """Bytes that autograd keeps for the backward pass: full recomputation < selective < none (torch's attention)."""
    kept = {}
    case = Case("llama", {}, dropout=DropoutRates(0.0, 0.1), dtype=torch.float64)
    for kind, recompute in {"none": Recompute(), **KINDS}.items():
        total = [0]

        def pack(x: torch.Tensor, total: list[int] = total) -> torch.Tensor:
            total[0] += x.numel() * x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            train(replace(case, recompute=recompute), Layout(micro_batch_size=8), Grid.single())
        kept[kind] = total[0]
    print(kept)
    assert kept["full"] < kept["selective"] < kept["none"]
