"""Does a run fit, what to change if not, and how long a step takes: planned from a config.json, no weights needed.

    python launch/plan.py --model_name_or_path DIR|config.json --ds_config ds_configs/4080_offload.json \\
        --gpu "RTX 4080" --host_memory 64GiB --config recipes/llada8b_qlora.yaml

Every flag of launch/train.py is read as there (see its --help), so a training command can be pasted behind this one.
"""

import json
import sys
from pathlib import Path

from diffdpo.cli.flags import parse_config
from diffdpo.command import Parser
from diffdpo.config import TrainConfig
from diffdpo.errors import UserError

RATES = {
    "gpu_flops": ("half", "FLOP/s of a GPU in 16-bit matrix products, dense, like 165.2T"),
    "gpu_flops_fp32": ("single", "FLOP/s of a GPU in fp32, like 82.6T"),
    "gpu_bandwidth": ("bandwidth", "bytes/s of a GPU's memory, like 1008G"),
    "gpu_link": ("link", "bytes/s between host and GPU one way, like 32G"),
}
"""Flag → field of `diffdpo.planner.hardware.Gpu`, help."""


def build_parser() -> Parser:
    """The planner's own flags."""
    parser = Parser(description=__doc__.splitlines()[0], epilog="All flags of launch/train.py are read as well.")
    parser.add_argument("--gpu", help='"RTX 4080", "RTX 4090", A100, H100 or H200')
    parser.add_argument("--gpu_memory", help="memory of a GPU, like 16GiB; default: that of --gpu")
    for flag, (_, what) in RATES.items():
        parser.add_argument(f"--{flag}", help=f"{what}; default: that of --gpu")
    parser.add_argument("--host_memory", help="memory of the host, like 64GiB; default: not judged")
    parser.add_argument("--num_gpus", type=int, default=1, help="GPUs, all on one host")
    parser.add_argument("--answer_tokens", type=int, help="longest answer; default: what --max_prompt_length leaves")
    parser.add_argument("--save_json", type=Path, help="write the plan to this file as well")
    return parser


def main(argv: list[str]) -> None:
    """Print the plan."""
    args, rest = build_parser().parse_known_args(argv)
    config = parse_config(TrainConfig, rest, __doc__ or "")
    if config.sequence_parallel_size > 1 or config.checkpoint_keeps != "nothing":
        flag = "sequence_parallel_size" if config.sequence_parallel_size > 1 else "checkpoint_keeps"
        raise UserError(f"--{flag} is not planned: its part of the activations is not counted; plan without it")
    if args.num_gpus < 1:
        raise UserError(f"--num_gpus is {args.num_gpus}; it must be at least 1")
    if args.answer_tokens is not None and not 0 < args.answer_tokens < config.max_length:
        raise UserError(f"--answer_tokens is {args.answer_tokens}; it must be above 0 and below --max_length")
    if args.save_json and not args.save_json.absolute().parent.is_dir():
        raise UserError(f"--save_json {args.save_json}: there is no folder {args.save_json.parent}; make it first")
    if args.save_json and args.save_json.is_dir():
        raise UserError(f"--save_json {args.save_json} is a folder; give a file in it")
    from diffdpo.memory.exhausted import out_of_memory
    from diffdpo.planner.hardware import Host, find_gpu
    from diffdpo.planner.sizes import parse_rate, parse_size

    memory = parse_size(args.gpu_memory, "gpu_memory") if args.gpu_memory else None
    given = {flag: getattr(args, flag) for flag in RATES}
    rates = {RATES[flag][0]: parse_rate(text, flag) for flag, text in given.items() if text is not None}
    gpu = find_gpu(args.gpu, memory, rates)
    host = Host(parse_size(args.host_memory, "host_memory")) if args.host_memory else None
    from diffdpo.planner.advise import advise
    from diffdpo.planner.plan import Machine, check_plannable, make_plan
    from diffdpo.planner.report import as_json, as_text

    machine = Machine(gpu, host, args.num_gpus)
    check_plannable(config, machine)
    print("planning: a step is traced without its numbers at several sizes, which can take minutes", file=sys.stderr)
    try:
        plan = make_plan(config, machine, scored=args.answer_tokens)
        advice = advise(plan, scored=args.answer_tokens) if plan.short() else None
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        why = str(error).splitlines()[0]
        raise UserError(f"too large to plan; look at --max_length and the model's sizes ({why})") from None
    print(as_text(plan, advice))
    if args.save_json:
        args.save_json.write_text(json.dumps(as_json(plan, advice), indent=1) + "\n")
