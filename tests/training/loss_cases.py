"""The cut cross-entropy and the autograd pairs of tensor parallelism on several ranks. Started by test_loss.py."""

from __future__ import annotations

from dataclasses import replace

import rank_runner
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from trilithon_parallel.collectives import copy_to_tp, enter_columns, leave_rows, reduce_from_tp
from trilithon_parallel.grid import Grid
from trilithon_parallel.loss import cross_entropy
from trilithon_parallel.placement import VOCAB_MULTIPLE

# Relative, in fp64 and fp32: sums of 50257 exponentials in another order.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def seeded(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal fp64 numbers, the same ones on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _grid() -> Grid:
    return Grid.build(tp=dist.get_world_size(), pp=1)


def _check_loss(grid: Grid, vocab: int, dtype: torch.dtype) -> None:
    """Loss, log-probabilities and gradient of this rank's columns against torch's over all columns."""
    tp, tokens = grid.tp, 13
    local = -(-vocab // (VOCAB_MULTIPLE * tp.size)) * VOCAB_MULTIPLE
    real = max(0, min(local, vocab - tp.rank * local))
    all_TV = (seeded(tokens, vocab) * 4.0).to(dtype)
    all_TV[0] *= 100.0  # exponentials that would overflow, were the largest logit not taken off
    targets_T = torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(1))
    targets_T[:3] = torch.tensor([0, vocab - 1, min(local, vocab - 1)])  # first and last token, a border
    best_T = all_TV.argmax(1)
    targets_T[3:7] = best_T[3:7]
    all_TV[7, targets_T[7]] = all_TV[7, best_T[7]]  # the first place, shared
    is_best_T = all_TV.gather(1, targets_T[:, None])[:, 0] == all_TV.amax(1)
    assert 5 <= int(is_best_T.sum()) < tokens
    for weights_T in (torch.ones(tokens), torch.arange(tokens) % 3 / 2.0):
        whole_TV = all_TV.clone().requires_grad_()
        losses_T = F.cross_entropy(whole_TV, targets_T, reduction="none")
        is_plain = bool((weights_T == 1.0).all())
        summed = F.cross_entropy(whole_TV, targets_T, reduction="sum")
        expected = summed if is_plain else (losses_T * weights_T).sum()
        (expected * 0.7).backward()
        assert whole_TV.grad is not None
        # Padding columns mean nothing, so let them be nothing.
        mine_TV = torch.full((tokens, local), torch.nan, dtype=dtype)
        mine_TV[:, :real] = all_TV[:, tp.rank * local : tp.rank * local + real]
        mine_TV.requires_grad_()
        total, logprobs_T, found_T = cross_entropy(mine_TV.clone(), targets_T, weights_T, tp=tp, real_columns=real)
        (total * 0.7).backward()
        tolerance = TOLERANCE[dtype]
        assert abs(total.item() - expected.item()) <= tolerance * abs(expected.item())
        assert total.dtype == torch.float64
        assert not logprobs_T.requires_grad
        assert logprobs_T.dtype == dtype
        assert torch.equal(found_T, is_best_T)
        torch.testing.assert_close(-logprobs_T, losses_T.detach(), rtol=tolerance, atol=tolerance)
        assert mine_TV.grad is not None
        assert not mine_TV.grad[:, real:].any()
        theirs_TV = whole_TV.grad[:, tp.rank * local : tp.rank * local + real]
        assert (mine_TV.grad[:, :real] - theirs_TV).abs().max().item() <= tolerance if real else True


def cross_entropies() -> None:
    """At this tp, and at tp 1; the second vocabulary leaves the last of four ranks padding alone."""
    for grid in (_grid(), Grid.single()):
        for vocab in (50257, 300):
            for dtype in (torch.float64, torch.float32):
                _check_loss(grid, vocab, dtype)


def gradients() -> None:
    """
    Finite differences of scalar functions through each pair of collectives, all ranks in step.

    Every rank gives the same x and gets the same scalar, which depends on all ranks' weights; its gradient to x must
    come out whole on every rank.
    """
    grid = _grid()
    rank, size = grid.tp.rank, grid.tp.size
    cut = replace(grid, sequence_parallel=True)
    mine = seeded(4, 3, seed=10 + rank)  # what this rank does to a tensor [T, H]
    x = seeded(4, 3, seed=20).requires_grad_()

    def columns_rows(x_TH: Tensor) -> Tensor:
        """f, a rank's own work, g: a column- and a row-parallel product without sequence parallelism."""
        return reduce_from_tp(torch.tanh(copy_to_tp(x_TH, grid.tp) * mine), grid.tp).square()

    def sequence(x_TH: Tensor) -> Tensor:
        """A rank's tokens, gathered, worked on, summed and cut again; then the sum over all tokens."""
        own = torch.sin(copy_to_tp(x_TH, grid.tp).chunk(size)[rank])
        out = leave_rows(torch.tanh(enter_columns(own, cut) * mine), cut)
        return reduce_from_tp((out.square() * (rank + 1)).sum(), grid.tp)

    def embedding(x_TH: Tensor) -> Tensor:
        """As after an embedding: a whole tensor on every rank of which each keeps its tokens."""
        out = leave_rows(copy_to_tp(x_TH, grid.tp) * mine, cut)
        return reduce_from_tp(out.pow(3).sum(), grid.tp)

    for function in (columns_rows, sequence, embedding):
        assert torch.autograd.gradcheck(function, (x,), check_undefined_grad=False, nondet_tol=0.0), function


def inputs_stay() -> None:
    """No pair changes what it is given while a gradient is wanted."""
    grid = _grid()
    for is_cut in (False, True):
        place = replace(grid, sequence_parallel=is_cut)
        for function in (enter_columns, leave_rows):
            x = seeded(4, 3, seed=30 + grid.tp.rank).requires_grad_()
            before = x.detach().clone()
            y = function(x, place)
            (y * 2).sum().backward()
            assert torch.equal(x.detach(), before)


if __name__ == "__main__":
    rank_runner.run({2: [cross_entropies, gradients, inputs_stay], 4: [cross_entropies]})
