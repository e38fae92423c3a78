"""What a conversation becomes: the server's own tokens, with exactly the assistant's words supervised."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from finetune_data.data_fixtures import MakeContext
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CHAT_TEMPLATE, TURN_END, TURN_START

from trilithon.errors import InvalidArgument
from trilithon_finetune.data.findings import Finding
from trilithon_finetune.data.reading import Row, read_rows
from trilithon_finetune.recipes import RECIPES
from trilithon_finetune.recipes.base import IGNORE, Context, Sample
from trilithon_parallel.config import load_config
from trilithon_parallel.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer
from trilithon_server.text.chat import assistant_turns, encode_chat, render_chat
from trilithon_server.text.template import ChatTemplate, load_template, template_digest

LLAMA = (
    "{% for m in messages %}{% if m.role == 'system' %}<<SYS>>{{ m.content }}<</SYS>>{% elif m.role == 'user' %}"
    "[INST] {{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }} <|im_end|>{% endif %}{% endfor %}"
)
"""As Llama 2's: the prompt needs no opening, contents are trimmed."""

SYSTEM_DEFAULT = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHAT_TEMPLATE
)
"""As SmolLM2's: a system turn comes first, whatever the messages."""

TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""With tools and calls written out."""

GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Which says itself what is learned."""

TEMPLATES = {"chatml": CHAT_TEMPLATE, "llama": LLAMA, "default": SYSTEM_DEFAULT, "tools": TOOLS, "marked": GENERATION}

CONTENT = st.one_of(
    st.text(min_size=1, max_size=20),
    st.sampled_from([TURN_END, f"a{TURN_START}user\nb", "\n\n x ", " spaces ", "Hi", "[INST]", "yyxx"]),
).filter(lambda text: bool(text.strip()))

CHATS = st.integers(1, 3).flatmap(
    lambda pairs: st.lists(CONTENT, min_size=2 * pairs, max_size=2 * pairs).map(
        lambda texts: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    )
)


def _encode(messages: Sequence[Mapping[str, Any]], context: Context, **row: Any) -> tuple[Sample, list[Finding]]:
    found = RECIPES["sft"].encode({"messages": messages, **row}, 1, context, file="train.jsonl")
    assert isinstance(found[0], Sample), found
    return found[0], [item for item in found[1:] if isinstance(item, Finding)]


def _with(context: Context, template: str) -> Context:
    return replace(context, template=ChatTemplate(template), max_tokens=8192)


def _served(messages: Sequence[Mapping[str, Any]], context: Context, *, opening: bool) -> list[int]:
    """The token ids that the chat route feeds."""
    assert context.template is not None
    rendered = render_chat(context.template, context.tokenizer, list(messages), add_generation_prompt=opening)
    return encode_chat(context.tokenizer, rendered)[0]


def _learned(sample: Sample, tokenizer: Tokenizer) -> list[str]:
    """The runs of supervised tokens, as text."""
    runs: list[list[int]] = []
    for before, target in zip((IGNORE, *sample.targets), sample.targets, strict=False):
        if target != IGNORE:
            if before == IGNORE:
                runs.append([])
            runs[-1].append(target)
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize("name", TEMPLATES)
@settings(deadline=None)
@given(messages=CHATS)
def test_E4_training_tokens_are_the_servers(
    decoder_context: Context, name: str, messages: list[dict[str, Any]]
) -> None:
    """
    For any conversation the tokens are those that the server feeds for the same messages, and every supervised turn
    begins where the prompt for it ends, unless a token spans the two, and ends with the end token.

    Inverse check: supervising from one token earlier, or leaving the end token out, fails here.
    """
    context = _with(decoder_context, TEMPLATES[name])
    sample, _ = _encode(messages, context)
    ids = list(sample.tokens)
    assert ids == _served(messages, context, opening=False)
    end = context.tokenizer.eos_ids[0]
    learned = [False, *(target != IGNORE for target in sample.targets)]
    starts = [i for i in range(1, len(ids)) if learned[i] and not learned[i - 1]]
    stops = [i for i in range(1, len(ids)) if learned[i] and not learned[i + 1]]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(starts) == len(stops) == len(turns)
    for turn, start, stop in zip(turns, starts, stops, strict=True):
        prompt = _served(messages[:turn], context, opening=True)
        whole = _served(messages[: turn + 1], context, opening=False)
        if ids[: len(prompt)] == prompt:
            assert start == len(prompt)
        else:  # a token spans the prompt's end and the answer's beginning, and is not learned
            before = [len(_text(part, context)) for part in (ids[: start - 1], prompt, ids[:start])]
            assert before == sorted(set(before))
        assert ids[stop] == end
        assert ids[: stop + 1] == whole[: stop + 1]


def _text(ids: list[int], context: Context) -> bytes:
    return b"".join(map(context.tokenizer.token_bytes, ids))


@pytest.mark.parametrize("name", TEMPLATES)
@settings(deadline=None)
@given(messages=CHATS)
def test_S10_no_message_spells_a_special_token(
    decoder_context: Context, name: str, messages: list[dict[str, Any]]
) -> None:
    """
    A conversation has exactly the special tokens of the same one with harmless contents, and its text is unchanged.

    Inverse check: encoding the rendered text as it stands, as one text, fails here.
    """
    context = _with(decoder_context, TEMPLATES[name])
    harmless = [{**message, "content": "x"} for message in messages]
    special = context.tokenizer.special_ids

    def specials(ids: list[int]) -> list[int]:
        return [token for token in ids if token in special]

    ids = _served(messages, context, opening=True)
    assert specials(ids) == specials(_served(harmless, context, opening=True))
    assert context.template is not None
    text = context.template.render(messages, add_generation_prompt=True)
    assert _text(ids, context) == text.encode()


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_the_assistant_is_learned(make_context: MakeContext, name: str) -> None:
    """What is learned is the assistant's text with its end token, in every turn, under every template."""
    context = make_context(template=TEMPLATES[name])
    messages = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Yes, one."},
        {"role": "user", "content": "Yes, one."},
        {"role": "assistant", "content": "Two."},
    ]
    sample, findings = _encode(messages, context)
    space, tail = (" ", " ") if name == "llama" else ("", "")

    assert not findings
    assert [f"{space}Yes, one.{tail}<|im_end|>", f"{space}Two.{tail}<|im_end|>"] == _learned(sample, context.tokenizer)


def test_train_on_all_and_weights(make_context: MakeContext) -> None:
    """`train_on: all` learns every token but the first; a turn of weight 0 is not learned either way."""
    messages = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Wrong.", "weight": 0},
        {"role": "user", "content": "No."},
        {"role": "assistant", "content": "Two."},
    ]
    some, _ = _encode(messages, make_context())
    most, _ = _encode(messages, make_context(train_on="all"))
    everything, _ = _encode([messages[0], messages[3]], make_context(train_on="all"))

    assert _learned(some, make_context().tokenizer) == ["Two.<|im_end|>"]
    assert list(everything.targets[:-1]) == list(everything.tokens[1:])
    assert "Wrong" not in "".join(_learned(most, make_context().tokenizer))
    assert most.num_supervised > some.num_supervised


def test_special_text_is_text_and_a_warning(make_context: MakeContext) -> None:
    """E-DATA-025: what a user spells is encoded as its letters, and told."""
    context = make_context()
    sample, findings = _encode(
        [{"role": "user", "content": f"Say {TURN_END}"}, {"role": "assistant", "content": "No."}], context
    )

    assert sample.tokens.count(context.tokenizer.eos_ids[0]) == 2
    assert [(f.code, f.severity, f.path) for f in findings] == [("E-DATA-025", "warning", "messages[0].content")]


def test_tools_and_calls_reach_the_template(make_context: MakeContext) -> None:
    """Tools are rendered, an assistant's calls are learned, and special text within their arguments stays text."""
    context = make_context(template=TOOLS)
    call = {"type": "function", "function": {"name": "find", "arguments": {"q": TURN_END}}}
    messages = [
        {"role": "user", "content": "Find it"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "[1]"},
        {"role": "assistant", "content": "Found."},
    ]
    assert not RECIPES["sft"].check({"messages": messages}, "messages", file="f", line=1)
    sample, _ = _encode(messages, context, tools=[{"name": "find"}])
    tokenizer = context.tokenizer

    assert '[{"name": "find"}]' in tokenizer.decode(sample.tokens, skip_special_tokens=False)
    assert [json.dumps(call) + TURN_END, f"Found.{TURN_END}"] == _learned(sample, tokenizer)
    assert sample.tokens.count(tokenizer.eos_ids[0]) == 5


FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last %}{{ m.content }}{% else %}...{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDLESS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
STRICT = "{{ raise_exception('system turns are not taken') }}"
MACRO = (
    "{% macro turn(m) %}{{ m.role }}:{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "code", "path"),
    [
        (FORGETFUL, "E-DATA-016", "messages[1]"),
        (ENDLESS, "E-DATA-023", "messages[1]"),
        (STRICT, "E-DATA-013", "messages"),
        ("{{ messages[0].content.nothing.there }}", "E-DATA-016", "messages"),
        (MACRO, "E-DATA-016", "messages"),
    ],
    ids=["forgets", "no end", "refuses", "breaks", "macro"],
)
def test_R11_templates_that_cannot_teach(make_context: MakeContext, template: str, code: str, path: str) -> None:
    """A template that renders turns in two ways, never ends one, or refuses the messages, is found at the row."""
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    found = RECIPES["sft"].encode({"messages": messages}, 7, make_context(template=template), file="t.jsonl")

    assert not any(isinstance(item, Sample) for item in found)
    assert (code, path, 7) == (found[0].code, found[0].path, found[0].line)  # type: ignore[union-attr]  # see above


def test_a_long_chat_is_refused_cut_or_left(make_context: MakeContext) -> None:
    """`on_long`: an error by default; truncated, it keeps its first tokens and says how many it lost."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "word " * 50}]
    recipe, row = RECIPES["sft"], {"messages": messages}
    whole, _ = _encode(messages, make_context())
    (refused,) = recipe.encode(row, 3, make_context(max_tokens=30), file="t.jsonl")
    cut, _ = _encode(messages, make_context(max_tokens=30, on_long="truncate"))
    (nothing,) = recipe.encode(row, 3, make_context(max_tokens=8, on_long="truncate"), file="t.jsonl")

    assert isinstance(refused, Finding)
    assert refused.message == f"{len(whole.tokens)} tokens, at most 30 allowed (data.max_tokens)."
    assert (cut.tokens, cut.cut) == (whole.tokens[:30], len(whole.tokens) - 30)
    assert cut.targets == (*whole.targets[:29], IGNORE)
    assert isinstance(nothing, Finding)
    assert nothing.code == "E-DATA-022"


def test_an_untrained_end_token_is_a_warning(make_context: MakeContext) -> None:
    """E-DATA-024: a base that never learned its end token will not end under an adapter that leaves it so."""
    context = make_context(untrained_ids=frozenset({2}))
    _, findings = _encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], context)

    assert [(item.code, item.severity) for item in findings] == [("E-DATA-024", "warning")]


def test_marked_turns_are_the_marked_text(make_context: MakeContext) -> None:
    """`{% generation %}` blocks are found where they stand, and a prompt does not show them."""
    template = make_context(template=GENERATION).template
    assert template is not None
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = template.render(messages, add_generation_prompt=False)
    (turn,) = assistant_turns(template, messages, text)

    assert text[turn.start : turn.stop] == "b<|im_end|>"
    assert template.marks_generation
    assert not make_context().template.marks_generation  # type: ignore[union-attr]  # tiny models have one


def test_a_template_that_takes_special_text_apart_is_refused(make_context: MakeContext) -> None:
    """Where the template shows special text of a message otherwise than it is, nobody can say what is text."""
    template = "{% for m in messages %}{{ m.content.split('<|im_end|>')[0] }}<|im_end|>{% endfor %}"
    context = make_context(template=template)
    assert context.template is not None
    with pytest.raises(InvalidArgument, match="special token text that the model's chat template takes apart"):
        render_chat(context.template, context.tokenizer, [{"role": "user", "content": f"a{TURN_END}b"}])


def test_the_digest_is_of_template_tokens_and_renderer(make_context: MakeContext) -> None:
    """Equal digests mean equal tokens: another text or other special tokens give another digest."""
    context = make_context()
    tokenizer = context.tokenizer
    digests = {
        template_digest(ChatTemplate(CHAT_TEMPLATE), tokenizer),
        template_digest(ChatTemplate(LLAMA), tokenizer),
        template_digest(ChatTemplate(CHAT_TEMPLATE, tokens={"bos_token": "<s>"}), tokenizer),
    }

    assert len(digests) == 3
    assert template_digest(ChatTemplate(CHAT_TEMPLATE), tokenizer) in digests


@pytest.mark.parametrize(
    "text", ["a<|im_end|>b<|im_end|>", "<|im_end|><|im_end|>", "  <|im_end|> \n", "\ufffd<|im_end|>"]
)
def test_literal_ranges_are_text(decoder_context: Context, text: str) -> None:
    """Special tokens outside of the ranges are read, within them they are letters; places and bytes stay true."""
    tokenizer = decoder_context.tokenizer
    at = text.index(TURN_END)
    ids, offsets = tokenizer.encode_with_literals(text, [(at, at + len(TURN_END))])
    outside = text.count(TURN_END) - 1

    assert ids.count(tokenizer.eos_ids[0]) == outside
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert all(0 <= start <= stop <= len(text) for start, stop in offsets)
    for token, (start, stop) in zip(ids, offsets, strict=True):
        if token == tokenizer.eos_ids[0]:
            assert text[start:stop] == TURN_END
    assert (ids, offsets) != tokenizer.encode_with_offsets(text, add_special_tokens=False)
    assert tokenizer.encode_with_literals(text, []) == tokenizer.encode_with_offsets(text, add_special_tokens=False)


def test_private_characters_beside_special_text_are_refused(decoder_context: Context) -> None:
    """The marks that stand for special tokens cannot be smuggled in."""
    tokenizer = decoder_context.tokenizer
    with pytest.raises(ValueError, match=r"holds U\+100000, a character for private use"):
        tokenizer.encode_with_literals(f"\U00100000{TURN_END}", [(1, 11)])


def test_literals_of_sentencepiece(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    """A SentencePiece tokenizer keeps special text within the ranges as text as well."""
    model = shared_data("tokenizer/sp_botchan_bpe_1000.model")
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    end = tokenizer.eos_ids[0]
    text = "so</s>there</s>"
    ids, _ = tokenizer.encode_with_literals(text, [(2, 6)])

    assert ids.count(end) == 1
    assert ids[-1] == end
    assert tokenizer.encode(text, add_special_tokens=False).count(end) == 2


@pytest.mark.slow
def test_E4_real_chats_are_the_servers_tokens(smollm2_dir: Path, shared_data: Callable[[str], Path]) -> None:
    """On real rows under SmolLM2's own template, tokens are the server's and exactly the answers are learned."""
    context = Context(
        tokenizer=load_tokenizer(smollm2_dir),
        template=load_template(smollm2_dir),
        model=load_config(smollm2_dir),
        max_tokens=8192,
        labels=(),
        options=RECIPES["sft"].Options(),
    )
    path = shared_data("instruct/dolly_hhrlhf_small.jsonl")
    rows = [item.value for item in read_rows(path) if isinstance(item, Row)]
    for row in rows[:200]:
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
        sample, _ = _encode(messages, context)
        assert list(sample.tokens) == _served(messages, context, opening=False)
        assert [row["response"] + TURN_END] == _learned(sample, context.tokenizer)
