"""The concept graph: files, sentences of facts, what a keyword finds, and how fast."""

from __future__ import annotations

import json
import re
import statistics
import string
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilithon.errors import InvalidArgument
from trilithon_server.knowledge.graph import MOST, PER_KEYWORD, ConceptGraph
from trilithon_server.knowledge.lemmas import base_forms, is_plural, known_forms, normalised
from trilithon_server.knowledge.templates import templates
from trilithon_server.knowledge.triples import read_triples
from trilithon_server.knowledge.word_lists import lines_of, stop_words

SharedData = Callable[[str], Path]

NEGATIVE = ("NotDesires", "NotCapableOf", "NotHasProperty", "NotIsA", "NotHasA", "NotMadeOf")

BUILT_WITHIN_S = 10.0
LOOKED_UP_WITHIN_S = 0.005

FUNCTION_WORDS = frozenset(
    """
    i me my mine we us our ours you your yours he him his she her hers it its they them their theirs myself yourself
    himself herself itself ourselves themselves this that these those who whom what which where when why how
    a an the and or but if because as than so nor not no am is are was were be been being do does did doing have has had
    having can will should of at by for with about against between into through during before after above below to
    from up down in out on off over under again further then once here there all any both each few more most other some
    such only own same too very just now while until s t
    """.split()
)
"""A short list of words that carry no meaning of their own."""


@pytest.fixture(scope="module")
def triples_path() -> Path:
    """A path that the tests of real data read; found by the fixture of the session."""
    raise NotImplementedError
