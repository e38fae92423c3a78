"""`trilithon schedule`: draw, time and trace a pipeline schedule. Needs no GPU, no model and no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from trilithon.cli._output import EXIT_OK, EXIT_USAGE, add_output_argument, explain, print_json
from trilithon.cli._parser import Parser, UsageError


def add_arguments(parser: Parser) -> None:
    """Add what the verb takes."""
    parser.add_argument("--pp", type=int, required=True, help="pipeline ranks")
    parser.add_argument("--virtual", type=int, default=1, help="model chunks per rank [1]")
    parser.add_argument("--micro-batches", type=int, required=True, help="micro-batches per pipeline and step")
    parser.add_argument("--schedule", help="gpipe, 1f1b, interleaved or forward_only [1f1b, interleaved with chunks]")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write the timeline in the Chrome trace format")
    add_output_argument(parser)
    parser.add_examples(
        "trilithon schedule --pp 4 --micro-batches 8",
        "trilithon schedule --pp 4 --virtual 2 --micro-batches 8 --trace schedule.json",
        "trilithon schedule --pp 4 --virtual 2 --micro-batches 8 --schedule gpipe -o json",
    )


def run(args: argparse.Namespace) -> int:
    """Simulate with a forward of 1 and a backward of 2 per rank and micro-batch; print."""
    from trilithon_parallel.schedule import ScheduleError, schedule
    from trilithon_parallel.simulate import chrome_trace, picture, simulate

    name = args.schedule or ("interleaved" if args.virtual > 1 else "1f1b")
    try:
        timeline = simulate(schedule(name, args.pp, args.virtual, args.micro_batches))
    except ScheduleError as error:
        return explain(error, EXIT_USAGE, as_json=args.output == "json")
    if args.trace is not None:
        try:
            args.trace.write_text(chrome_trace(timeline))
        except OSError as error:
            raise UsageError(f"--trace must be a file that can be written. Given: {args.trace} ({error}).") from None
    table = timeline.schedule
    if args.output == "json":
        print_json(
            {
                "schedule": name,
                "pp": table.pp,
                "virtual": table.virtual,
                "micro_batches": table.num_microbatches,
                "makespan": float(timeline.makespan),
                "bubble": float(timeline.bubble),
                "peak_activations": timeline.peak_activations,
                "ranks": [[str(op) for op in ops] for ops in table.ranks],
            }
        )
        return EXIT_OK
    print(picture(timeline))
    print()
    print(f"{name}: pp {table.pp}, virtual {table.virtual}, micro-batches {table.num_microbatches}")
    print(f"  time    {float(timeline.makespan):g} (forward 1, backward 2 per rank and micro-batch)")
    print(f"  bubble  {float(timeline.bubble):.1%} of the time without idling")
    print(f"  kept    {' '.join(map(str, timeline.peak_activations))} micro-batches in chunks at once, rank by rank")
    return EXIT_OK
