"""
Our training step against a plain torch loop and against transformers, in one run on one machine, interleaved.

    python benchmarks/training.py                  all parts
    python benchmarks/training.py --part step      one of step, ranks, optimizer, recompute

step       tokens/s of one rank against a plain torch loop of the same Llama (written below: F.linear, SDPA, fused
           AdamW, torch.compile off on both sides), and against transformers' model in the same loop. Losses of the
           first step are compared before that.
ranks      two data-parallel ranks with one thread each against one rank with one thread, on the same global batch.
optimizer  bytes of weights, gradients, masters and moments a parameter on each rank, against 6 + 12 / dp (bf16).
recompute  bytes that a layer keeps, counted by saved-tensor hooks, and the time of a step, for each kind.

Only the ratios mean something elsewhere; absolute speeds belong to the machine and the hour.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilithon_parallel import rendezvous
from trilithon_parallel.backend import select
from trilithon_parallel.grid import Grid
from trilithon_parallel.init import initialise
from trilithon_parallel.layout import Layout
from trilithon_parallel.objective import Batch
from trilithon_parallel.optimizer import AdamWSettings
from trilithon_parallel.presets import llama
from trilithon_parallel.recompute import Recompute
from trilithon_parallel.step import TrainingModel

CONFIG = llama(layers=6, hidden=384, heads=6, groups=6, ffn=1024, vocab=8192, context=1024)
SEQ_LEN, SAMPLES, MICRO_BATCH, SEED = 512, 16, 4, 1
SETTINGS = AdamWSettings(weight_decay=0.1, clip_norm=1.0)
RATE = 1e-3


def tokens_of(step: int) -> Tensor:
    """One global batch [samples, seq_len + 1]."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(CONFIG.vocab_size, (SAMPLES, SEQ_LEN + 1), generator=generator)


# -- ours --------------------------------------------------------------------------------------------------------------


def our_model(
    layout: Layout, grid: Grid, *, dtype: torch.dtype = torch.float32, recompute: Recompute | None = None
) -> TrainingModel:
    model = TrainingModel(CONFIG, grid, layout, select("torch"), dtype=dtype, optimizer=SETTINGS, recompute=recompute)
    for chunk in model.chunks:
        initialise(chunk.stage, config=CONFIG, grid=chunk.grid, seed=SEED, sigma=0.02)
    model.optimizer.adopt_weights()
    model.weights_changed()
    return model


def our_step(model: TrainingModel, step: int) -> float:
    tokens, layout, grid = tokens_of(step), model.layout, model.grid
    batches, b = [], layout.micro_batch_size
    for index in range(layout.micro_batches(SAMPLES)):
        first = (index * layout.dp + grid.dp.rank) * b
        rows = tokens[first : first + b]
        batches.append(
            Batch(
                tokens_T=rows[:, :-1].flatten(),
                targets_T=rows[:, 1:].flatten(),
                weights_T=torch.ones(b * SEQ_LEN),
                positions_T=torch.arange(SEQ_LEN).repeat(b),
                cu_seqlens=[i * SEQ_LEN for i in range(b + 1)],
                sample_ids=list(range(first, first + b)),
                lengths=[SEQ_LEN] * b,
            )
        )
    return model.train_step(batches, learning_rate=RATE, step=step).loss


# -- a plain torch loop ------------------------------------------------------------------------------------------------


class PlainBlock(nn.Module):
    """A Llama layer as one writes it."""

    def __init__(self) -> None:
        super().__init__()
        hidden, ffn = CONFIG.hidden_size, CONFIG.ffn_size
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(hidden, ffn, bias=False) for _ in range(2))
        self.down = nn.Linear(ffn, hidden, bias=False)
        self.norm_1, self.norm_2 = (nn.RMSNorm(hidden, CONFIG.norm_eps) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        y = self.norm_1(x)
        q, k, v = (
            part(y).view(batch, length, CONFIG.num_heads, CONFIG.head_dim).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(batch, length, hidden))
        y = self.norm_2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


class PlainModel(nn.Module):
    """The same Llama in plain torch modules."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CONFIG.vocab_size, CONFIG.hidden_size)
        self.blocks = nn.ModuleList(PlainBlock() for _ in range(CONFIG.num_layers))
        self.norm = nn.RMSNorm(CONFIG.hidden_size, CONFIG.norm_eps)
        self.head = nn.Linear(CONFIG.hidden_size, CONFIG.vocab_size, bias=False)
        half = CONFIG.head_dim // 2
        angles = torch.outer(torch.arange(SEQ_LEN), CONFIG.rope_theta ** (-torch.arange(half) / half))
        self.cos, self.sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(self.norm(x))

    def copy_from(self, ours: TrainingModel) -> None:
        """Take our weights."""
        names = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
                 "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
                 "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm"}  # fmt: skip
        state = dict(ours.chunks[0].stage.named_parameters())
        with torch.no_grad():
            self.embed.weight.copy_(state["model.embed_tokens.weight"][: CONFIG.vocab_size])
            self.norm.weight.copy_(state["model.norm.weight"])
            self.head.weight.copy_(state["lm_head.weight"][: CONFIG.vocab_size])
            for index, block in enumerate(self.blocks):
                for name, canonical in names.items():
                    getattr(block, name).weight.copy_(state[f"model.layers.{index}.{canonical}.weight"])


def loop_of(model: nn.Module, logits: Callable[[Tensor], Tensor]) -> Callable[[int], float]:
    """The training loop that everybody writes, with gradient accumulation."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
    )

    def step(number: int) -> float:
        tokens, total = tokens_of(number), 0.0
        optimizer.zero_grad(set_to_none=True)
        for rows in tokens.split(MICRO_BATCH):
            x = logits(rows[:, :-1])
            loss = F.cross_entropy(x.flatten(0, 1), rows[:, 1:].flatten()) * len(rows) / len(tokens)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return total

    return step


def part_step(rounds: int) -> dict[str, object]:
    """One rank against plain torch and transformers."""
    ours = our_model(Layout(micro_batch_size=MICRO_BATCH), Grid.single())
    plain = PlainModel()
    plain.copy_from(ours)
    sides: dict[str, Callable[[int], float]] = {
        "trilithon": lambda step: our_step(ours, step),
        "plain torch": loop_of(plain, plain),
    }
    try:
        from transformers import LlamaConfig, LlamaForCausalLM

        peer = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=CONFIG.vocab_size,
                hidden_size=CONFIG.hidden_size,
                intermediate_size=CONFIG.ffn_size,
                num_hidden_layers=CONFIG.num_layers,
                num_attention_heads=CONFIG.num_heads,
                max_position_embeddings=CONFIG.max_context,
                tie_word_embeddings=False,
            )
        )
        sides["transformers"] = loop_of(peer, lambda tokens: peer(tokens, use_cache=False).logits)
    except ImportError:
        print("transformers is not installed: left out")
    first = {name: run(0) for name, run in sides.items()}
    difference = abs(first["trilithon"] - first["plain torch"])
    print(f"loss of the first step: ours {first['trilithon']:.6f}, plain torch {first['plain torch']:.6f}")
    assert difference < 1e-4, "the two sides must compute the same"
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(1, rounds + 1):
        order = list(sides)
        for name in order[number % len(order) :] + order[: number % len(order)]:
            began = time.perf_counter()
            sides[name](number)
            times[name].append(time.perf_counter() - began)
    return _compared(times, SAMPLES * SEQ_LEN)


def _compared(times: dict[str, list[float]], tokens: int) -> dict[str, object]:
    result: dict[str, object] = {}
    for name, seconds in times.items():
        ratios = sorted(theirs / ours for ours, theirs in zip(times["trilithon"], seconds, strict=True))
        middle = statistics.median(seconds)
        result[name] = {"tokens_per_s": tokens / middle, "ours_is_times": statistics.median(ratios)}
        print(
            f"{name:<14} {tokens / middle:8.0f} tokens/s   ours is {statistics.median(ratios):.2f}x "
            f"[{ratios[0]:.2f}..{ratios[-1]:.2f}]"
        )
    return result


# -- ranks -------------------------------------------------------------------------------------------------------------


def rank_main(part: str, out: Path, rounds: int) -> None:
    """One rank of a part; rank 0 writes what was measured."""
    torch.set_num_threads(1)
    world = rendezvous.join(timeout_s=120)
    result = _measured(part, Grid.build(tp=1, pp=1, dp=world.world_size), rounds)
    if world.rank == 0:
        out.write_text(json.dumps(result))
    rendezvous.leave()


def _measured(part: str, grid: Grid, rounds: int) -> dict[str, object]:
    """What a part measures on this rank."""
    dtype = torch.bfloat16 if part == "optimizer" else torch.float32
    model = our_model(Layout(dp=grid.dp.size, micro_batch_size=MICRO_BATCH), grid, dtype=dtype)
    if part == "optimizer":
        buckets, masters = model.buckets.buckets, model.optimizer.masters
        held = sum(b.data.nbytes + b.grad.nbytes for b in buckets)
        held += sum(m.nbytes for m, b in zip(masters, buckets, strict=True) if m.dtype != b.data.dtype)
        held += sum(t.nbytes for state in model.optimizer.states() for t in state.values())
        return {"bytes_per_parameter": held / sum(p.numel() for p in model.chunks[0].stage.parameters())}
    our_step(model, 0)
    seconds = []
    for number in range(1, rounds + 1):
        began = time.perf_counter()
        our_step(model, number)
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds}


def start(part: str, ranks: int, rounds: int) -> dict[str, object]:
    """Run a part on so many ranks of this host."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        out = Path(folder) / "result.json"
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--rank-of", part, "--out", str(out), "--rounds", str(rounds)],
                env=os.environ
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
                | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            )
            for rank in range(ranks)
        ]
        codes = [process.wait() for process in processes]
        assert codes == [0] * ranks, codes
        result: dict[str, object] = json.loads(out.read_text())
        return result


def part_ranks(rounds: int) -> dict[str, object]:
    """Two ranks against one, in turns."""
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(2):
        for ranks in (1, 2):
            seconds = start("ranks", ranks, rounds)["seconds"]
            assert isinstance(seconds, list)
            times[ranks] += seconds
    ratio = statistics.median(times[1]) / statistics.median(times[2])
    print(f"two ranks with a thread each are {ratio:.2f}x one rank with one thread")
    return {"ratio": ratio}


def part_optimizer(rounds: int) -> dict[str, object]:
    """Bytes a parameter against the formula."""
    result: dict[str, object] = {}
    for ranks in (1, 2, 4):
        measured = start("optimizer", ranks, rounds)["bytes_per_parameter"]
        assert isinstance(measured, float)
        expected = 6 + 12 / ranks
        print(
            f"dp {ranks}: {measured:.2f} bytes a parameter, the formula says {expected:.2f} ({measured / expected:.3f})"
        )
        result[str(ranks)] = measured / expected
    return result


# -- recomputation -----------------------------------------------------------------------------------------------------


def part_recompute(rounds: int) -> dict[str, object]:
    """What a step keeps between forward and backward, and its time, for each kind."""
    kinds = {"none": Recompute(), "selective": Recompute("selective"), "full": Recompute("full"),
             "full, every 2": Recompute("full", every=2)}  # fmt: skip
    models = {
        name: our_model(Layout(micro_batch_size=MICRO_BATCH), Grid.single(), recompute=kind)
        for name, kind in kinds.items()
    }
    kept = {name: stored_bytes(model) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            began = time.perf_counter()
            our_step(model, number)
            if number:
                times[name].append(time.perf_counter() - began)
    result: dict[str, object] = {}
    for name in models:
        seconds = statistics.median(times[name]) / statistics.median(times["none"])
        print(
            f"{name:<14} {kept[name] / 2**20:8.1f} MiB kept ({kept[name] / kept['none']:.3f})   {seconds:.2f}x the time"
        )
        result[name] = {"bytes": kept[name], "time": seconds}
    return result


def stored_bytes(model: TrainingModel) -> int:
    """Bytes that autograd keeps of one micro-batch, each storage once, parameters not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.chunks[0].stage.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = tokens_of(0)[:MICRO_BATCH]
    chunk = model.chunks[0]
    batch = Batch(
        tokens[:, :-1].flatten(), tokens[:, 1:].flatten(), torch.ones(MICRO_BATCH * SEQ_LEN),
        torch.arange(SEQ_LEN).repeat(MICRO_BATCH), [i * SEQ_LEN for i in range(MICRO_BATCH + 1)],
        list(range(MICRO_BATCH)), [SEQ_LEN] * MICRO_BATCH,
    )  # fmt: skip
    chunk.batches = [batch]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = chunk.forward(0, None)
    del loss
    return sum(seen.values())


PARTS: dict[str, Callable[[int], dict[str, object]]] = {
    "step": part_step,
    "ranks": part_ranks,
    "optimizer": part_optimizer,
    "recompute": part_recompute,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description="Our training step against others, in one run.")
    parser.add_argument("--part", choices=tuple(PARTS), action="append")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--save", type=Path, help="write the ratios as JSON")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.rank_of:
        rank_main(args.rank_of, args.out, args.rounds)
        return
    torch.set_num_threads(args.threads)
    results = {}
    for name in args.part or PARTS:
        print(f"-- {name} ({args.threads} threads)")
        results[name] = PARTS[name](args.rounds)
    if args.save:
        args.save.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
