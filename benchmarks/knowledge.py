"""
How fast knowledge is found: sentences for a turn, facts of a keyword, passages of a question; how soon a bomb is seen.

    python benchmarks/knowledge.py
    python benchmarks/knowledge.py --graph ../shared/data/kb/conceptnet100k_train.tsv

Times in milliseconds, the median of `--rounds` with the least and the most, in one thread of this process.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from trilithon.errors import InvalidArgument
from trilithon_server.knowledge.dense import FlatIndex, HnswIndex
from trilithon_server.knowledge.graph import ConceptGraph
from trilithon_server.knowledge.html import read_html
from trilithon_server.knowledge.local import SCORERS, Choice, LocalKnowledge
from trilithon_server.knowledge.sentences import Sentence, split_sentences
from trilithon_server.knowledge.sparse import SparseIndex
from trilithon_server.knowledge.templates import templates
from trilithon_server.knowledge.triples import read_triples

SENTENCES, PASSAGES, WIDTH = 10_000, 20_000, 384
BOMBS = {
    "5 MB of text": "<p>" + "a " * 2_500_000,
    "nested tags": "<div>" * 100_000,
    "attributes": "<p " + " ".join(f"a{i}=1" for i in range(100_000)) + ">x</p>",
}


def timed(name: str, work: Callable[[], object], *, rounds: int) -> None:
    """Print what it takes; the first time is told apart, since it may build what later ones use."""
    took = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        work()
        took.append(1000 * (time.perf_counter() - begun))
    first, *rest = took
    print(f"{name:44} {statistics.median(rest):9.2f}  [{min(rest):.2f} .. {max(rest):.2f}]  first {first:.2f}")


def refused(page: str) -> None:
    """Read a page that is refused."""
    with contextlib.suppress(InvalidArgument):
        read_html(page)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--graph", type=Path, default=None, help="facts, relation<TAB>head<TAB>tail")
    args = parser.parse_args()
    rng = np.random.default_rng(3)
    shares = 1 / np.arange(1, 20_001)
    words = rng.choice([f"word{i}" for i in range(20_000)], (PASSAGES, 20), p=shares / shares.sum())
    texts = [" ".join(row) for row in words]
    vectors = rng.standard_normal((PASSAGES, WIDTH), dtype=np.float32)
    sentences = [Sentence(text, "d", i, 0, len(text)) for i, text in enumerate(texts[:SENTENCES])]
    base = LocalKnowledge(sentences, vectors_NH=vectors[:SENTENCES])
    for scorer in SCORERS:
        choice = Choice(scorer=scorer)  # type: ignore[arg-type]  # one of them
        timed(
            f"select of {SENTENCES:,} sentences, {scorer}",
            lambda choice=choice: base.select([texts[7], texts[9]], choice, turn_vectors_MH=vectors[[7, 9]]),  # type: ignore[misc]
            rounds=args.rounds,
        )
    sparse, flat = SparseIndex.build(texts), FlatIndex(vectors)
    hnsw = HnswIndex.build(vectors)
    timed(f"BM25 of {PASSAGES:,} passages", lambda: sparse.search([texts[7]], 20), rounds=args.rounds)
    timed(f"flat of {PASSAGES:,} passages", lambda: flat.search(vectors[:1], 20), rounds=args.rounds)
    timed(f"hnsw of {PASSAGES:,} passages", lambda: hnsw.search(vectors[:1], 20), rounds=args.rounds)
    timed("sentences of a megabyte", lambda: split_sentences("It goes on and on. " * 52_000), rounds=args.rounds)
    for name, page in BOMBS.items():
        timed(f"refused: {name}", lambda page=page: refused(page), rounds=args.rounds)  # type: ignore[misc]
    if args.graph is not None:
        triples = read_triples(args.graph, relations=templates())
        timed(f"a graph of {len(triples):,} facts", lambda: ConceptGraph(triples), rounds=min(3, args.rounds))
        graph = ConceptGraph(triples)
        names = [head for _, head, _ in triples[:5000]]
        timed("facts of 5,000 keywords", lambda: [graph.about(name) for name in names], rounds=args.rounds)


if __name__ == "__main__":
    main()
