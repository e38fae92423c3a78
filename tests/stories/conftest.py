"""A server that tells stories: a tiny decoder and a tiny encoder of random weights, and facts in our own words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Server, serving
from tiny import tiny_bert, tiny_llama

FACTS = """\
AtLocation\tboat\tharbour
UsedFor\tboat\tcross river
IsA\tboat\tvehicle
Desires\tdog\tbone
CapableOf\tdog\tbark
AtLocation\tdog\tkennel
AtLocation\tlamp\tdesk
antonym\tearly\tlate
antonym\tfriend\tenemy
"""
SYNSETS = '{"pos": "n", "lemmas": ["boat", "ship"]}\n'
WRITER = "writer"


@pytest.fixture(scope="session")
def concepts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of facts and synsets."""
    folder = tmp_path_factory.mktemp("concepts") / "village"
    folder.mkdir()
    (folder / "facts.tsv").write_text(FACTS)
    (folder / "synsets.jsonl").write_text(SYNSETS)
    return folder


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights."""
    return tiny_llama(tmp_path_factory.mktemp("stories") / WRITER, context=2048)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of random weights."""
    return tiny_bert(tmp_path_factory.mktemp("stories") / "encoder")


@pytest.fixture(scope="session")
def flags(encoder: Path, concepts: Path) -> list[str]:
    """What a server is told beside its decoder."""
    pairs = {"engines.1.name": "encoder", "engines.1.model": encoder, "engines.1.num_threads": 1}
    pairs |= {"engines.1.memory_fraction": 0.1, "server.concepts": concepts}
    told = [argument for name, value in pairs.items() for argument in ("--set", f"{name}={value}")]
    return ["--dtype", "float32", *told]


@pytest.fixture(scope="session")
def server(decoder: Path, flags: list[str]) -> Iterator[Server]:
    """It has no keys, so that every request is of one tenant."""
    with serving(decoder, *flags) as started:
        yield started
