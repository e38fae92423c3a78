"""
Questions and passages as an encoder of vectors reads them. No torch.

    format = RetrievalFormat()
    format.query("Who built it?", tokenizer), format.passage("Stonehenge", "It was built in stages.", tokenizer)

A vector stands for a text; a passage answers a question where the inner product of theirs is high. The title is part of
a passage: before a separator, as encoders from BERT learn it (Karpukhin et al. 2020), or as a sentence of its own for
encoders of sentences, which have seen no separator inside of a text.

One encoder reads both, or each has its own (arXiv 2101.00408, section 2.1): then either is a model by itself, and that
of questions says whose passages it asks for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from trilithon_parallel.tokenizer import Tokenizer
from trilithon_server.tasks.pieces import Encoded
from trilithon_server.tasks.task_file import Size, TaskFile
from trilithon_server.tasks.writing import literal

Reads = Literal["both", "questions", "passages"]
"""What an encoder reads: both, or one of the two, where it is one of two."""


@dataclass(frozen=True)
class RetrievalFormat(TaskFile):
    """
    How both are written, and what their inner product means.

    Attributes:
        max_query_tokens, max_passage_tokens: of a sequence, special tokens included; what is longer is cut at its end.
        title: `separator`: [CLS] title [SEP] text [SEP]; `sentence`: [CLS] title. text [SEP].
        score_scale: what an inner product is multiplied by before a softmax over passages: 1 / sqrt(H) for vectors of
            any length (arXiv 2101.00408), 20 for those of length 1, whose products are cosines.
        reads: what this encoder reads.
        passages_by: `model_digest` of the encoder of the passages that it asks for, where it reads `questions`; else
            empty.
    """

    task: ClassVar[str] = "retrieval"
    added: ClassVar[tuple[str, ...]] = ("reads", "passages_by")

    max_query_tokens: Size = 64
    max_passage_tokens: Size = 256
    title: Literal["separator", "sentence"] = "sentence"
    score_scale: float = 20.0
    reads: Reads = "both"
    passages_by: str = ""

    @classmethod
    def for_encoder(cls, *, normalize: bool, hidden_size: int, max_context: int) -> Self:
        """What suits an encoder, by whether its vectors have length 1."""
        return cls(
            max_query_tokens=min(64, max_context),
            max_passage_tokens=min(256, max_context),
            title="sentence" if normalize else "separator",
            score_scale=20.0 if normalize else hidden_size**-0.5,
        )

    @property
    def passage_format(self) -> str:
        """How a passage is written, with `{title}` and `{text}`, as an index tells it of its encoder."""
        return "{title}. {text}" if self.title == "sentence" else "{title} [SEP] {text}"

    def query(self, text: str, tokenizer: Tokenizer) -> Encoded:
        """A question."""
        return self.framed(literal(text, tokenizer), tokenizer)

    def framed(self, tokens: list[int], tokenizer: Tokenizer) -> Encoded:
        """The tokens of a question, with what stands around them."""
        return _framed([tokens], tokenizer, self.max_query_tokens)

    def passage(self, title: str, text: str, tokenizer: Tokenizer) -> Encoded:
        """A passage; without a title it is the text alone."""
        title, text = title.strip(), text.strip()
        if not title:
            parts = [text]
        elif self.title == "separator":
            parts = [title, text]
        else:
            parts = [f"{title}{'' if title[-1] in '.!?' else '.'} {text}"]
        return _framed([literal(part, tokenizer) for part in parts], tokenizer, self.max_passage_tokens)


def _framed(parts: list[list[int]], tokenizer: Tokenizer, most: int) -> Encoded:
    first, last = tokenizer.encode("", add_special_tokens=True)
    tokens = [first]
    for part in parts:
        tokens += [*part, last]
    return Encoded((*tokens[: most - 1], last) if len(tokens) > most else tuple(tokens))
