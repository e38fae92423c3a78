"""What every verb of `trilithon finetune` takes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trilithon.cli._finetune_doors import (
    add_door_arguments,
    add_store_arguments,
    job_and_step,
    job_id,
)
from trilithon.cli._output import add_output_argument
from trilithon.cli._parser import Parser

TASKS = (
    "lm", "sft", "dpo", "mlm", "span_qa", "answer_qa", "yes_no_maybe", "ner", "relation", "classify", "dpr", "ict",
    "mss", "reader_individual", "reader_joint",
    "dialogue", "grounded_dialogue", "answer_gen", "question_gen", "story_keywords", "story_generator", "story_ranker",
)  # fmt: skip
"""As `trilithon_finetune.config.Task` has them; a test compares."""

STATES = ("validating", "queued", "preparing", "starting", "running", "pausing", "paused", "exporting", "verifying",
          "cancelling", "succeeded", "failed", "cancelled")  # fmt: skip

_ID = "ftjob-0k2j4h5g6f7d8s9a0q1w"
_OTHER = "ftjob-0k2j4m8n7b6v5c4x3z2l"


def add(parser: Parser) -> None:
    """Add the verbs."""
    parser.add_examples(
        "trilithon finetune validate chats.jsonl --model smollm2-135m-instruct --task sft",
        "trilithon finetune run job.yaml",
        "trilithon finetune create job.yaml -y --wait",
        "trilithon finetune ls",
    )
    actions: Any = parser.add_subparsers(dest="action", metavar="VERB", required=True)

    def verb(name: str, about: str, *examples: str, **rest: Any) -> Parser:
        made: Parser = actions.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.", **rest)
        made.add_examples(*(f"trilithon finetune {example}" for example in examples))
        return made

    _before(verb)
    _new(verb)
    _there(verb)
    _results(verb)


Verb = Callable[..., Parser]


def _before(verb: Verb) -> None:
    parser = verb(
        "validate",
        "tell everything that is wrong with a data file",
        "validate chats.jsonl --model smollm2-135m-instruct --task sft",
        "validate train.jsonl --model all-minilm-l6-v2 --task ner --validation dev.jsonl --max-errors 0",
        "validate chats.jsonl --model smollm2-135m-instruct --task sft --set data.max_tokens=256 -o json",
    )
    _data(parser)
    parser.add_argument("--validation", type=Path, metavar="FILE", help="a file that must not share rows with it")
    parser.add_argument("--max-errors", type=_count, default=20, metavar="N", help="findings shown; 0 for all [20]")
    add_output_argument(parser)
    add_door_arguments(parser, local=True)
    parser = verb(
        "estimate",
        "tell what a job would take: tokens, steps, memory, disk, time",
        "estimate job.yaml",
        "estimate job.yaml --set tuning.rank=32 --set parallel.dp=2 -o json",
        "estimate job.yaml --probe",
    )
    _config(parser)
    parser.add_argument(
        "--probe", action="store_true", help="measure: prepare the data and start the job's ranks here, for a few steps"
    )
    add_output_argument(parser)
    add_door_arguments(parser, local=True)
    parser = verb(
        "preview",
        "show a row as the model sees it: its tokens, and which of them are learned",
        "preview chats.jsonl --model smollm2-135m-instruct --task sft --row 3",
    )
    _data(parser)
    parser.add_argument("--row", type=_positive, default=1, metavar="N", help="line of the file [1]")
    add_output_argument(parser)
    add_store_arguments(parser, note="the default")


def _new(verb: Verb) -> None:
    parser = verb(
        "create",
        "check a job and queue it",
        "create job.yaml",
        "create job.yaml -y --wait",
        "create job.yaml --dry-run -o json",
        "create job.yaml --print-config --set training.epochs=1 --store",
    )
    _config(parser)
    parser.add_argument("--dry-run", action="store_true", help="check and estimate, and queue nothing")
    parser.add_argument("--wait", action="store_true", help="follow the job to its end; Ctrl-C leaves it running")
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask before it is queued")
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print the configuration, and queue nothing; of a job of this machine with every choice made",
    )
    parser.add_argument("--idempotency-key", metavar="KEY", help="the same key names the same job for 24 hours")
    add_output_argument(parser)
    add_door_arguments(parser)
    parser = verb(
        "run",
        "run a job in the foreground, here and without a server, or go on with one",
        "run job.yaml",
        "run job.yaml --set training.max_steps=20",
        f"run {_ID}",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG|ID", help="the job's YAML file, or a job to go on with")
    _set(parser)
    add_output_argument(parser)
    add_store_arguments(parser, note="the default")


def _there(verb: Verb) -> None:
    parser = verb("ls", "list jobs, newest first", "ls", "ls --state running", "ls -o json --store")
    parser.add_argument("--state", choices=STATES, metavar="STATE", help="only those in this state")
    _doors(parser)
    parser = verb("get", "show one job", f"get {_ID}", f"get {_ID} -o json")
    _job(parser)
    parser = verb("events", "tell what has happened to a job", f"events {_ID}", f"events {_ID} -f -o json")
    parser.add_argument("-f", "--follow", action="store_true", help="wait for more until the job is over")
    parser.add_argument("--after", type=_count, default=0, metavar="SEQ", help="only later ones than this [0]")
    _job(parser)
    parser = verb("logs", "show the end of what a rank printed", f"logs {_ID}", f"logs {_ID} -f --rank 1")
    parser.add_argument("-f", "--follow", action="store_true", help="wait for more until the job is over")
    parser.add_argument("--rank", type=_count, default=0, metavar="R", help="whose output [0]")
    parser.add_argument("--attempt", type=_positive, metavar="N", help="of which attempt [the newest]")
    _job(parser)
    parser = verb("metrics", "show the numbers of a job's steps", f"metrics {_ID}", f"metrics {_ID} --csv")
    parser.add_argument("--csv", action="store_true", help="every row as CSV, OpenAI's columns first")
    _job(parser)
    parser = verb("plot", "draw the curves of a job", f"plot {_ID} -o loss.svg", f"plot {_ID} -o json")
    parser.add_argument("job", type=job_id, metavar="ID", help="of the job")
    _picture(parser, required=True)
    parser = verb(
        "compare",
        "show jobs side by side: settings that differ, and what came of them",
        f"compare {_ID} {_OTHER}",
        f"compare {_ID} {_OTHER} -o curves.svg",
    )
    parser.add_argument("jobs", type=job_id, metavar="ID", nargs="+", action=_SeveralJobs, help="of two jobs or more")
    _picture(parser, required=False)
    parser = verb("pause", "let a job write a checkpoint and rest", f"pause {_ID}")
    _job(parser)
    parser = verb("resume", "let a job go on from its last checkpoint", f"resume {_ID}")
    _job(parser)
    parser = verb("cancel", "end a job; its last checkpoint stays", f"cancel {_ID}")
    _job(parser)
    parser = verb("checkpoints", "list a job's checkpoints, newest first", f"checkpoints {_ID}")
    _job(parser)


def _results(verb: Verb) -> None:
    parser = verb(
        "export",
        "write what a job made, or a checkpoint of it, as a directory",
        f"export {_ID} -o adapter",
        f"export {_ID}@40 --format peft -o adapter-40",
        f"export {_ID} --format model -o merged",
    )
    _job_and_step(parser)
    parser.add_argument(
        "--format", choices=("peft", "model"), help="an adapter, or a model directory, merged if need be [as it is]"
    )
    parser.add_argument("--base", metavar="MODEL", help="what an adapter is merged into, here [the job's model]")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="must not be there yet")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    add_door_arguments(parser)
    parser = verb(
        "verify",
        "read a result as a server does and compare what it says",
        "verify adapter --base smollm2-135m-instruct",
        "verify merged -o json",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="an adapter directory or a model directory")
    parser.add_argument("--base", metavar="MODEL", help="what an adapter stands on")
    add_output_argument(parser)
    parser = verb(
        "deploy",
        "point a name at what a job made, or at a checkpoint",
        f"deploy {_ID} --as faq",
        f"deploy {_ID}@40 --as faq",
    )
    _job_and_step(parser)
    parser.add_argument("--as", dest="alias", required=True, metavar="NAME", help="the name that moves")
    _doors(parser)
    parser = verb(
        "undeploy",
        "take away a name that `deploy` has pointed at something; what it points at stays",
        "undeploy faq",
        f"undeploy faq --expected ft:smollm2-135m-instruct:faq:{_ID[6:]}",
    )
    parser.add_argument("alias", metavar="NAME", help="the name")
    parser.add_argument("--expected", metavar="MODEL", help="only where the name points at this one")
    _doors(parser)
    parser = verb("worker", "run the jobs of a store until stopped", "worker", "worker --slots 2 --store jobs")
    parser.add_argument("--slots", type=_positive, default=1, metavar="N", help="jobs at a time [1]")
    parser.add_argument("--backend", choices=("local",), default="local", help="where gangs run [local]")
    add_store_arguments(parser, note="the default")
    parser = verb(
        "clean",
        "take away what a store need not keep, by its policy; a worker does so by itself",
        "clean --dry-run",
        "clean --store jobs -o json",
    )
    parser.add_argument("--dry-run", action="store_true", help="tell what would go, and take nothing away")
    add_output_argument(parser)
    add_store_arguments(parser, note="the default")


def _config(parser: Parser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="the job's YAML file")
    _set(parser)


def _set(parser: Parser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="override a field, for example training.epochs=1",
    )


def _data(parser: Parser) -> None:
    parser.add_argument("data", type=Path, metavar="DATA", help="the data file; with --url also the id of one")
    parser.add_argument("--model", required=True, help="whose tokenizer and template count")
    parser.add_argument("--task", required=True, choices=TASKS, metavar="TASK", help=f"one of {', '.join(TASKS)}")
    _set(parser)


def _job(parser: Parser) -> None:
    parser.add_argument("job", type=job_id, metavar="ID", help="of the job")
    _doors(parser)


def _job_and_step(parser: Parser) -> None:
    parser.add_argument("job", type=job_and_step, metavar="ID[@STEP]", help="of a job, or of a checkpoint of it")


def _doors(parser: Parser) -> None:
    add_output_argument(parser)
    add_door_arguments(parser)


def _picture(parser: Parser, *, required: bool) -> None:
    parser.add_argument(
        "-o",
        "--output",
        type=_picture_name,
        required=required,
        default="text",
        metavar="FILE.svg|json",
        help="draw into this file, or print the numbers as JSON",
    )
    add_door_arguments(parser)


def _picture_name(text: str) -> str:
    if text not in ("text", "json") and not text.endswith(".svg"):
        raise argparse.ArgumentTypeError(f"must end in .svg, or be json. Given: {text!r}")
    return text


class _SeveralJobs(argparse.Action):
    """At least two ids, each once."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        if len(set(values)) < 2 or len(set(values)) < len(values):
            raise argparse.ArgumentError(self, f"must be two different jobs or more. Given: {' '.join(values)}")
        setattr(namespace, self.dest, values)


def _count(text: str) -> int:
    return _whole(text, least=0)


def _positive(text: str) -> int:
    return _whole(text, least=1)


def _whole(text: str, *, least: int) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise argparse.ArgumentTypeError(f"must be a whole number from {least}. Given: {text!r}")
    return int(text)
