"""
What a vocabulary, and reading on in a domain, are worth for entities in biomedical text (after arXiv 2010.06060).

    python benchmarks/quality/vocabulary.py fragmentation
    python benchmarks/quality/vocabulary.py transfer --seed 1
    python benchmarks/quality/vocabulary.py scratch --seed 1

fragmentation  how finely word pieces learned from biomedical and from general text cut the devel files of NCBI-disease
               and BC5CDR, and the mentions in them, beside MiniLM's own vocabulary.
transfer       NER on NCBI-disease from all-MiniLM-L6-v2: as it is, read on with its own vocabulary, read on with a
               biomedical one of 8,000 pieces, and from new weights of the same shape.
scratch        the same from 4 layers of 128 with the biomedical vocabulary: with and without reading first.

The biomedical text is articles of PubMed Central and the contexts of PubMedQA; one paragraph in twenty is held out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from runs import Result, data_dir, model_dir, record, run_job, write_rows

from trilithon_finetune.converters.conll import read_conll
from trilithon_finetune.converters.questions import json_lines
from trilithon_parallel.data.fragmentation import fragmentation
from trilithon_parallel.data.train_tokenizer import train_tokenizer
from trilithon_parallel.tokenizer import load_tokenizer
from trilithon_parallel.weights.vocabulary import change_vocabulary
from trilithon_server.tasks.tagging import spans_of

MINILM = "all-minilm-l6-v2"
HELD_OUT_EVERY = 20
SIZES = (4000, 8000)


def biomedical_texts() -> list[str]:
    """Paragraphs of full articles, and contexts of questions; each once."""
    articles = _rows("pretrain/pmc_craft_fulltext.jsonl")
    questions = _rows("qa/pubmedqa_pqal.jsonl")
    texts = [part for row in articles for part in row["text"].split("\n\n")]
    texts += [context for row in questions for context in row["contexts"]]
    return list(dict.fromkeys(text for text in texts if len(text.split()) > 8))  # articles repeat legal notes


def general_texts(num_words: int) -> Iterator[str]:
    """Encyclopedia articles, as many words."""
    for row in _rows("pretrain/wikipedia_en_articles.jsonl"):
        for text in row["text"].split("\n\n"):
            if num_words <= 0:
                return
            num_words -= len(text.split())
            yield text


def _rows(name: str) -> list[dict[str, Any]]:
    return list(json_lines((data_dir() / name).read_bytes()))


def sentences(name: str) -> list[Mapping[str, Any]]:
    """Tokens and tags of a corpus' file."""
    return list(read_conll((data_dir() / "biomed" / name).read_bytes(), file=name))  # type: ignore[arg-type]


def word_pieces(folder: Path, name: str, texts: Iterable[str], size: int) -> Path:
    """A vocabulary learned from texts."""
    rows = write_rows(folder / f"{name}.jsonl", ({"text": text} for text in texts))
    return train_tokenizer([rows], folder / f"{name}-{size}", vocab_size=size, kind="wordpiece", lowercase=True).path


def fragments(folder: Path) -> dict[str, Any]:
    """Pieces a word and a mention, by vocabulary and corpus."""
    biomedical = biomedical_texts()
    num_words = sum(len(text.split()) for text in biomedical)
    vocabularies = {f"biomedical {size}": word_pieces(folder, "bio", biomedical, size) for size in SIZES}
    vocabularies["general 8000"] = word_pieces(folder, "general", general_texts(num_words), 8000)
    vocabularies["MiniLM 30522"] = model_dir(MINILM)
    found: dict[str, Any] = {}
    for corpus in ("ncbi_disease_devel.tsv", "bc5cdr_devel.tsv"):
        rows = sentences(corpus)
        texts = [" ".join(row["tokens"]) for row in rows]
        mentions = [" ".join(row["tokens"][start:stop]) for row in rows for start, stop, _ in spans_of(row["tags"])]
        for name, path in vocabularies.items():
            tokenizer = load_tokenizer(path)
            words, named = fragmentation(texts, tokenizer), fragmentation(mentions, tokenizer)
            found[f"{corpus} {name}"] = {
                "pieces_per_word": words.pieces_per_word,
                "bytes_per_piece": words.bytes_per_piece,
                "whole_share": words.whole_share,
                "unknown_share": words.unknown_share,
                "pieces_per_mention": named.pieces / len(mentions),
            }
    return {"words": num_words, "texts": len(biomedical), "vocabularies": found}


def random_start(folder: Path, *, tokenizer: Path, seed: int, **sizes: int) -> Path:
    """An encoder's directory with new weights."""
    torch.manual_seed(seed)
    source = transformers.AutoConfig.from_pretrained(model_dir(MINILM))
    source.update({**sizes, "vocab_size": load_tokenizer(tokenizer).vocab_size})
    out = folder / f"random-{sizes.get('hidden_size', source.hidden_size)}"
    transformers.BertModel(source, add_pooling_layer=True).save_pretrained(out)
    for path in tokenizer.iterdir():
        if path.name.startswith(("tokenizer", "vocab", "special_tokens")):
            (out / path.name).write_bytes(path.read_bytes())
    return out


class Study:
    """Jobs on one machine, with what each reached."""

    def __init__(self, folder: Path, *, seed: int, reading_epochs: int, epochs: int) -> None:
        self.folder, self.seed = folder, seed
        self._reading_epochs, self._epochs = reading_epochs, epochs
        texts = biomedical_texts()
        held = [text for i, text in enumerate(texts) if i % HELD_OUT_EVERY == 0]
        kept = [text for i, text in enumerate(texts) if i % HELD_OUT_EVERY]
        self.train = write_rows(folder / "read.jsonl", ({"text": text} for text in kept))
        self.valid = write_rows(folder / "read-dev.jsonl", ({"text": text} for text in held))
        self.vocabulary = word_pieces(folder, "bio", kept, 8000)
        self.found: dict[str, Any] = {}

    def read(self, name: str, model: Path, *, lr: float) -> Path:
        """Masked-LM training; the exported model."""
        config = {
            "task": "mlm",
            "seed": self.seed,
            "training": {"epochs": self._reading_epochs},
            "optimizer": {"lr": lr},
            "eval": {"every_steps": 100},
        }
        result = run_job(self.folder, model, self.train, self.valid, config)
        self._keep(f"reading: {name}", result, curve_of(result))
        return result.export

    def entities(self, name: str, model: Path, *, lr: float | None = None) -> None:
        """NER on NCBI-disease."""
        files = [data_dir() / "biomed" / f"ncbi_disease_{part}.tsv" for part in ("train", "devel")]
        config: dict[str, Any] = {"task": "ner", "seed": self.seed, "training": {"epochs": self._epochs}}
        if lr is not None:
            config["optimizer"] = {"lr": lr}
        self._keep(f"entities: {name}", run_job(self.folder, model, files[0], files[1], config), ())

    def _keep(self, name: str, result: Result, curve: Sequence[Mapping[str, float]]) -> None:
        self.found[name] = {
            "best": dict(result.metrics),
            "last": dict(result.last),
            "curve": list(curve),
            "seconds": result.seconds,
            "tokens_per_s": result.tokens / result.step_seconds,
        }
        print(name, json.dumps(self.found[name]["last"]), flush=True)


def curve_of(result: Result) -> Iterator[Mapping[str, float]]:
    """Every evaluation of a job."""
    events = result.export.parent / "attempts" / "1" / "events.jsonl"
    for line in events.read_text("utf-8").splitlines():
        if (event := json.loads(line))["kind"] == "eval":
            yield event["data"]


def transfer(study: Study) -> dict[str, Any]:
    """MiniLM and its shape."""
    minilm = model_dir(MINILM)
    study.entities("MiniLM", minilm)
    study.entities("MiniLM, read on", study.read("MiniLM", minilm, lr=1e-4))
    other = study.folder / "minilm-bio"
    changed = change_vocabulary(minilm, study.vocabulary, other)
    study.entities("MiniLM, biomedical vocabulary, not read on", other)
    study.entities("MiniLM, biomedical vocabulary, read on", study.read("biomedical vocabulary", other, lr=1e-4))
    study.entities("new weights", random_start(study.folder, tokenizer=minilm, seed=study.seed))
    return {**study.found, "changed": asdict(changed)}


def scratch(study: Study) -> dict[str, Any]:
    """An encoder of 4 x 128 with the biomedical vocabulary."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
    tiny = random_start(study.folder, tokenizer=study.vocabulary, seed=study.seed, **sizes)
    study.entities("new weights", tiny, lr=1e-3)
    study.entities("after reading", study.read("from new weights", tiny, lr=1e-3), lr=1e-3)
    return study.found


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("part", choices=("fragmentation", "transfer", "scratch"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--reading-epochs", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.part == "fragmentation":
            numbers = fragments(folder)
        else:
            study = Study(folder, seed=args.seed, reading_epochs=args.reading_epochs, epochs=args.epochs)
            numbers = (transfer if args.part == "transfer" else scratch)(study)
        record(f"vocabulary_{args.part}", {"seed": args.seed, **numbers})


if __name__ == "__main__":
    main()
