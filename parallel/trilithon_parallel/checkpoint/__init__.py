"""
Training checkpoints: safetensors by global names, weights as a model directory that is served as it stands, optimizer
state beside them; saved while training goes on, published whole or not at all, loaded at any layout.
"""

from trilithon_parallel.checkpoint.adapter import Base
from trilithon_parallel.checkpoint.errors import CheckpointError
from trilithon_parallel.checkpoint.loading import load
from trilithon_parallel.checkpoint.manifest import Manifest, read_manifest, verify
from trilithon_parallel.checkpoint.megatron import import_megatron
from trilithon_parallel.checkpoint.piece import Piece
from trilithon_parallel.checkpoint.run_dir import Found, Retention, Skipped, find_latest
from trilithon_parallel.checkpoint.saver import Progress, RunFacts, Saver
from trilithon_parallel.checkpoint.table import optimizer_names
from trilithon_parallel.checkpoint.transfer import export, import_base, import_model_directory

__all__ = [
    "Base",
    "CheckpointError",
    "Found",
    "Manifest",
    "Piece",
    "Progress",
    "Retention",
    "RunFacts",
    "Saver",
    "Skipped",
    "export",
    "find_latest",
    "import_base",
    "import_megatron",
    "import_model_directory",
    "load",
    "optimizer_names",
    "read_manifest",
    "verify",
]
