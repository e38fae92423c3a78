"""`trilithon data stories`: stories labelled with keywords and facts, as rows of the tasks that tell them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from trilithon import _store
from trilithon.cli import _extra
from trilithon.cli._output import EXIT_INVALID_DATA, EXIT_OK, Progress, explain, print_json
from trilithon.cli._parser import Parser


def add(parser: Parser) -> None:
    """Add what the action takes."""
    parser.add_argument("input", type=Path, metavar="IN", help='a story a line, {"sentences": [...]}')
    parser.add_argument("--concepts", type=Path, required=True, metavar="PATH", help="facts: a .tsv file or a folder")
    parser.add_argument("--encoder", required=True, metavar="MODEL", help="its cosines say which facts fit a sentence")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the file to write")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="how to print [text]")
    parser.add_examples(
        "trilithon data stories stories.jsonl --concepts concepts --encoder all-minilm-l6-v2 -o labelled.jsonl"
    )


def run(args: argparse.Namespace) -> int:
    """Label; a file that cannot be read as stories or facts is exit code 3."""
    labels = _extra.load("trilithon_finetune.data.story_labels", verb="data stories", extra="engine")
    encoders = _extra.load("trilithon_finetune.train.text_encoder", verb="data stories", extra="engine")
    concepts = _extra.load("trilithon_server.knowledge.concepts", verb="data stories", extra="engine")
    models = _extra.load("trilithon_parallel.config", verb="data stories", extra="engine")
    as_json = args.format == "json"
    try:
        rows = labels.read_stories(args.input)
        known = concepts.read_concepts(args.concepts)
        with (
            encoders.open_encoder(_store.resolve(args.encoder)) as encoder,
            Progress("labelling", total=len(rows)) as bar,
        ):
            labeller = labels.StoryLabeller(known, encoder)
            labelled = []
            for row in rows:
                labelled.append(labeller.label(row))
                bar.update(len(labelled), total=len(rows))
    except (OSError, ValueError, models.ModelError) as error:
        return explain(error, EXIT_INVALID_DATA, as_json=as_json)
    part = args.output.with_name(f".{args.output.name}.part")
    part.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in labelled), encoding="utf-8")
    part.replace(args.output)
    steps = [step for row in labelled for step in row["steps"]]
    found = {"rows": len(labelled), "sentences": len(steps), "with_facts": sum(bool(step["facts"]) for step in steps)}
    if as_json:
        print_json({**found, "output": str(args.output)})
        return EXIT_OK
    print(f"{args.output}: {len(labelled):,} stories, {found['with_facts']:,} of {len(steps):,} sentences with facts")
    print(f"Learn from it with: trilithon finetune validate {args.output} --model MODEL --task story_generator")
    return EXIT_OK
