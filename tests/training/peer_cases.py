"""
Torch's own parallel training beside ours, on one tiny model in fp64. Started by test_peers.py, one process per rank.

The peer is a plain module of torch's layers that shares nothing with ours but the numbers of its weights; DTensor and
FSDP2 lay it out. Both learn from the same global batch, whose loss is the sum over tokens that count by their number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import rank_runner
import torch
import torch.distributed as dist
import torch.nn.functional as F
from step_cases import LENGTH, batches_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from trilithon_parallel.backend import select
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.grid import Grid
from trilithon_parallel.init import initialise
from trilithon_parallel.layout import Layout
from trilithon_parallel.optimizer import AdamWSettings
from trilithon_parallel.placement import global_shapes, local_slice
from trilithon_parallel.step import TrainingModel

CONFIG = ModelConfig(
    family="llama", architecture="LlamaForCausalLM", vocab_size=256, hidden_size=48, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=12, ffn_size=96, max_context=64, norm="rms", norm_eps=1e-5, norm_order="pre",
    activation="silu", gated_mlp=True, position="rope", tied_embeddings=False,
)  # fmt: skip
SETTINGS = AdamWSettings(eps=1e-4, clip_norm=None)
RATE = 1e-2


class PlainAttention(nn.Module):
    """Causal attention of grouped heads with rotary positions; how many heads there are follows from the products."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        self.channels = config.head_dim
        self.q_proj = nn.Linear(hidden, width, bias=False)
        self.k_proj = nn.Linear(hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x_BSH: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        q, k, v = (
            part(x_BSH).unflatten(-1, (-1, self.channels)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        per_group = q.shape[1] // k.shape[1]
        k, v = _turned(k).repeat_interleave(per_group, 1), v.repeat_interleave(per_group, 1)
        out_BASC = F.scaled_dot_product_attention(_turned(q), k, v, is_causal=True)
        result: Tensor = self.o_proj(out_BASC.transpose(1, 2).flatten(2))
        return result


def _turned(x_BASC: Tensor) -> Tensor:
    half, size = x_BASC.shape[-1] // 2, x_BASC.shape[-2]
    frequencies = 1.0 / 10000.0 ** (torch.arange(half, dtype=torch.float32) / half)
    angles = torch.outer(torch.arange(size, dtype=torch.float32), frequencies)
    cos, sin = angles.cos().double(), angles.sin().double()
    low, high = x_BASC.split(half, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


class PlainMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.down_proj = nn.Linear(config.ffn_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        result: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class PlainBlock(nn.Module):
    """A pre-norm layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = PlainAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = PlainMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        x = x + self.self_attn(self.input_layernorm(x))
        result: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return result


class PlainTrunk(nn.Module):
    """Embedding, layers, norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([PlainBlock(config) for _ in range(config.num_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """int64 [B, S] -> [B, S, H]."""
        x: Tensor = self.embed_tokens(tokens_BS)
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.norm(x)
        return result


class Plain(nn.Module):
    """A Llama of torch's own layers, with our names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = PlainTrunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """int64 [B, S] -> logits [B, S, V]."""
        result: Tensor = self.lm_head(self.model(tokens_BS))
        return result


@dataclass(frozen=True)
class Learned:
    """What one step gives. `gradients` and `weights` are whole tensors by name, or this rank's slices for ours."""

    loss: float
    norm: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def plain() -> Plain:
    """The peer with our weights, fp64."""
    config, grid = CONFIG, Grid.single()
    ours = TrainingModel(config, grid, Layout(), select("torch"), dtype=torch.float64, optimizer=SETTINGS)
    initialise(ours.chunks[0].stage, config=config, grid=grid, seed=3, sigma=0.1)
    weights = {
        piece.name: piece.tensor.clone()  # without the rows that pad the vocabulary
        for piece in ours.optimizer.targets()
        if ".exp_avg" not in piece.name
    }
    model = Plain(config).double()
    model.load_state_dict(weights)
    return model


def ours(layout: Layout, *, sequence_parallel: bool = False) -> tuple[Learned, Grid]:
    """One step of ours at this layout."""
    grid = replace(Grid.build(tp=layout.tp, pp=layout.pp, dp=layout.dp), sequence_parallel=sequence_parallel)
    model = TrainingModel(CONFIG, grid, layout, select("torch"), dtype=torch.float64, optimizer=SETTINGS)
    initialise(model.chunks[0].stage, config=CONFIG, grid=grid, seed=3, sigma=0.1)
    result = model.train_step(batches_of(CONFIG, 0, layout, grid.dp.rank), learning_rate=RATE, step=0)
    gradients = {slot.name: slot.parameter.main_grad for _, slot in model.buckets.slots()}
    weights = {slot.name: slot.parameter.detach() for _, slot in model.buckets.slots()}
    return Learned(result.loss, result.grad_norm, gradients, weights), grid


def learn(model: Plain, layout: Layout, dp_rank: int, *, times: int) -> Learned:
    """One step of the peer from the same micro-batches; `times`: what its reduction divides gradients by."""
    mine = batches_of(CONFIG, 0, layout, dp_rank)
    whole = batches_of(CONFIG, 0, Layout(), 0)
    count, total = sum(batch.num_targets for batch in whole), 0.0
    for batch in mine:
        logits = model(batch.tokens_T.view(-1, LENGTH))
        logits = logits.full_tensor() if isinstance(logits, DTensor) else logits
        losses_T = F.cross_entropy(logits.flatten(0, 1), batch.targets_T, reduction="none")
        loss = (losses_T * batch.weights_T).sum() / count
        (loss * times).backward()
        total += loss.item()
    names = {name: parameter for name, parameter in model.named_parameters() if parameter.grad is not None}
    # DTensors and plain tensors don't mix in one norm: where norms are replicated they have one of their own.
    parts = [nn.utils.get_total_norm([p.grad]) for p in names.values() if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([_whole(part) for part in parts]))
    groups = [
        {"params": [p for p in names.values() if p.dim() > 1], "weight_decay": SETTINGS.weight_decay},
        {"params": [p for p in names.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    gradients = {name: _whole(p.grad) for name, p in names.items() if p.grad is not None}
    torch.optim.AdamW(groups, lr=RATE, betas=(SETTINGS.beta1, SETTINGS.beta2), eps=SETTINGS.eps, foreach=False).step()
    return Learned(total, norm.item(), gradients, {name: _whole(p) for name, p in names.items()})


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def compare(mine: Learned, theirs: Learned, grid: Grid, *, gradients: bool = True) -> dict[str, float]:
    """The largest differences, relative to the largest value of each tensor; every tensor must be there."""
    shapes = global_shapes(CONFIG)
    assert set(mine.weights) == set(theirs.weights) == set(shapes)
    worst = {
        "loss": abs(mine.loss - theirs.loss) / abs(theirs.loss),
        "norm": abs(mine.norm - theirs.norm) / theirs.norm,
    }
    pairs = [("weights", mine.weights, theirs.weights)]
    pairs += [("gradients", mine.gradients, theirs.gradients)] if gradients else []
    for what, our_part, their_part in pairs:
        worst[what] = 0.0
        for name, tensor in our_part.items():
            place = local_slice(name, shapes[name], config=CONFIG, tp=grid.tp.size, tp_rank=grid.tp.rank)
            theirs_here = their_part[name][place.slices]
            real = tensor[tuple(slice(0, size) for size in place.source_shape)]
            difference = (real - theirs_here).abs().max().item()
            worst[what] = max(worst[what], difference / their_part[name].abs().max().item())
    return worst


def tensor_parallel() -> dict[str, float]:
    """DTensor's column- and row-parallel products."""
    mesh = init_device_mesh("cpu", (2,))
    model = plain()
    plan: dict[str, ParallelStyle] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    for layer in range(CONFIG.num_layers):
        at = f"model.layers.{layer}"
        plan |= {f"{at}.{name}": ColwiseParallel() for name in _COLUMNS}
        plan |= {f"{at}.{name}": RowwiseParallel() for name in _ROWS}
    parallelize_module(model, mesh, plan)
    layout = Layout(tp=2)
    mine, grid = ours(layout)
    return compare(mine, learn(model, layout, 0, times=1), grid)


def sequence_parallel() -> dict[str, float]:
    """The same, with the tokens of norms and of the residual stream cut."""
    mesh = init_device_mesh("cpu", (2,))
    model = plain()
    enter = {"input_layouts": (Shard(1),), "desired_input_layouts": (Replicate(),)}
    plan: dict[str, ParallelStyle] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    for layer in range(CONFIG.num_layers):
        at = f"model.layers.{layer}"
        plan |= {f"{at}.{name}": SequenceParallel() for name in ("input_layernorm", "post_attention_layernorm")}
        plan |= {f"{at}.{name}": PrepareModuleInput(**enter) for name in ("self_attn", "mlp")}
        plan |= {f"{at}.{name}": ColwiseParallel() for name in _COLUMNS}
        plan |= {f"{at}.{name}": RowwiseParallel(output_layouts=Shard(1)) for name in _ROWS}
    parallelize_module(model, mesh, plan)
    layout = Layout(tp=2, sequence_parallel=True)
    mine, grid = ours(layout, sequence_parallel=True)
    return compare(mine, learn(model, layout, 0, times=1), grid)


def sharded_data_parallel() -> dict[str, float]:
    """FSDP2 beside replicated and beside distributed optimizer states."""
    mesh = init_device_mesh("cpu", (2,))
    model = plain()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    layout = Layout(dp=2, distributed_optimizer=False)
    mine, grid = ours(layout)
    theirs = learn(model, layout, grid.dp.rank, times=2)  # it averages over ranks, ours adds
    losses = torch.tensor(theirs.loss, dtype=torch.float64)
    dist.all_reduce(losses)
    theirs = replace(theirs, loss=float(losses))
    worst = compare(mine, theirs, grid)
    distributed, _ = ours(replace(layout, distributed_optimizer=True))
    again = compare(distributed, theirs, grid, gradients=False)
    return worst | {f"distributed {key}": value for key, value in again.items()}


_COLUMNS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]
_ROWS = ["self_attn.o_proj", "mlp.down_proj"]

if __name__ == "__main__":
    rank_runner.run({2: [tensor_parallel, sequence_parallel, sharded_data_parallel]})
