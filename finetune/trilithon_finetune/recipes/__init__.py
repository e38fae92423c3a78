"""The tasks that a job can have: one module each, and the table of them."""

from __future__ import annotations

from trilithon_finetune.recipes.answer_gen import AnswerGen
from trilithon_finetune.recipes.answer_qa import AnswerQa
from trilithon_finetune.recipes.base import Recipe
from trilithon_finetune.recipes.causal_lm import CausalLm
from trilithon_finetune.recipes.chat import Chat
from trilithon_finetune.recipes.classify import Classify
from trilithon_finetune.recipes.dialogue import Dialogue, GroundedDialogue
from trilithon_finetune.recipes.mlm import MaskedTokens
from trilithon_finetune.recipes.mss import MaskedSpans
from trilithon_finetune.recipes.openqa import IndividualReader, JointReader
from trilithon_finetune.recipes.preference import Preference
from trilithon_finetune.recipes.question_gen import QuestionGen
from trilithon_finetune.recipes.relation import Relation
from trilithon_finetune.recipes.retriever import DensePassages, InverseCloze
from trilithon_finetune.recipes.span_qa import SpanQa
from trilithon_finetune.recipes.story import StoryGenerator, StoryKeywords
from trilithon_finetune.recipes.story_ranker import StoryRanker
from trilithon_finetune.recipes.token_tagging import TokenTagging
from trilithon_finetune.recipes.yes_no_maybe import YesNoMaybe

RECIPES: dict[str, Recipe] = {
    "lm": CausalLm(),
    "sft": Chat(),
    "dpo": Preference(),
    "mlm": MaskedTokens(),
    "answer_qa": AnswerQa(),
    "yes_no_maybe": YesNoMaybe(),
    "ner": TokenTagging(),
    "relation": Relation(),
    "classify": Classify(),
    "span_qa": SpanQa(),
    "dpr": DensePassages(),
    "ict": InverseCloze(),
    "mss": MaskedSpans(),
    "reader_individual": IndividualReader(),
    "reader_joint": JointReader(),
    "dialogue": Dialogue(),
    "grounded_dialogue": GroundedDialogue(),
    "answer_gen": AnswerGen(),
    "question_gen": QuestionGen(),
    "story_keywords": StoryKeywords(),
    "story_generator": StoryGenerator(),
    "story_ranker": StoryRanker(),
}
"""Recipe by task name."""
