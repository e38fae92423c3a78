"""
Weights of Megatron-LM checkpoints into a model directory: tp shards merged, stages put in order, q, k, v taken apart.

Read is the format `torch` (one `mp_rank_TT[_PPP]/model_optim_rng.pt` per rank), in the names of both of its model
classes. What each rank's fused q, k, v rows are, with A heads of C channels, by `checkpoint_version`:

    0       [q|k|v, A, C]
    1       [A, C, q|k|v]
    2, 3    [A, q|k|v, C]; with G key/value groups [G, (A/G q heads)|k|v, C]

Source: Megatron-LM, `fix_query_key_value_ordering`.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import torch

from trilithon_parallel.checkpoint.describe import model_files, write_files
from trilithon_parallel.checkpoint.errors import CheckpointError
from trilithon_parallel.checkpoint.megatron_files import check_arguments, iteration, rank_files, sections
from trilithon_parallel.checkpoint.run_dir import sync_directory
from trilithon_parallel.checkpoint.torch_file import TensorRef, TorchFile
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.placement import global_shapes
from trilithon_parallel.weights.directory import MAX_SHARD_BYTES, and_more, write_shards
from trilithon_parallel.weights.names import Source, file_shape, file_slices, name_table
from trilithon_parallel.weights.safetensors_io import TensorSpec

Kind = Literal["whole", "column", "row", "qkv", "up"]

_NORM = r"[._](weight|bias)"
_ATTENTION = r"decoder\.layers\.N\.(?:self_)?attention\."
_MLP = r"decoder\.layers\.N\.mlp\."
_NAMES: tuple[tuple[str, str, Kind], ...] = (
    (r"embedding\.word_embeddings\.weight", "model.embed_tokens.weight", "column"),
    (r"embedding\.position_embeddings\.weight", "model.embed_positions.weight", "whole"),
    (r"decoder\.final_(?:layer)?norm" + _NORM, r"model.norm.\1", "whole"),
    (r"output_layer\.weight", "lm_head.weight", "column"),
    (r"decoder\.layers\.N\.input_(?:layer)?norm" + _NORM, r"model.layers.N.input_layernorm.\1", "whole"),
    (_ATTENTION + r"linear_qkv\.layer_norm" + _NORM, r"model.layers.N.input_layernorm.\1", "whole"),
    (
        r"decoder\.layers\.N\.(?:post_attention_(?:layer)?norm|pre_mlp_layernorm)" + _NORM,
        r"model.layers.N.post_attention_layernorm.\1",
        "whole",
    ),
    (_MLP + r"linear_fc1\.layer_norm" + _NORM, r"model.layers.N.post_attention_layernorm.\1", "whole"),
    (_ATTENTION + r"(?:query_key_value|linear_qkv)\.(weight|bias)", r"model.layers.N.self_attn.{q,k,v}_proj.\1", "qkv"),
    (_ATTENTION + r"(?:dense|linear_proj)\.weight", "model.layers.N.self_attn.o_proj.weight", "row"),
    (_ATTENTION + r"(?:dense|linear_proj)\.bias", "model.layers.N.self_attn.o_proj.bias", "whole"),
    (_MLP + r"(?:dense_h_to_4h|linear_fc1)\.(weight|bias)", r"model.layers.N.mlp.{gate,up}_proj.\1", "up"),
    (_MLP + r"(?:dense_4h_to_h|linear_fc2)\.weight", "model.layers.N.mlp.down_proj.weight", "row"),
    (_MLP + r"(?:dense_4h_to_h|linear_fc2)\.bias", "model.layers.N.mlp.down_proj.bias", "whole"),
)
"""
Name in Megatron-LM -> canonical name, and how tp shards make up the whole.

N stands for a layer, counted from the first of its stage there and from the model's first here; {a,b} for parts of one
tensor.
"""

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


def import_megatron(
    checkpoint: Path,
    out_dir: Path,
    *,
    config: ModelConfig,
    side_files_from: Path | None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """
    Convert the weights of a Megatron-LM GPT checkpoint into a model directory, a few tensors in memory at a time.

    Nothing in its files is run (`torch_file.py`). The optimizer stays behind: a run goes on from these weights with
    `import_model_directory`.

    Args:
        checkpoint: `iter_0001000`, or the directory above it, whose newest iteration is taken.
        out_dir: must not exist yet; it is there whole or not at all.
        config: of the model, which the files do not say in full: family gpt2 or llama, true vocabulary size.
        side_files_from: a model directory whose tokenizer files go along; None for none.
        dtype: of the weights written; None keeps the checkpoint's.
        max_shard_bytes: size of a file.
    Raises:
        CheckpointError: `export_exists`; `checkpoint_unsupported` for other formats and models; `checkpoint_missing`,
            `checkpoint_corrupt`, `checkpoint_mismatch`, `weights_missing`, `weights_extra`, `weights_shape`.
    """
    if out_dir.exists():
        raise CheckpointError(
            f"{out_dir.name} exists already, and imports never overwrite.",
            code="export_exists",
            hint="Name a new directory, or remove that one.",
        )
    if config.family not in ("gpt2", "llama"):
        raise CheckpointError(
            f"Megatron-LM checkpoints of family {config.family} are not read.",
            code="checkpoint_unsupported",
            hint="Allowed: gpt2, llama. (Its BERT and T5 are other models than Hugging Face's of these names.)",
        )
    table, shapes = name_table(config), global_shapes(config)
    parts: dict[str, list[tuple[str, Source]]] = {}
    for name, source in table.sources.items():
        parts.setdefault(table.spellings(source.file_name)[0], []).append((name, source))
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with (
        _Shards(iteration(checkpoint), config) as shards,
        tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".tmp-{out_dir.name}-") as temporary,
    ):
        dtype = dtype or shards.dtype
        model_dir = Path(temporary) / "model"
        model_dir.mkdir()
        write_files(model_dir, model_files(config, dtype=dtype, side_files_from=side_files_from))
        specs = [
            TensorSpec(file_name, dtype, file_shape(held[0][1], shapes[held[0][0]]))
            for file_name, held in parts.items()
        ]

        def produce(spec: TensorSpec) -> torch.Tensor:
            out = torch.empty(spec.shape, dtype=spec.dtype)
            for name, source in parts[spec.name]:
                whole = tuple(slice(0, size) for size in shapes[name])
                where, transpose = file_slices(source, shapes[name], whole)
                tensor = shards.read(name)
                out[where] = tensor.t() if transpose else tensor
            return out

        write_shards(model_dir, specs, produce, max_bytes=max_shard_bytes)
        sync_directory(model_dir)
        model_dir.rename(out_dir)
    sync_directory(out_dir.parent)


@dataclass(frozen=True)
class _Found:
    """A tensor of the model: in which stage, under which key in each tp rank's state, and which part of it."""

    pp_rank: int
    section: str
    key: str
    kind: Kind
    part: int
    parts: int


class _Shards:
    """The open files of all ranks, and where each canonical tensor lies in them."""

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        self._config, self._shapes = config, global_shapes(config)
        self._files: dict[tuple[int, int], TorchFile] = {}
        self._states: dict[tuple[int, int], dict[str, dict[str, TensorRef]]] = {}
        self._last: tuple[tuple[int, str, str], list[torch.Tensor]] | None = None
        with contextlib.ExitStack() as on_error:
            on_error.callback(self.close)
            for path, place in rank_files(directory):
                self._files[place] = TorchFile(path)
                self._states[place] = sections(self._files[place])
            self._tp = 1 + max(tp_rank for tp_rank, _ in self._files)
            self._pp = 1 + max(pp_rank for _, pp_rank in self._files)
            if len(self._files) != self._tp * self._pp:
                raise CheckpointError(
                    f"{directory.name} must hold the files of {self._tp} tp ranks by {self._pp} stages. "
                    f"Given: {len(self._files)} files.",
                    code="checkpoint_missing",
                    hint="Copy the directories of all ranks.",
                )
            document = self._files[0, 0].document
            self._version = float(document.get("checkpoint_version") or 0)
            check_arguments(document.get("args"), config)
            self._found = self._find()
            on_error.pop_all()

    @property
    def dtype(self) -> torch.dtype:
        """Of the embedding, and so of the model."""
        found = self._found["model.embed_tokens.weight"]
        return self._states[0, found.pp_rank][found.section][found.key].storage.dtype

    def read(self, name: str) -> torch.Tensor:
        """A canonical tensor, whole and unpadded."""
        found, shape = self._found[name], self._shapes[name]
        place = (found.pp_rank, found.section, found.key)
        if self._last is None or self._last[0] != place:  # parts of one tensor come one after another
            refs = [self._states[tp_rank, found.pp_rank][found.section][found.key] for tp_rank in range(self._tp)]
            self._last = place, [self._files[tp_rank, found.pp_rank].read(ref) for tp_rank, ref in enumerate(refs)]
        merged = self._merge(found, self._last[1])
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            merged = merged[: shape[0]]  # Megatron pads the vocabulary behind its true end
        if tuple(merged.shape) != shape:
            raise CheckpointError(
                f"tensor {found.key} of stage {found.pp_rank} makes up {name} of shape {list(merged.shape)}, which "
                f"must be {list(shape)} by config.json.",
                code="weights_shape",
                hint="The configuration is of another model than the checkpoint.",
            )
        return merged

    def _merge(self, found: _Found, shards: list[torch.Tensor]) -> torch.Tensor:
        match found.kind:
            case "whole":
                return shards[0]
            case "column":
                return torch.cat(shards)
            case "row":
                return torch.cat(shards, dim=1)
            case "up":
                return torch.cat([shard.chunk(found.parts)[found.part] for shard in shards])
            case "qkv":
                return torch.cat([self._part_of_qkv(shard, found.part) for shard in shards])

    def _part_of_qkv(self, shard: torch.Tensor, part: int) -> torch.Tensor:
        """One tp rank's rows of q (part 0), k or v."""
        config, rest = self._config, shard.shape[1:]
        channels, per_group = config.head_dim, config.heads_per_group
        if shard.shape[0] % (channels * (per_group + 2)):
            raise CheckpointError(
                f"a fused q, k, v tensor of {shard.shape[0]} rows must hold whole groups of {per_group} + 2 heads of "
                f"{channels} channels by config.json.",
                code="weights_shape",
                hint="The configuration is of another model than the checkpoint.",
            )
        if self._version < 2:
            split_first = self._version == 0
            by_part = shard.view(3, -1, *rest) if split_first else shard.view(-1, 3, *rest).transpose(0, 1)
            return by_part[part]
        grouped = shard.view(-1, per_group + 2, channels, *rest)
        rows = (slice(0, per_group), slice(per_group, per_group + 1), slice(per_group + 1, None))[part]
        return grouped[:, rows].reshape(-1, *rest)

    def _find(self) -> dict[str, _Found]:
        found: dict[str, _Found] = {}
        extra: list[str] = []
        for pp_rank, section, first_layer in self._stages():
            for key in self._states[0, pp_rank][section]:
                kind, names = _canonical(key, first_layer=first_layer, gated=self._config.gated_mlp)
                if self._is_copy(key):
                    continue
                if not names or any(name not in self._shapes for name in names):
                    extra.append(key)
                for part, name in enumerate(names):
                    found.setdefault(name, _Found(pp_rank, section, key, kind, part, len(names)))
        missing = [name for name in self._shapes if name not in found]
        if missing:
            raise CheckpointError(
                f"the checkpoint has nothing for tensor {missing[0]}{and_more(missing)}.",
                code="weights_missing",
                hint="The configuration is of another model than the checkpoint, or a rank's file is missing.",
            )
        if extra:
            raise CheckpointError(
                f"tensor {extra[0]} of the checkpoint has no place in this model{and_more(extra)}.",
                code="weights_extra",
                hint="The configuration is of another model than the checkpoint; nothing is left out in silence.",
            )
        return found

    def _stages(self) -> Iterator[tuple[int, str, int]]:
        """Every stage in the order of layers: its rank, its section of the rank's state, its first layer."""
        first_layer = 0
        for chunk in range(max(len(self._states[0, pp_rank]) for pp_rank in range(self._pp))):
            for pp_rank in range(self._pp):
                state = self._states[0, pp_rank]
                section = list(state)[chunk]
                yield pp_rank, section, first_layer
                layers = [int(hit.group(1)) for hit in map(_LAYER.match, state[section]) if hit]
                first_layer += max(layers, default=-1) + 1

    def _is_copy(self, key: str) -> bool:
        """What is computed or stored twice: rotary frequencies, and a tied head's weights on the last stage."""
        heads = ("word_embeddings_for_head.", "output_layer.") if self._config.tied_embeddings else ()
        return key.endswith("rotary_pos_emb.inv_freq") or key.startswith(heads)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release every file; safe to call twice."""
        for file in self._files.values():
            file.close()


def _canonical(key: str, *, first_layer: int, gated: bool) -> tuple[Kind, list[str]]:
    """
    How a tensor of Megatron's is cut over tp, and the canonical names it holds; none for a name without a place.

    >>> _canonical("decoder.layers.1.mlp.linear_fc1.weight", first_layer=4, gated=True)
    ('up', ['model.layers.5.mlp.gate_proj.weight', 'model.layers.5.mlp.up_proj.weight'])
    """
    layer = _LAYER.match(key)
    starred = _LAYER.sub("decoder.layers.N.", key)
    for pattern, named, kind in _NAMES:
        match = re.fullmatch(pattern, starred)
        if match is not None:
            name = match.expand(named)
            if layer is not None:
                name = name.replace("layers.N.", f"layers.{first_layer + int(layer.group(1))}.")
            parts = re.search(r"\{(.*)\}", name)
            if parts is None:
                return kind, [name]
            options = parts.group(1).split(",")
            options = ["up"] if options == ["gate", "up"] and not gated else options
            return kind, [name.replace(parts.group(0), option) for option in options]
    return "whole", []
