"""From the configuration file to the parts of a run; refuses what does not fit before any rank starts. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from trilithon_parallel.config import ModelConfig, ModelError, load_config
from trilithon_parallel.data.batches import Source, TrainingData
from trilithon_parallel.data.objectives import CausalLM, MaskedLM, Objective, SpanCorruption
from trilithon_parallel.data.ramp import BatchSchedule, LearningRate
from trilithon_parallel.fp8 import check_fp8
from trilithon_parallel.layout import Layout
from trilithon_parallel.presets import find_recipe
from trilithon_parallel.pretrain.config import DataSection, PretrainConfig, SourceSection
from trilithon_parallel.tokenizer import Tokenizer, load_tokenizer

_ARCHITECTURES = {"causal": "a decoder", "masked": "BertForMaskedLM", "spans": "T5ForConditionalGeneration"}


@dataclass(frozen=True)
class Setup:
    """What every rank of a run has in common."""

    config: ModelConfig
    layout: Layout
    objective: Objective
    batches: BatchSchedule
    learning_rate: LearningRate
    train_samples: int


def prepare(settings: PretrainConfig) -> Setup:
    """
    Work out model, layout and plan, and check that they fit each other.

    Raises:
        ModelError: `layout_invalid`, `model_...`, `config_invalid`.
        DataError: a ramp or a learning rate that is out of order, a batch that the layout does not divide.
    """
    tokenizer = load_tokenizer(settings.data.tokenizer)
    config = model_config(settings, tokenizer)
    sizes = settings.layout
    layout = Layout(
        tp=sizes.tp,
        pp=sizes.pp,
        dp=sizes.dp,
        virtual=sizes.virtual,
        micro_batch_size=sizes.micro_batch_size,
        schedule=sizes.schedule,
        sequence_parallel=sizes.sequence_parallel,
        distributed_optimizer=sizes.distributed_optimizer,
        layer_counts=None if sizes.layer_counts is None else tuple(sizes.layer_counts),
    )
    layout.check(config, tokens_per_micro_batch=settings.data.seq_len * sizes.micro_batch_size)
    if settings.data.seq_len > config.max_context and config.position == "learned":
        raise ModelError(
            f"data seq_len must be at most the model's {config.max_context} positions. Given: {settings.data.seq_len}.",
            code="config_invalid",
            hint="Shorten the sequences, or give the model more positions.",
        )
    training = settings.training
    if training.fp8 is not None:
        check_fp8(
            config, training.fp8, tp=layout.tp, sequence_parallel=layout.sequence_parallel,
            tokens_per_micro_batch=settings.data.seq_len * layout.micro_batch_size, dtype=training.dtype,
            recompute=sizes.recompute,
        )  # fmt: skip
    if config.is_seq2seq and (training.dropout or training.attention_dropout or sizes.recompute == "selective"):
        raise ModelError(
            f"{config.architecture} must be trained without dropout and without selective recomputation. Given: "
            f"dropout {training.dropout}, attention_dropout {training.attention_dropout}, recompute "
            f"{sizes.recompute}.",
            code="config_invalid",
            hint="Version 1.1 of T5 is pretrained without dropout too; recompute may be none or full.",
        )
    batches = _batches(settings)
    batches.check_layout(dp=layout.dp, micro_batch=layout.micro_batch_size)
    samples = _train_samples(settings)
    objective = _objective(settings.data, config, tokenizer)
    return Setup(config, layout, objective, batches, _rate(settings, samples), samples)


def model_config(settings: PretrainConfig, tokenizer: Tokenizer) -> ModelConfig:
    """
    The model: a recipe's with the data's vocabulary, that of a config.json, or that of a model directory.

    Raises:
        ModelError: the model has fewer tokens than the tokenizer.
    """
    section, ids = settings.model, _special_ids(tokenizer)
    if section.preset is not None:
        config = find_recipe(section.preset).config
        context = max(config.max_context, settings.data.seq_len)
        config = replace(config, vocab_size=tokenizer.vocab_size, max_context=context, **ids)
    elif section.config is not None:
        config = replace(load_config(section.config), **ids)
    else:
        assert section.weights is not None
        config = load_config(section.weights)
    if config.vocab_size < tokenizer.vocab_size:
        raise ModelError(
            f"model vocab_size must be at least the tokenizer's {tokenizer.vocab_size}. Given: {config.vocab_size}.",
            code="config_invalid",
            hint="Use the model's own tokenizer, or a larger vocabulary.",
        )
    return replace(config, dtype=settings.training.dtype)


def open_data(settings: PretrainConfig, setup: Setup) -> tuple[TrainingData, TrainingData | None]:
    """
    The stream of training samples, and that of held-out ones where there are any.

    Raises:
        DataError: a file is missing or broken, or holds too little.
    """
    data, seed = settings.data, settings.training.seed
    num_samples = setup.batches.whole_run(setup.train_samples)[1]
    cache = settings.run.directory / "data"

    def stream(sources: Sequence[SourceSection], part: str, num: int | None, split: Sequence[float]) -> TrainingData:
        return TrainingData(
            [Source(source.prefix, source.weight) for source in sources],
            objective=setup.objective,
            seq_len=data.seq_len,
            seed=seed,
            num_samples=num,
            vocab_size=setup.config.vocab_size,
            split=split,
            part=part,
            cache_dir=cache,
        )

    train = stream(data.train, "train", num_samples, data.split)
    if data.valid:
        return train, stream(data.valid, "train", None, (1, 0, 0))
    return train, stream(data.train, "valid", None, data.split) if data.split[1] > 0 else None


def digest(settings: PretrainConfig) -> str:
    """A hash of everything that the file says, to compare between ranks."""
    return hashlib.sha256(settings.model_dump_json().encode()).hexdigest()


def _objective(data: DataSection, config: ModelConfig, tokenizer: Tokenizer) -> Objective:
    kind = "causal" if config.is_causal else "masked"
    kind = "spans" if config.is_seq2seq else kind
    if data.objective is not None and data.objective != kind:
        raise ModelError(
            f"data objective must be {kind!r} for {config.architecture}. Given: {data.objective!r}.",
            code="config_invalid",
            hint=f"{data.objective!r} trains {_ARCHITECTURES[data.objective]}.",
        )
    if kind == "causal":
        return CausalLM(data.reset_positions, data.reset_attention, data.mask_document_ends)
    if kind == "masked":
        cls_id, sep_id, mask_id = (_id(tokenizer, piece) for piece in ("[CLS]", "[SEP]", "[MASK]"))
        return MaskedLM(tokenizer.vocab_size, cls_id, sep_id, mask_id, pairs=data.sentence_pairs)
    sentinels = [i for i in range(tokenizer.vocab_size) if tokenizer.id_to_piece(i).startswith("<extra_id_")]
    sentinels.sort(key=lambda i: int(tokenizer.id_to_piece(i)[len("<extra_id_") : -1]))
    pad_id = config.pad_id if config.pad_id is not None else 0
    return SpanCorruption(tuple(sentinels), tokenizer.eos_ids[0], pad_id)


def _id(tokenizer: Tokenizer, piece: str) -> int:
    for token in sorted(tokenizer.special_ids):
        if tokenizer.id_to_piece(token) == piece:
            return token
    raise ModelError(
        f"tokenizer has no special token {piece}, which masked tokens need.",
        code="config_invalid",
        hint="Use a BERT vocabulary.",
    )


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    return {"bos_id": tokenizer.bos_id, "eos_ids": tokenizer.eos_ids}


def _batches(settings: PretrainConfig) -> BatchSchedule:
    training, ramp = settings.training, settings.training.batch_ramp
    if ramp is None:
        return BatchSchedule.constant(training.global_batch_size)
    return BatchSchedule.ramp(
        start=ramp.start, increment=ramp.increment, samples=ramp.samples, batch_size=training.global_batch_size
    )


def _train_samples(settings: PretrainConfig) -> int:
    training = settings.training
    if training.samples is not None:
        return training.samples
    if training.steps is not None:
        return training.steps * training.global_batch_size
    assert training.tokens is not None
    return -(-training.tokens // settings.data.seq_len)


def _rate(settings: PretrainConfig, samples: int) -> LearningRate:
    rate = settings.training.learning_rate
    return LearningRate(
        peak=rate.peak,
        floor=rate.peak / 10 if rate.floor is None else rate.floor,
        warmup_samples=round(rate.warmup * samples),
        decay_samples=samples,
        kind=rate.kind,
        cooldown_samples=round(rate.cooldown * samples) if rate.kind == "wsd" else 0,
    )
