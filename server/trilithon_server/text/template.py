"""
Chat templates: a model directory's own Jinja program turns messages into the prompt that the model was trained on.

The program comes from the model directory (or a file that the operator names), never from a request, and runs in an
immutable sandbox (bar S6): it can read the messages and nothing else. The helpers are those that templates written
for `transformers` expect.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.parser import Parser

from trilithon.errors import InvalidArgument
from trilithon_parallel.tokenizer import Tokenizer
from trilithon_server.validation import invalid

Message = dict[str, Any]
"""One message as templates read it: `role`, `content`, and what else OpenAI's shape has."""

TEMPLATE_FILE = "chat_template.jinja"

RENDERER_VERSION = 1
"""Raised when the same template and messages give another text or other tokens than before."""

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class TemplateError(ValueError):
    """A chat template that cannot be read; the message says which file and why."""


class _RefusedByTemplate(jinja2.TemplateError):
    """The template called `raise_exception`: the messages are not what it takes."""


class ChatTemplate:
    """
    One compiled template.

    Args:
        source: Jinja text.
        tokens: special tokens by name (`bos_token`, ...), as the template reads them.
        where: the file, for messages.
    Raises:
        TemplateError: it does not compile.
    """

    def __init__(self, source: str, *, tokens: dict[str, str] | None = None, where: str = TEMPLATE_FILE) -> None:
        self.source = source
        self.digest = hashlib.sha256(source.encode()).hexdigest()
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self.tokens = dict(tokens or {})
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise TemplateError(f"{where} is not a chat template: {error}. Fix it or remove it.") from None
        marks = environment.extensions[_Generation.identifier]
        assert isinstance(marks, _Generation)
        self.marks_generation = marks.used
        """Whether it says itself, in `{% generation %}` blocks, what training learns from."""

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """
        The prompt for a conversation.

        >>> ChatTemplate("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}").render(
        ...     [{"role": "user", "content": "Hi"}])
        '[user] Hi'

        Args:
            messages: at least one; `content` is a string.
            tools: offered to the template as they are.
            add_generation_prompt: end with the opening of an assistant turn.
            continue_final_message: cut off what closes the last message, so that the model goes on with it.
        Raises:
            InvalidArgument: the template refuses the messages.
        """
        text = self._run(messages, tools, add_generation_prompt, _Recording())
        return _cut_after_final(text, messages[-1]) if continue_final_message else text

    def generated(
        self, messages: Sequence[Message], *, tools: Sequence[dict[str, Any]] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """
        A whole conversation, and where its `{% generation %}` blocks stand, as half-open ranges of characters.

        Raises:
            InvalidArgument: the template refuses the messages, or has such a block in a macro.
        """
        recording = _Recording()
        text = self._run(messages, tools, False, recording)
        if any(text[start : start + len(body)] != body for start, body in recording.blocks):
            raise invalid(
                "messages", "cannot be learned: the template marks text in a macro", code="chat_template_failed"
            )
        return text, [(start, start + len(body)) for start, body in recording.blocks]

    def _run(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None,
        add_generation_prompt: bool,
        recording: _Recording,
    ) -> str:
        token = _RECORDING.set(recording)
        parts = []
        try:
            for part in self._template.generate(
                messages=list(messages),
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.tokens,
            ):
                parts.append(part)
                recording.length += len(part)
        except _RefusedByTemplate as error:
            raise invalid("messages", f"are refused by the model's chat template: {error}", code="chat_roles") from None
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            message = f"do not fit the model's chat template: {error}"
            raise invalid("messages", message, code="chat_template_failed") from None
        except OverflowError:
            raise invalid(
                "messages", "make the chat template's output too large", code="chat_template_failed"
            ) from None
        finally:
            _RECORDING.reset(token)
        return "".join(parts)


def template_digest(template: ChatTemplate, tokenizer: Tokenizer) -> str:
    """SHA-256 (hex) of what decides the tokens of a conversation: template, special tokens, this renderer."""
    special = sorted((token, tokenizer.id_to_piece(token)) for token in tokenizer.special_ids)
    document = [RENDERER_VERSION, template.source, sorted(template.tokens.items()), special]
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


def load_template(model_dir: Path, override: Path | None = None) -> ChatTemplate | None:
    """
    The chat template of a model directory, or None where the model has none.

    Read from, in this order: `override`, `chat_template.jinja`, `chat_template` in `tokenizer_config.json` (a text,
    or a list of named ones, of which `default` is taken).

    Raises:
        TemplateError: the file cannot be read or does not compile.
    """
    config = _read_json(model_dir / "tokenizer_config.json")
    tokens = {}
    for name in _SPECIAL_TOKENS:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    path = override if override is not None else model_dir / TEMPLATE_FILE
    if override is not None or path.is_file():
        try:
            return ChatTemplate(path.read_text(encoding="utf-8"), tokens=tokens, where=path.name)
        except (OSError, UnicodeDecodeError) as error:
            raise TemplateError(f"{path.name} cannot be read: {error}. Name a text file.") from None
    source = config.get("chat_template")
    if isinstance(source, list):
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        return None
    return ChatTemplate(source, tokens=tokens, where="tokenizer_config.json chat_template")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TemplateError(f"{path.name} cannot be read: {error}. Restore the file.") from None
    return document if isinstance(document, dict) else {}


def _cut_after_final(text: str, message: Message) -> str:
    """The rendered text up to the end of the last message's content; trailing space that a template trims goes too."""
    content = str(message.get("content") or "")
    core = content.strip()
    at = text.rfind(core) if core else -1
    if at < 0:
        raise InvalidArgument(
            "`continue_final_message` needs a last message whose content the chat template shows. "
            'Given: a message that is empty or left out. Set "continue_final_message" to false.',
            code="invalid_value",
        )
    whole = content.lstrip()
    return text[: at + len(whole)] if text.startswith(whole, at) else text[: at + len(core)]


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as templates expect it: not escaped for HTML, unlike Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise _RefusedByTemplate(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@dataclass
class _Recording:
    """How long the text is so far, and the blocks in it with their places."""

    length: int = 0
    blocks: list[tuple[int, str]] = field(default_factory=list)


_RECORDING: ContextVar[_Recording] = ContextVar("recording")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what training learns from; for a prompt it is only its body."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it as a plain class attribute
    used = False

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        self.used = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_record"), [], [], body).set_lineno(line)

    def _record(self, caller: Callable[[], str]) -> str:
        recording, body = _RECORDING.get(), caller()
        recording.blocks.append((recording.length, body))
        return body
