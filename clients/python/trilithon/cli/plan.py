"""`trilithon plan`: which layout trains a model fastest on a cluster, what it costs, and why."""

from __future__ import annotations

import argparse
from pathlib import Path

from trilithon.cli import _extra, _plan_output
from trilithon.cli._output import EXIT_INVALID_DATA, EXIT_OK, EXIT_USAGE, add_output_argument, explain, print_json
from trilithon.cli._parser import Parser, UsageError
from trilithon_parallel.calibration import find_hardware
from trilithon_parallel.config import ModelError, load_config
from trilithon_parallel.hardware import Hardware, HardwareError
from trilithon_parallel.memory import Numerics
from trilithon_parallel.pictures import PictureError
from trilithon_parallel.planner import Constraints, Plan, Workload
from trilithon_parallel.planner import plan as search
from trilithon_parallel.presets import Recipe, find_recipe, parse_count, recipe_of_size

_ON_OFF = {"on": True, "off": False}
_DATA_CODES = ("model_not_found", "model_invalid", "model_unsupported", "hardware_invalid")


def add_arguments(parser: Parser) -> None:
    """Add what the verb takes."""
    model = parser.add_argument_group("what to train")
    model.add_argument("--model", metavar="NAME|DIR", help="a recipe (`--list`) or a model directory")
    model.add_argument("--params", metavar="COUNT", help="instead of --model: a GPT of this size, for example 175B")
    model.add_argument("--gpus", type=int, metavar="N", help="devices [the recipe's]")
    model.add_argument("--hardware", default="a100-80gb", metavar="NAME|FILE",
                       help="a preset, `here`, or a .yaml or .json file of measured values [a100-80gb]")  # fmt: skip
    model.add_argument("--global-batch-size", type=int, metavar="B", help="sequences of one step [the recipe's]")
    model.add_argument("--seq-len", type=int, metavar="S", help="tokens of a sequence [the recipe's]")
    model.add_argument("--tokens", metavar="COUNT", help="of the whole run, for example 300B [the recipe's]")
    model.add_argument("--dtype", choices=("bfloat16", "float32"), help="of weights and activations [the recipe's]")
    model.add_argument("--attention", choices=("fused", "unfused"), help="does it write its scores out? [the recipe's]")
    model.add_argument("--dropout", choices=_ON_OFF, help="are dropout masks kept? [the recipe's]")
    fixed = parser.add_argument_group("what the search may not choose")
    for name in ("tp", "pp", "dp", "virtual"):
        fixed.add_argument(f"--{name}", type=int, metavar="N")
    fixed.add_argument("--micro-batch-size", type=int, metavar="N")
    fixed.add_argument("--recompute", choices=("none", "selective", "full"))
    fixed.add_argument("--schedule", choices=("gpipe", "1f1b", "interleaved"))
    fixed.add_argument("--sequence-parallel", choices=_ON_OFF)
    fixed.add_argument("--distributed-optimizer", choices=_ON_OFF)
    out = parser.add_argument_group("what to print and write")
    out.add_argument("--list", action="store_true", help="list the recipes and the hardware, and stop")
    out.add_argument("--top", type=int, default=5, metavar="N", help="runners-up to show [5]")
    out.add_argument("--rejected", action="store_true", help="list what was rejected, and why")
    out.add_argument(
        "--measure", action="store_true", help="run the best layout here (one rank): measured beside predicted"
    )
    out.add_argument("--write", metavar="FILE", help="write the best layout as YAML for training")
    out.add_argument("--picture-dir", metavar="DIR", help="draw memory and the pipeline's timeline as PNG files")
    add_output_argument(parser)
    parser.add_examples(
        "trilithon plan --params 175B --gpus 1024",
        "trilithon plan --model mt_nlg_530b --hardware h100-sxm --recompute full --rejected",
        "trilithon plan --model gpt_145.6b --write layout.yaml --picture-dir pictures",
        "trilithon plan --list",
    )


def run(args: argparse.Namespace) -> int:
    """Search, explain, draw and write."""
    as_json = args.output == "json"
    if args.list:
        _plan_output.print_list(as_json=as_json)
        return EXIT_OK
    try:
        workload = _workload(args)
        plan = search(workload, _hardware(args.hardware, workload.gpus), _constraints(args))
        measured_s = _measure(plan) if args.measure else None
        written = [_plan_output.write(plan, Path(args.write))] if args.write else []
        if args.picture_dir:
            written += _plan_output.draw(plan, Path(args.picture_dir), top=args.top)
        if as_json:
            document = _plan_output.document(plan, top=args.top, with_rejected=args.rejected, measured_s=measured_s)
            print_json({**document, "written": [str(path) for path in written]})
            return EXIT_OK
        _plan_output.print_plan(plan, top=args.top, with_rejected=args.rejected, measured_s=measured_s)
    except (ModelError, HardwareError) as error:
        return explain(error, EXIT_INVALID_DATA if error.code in _DATA_CODES else EXIT_USAGE, as_json=as_json)
    except PictureError as error:
        return explain(error, EXIT_USAGE, as_json=as_json)
    for path in written:
        print(f"wrote {path}")
    return EXIT_OK


def _workload(args: argparse.Namespace) -> Workload:
    if (args.model is None) == (args.params is None):
        raise UsageError("exactly one of --model and --params is needed. See `trilithon plan --help`.")
    if args.top < 0:
        raise UsageError(f"--top must be at least 0. Given: {args.top}.")
    recipe = recipe_of_size(parse_count(args.params)) if args.params else _recipe(args.model)
    gpus = recipe.gpus if args.gpus is None else args.gpus
    if gpus is None:
        raise UsageError(f"--gpus is needed: the recipe {recipe.name!r} names no number of devices.")
    usual = recipe.numerics
    return Workload(
        config=recipe.config,
        gpus=gpus,
        global_batch=recipe.global_batch if args.global_batch_size is None else args.global_batch_size,
        seq_len=recipe.seq_len if args.seq_len is None else args.seq_len,
        numerics=Numerics(
            dtype=args.dtype or usual.dtype,
            dropout=usual.dropout if args.dropout is None else _ON_OFF[args.dropout],
            fused_attention=usual.fused_attention if args.attention is None else args.attention == "fused",
        ),
        tokens=recipe.tokens if args.tokens is None else parse_count(args.tokens),
    )


def _recipe(name: str) -> Recipe:
    """A recipe by name, or one made of a model directory's configuration."""
    if not Path(name).is_dir() and "/" not in name:
        return find_recipe(name)
    config = load_config(Path(name))
    return Recipe(Path(name).name, config, min(config.max_context, 2048), 512, 0.0, source=name, numerics=Numerics())


def _hardware(spec: str, num_ranks: int) -> Hardware:
    if spec != "here":
        return find_hardware(spec)
    measured = _extra.load("trilithon_parallel.measured", verb="plan", extra="engine")
    here: Hardware = measured.calibrate_this_machine(num_ranks)
    return here


def _constraints(args: argparse.Namespace) -> Constraints:
    return Constraints(
        tp=args.tp,
        pp=args.pp,
        dp=args.dp,
        micro_batch=args.micro_batch_size,
        virtual=args.virtual,
        recompute=args.recompute,
        schedule=args.schedule,
        sequence_parallel=_ON_OFF.get(args.sequence_parallel),
        distributed_optimizer=_ON_OFF.get(args.distributed_optimizer),
    )


def _measure(plan: Plan) -> float:
    """Seconds that the best layout takes here."""
    workload = plan.workload
    step = _extra.load("trilithon_parallel.measured", verb="plan", extra="engine").measure_step(
        workload.config,
        plan.best.layout,
        workload.numerics,
        seq_len=workload.seq_len,
        global_batch=workload.global_batch,
    )
    return float(step.seconds)
