"""Text in and out of tokens: incremental detokenisation, stop strings, chat templates."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_llama

from trilithon.errors import InvalidArgument
from trilithon_parallel.tokenizer import load_tokenizer
from trilithon_server.text.detokenizer import Detokenizer, TokenTexts, decode_all
from trilithon_server.text.stops import StopFinder
from trilithon_server.text.template import ChatTemplate, TemplateError, load_template

ALPHABET = "ab\n"
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=4), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> TokenTexts:
    return TokenTexts(load_tokenizer(tiny_llama(tmp_path_factory.mktemp("model") / "tiny")))


@given(data=st.data())
def test_E3_joined_pieces_are_the_whole_text(texts: TokenTexts, data: st.DataObject) -> None:
    """
    Any ids, sound text or not, give in pieces the characters that decoding their joined bytes at once gives.

    Inverse check: decoding each token by itself instead of through the incremental decoder fails here.
    """
    ids = data.draw(st.lists(st.integers(0, texts.tokenizer.vocab_size + 5), max_size=40))
    detokenizer = Detokenizer(texts, skip_special=False)

    pieces = [detokenizer.push(token_id) for token_id in ids]

    whole = b"".join(map(texts.bytes_of, ids)).decode("utf-8", errors="replace")
    assert "".join(pieces) + detokenizer.flush() == whole


@given(text=st.text(max_size=60))
def test_E3_tokens_of_a_text_give_the_text(texts: TokenTexts, text: str) -> None:
    """Encoding a text and detokenising it piece by piece gives the text back, characters of four bytes included."""
    ids = texts.tokenizer.encode(text, add_special_tokens=False)

    assert decode_all(texts, ids, skip_special=False) == text


def test_special_tokens_are_left_out_or_kept(texts: TokenTexts) -> None:
    """`skip_special_tokens` decides whether an end token shows in the text."""
    end = texts.tokenizer.eos_ids[0]
    ids = [*texts.tokenizer.encode("hi", add_special_tokens=False), end]

    assert decode_all(texts, ids, skip_special=True) == "hi"
    assert decode_all(texts, ids, skip_special=False) == "hi" + texts.text_of(end)


def test_sentence_ends_are_the_tokens_that_end_a_sentence(texts: TokenTexts) -> None:
    """The default reset tokens of factual-nucleus sampling end in . ! ? or a newline, and all such tokens are there."""
    ends = {
        i for i in range(texts.tokenizer.vocab_size) if texts.text_of(i)[-1:] in tuple(".!?\n") and texts.text_of(i)
    }

    assert set(texts.sentence_ends) == ends


def _reference(text: str, stops: list[str], keep: bool) -> tuple[str, str | None]:
    """The first stop string by the end of its match, the longer one on a tie; read off the whole text."""
    for end in range(1, len(text) + 1):
        hits = sorted((stop for stop in stops if text[:end].endswith(stop)), key=len)
        if hits:
            stop = hits[-1]
            return text[: end if keep else end - len(stop)], stop
    return text, None


@given(text=st.text(ALPHABET, max_size=30), stops=STOPS, keep=st.booleans(), data=st.data())
def test_E3_stop_strings_do_not_depend_on_how_the_text_is_cut(
    text: str, stops: list[str], keep: bool, data: st.DataObject
) -> None:
    """
    Pieces of any size give the text before the first stop string, and the match that the whole text gives.

    Inverse check: holding back nothing (`_hold_from` returning the length) fails here.
    """
    finder = StopFinder(stops, keep=keep)
    out, matched, rest = "", None, text
    while rest and matched is None:
        size = data.draw(st.integers(1, len(rest)))
        piece, rest = rest[:size], rest[size:]
        released, matched = finder.push(piece)
        out += released
    if matched is None:
        out += finder.flush()

    assert (out, matched) == _reference(text, stops, keep)


@given(text=st.text(ALPHABET, max_size=30), stops=STOPS)
def test_E3_only_what_could_become_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    """What is held back is a beginning of a stop string, so a stream is never later than it must be."""
    finder = StopFinder(stops)
    out = ""
    for position, letter in enumerate(text, start=1):
        released, matched = finder.push(letter)
        out += released
        if matched is not None:
            return
        held = text[len(out) : position]
        assert not held or any(stop.startswith(held) for stop in stops)

    assert out + finder.flush() == text


MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, I "}]
SOURCE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_templates_render_like_transformers(tmp_path: Path) -> None:
    """The tiny model's own template gives what `transformers` renders from the same directory."""
    from transformers import AutoTokenizer

    model = tiny_llama(tmp_path / "tiny")
    template = load_template(model)
    assert template is not None
    theirs = AutoTokenizer.from_pretrained(model)

    for opening in (True, False):
        expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=opening)
        assert template.render(MESSAGES, add_generation_prompt=opening) == expected


def test_continue_final_message_leaves_the_last_turn_open() -> None:
    """The prompt ends inside the last message; space that the template trims is trimmed here too."""
    text = ChatTemplate(SOURCE).render(MESSAGES, add_generation_prompt=False, continue_final_message=True)

    assert text == "<user>Hi</user><assistant>Hello, I"


def test_a_template_refuses_in_its_own_words() -> None:
    """`raise_exception` of a template is the sender's 400, with the template's reason."""
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")

    with pytest.raises(InvalidArgument, match="roles must alternate"):
        template.render(MESSAGES)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'].dumps(1) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_S6_templates_run_in_an_immutable_sandbox(source: str) -> None:
    """
    A template can neither change what it is given nor reach Python or files.

    Inverse check: jinja2's plain Environment renders five of these.
    """
    with pytest.raises(InvalidArgument):
        print(ChatTemplate(source).render([{"role": "user", "content": "x"}]))


def test_a_broken_template_is_named(tmp_path: Path) -> None:
    """A template that does not compile is reported when the model is loaded, by its file's name."""
    (tmp_path / "chat_template.jinja").write_text("{% if %}")

    with pytest.raises(TemplateError, match=r"chat_template\.jinja is not a chat template"):
        load_template(tmp_path)
