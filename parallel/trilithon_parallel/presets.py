"""
Model recipes as data: the GPTs of the papers, GPT-3 175B, MT-NLG 530B, and small ones for a laptop. No torch.

Sources: PTD-P (arXiv 2104.04473, Table 1, with micro-batches and chunks of its published scripts), GPT-3 (arXiv
2005.14165), MT-NLG (arXiv 2201.11990). `model_of_size` makes a GPT of any size in their proportions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from trilithon_parallel.config import ModelConfig, ModelError
from trilithon_parallel.costs import PlannedLayout, formula_parameters
from trilithon_parallel.data.ramp import BatchSchedule, LearningRate
from trilithon_parallel.memory import PAPER_NUMERICS, Numerics

# GPT-2's 50,257 tokens, padded for tp = 8.
GPT_VOCAB, GPT_SEQ_LEN = 51200, 2048


@dataclass(frozen=True)
class Optimization:
    """How a recipe trains: AdamW, a ramp of batches and a schedule of rates, both by consumed samples."""

    batches: BatchSchedule
    learning_rate: LearningRate
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip: float
    init_std: float


@dataclass(frozen=True)
class Recipe:
    """
    A model and how it was, or could be, trained. `gpus` and `layout` are the source's, None where it names none.

    `tokens`: of the whole run. `numerics`: what the source computed with.
    """

    name: str
    config: ModelConfig
    seq_len: int
    global_batch: int
    tokens: float
    source: str
    numerics: Numerics = PAPER_NUMERICS
    gpus: int | None = None
    layout: PlannedLayout | None = None
    optimization: Optimization | None = None


@dataclass(frozen=True)
class BlendPart:
    """One data set of a blend: its size in tokens and its share of what is trained on, in percent."""

    name: str
    tokens: float
    weight_percent: float

    def epochs(self, total_tokens: float) -> float:
        """How often a run of so many tokens sees this part."""
        return self.weight_percent / 100 * total_tokens / self.tokens


def gpt(*, layers: int, hidden: int, heads: int, vocab: int = GPT_VOCAB, seq_len: int = GPT_SEQ_LEN) -> ModelConfig:
    """The papers' GPT: learned positions, tied head, biases, LayerNorm before each part, 4h wide MLPs."""
    return ModelConfig(
        family="gpt2",
        architecture="GPT2LMHeadModel",
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        ffn_size=4 * hidden,
        max_context=seq_len,
        norm="layer",
        norm_eps=1e-5,
        norm_order="pre",
        activation="gelu_tanh",
        gated_mlp=False,
        position="learned",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied_embeddings=True,
    )


def llama(
    *,
    layers: int,
    hidden: int,
    heads: int,
    groups: int,
    ffn: int,
    vocab: int,
    context: int,
    rope_theta: float = 10000.0,
    tied: bool = False,
) -> ModelConfig:
    """A Llama: rotary positions, grouped heads, gated MLPs, RMSNorm, no biases."""
    return ModelConfig(
        family="llama",
        architecture="LlamaForCausalLM",
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=hidden // heads,
        ffn_size=ffn,
        max_context=context,
        norm="rms",
        norm_eps=1e-5,
        norm_order="pre",
        activation="silu",
        gated_mlp=True,
        position="rope",
        rope_theta=rope_theta,
        tied_embeddings=tied,
    )


def _table_1(
    name: str,
    *,
    heads: int,
    hidden: int,
    layers: int,
    tp: int,
    pp: int,
    gpus: int,
    batch: int,
    micro: int,
    virtual: int,
) -> Recipe:
    layout = PlannedLayout(
        tp=tp,
        pp=pp,
        dp=gpus // (tp * pp),
        micro_batch=micro,
        virtual=virtual,
        recompute="full",
        schedule="interleaved" if virtual > 1 else "1f1b",
    )
    config = gpt(layers=layers, hidden=hidden, heads=heads)
    return Recipe(name, config, GPT_SEQ_LEN, batch, 300e9, "arXiv 2104.04473, Table 1", gpus=gpus, layout=layout)


# fmt: off
TABLE_1: tuple[Recipe, ...] = (
    _table_1("gpt_1.7b", heads=24, hidden=2304, layers=24, tp=1, pp=1, gpus=32, batch=512, micro=16, virtual=1),
    _table_1("gpt_3.6b", heads=32, hidden=3072, layers=30, tp=2, pp=1, gpus=64, batch=512, micro=16, virtual=1),
    _table_1("gpt_7.5b", heads=32, hidden=4096, layers=36, tp=4, pp=1, gpus=128, batch=512, micro=16, virtual=1),
    _table_1("gpt_18.4b", heads=48, hidden=6144, layers=40, tp=8, pp=1, gpus=256, batch=1024, micro=8, virtual=1),
    _table_1("gpt_39.1b", heads=64, hidden=8192, layers=48, tp=8, pp=2, gpus=512, batch=1536, micro=4, virtual=1),
    _table_1("gpt_76.1b", heads=80, hidden=10240, layers=60, tp=8, pp=4, gpus=1024, batch=1792, micro=2, virtual=3),
    _table_1("gpt_145.6b", heads=96, hidden=12288, layers=80, tp=8, pp=8, gpus=1536, batch=2304, micro=2, virtual=2),
    _table_1("gpt_310.1b", heads=128, hidden=16384, layers=96, tp=8, pp=16, gpus=1920, batch=2160, micro=1, virtual=2),
    _table_1("gpt_529.6b", heads=128, hidden=20480, layers=105, tp=8, pp=35, gpus=2520, batch=2520, micro=1, virtual=3),
    _table_1("gpt_1008b", heads=160, hidden=25600, layers=128, tp=8, pp=64, gpus=3072, batch=3072, micro=1, virtual=1),
)
# fmt: on

GPT3_175B = Recipe(
    name="gpt3_175b",
    config=gpt(layers=96, hidden=12288, heads=96),
    seq_len=GPT_SEQ_LEN,
    global_batch=1536,
    tokens=300e9,
    source="arXiv 2005.14165; layout and rates of Megatron-LM's published script",
    gpus=1024,
    layout=PlannedLayout(tp=8, pp=16, dp=8, micro_batch=1, recompute="full"),
    optimization=Optimization(
        batches=BatchSchedule.ramp(start=16, increment=16, samples=5_859_375, batch_size=1536),
        learning_rate=LearningRate(peak=6e-5, floor=6e-6, warmup_samples=183_105, decay_samples=126_953_125),
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        clip=1.0,
        init_std=0.006,
    ),
)

# Rates in samples of 2048 tokens: warm-up 1B tokens, cosine to a tenth over 340B tokens, ramp over 12B.
MT_NLG_530B = Recipe(
    name="mt_nlg_530b",
    config=gpt(layers=105, hidden=20480, heads=128),
    seq_len=GPT_SEQ_LEN,
    global_batch=1920,
    tokens=270e9,
    source="arXiv 2201.11990",
    gpus=2240,
    layout=PlannedLayout(tp=8, pp=35, dp=8, micro_batch=1, recompute="full"),
    optimization=Optimization(
        batches=BatchSchedule.ramp(start=32, increment=32, samples=5_859_375, batch_size=1920),
        learning_rate=LearningRate(peak=5e-5, floor=5e-6, warmup_samples=488_281, decay_samples=166_015_625),
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        clip=1.0,
        init_std=4e-3,
    ),
)

# What MT-NLG was trained on (arXiv 2201.11990, Table 2).
MT_NLG_BLEND: tuple[BlendPart, ...] = (
    BlendPart("Books3", 25.7e9, 14.336),
    BlendPart("OpenWebText2", 14.8e9, 19.336),
    BlendPart("Stack Exchange", 11.6e9, 5.689),
    BlendPart("PubMed Abstracts", 4.4e9, 2.897),
    BlendPart("Wikipedia", 4.2e9, 4.771),
    BlendPart("Gutenberg (PG-19)", 2.7e9, 0.873),
    BlendPart("BookCorpus2", 1.5e9, 1.007),
    BlendPart("NIH ExPorter", 0.3e9, 0.208),
    BlendPart("ArXiv", 20.8e9, 1.359),
    BlendPart("GitHub", 24.3e9, 1.588),
    BlendPart("Pile-CC", 49.8e9, 9.446),
    BlendPart("CC-2020-50", 68.7e9, 13.017),
    BlendPart("CC-2021-04", 82.6e9, 15.652),
    BlendPart("RealNews", 21.9e9, 8.962),
    BlendPart("CC-Stories", 5.3e9, 0.859),
)

_MODERN = Numerics()
_LAPTOP = Numerics(dtype="float32")
OTHERS: tuple[Recipe, ...] = (
    GPT3_175B,
    MT_NLG_530B,
    Recipe(
        "llama3_8b",
        llama(layers=32, hidden=4096, heads=32, groups=8, ffn=14336, vocab=128256, context=8192, rope_theta=500000.0),
        8192,
        1024,
        15e12,
        "arXiv 2407.21783",
        numerics=_MODERN,
    ),
    Recipe(
        "llama3_70b",
        llama(layers=80, hidden=8192, heads=64, groups=8, ffn=28672, vocab=128256, context=8192, rope_theta=500000.0),
        8192,
        1024,
        15e12,
        "arXiv 2407.21783",
        numerics=_MODERN,
    ),
    Recipe(
        "gpt2_small",
        gpt(layers=12, hidden=768, heads=12, vocab=50257, seq_len=1024),
        1024,
        512,
        10e9,
        "GPT-2 (Radford et al. 2019)",
        numerics=_MODERN,
    ),
    Recipe(
        "llama_10m",
        llama(layers=8, hidden=256, heads=8, groups=4, ffn=768, vocab=16384, context=512, tied=True),
        256,
        16,
        200e6,
        "for one CPU",
        numerics=_LAPTOP,
    ),
    Recipe(
        "llama_30m",
        llama(layers=8, hidden=448, heads=8, groups=4, ffn=1664, vocab=16384, context=1024, tied=True),
        512,
        32,
        600e6,
        "for one CPU",
        numerics=_LAPTOP,
    ),
)

RECIPES: Mapping[str, Recipe] = {recipe.name: recipe for recipe in (*TABLE_1, *OTHERS)}


def find_recipe(name: str) -> Recipe:
    """A recipe by name. Raises ModelError `model_not_found` with the known names."""
    if name not in RECIPES:
        raise ModelError(
            f"model recipe is not known. Given: {name!r}.",
            code="model_not_found",
            hint=f"Allowed: {', '.join(RECIPES)}.",
        )
    return RECIPES[name]


def parse_count(text: str) -> float:
    """
    A number of parameters or tokens, with K, M, B or T for powers of a thousand.

    >>> parse_count("1.5B")
    1500000000.0

    Raises:
        ModelError: `model_invalid`.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([KMBT]?)", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ModelError(f"a count must be a positive number with K, M, B or T. Given: {text!r}.", hint="Say 175B.")
    return float(match[1]) * 1000.0 ** " KMBT".index(match[2].upper() or " ")


def recipe_of_size(parameters: float) -> Recipe:
    """
    The recipe whose exact size is nearest, where one is within 1 %; else a GPT of that size in Table 1's proportions.

    Hidden sizes are multiples of 128 with heads of 128 channels; the global batch is that of the next larger row.

    Raises:
        ModelError: `model_invalid`, below a million parameters.
    """
    if parameters < 1e6:
        raise ModelError(f"parameters must be at least 1M. Given: {parameters:g}.")
    papers = (*TABLE_1, GPT3_175B)
    nearest = min(papers, key=lambda recipe: abs(math.log(formula_parameters(recipe.config) / parameters)))
    if abs(formula_parameters(nearest.config) / parameters - 1) <= 0.01:
        return nearest
    hidden, layers = _proportions(parameters)
    batch = next((row.global_batch for row in TABLE_1 if formula_parameters(row.config) >= parameters), 3072)
    return Recipe(
        name=f"gpt_{_short(parameters)}",
        config=gpt(layers=layers, hidden=hidden, heads=hidden // 128),
        seq_len=GPT_SEQ_LEN,
        global_batch=batch,
        tokens=300e9,
        source="the proportions of arXiv 2104.04473, Table 1",
    )


def _proportions(parameters: float) -> tuple[int, int]:
    """(hidden size, layers): of all that come within a twentieth of the nearest count, the most like Table 1's."""
    options = []
    for hidden in range(128, 128 * 401, 128):
        shape = gpt(layers=1, hidden=hidden, heads=hidden // 128)
        per_layer = formula_parameters(replace(shape, num_layers=2)) - formula_parameters(shape)
        layers = max(1, round((parameters - formula_parameters(shape)) / per_layer) + 1)
        error = abs(math.log(formula_parameters(replace(shape, num_layers=layers)) / parameters))
        options.append((error, abs(math.log(layers / _usual_layers(hidden))), hidden, layers))
    good = [option for option in options if option[0] <= 0.01] or [min(options)]
    _, _, hidden, layers = min(good, key=lambda option: option[1])
    return hidden, layers


def _usual_layers(hidden: int) -> float:
    """Layers at a hidden size, on straight lines between the rows of Table 1 (logarithmic)."""
    points = [(math.log(row.config.hidden_size), math.log(row.config.num_layers)) for row in TABLE_1]
    x = math.log(hidden)
    (x0, y0), (x1, y1) = next((pair for pair in pairwise(points) if x <= pair[1][0]), (points[-2], points[-1]))
    return math.exp(y0 + (y1 - y0) * (x - x0) / (x1 - x0))


def _short(count: float) -> str:
    power = min(4, int(math.log(count, 1000)))
    return f"{count / 1000**power:.4g}{['', 'k', 'm', 'b', 't'][power]}"
