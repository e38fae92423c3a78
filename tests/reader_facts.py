"""
Facts that nobody can guess, passages that tell them, and tiny models from scratch to read them with.

A question names a thing by its key and its lock, the passage by its box and its lid: they share no word, so what goes
with what is learned from answers alone. A reader sees the first word of a question and no more (`max_question_tokens`
1): it can neither know an answer by heart nor find its passage. It has to read what its retriever points at.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
from finetune_jobs import JobDir, make_job, write_rows
from tiny_configs import BERT, T5
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from trilithon_parallel.backend import select
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.grid import Grid
from trilithon_parallel.init import initialise
from trilithon_parallel.models import build_seq2seq, build_stage
from trilithon_parallel.weights.export import export_model, full_state

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
KINDS = ("key", "lock", "box", "lid", "coin", "ring")
SENTINELS = tuple(f"<extra_id_{i}>" for i in range(8))
PAD, SEP = 0, 3
SIDE = 8
"""Of a square: a fact for each row and column."""
NUM_FACTS = SIDE * SIDE

READER = replace(
    T5,
    vocab_size=len(SPECIAL) + 1 + len(KINDS) * SIDE + len(SENTINELS),
    hidden_size=32,
    head_dim=8,
    ffn_size=64,
    num_layers=2,
    num_encoder_layers=1,
    max_context=64,
    tied_embeddings=False,
    scale_logits=False,
    decoder_start_id=PAD,
    pad_id=PAD,
    eos_ids=(SEP,),
)
RETRIEVER = replace(
    BERT,
    vocab_size=READER.vocab_size,
    hidden_size=128,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    ffn_size=128,
    num_layers=1,
    max_context=64,
    pooling="mean",
)
OPTIONS: dict[str, Any] = {"max_question_tokens": 1, "max_answer_tokens": 4, "written_answers": 16}


def write_tokenizer(folder: Path, texts: Sequence[str] = (), *, vocab_size: int = 0, longest: int = 64) -> None:
    """A word is a token; texts stand between [CLS] and [SEP]. With `texts` its pieces are learned from these."""
    words = [*SPECIAL, "hold", *(f"{kind}{i}" for kind in KINDS for i in range(SIDE)), *SENTINELS]
    tokenizer = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if texts:
        tokenizer.normalizer = normalizers.BertNormalizer()
        special = [*SPECIAL, *SENTINELS]
        trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens([*SPECIAL, *SENTINELS])
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    named = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
    document = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": longest, **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(document), encoding="utf-8")


def write_model(folder: Path, config: ModelConfig, *, seed: int, sigma: float, texts: Sequence[str] = ()) -> Path:
    """A model directory of new weights; its vocabulary is that of the facts, or learned from `texts`."""
    grid = Grid.single()
    build = build_seq2seq if config.is_seq2seq else build_stage
    stage = build(config, grid=grid, backend=select("torch"), dtype=torch.float32)
    initialise(stage, config=config, grid=grid, seed=seed, sigma=sigma)
    side = folder.with_name(f"{folder.name}-tokenizer")
    write_tokenizer(side, texts, vocab_size=config.vocab_size, longest=config.max_context)
    export_model(full_state([(stage, grid)], config), config, folder, side_files_from=side)
    return folder


def new_reader(folder: Path) -> Path:
    """An encoder-decoder that has learned nothing."""
    return write_model(folder, READER, seed=1, sigma=0.2)


def new_retriever(folder: Path) -> Path:
    """An encoder whose vectors mean nothing."""
    return write_model(folder, RETRIEVER, seed=2, sigma=0.02)


def answer(row: int, column: int) -> str:
    """What a box with a lid holds."""
    return f"coin{row} ring{column}"


def passages() -> list[dict[str, Any]]:
    """What is told."""
    squares = [divmod(i, SIDE) for i in range(NUM_FACTS)]
    return [
        {"id": f"p{i}", "title": "", "text": f"box{row} lid{column} {answer(row, column)}"}
        for i, (row, column) in enumerate(squares)
    ]


def questions() -> list[dict[str, Any]]:
    """What is asked, with the answers."""
    squares = [divmod(i, SIDE) for i in range(NUM_FACTS)]
    return [{"question": f"hold key{row} lock{column}", "answers": [answer(row, column)]} for row, column in squares]


def told_rows(num: int, *, count: int = 4) -> list[dict[str, Any]]:
    """Questions that bring passages of random things, one of which stands out by its score and tells the answer."""
    draw = random.Random(5)
    rows = []
    for _ in range(num):
        held = [[draw.randrange(SIDE) for _ in range(4)] for _ in range(count)]
        right = draw.randrange(count)
        ctxs = [
            {"title": "", "text": f"box{a} lid{b} {answer(c, d)}", "score": draw.gauss(0, 0.5) + 4.0 * (i == right)}
            for i, (a, b, c, d) in enumerate(held)
        ]
        rows.append({"question": "hold", "answers": [answer(*held[right][2:])], "ctxs": ctxs})
    return rows


def reader_job(
    folder: Path, base: Path, *, retriever: Path | None, train: list[dict[str, Any]], valid: list[dict[str, Any]],
    task: str = "reader_joint", options: dict[str, Any], again: bool = True, **config: Any,
) -> JobDir:  # fmt: skip
    """
    A job that trains a reader; with a retriever it finds its passages among those of the facts.

    `again`: validation rows are told from equal ones of the training by an id.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = {} if retriever is None else {"retriever": "retriever", "passages": "passages"}
    sections = {
        "data": {"max_tokens": 32},
        "optimizer": {"lr": 5e-4, "head_lr": 5e-3, "schedule": "constant", "weight_decay": 0.0},
    }
    made = make_job(
        folder,
        base,
        write_rows(folder / "train.jsonl", train),
        write_rows(folder / "valid.jsonl", [{**row, "id": "again"} if again else row for row in valid]),
        task=task,
        options={**OPTIONS, **named, **options},
        **{**sections, **config},
    )
    if retriever is not None:
        evidence = write_rows(folder / "passages.jsonl", passages())
        made.change({"retriever_dir": str(retriever), "passages_path": str(evidence), "passages_name": evidence.name})
    return made
