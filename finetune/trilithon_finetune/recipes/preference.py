"""
Task `dpo`: prefer one answer to another (direct preference optimisation, arXiv 2305.18290). Rows are OpenAI's:

    {"input": {"messages": [...], "tools": [...]},
     "preferred_output": [{"role": "assistant", "content": "..."}],
     "non_preferred_output": [{"role": "assistant", "content": "..."}]}

Each row is a pair of samples, the preferred one first; only the answers count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, JsonValue

from trilithon_finetune.config import Section
from trilithon_finetune.data.findings import Finding
from trilithon_finetune.recipes.base import Context, Defaults, Head, Output, Recipe, Sample
from trilithon_finetune.recipes.fields import Best, RowCheck
from trilithon_finetune.recipes.messages import Place, check_messages, check_tools, encode_messages

PREFERENCE = "input/preferred_output/non_preferred_output"
OUTPUTS = ("preferred_output", "non_preferred_output")


class DpoOptions(Section):
    """Options of the task `dpo`."""

    beta: Annotated[float, Field(gt=0, le=10)] = 0.1
    """How strongly the model is held to what it said before: larger stays closer."""


class Preference(Recipe):
    """The recipe of `dpo`."""

    task = "dpo"
    head: Head = "preference"
    formats: tuple[str, ...] = (PREFERENCE,)
    defaults = Defaults(
        lr_full=5e-7, lr_lora=2e-5, epochs=1, max_tokens=1024, schedule="cosine", warmup_ratio=0.1, betas=(0.9, 0.95)
    )
    Options: type[Section] = DpoOptions
    best_metric: Best = ("valid_loss", "min")

    def unit(self, options: Section) -> int:
        """Two answers."""
        return 2

    def detect(self, row: Mapping[str, Any]) -> str | None:
        """By one of its three keys."""
        return PREFERENCE if any(key in row for key in ("input", *OUTPUTS)) else None

    def rows_of(self, document: bytes, *, file: str) -> None:
        """JSON lines only."""

    def check(self, row: Mapping[str, Any], format: str, *, file: str, line: int) -> list[Finding]:
        """A conversation that waits for an answer, and two answers that differ."""
        check = RowCheck(row, file=file, line=line)
        check.keys(("input", *OUTPUTS, "id"))
        given = check.value("input", dict)
        last = "user"
        if given is not None:
            check.keys(("messages", "tools"), row=given, path="input")
            messages = check.value("input.messages", list, row=given)
            if messages is not None:
                check_messages(check, messages, path="input.messages", answered=False)
            if messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "tool":
                last = "tool"
            if "tools" in given:
                check_tools(check, given["tools"], path="input.tools")
        for key in OUTPUTS:
            output = check.value(key, list)
            if output is not None:
                check_messages(check, output, path=key, after=last)
        if not check.findings and row[OUTPUTS[0]] == row[OUTPUTS[1]]:
            check.add("E-DATA-022", OUTPUTS[1], "is the same as preferred_output, so there is nothing to prefer.")
        return check.findings

    def labels(self, rows: Iterable[Mapping[str, Any]], options: Section) -> tuple[str, ...]:
        """None."""
        return ()

    def encode(self, row: Mapping[str, Any], line: int, context: Context, *, file: str) -> Sequence[Sample | Finding]:
        """The preferred and the other conversation, of which the outputs are supervised."""
        asked, tools = row["input"]["messages"], row["input"].get("tools")
        samples: list[Sample] = []
        findings: dict[tuple[str, str, str], Finding] = {}
        for part, key in enumerate(OUTPUTS):
            messages = [*asked, *row[key]]
            learned = range(len(asked), len(messages))
            place = Place(file, line, key, before=len(asked), before_path="input.messages")
            for item in encode_messages(messages, context, place, tools=tools, learned=learned, part=part):
                if isinstance(item, Sample):
                    samples.append(item)
                else:
                    # Both share what was asked, and what is wrong with it.
                    findings.setdefault((item.code, item.path, item.message), item)
        return [*samples, *findings.values()] if len(samples) == len(OUTPUTS) else list(findings.values())

    def metrics(
        self, outputs: Sequence[Output], rows: Mapping[int, Mapping[str, Any]], context: Context
    ) -> Mapping[str, float]:
        """The loss says it all: margins need the model that training began from."""
        return {}

    def task_file(self, context: Context, numbers: Mapping[str, float]) -> dict[str, JsonValue]:
        """Nothing: the chat template says how it is served."""
        return {}
