"""
Many adapters over one base model: a stage's products, with each row's own adapter added to them.

    y = W x + b [+ residual]            one product for all rows, whatever their adapters
    y += B (scale * A x)                for the rows of each adapter; nothing where a step has none

Both factors' products round to the model's dtype, and what they add is added after the base's product is rounded:
the arithmetic of the forward pass that trains an adapter, so that serving has the numbers of training. A row's bits
don't depend on the other rows where the backend's products have that property.

No collective is added. Column-parallel products: A is whole, B is cut by outputs. Row-parallel ones: A is cut by
inputs, B is whole, and each rank's share goes into the sum that tp makes anyway.

Shapes: T packed tokens, K inputs and O outputs of a product (local), R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trilithon_parallel.backend import native, native_lora
from trilithon_parallel.backend.native_lora import Arena
from trilithon_parallel.backend.native_product import NativeProduct, even_terms
from trilithon_parallel.backend.torch_ops import TorchBackend
from trilithon_parallel.config import ModelConfig, ModelError
from trilithon_parallel.grid import Grid
from trilithon_parallel.layers import Product, RowParallelLinear
from trilithon_parallel.lora.peft import AdapterFiles, read_adapter
from trilithon_parallel.lora.sites import Factors, KernelSite, ProductSite, Put, Rows, Site, arrange
from trilithon_parallel.lora.spec import SHARED, products
from trilithon_parallel.models import CausalStage, EncoderStage
from trilithon_parallel.placement import LocalSlice, local_slice
from trilithon_parallel.transformer import Block

MAX_RANK = 256
"""The largest rank that any bank takes: what the kernel has room for."""

PADDING = 32
"""Outputs of the kernel's widest panel: by so much a factor may be padded."""


class _Adapted:
    """A packed product of the stage with its adapters."""

    def __init__(self, inner: Product, site: Site, bank: AdapterBank) -> None:
        self._inner, self._site, self._bank = inner, site, bank

    def __call__(self, x_TK: Tensor, residual_TO: Tensor | None = None) -> Tensor:
        y_TO = self._inner(x_TK, residual_TO)
        if self._bank.rows is not None:
            self._site.add(y_TO, x_TK, self._bank.rows)
        return y_TO


@dataclass(frozen=True)
class Adapter:
    """This rank's part of an adapter, read and packed; `puts` are in the order of the bank's sites."""

    digest: str
    puts: tuple[Put, ...]


class AdapterBank:
    """
    The adapters of one stage, in slots; made once, when the stage is packed for serving.

    Args:
        stage: after `prepare()`. Its products are wrapped, and cost what they did while no row has an adapter.
        config: of the base model.
        max_adapters: slots, from 1.
        max_rank: the largest rank that a slot takes, 1 to 256.
        kernel: False for the backend's products where the C kernel could run (tests compare both).
    Raises:
        ModelError: `adapters_unsupported`: the backend packs no products, or the model is an encoder-decoder.
    """

    def __init__(
        self,
        stage: CausalStage | EncoderStage,
        *,
        config: ModelConfig,
        grid: Grid,
        max_adapters: int,
        max_rank: int,
        kernel: bool = True,
    ) -> None:
        if not isinstance(stage.backend, TorchBackend):
            raise ModelError(
                f"adapters need backend torch. Given: {stage.backend.name}.",
                code="adapters_unsupported",
                hint="Set backend to torch, or max_adapters to 0.",
            )
        assert 1 <= max_rank <= MAX_RANK
        self.max_adapters, self.max_rank = max_adapters, max_rank
        self.rows: Rows | None = None
        self._config, self._grid = config, grid
        self._dtype, self._backend, self._kernel = stage.dtype, stage.backend, kernel
        self._piece = native_lora.max_rows() if not native.unavailable_reason() else 1
        self._held = {-1}
        self._sites: list[Site] = []
        self._leaves: list[tuple[str, tuple[str, ...]]] = []  # of each site: the layer's name and its products' leaves
        columns = [tuple(leaf for leaf in group if leaf in products(config)) for group in SHARED]
        for layer, block in stage.model.layers.items():
            assert isinstance(block, Block)
            at, attention, mlp = f"model.layers.{layer}.", block.self_attn, block.mlp
            attention.fused = self._wrap(attention.fused, at, columns[0])
            mlp.fused = self._wrap(mlp.fused, at, columns[1])
            for leaf, part in (("o_proj", attention.o_proj), ("down_proj", mlp.down_proj)):
                assert isinstance(part, RowParallelLinear)
                part.product = self._wrap(part.product, at, (leaf,), terms=part.terms)

    def _wrap(
        self, inner: Product | None, at: str, leaves: tuple[str, ...], *, terms: Sequence[int] | None = None
    ) -> _Adapted:
        """A packed product with its adapters; `terms` where its inputs are cut by tp."""
        assert inner is not None, "a bank is made of a stage that is packed"
        outputs, inputs = zip(*(self._slice(at, leaf).shape for leaf in leaves), strict=True)
        site: Site
        if self._kernel and isinstance(inner, NativeProduct):
            sizes = even_terms(inputs[0]) if terms is None else terms
            site = KernelSite(sizes, outputs, num_slots=self.max_adapters, dtype=self._dtype)
        else:
            site = ProductSite(terms, outputs, num_slots=self.max_adapters, backend=self._backend)
        self._sites.append(site)
        self._leaves.append((at, leaves))
        return _Adapted(inner, site, self)

    def _slice(self, at: str, leaf: str) -> LocalSlice:
        """What of a product's weight this rank holds: B has its outputs, A its inputs."""
        path, outputs, inputs = products(self._config)[leaf]
        tp = self._grid.tp
        return local_slice(f"{at}{path}.weight", (outputs, inputs), config=self._config, tp=tp.size, tp_rank=tp.rank)

    def _factors(self, files: AdapterFiles, at: str, leaves: tuple[str, ...]) -> list[Factors | None]:
        """This rank's part of an adapter's factors of one site."""
        found: list[Factors | None] = []
        for leaf in leaves:
            if leaf not in files.spec.targets:
                found.append(None)
                continue
            name = f"{at}{products(self._config)[leaf][0]}"
            local, rank = self._slice(at, leaf), files.spec.rank_of(leaf)
            a_RK = torch.zeros(rank, local.shape[1], dtype=self._dtype)
            b_OR = torch.zeros(local.shape[0], rank, dtype=self._dtype)
            files.fill(a_RK, f"{name}.lora_A.weight", (slice(0, rank), local.slices[1]))
            files.fill(b_OR, f"{name}.lora_B.weight", (local.slices[0], slice(0, rank)))
            device = self._grid.device
            found.append(Factors(a_RK.to(device), b_OR.to(device), files.spec.scale_of(leaf)))
        return found

    # -- slots ----------------------------------------------------------------------------------------------

    def read(self, directory: Path) -> Adapter:
        """
        Read this rank's part of an adapter directory and pack it; nothing of the bank changes, so any thread may.

        Raises:
            ModelError: a file is missing, broken, of another model, or of a larger rank than `max_rank`.
        """
        files = read_adapter(directory, config=self._config, max_rank=self.max_rank)
        sites = list(zip(self._sites, self._leaves, strict=True))
        ranks = {leaf: files.spec.rank_of(leaf) for leaf in files.spec.targets}
        arena = Arena(sum(site.room([ranks.get(leaf, 0) for leaf in leaves]) for site, (_, leaves) in sites))
        return Adapter(files.digest, tuple(site.pack(self._factors(files, *names), arena) for site, names in sites))

    def put(self, slot: int, adapter: Adapter) -> None:
        """Give a slot what `read` returned."""
        for put in adapter.puts:
            put(slot)
        self._held.add(slot)

    def load(self, slot: int, directory: Path) -> None:
        """Read an adapter into a slot; raises as `read`, and then the slot is as before."""
        self.put(slot, self.read(directory))

    def unload(self, slot: int) -> None:
        """Empty a slot and free its memory."""
        for site in self._sites:
            site.clear(slot)
        self._held.discard(slot)

    # -- a step ---------------------------------------------------------------------------------------------

    @contextmanager
    def batch(self, slots: Sequence[int], bounds: Sequence[int]) -> Iterator[None]:
        """
        The forward passes inside have these adapters.

        Args:
            slots: of each sequence; -1: the base model alone.
            bounds: the borders of the sequences in T, one more than `slots`.
        """
        assert self._held.issuperset(slots), "a row of an adapter that is not loaded"
        self.rows = arrange(slots, bounds, piece=self._piece)
        try:
            yield
        finally:
            self.rows = None


def bank_bytes(config: ModelConfig, *, grid: Grid, dtype: torch.dtype, max_adapters: int, max_rank: int) -> int:
    """Memory of this rank's slots when each holds an adapter of the largest rank for every product."""
    tp, at = grid.tp, "model.layers.0."
    elements = 0
    for path, outputs, inputs in products(config).values():
        local = local_slice(f"{at}{path}.weight", (outputs, inputs), config=config, tp=tp.size, tp_rank=tp.rank)
        elements += -(-max_rank // PADDING) * PADDING * local.shape[1] + (local.shape[0] + PADDING) * max_rank
    return max_adapters * len(grid.layers(config.num_layers)) * elements * dtype.itemsize
