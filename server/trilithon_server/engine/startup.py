"""
From a spec to a rank that can step: load the weights, run the worst case, size the KV cache, refuse what can't fit.

Every rank runs this in step with the others; the smallest cache decides.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from trilithon_parallel import backend as backends
from trilithon_parallel.attention import PagedBatch, PagedKVCache, PagedView
from trilithon_parallel.collectives import all_gather, all_reduce_max, barrier
from trilithon_parallel.config import ModelConfig, ModelError, load_config
from trilithon_parallel.grid import Grid
from trilithon_parallel.lora.bank import AdapterBank, bank_bytes
from trilithon_parallel.models import CausalStage, EncoderStage, Seq2SeqStage, build_seq2seq, build_stage
from trilithon_parallel.placement import local_sizes
from trilithon_parallel.tokenizer import load_tokenizer
from trilithon_parallel.weights.loader import load_stage
from trilithon_server.engine import memory
from trilithon_server.engine.adapter_reads import AdapterReads
from trilithon_server.engine.batch import Limits
from trilithon_server.engine.constraints import ConstraintCompiler
from trilithon_server.engine.core import EngineCore
from trilithon_server.engine.identity import model_digest
from trilithon_server.engine.intake import Facts
from trilithon_server.engine.plan import StepPlan
from trilithon_server.engine.runner import Runner, try_head
from trilithon_server.engine.sampler import Draw
from trilithon_server.engine.seq2seq_runner import Seq2SeqRunner, warm_up_seq2seq
from trilithon_server.engine.spec import EngineSpec
from trilithon_server.engine.wire_pb2 import Hello, Pooling, Sampling, Submit

MIN_BLOCKS = 4
CPU_CACHE_TOKENS = 65_536  # of an unasked size: touching memory costs a second per GiB, and other programs want it too
MIN_GATHER_TOKENS = 131_072  # cached tokens that the decodes of one plan may attend to, at least
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

PhaseListener = Callable[[str, float], None]


@dataclass(slots=True)
class Loaded:
    """A rank that is ready to step."""

    spec: EngineSpec
    config: ModelConfig
    grid: Grid
    runner: Runner
    max_context: int
    num_blocks: int
    memory: memory.MemorySum
    model_digest: str
    warmup_s: float
    max_adapters: int = 0
    startup_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def limits(self) -> Limits:
        """Budgets of a step."""
        spec = self.spec
        return Limits(
            max_batch_tokens=spec.max_batch_tokens,
            max_batch_sequences=spec.max_batch_sequences,
            max_gather_tokens=_gather_tokens(self.max_context),
            block_size=spec.block_size,
            slots=spec.pp,
            prefix_cache=spec.prefix_cache,
        )

    def core(self, *, check_blocks: bool = False) -> EngineCore:
        """The leader's mind for this engine."""
        config, spec = self.config, self.spec
        facts = Facts(
            model_digest=self.model_digest,
            vocab_size=config.vocab_size,
            max_context=self.max_context,
            is_encoder=config.family == "bert",
            is_seq2seq=config.is_seq2seq,
            token_types=config.token_types,
            task_columns=len(config.task_head.labels) if config.task_head is not None else 0,
            task_rows=int(config.task_head is not None and config.task_head.kind == "sequence"),
            num_blocks=self.num_blocks,
            block_size=spec.block_size,
            max_queued_requests=spec.max_queued_requests,
            max_adapters=self.max_adapters,
        )
        compiler = ConstraintCompiler(lambda: load_tokenizer(Path(spec.model_dir)))
        core = EngineCore(facts, self.limits, compiler=compiler, check_blocks=check_blocks)
        core.pace.warmed_up(spec.max_batch_tokens, seconds=self.warmup_s)
        return core

    def hello(self) -> Hello:
        """What the front is told of this engine."""
        spec, config = self.spec, self.config
        return Hello(
            model_digest=self.model_digest,
            vocab_size=config.vocab_size,
            max_context_tokens=self.max_context,
            kv_capacity_tokens=self.num_blocks * spec.block_size,
            block_size=spec.block_size,
            max_batch_tokens=spec.max_batch_tokens,
            max_batch_sequences=spec.max_batch_sequences,
            tp=spec.tp,
            pp=spec.pp,
            dtype=spec.dtype,
            device=spec.device,
            encoder=config.family == "bert",
            seq2seq=config.is_seq2seq,
            decoder_start_id=config.decoder_start_id or 0,
            hidden_size=config.hidden_size,
            startup_seconds=self.startup_seconds,
            memory_bytes=self.memory.as_dict(),
            max_adapters=self.max_adapters,
            max_adapter_rank=spec.max_adapter_rank if self.max_adapters else 0,
            task_labels=len(config.task_head.labels) if config.task_head is not None else 0,
        )


def load(spec: EngineSpec, grid: Grid, *, on_phase: PhaseListener) -> Loaded:
    """
    Args:
        grid: this rank's place; all ranks call at the same time.
        on_phase: called with each phase's name and seconds as it ends.
    Raises:
        ModelError: the model is broken or unknown, the layout does not fit it, or the memory does not suffice.
        CollectiveError: another rank is gone.
    """
    seconds: dict[str, float] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        seconds[name] = time.monotonic() - began
        on_phase(name, seconds[name])

    torch.set_num_threads(spec.num_threads or _default_threads(grid))
    with phase("weights"):
        model_dir = Path(spec.model_dir)
        config = load_config(model_dir)
        max_context = _max_context(spec, config)
        digest = spec.model_digest or model_digest(model_dir)
        _agree(f"{spec.to_json()}|{config}|{digest}|{torch.__version__}", grid)
        barrier(grid.world, label="start")
        # Ranks of one host share what it has.
        overhead = memory.used_bytes(grid.device)
        available = memory.available_bytes(grid.device) // _local_ranks(grid) + overhead
        barrier(grid.world, label="memory measured")
        backend = backends.select(spec.backend, batch_invariant=spec.batch_invariant, device=grid.device)
        stage = _build(config, grid=grid, backend=backend, dtype=_DTYPES[spec.dtype])
        load_stage(stage, model_dir, config=config, grid=grid)
        stage.eval().requires_grad_(False)
        if not isinstance(stage, Seq2SeqStage):
            stage.prepare()
        bank = _bank(spec, config, stage, grid)
        adapters = 0
        if bank is not None:
            slots = {"max_adapters": bank.max_adapters, "max_rank": bank.max_rank}
            adapters = bank_bytes(config, grid=grid, dtype=stage.dtype, **slots)
        weights = max(0, memory.used_bytes(grid.device) - overhead)
    with phase("warmup"):
        with memory.watch(grid.device) as step:
            warmup_s = warm_up(spec, config, stage, grid=grid, max_context=max_context)
        # The step has run without a past: what a full window adds is attention's, and layers use it one after another.
        with memory.watch(grid.device) as past:
            if config.is_causal:  # an encoder-decoder's step has had one
                probe_attention(spec, config, grid=grid, max_context=max_context)
        activations = step.num_bytes + past.num_bytes
    with phase("kv"):
        cache, kv = None, 0
        num_blocks = 0
        if config.num_decoder_layers:
            # A stage of an encoder-decoder may hold no layer that decodes: its blocks take nothing.
            per_block = max(1, PagedKVCache.bytes_per_block(config, grid, _DTYPES[spec.dtype]))
            kv = memory.kv_bytes(
                weights=weights,
                activations=activations,
                overhead=overhead,
                available=available,
                asked=spec.kv_cache_bytes,
                fraction=spec.memory_fraction,
                bytes_per_block=per_block,
                min_blocks=MIN_BLOCKS,
                max_blocks=_useful_blocks(spec, max_context),
                adapters=adapters,
            )
            mine = torch.tensor([-(kv // per_block)], dtype=torch.int64)
            num_blocks = -int(all_reduce_max(mine, grid.world, label="blocks").item())
            kv = num_blocks * per_block
            cache = PagedKVCache(config, grid, num_blocks=num_blocks, dtype=_DTYPES[spec.dtype])
    kind = Seq2SeqRunner if config.is_seq2seq else Runner
    return Loaded(
        spec=spec,
        config=config,
        grid=grid,
        runner=kind(stage, grid=grid, cache=cache, adapters=None if bank is None else AdapterReads(bank, grid)),
        max_context=max_context,
        num_blocks=num_blocks,
        memory=memory.MemorySum(weights, activations, kv, overhead, available, adapters),
        model_digest=digest,
        warmup_s=warmup_s,
        max_adapters=0 if bank is None else bank.max_adapters,
        startup_seconds=seconds,
    )


Stage = CausalStage | EncoderStage | Seq2SeqStage


def _build(config: ModelConfig, *, grid: Grid, backend: backends.Backend, dtype: torch.dtype) -> Stage:
    if not config.is_seq2seq:
        return build_stage(config, grid=grid, backend=backend, dtype=dtype)
    if backend.batch_invariant:
        raise ModelError(
            f"{config.architecture} has no batch-invariant mode: its attention adds in an order that depends on the "
            "batch.",
            code="backend_unavailable",
            hint="Turn batch_invariant off.",
        )
    if config.decoder_start_id is None:
        raise ModelError(
            f"{config.architecture} must say in its config which token its answers begin with.",
            code="model_invalid",
            hint="Set decoder_start_token_id in config.json.",
        )
    return build_seq2seq(config, grid=grid, backend=backend, dtype=dtype)


def _bank(spec: EngineSpec, config: ModelConfig, stage: Stage, grid: Grid) -> AdapterBank | None:
    """Slots for adapters; none where the spec wants none, or the backend's products or the model take none."""
    if not spec.max_adapters or stage.backend.name != "torch" or isinstance(stage, Seq2SeqStage):
        return None
    return AdapterBank(stage, config=config, grid=grid, max_adapters=spec.max_adapters, max_rank=spec.max_adapter_rank)


def warm_up(spec: EngineSpec, config: ModelConfig, stage: Stage, *, grid: Grid, max_context: int) -> float:
    """The most tokens and the most rows of logits that a plan can ask for; returns the seconds that they took."""
    if isinstance(stage, Seq2SeqStage):
        gather = _gather_tokens(max_context)
        return warm_up_seq2seq(spec, config, stage, grid=grid, max_context=max_context, gather_tokens=gather)
    began = time.monotonic()
    if isinstance(stage, EncoderStage):
        length = min(max_context, spec.max_batch_tokens)
        count = max(1, spec.max_batch_tokens // length)
        plan = StepPlan(0, tokens=[0] * (length * count), starts=[0] * count, lengths=[length] * count)
        what = Pooling(task_logits=config.task_head is not None)
        plan.pools = [what] * count
        runner = Runner(stage, grid=grid, cache=None)
        runner.execute(plan)
        if max_context > spec.max_batch_tokens:  # one text beyond the budget runs alone
            plan = StepPlan(1, tokens=[0] * max_context, starts=[0], lengths=[max_context], pools=[what])
            runner.execute(plan)
        runner.flush()
        return time.monotonic() - began
    length = min(max_context, spec.max_batch_tokens)
    num_blocks = -(-length // spec.block_size)
    runner = Runner(stage, grid=grid, cache=PagedKVCache(config, grid, num_blocks=num_blocks, dtype=stage.dtype))
    sampling = Sampling(num_sequences=1, repetition_penalty=1.0, top_p=1.0, typical_p=1.0, top_p_decay=1.0, logprobs=1)
    plan = StepPlan(0, tokens=[0] * length, starts=[0], lengths=[length], tables=[list(range(num_blocks))])
    plan.registrations = [(0, Submit(prompt=[0], sampling=sampling))]
    plan.draws = [Draw(0, 0)]
    runner.execute(plan)
    runner.flush()
    try_head(stage, spec.max_batch_sequences)
    return time.monotonic() - began


def probe_attention(spec: EngineSpec, config: ModelConfig, *, grid: Grid, max_context: int) -> None:
    """
    One layer's attention at a full window: the last chunk of a prompt, then as many decodes as a plan may gather for.

    The cache is one block that stands for all: attention gathers as much from it as from a full one.
    """
    dtype, table = _DTYPES[spec.dtype], [0] * -(-max_context // spec.block_size)
    sizes = local_sizes(config, grid.tp.size)
    cache = PagedKVCache(config, grid, num_blocks=1, dtype=dtype)

    def attend(count: int, length: int) -> None:
        num_tokens = count * length
        bounds = list(range(0, num_tokens + 1, length))
        slots_T = torch.zeros(num_tokens, dtype=torch.int64)
        batch = PagedBatch(bounds, [max_context - length] * count, [table] * count, slots_T)
        q_TAC = torch.zeros(num_tokens, sizes.heads, config.head_dim, dtype=dtype, device=grid.device)
        k_TGC = torch.zeros(num_tokens, sizes.groups, config.head_dim, dtype=dtype, device=grid.device)
        PagedView(cache, batch).attend(0, q_TAC, k_TGC, k_TGC)

    with torch.inference_mode():
        attend(1, min(max_context, spec.max_batch_tokens))
        attend(max(1, min(spec.max_batch_sequences, _gather_tokens(max_context) // max_context)), 1)


def _useful_blocks(spec: EngineSpec, max_context: int) -> int:
    """What an automatic cache is worth at most: on CPUs `CPU_CACHE_TOKENS`, else all sequences with a full window."""
    full = -(-max_context // spec.block_size)
    if spec.device == "cpu":
        return max(full, CPU_CACHE_TOKENS // spec.block_size)
    return 2 * spec.pp * spec.max_batch_sequences * full


def _gather_tokens(max_context: int) -> int:
    return max(max_context, MIN_GATHER_TOKENS)


def _max_context(spec: EngineSpec, config: ModelConfig) -> int:
    if spec.max_context > config.max_context:
        raise ModelError(
            f"engine {spec.name} `max_context` must be at most {config.max_context}, the model's window. "
            f"Given: {spec.max_context}.",
            code="max_context_invalid",
            hint=f"Lower it to {config.max_context} or leave it out.",
        )
    return spec.max_context or config.max_context


def _default_threads(grid: Grid) -> int:
    """The cores that this process may use, shared among the host's ranks; one is left to the front where many are."""
    cores = len(os.sched_getaffinity(0))
    return max(1, (cores - (cores > 2)) // _local_ranks(grid))


def _local_ranks(grid: Grid) -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", grid.world_size))


def _agree(text: str, grid: Grid) -> None:
    """All ranks were told the same and found the same model, or none of them starts."""
    mine = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
    digests = all_gather(torch.tensor([mine], dtype=torch.int64), grid.world, dim=0, label="agree").tolist()
    odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if odd:
        raise ModelError(
            f"all ranks must have the same spec, model directory and torch version. Given: ranks {odd} differ from "
            "rank 0.",
            code="ranks_differ",
            hint="Copy the model directory and the environment to every host.",
        )
