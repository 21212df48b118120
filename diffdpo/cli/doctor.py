"""What this machine can do for a run and what is missing; with --self_test, whether its device computes what it should.

    python launch/doctor.py                        # a screen: ok, warning or error, and what to do
    python launch/doctor.py --self_test --json     # to attach to a bug report

Exit code 1 where no run can be, or the self-test fails.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from diffdpo.command import Parser

NOT_FOR_A_TEST = ("outputs", "NVMe offload")  # findings that a self-test can do without


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(description=(__doc__ or "").strip(), prog=None)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--self_test", action="store_true", help="train some steps on the device; a minute or two")
    parser.add_argument("--device", default="auto", help="of the self-test: auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--output_dir", type=Path, help="where runs are to go (default: outputs, here)")
    parser.add_argument("--nvme_path", type=Path, help="where --ds_config is to offload to")
    parser.add_argument("--json", action="store_true", help="all of it as JSON, and nothing else")
    return parser


def main(argv: list[str]) -> int:
    """Look at the machine; 0 where runs can be."""
    args = build_parser().parse_args(argv)
    from diffdpo.doctor.examine import examine
    from diffdpo.doctor.finding import ERROR, WARNING, error, worst
    from diffdpo.doctor.report import as_json, as_text

    say = (lambda text: None) if args.json else (lambda text: print(text, flush=True))
    subjects = {}
    for subject, findings in examine(output_dir=args.output_dir, nvme_path=args.nvme_path):
        subjects[subject] = findings
        if findings:
            say(as_text(subject, findings))
    everything = [finding for findings in subjects.values() for finding in findings]
    compared = None
    if args.self_test:
        if missing := [one.name for one in everything if one.state == ERROR and one.name not in NOT_FOR_A_TEST]:
            subjects["self-test"] = [error("self-test", f"not without {', '.join(missing)}", "install what is missing")]
            everything += subjects["self-test"]
            say(as_text("self-test", subjects["self-test"]))
        else:
            compared = _self_test(args.device, say)
    failed = [line for line in compared or () if line.state == "FAILED"]
    passed = worst(everything) != ERROR and not failed
    if args.json:
        print(json.dumps(as_json(subjects, compared, passed), indent=1))
    counts = ", ".join(
        f"{sum(finding.state == state for finding in everything)} {state}s" for state in (ERROR, WARNING)
    )
    tested = f"; self-test: {len(failed)} of {len(compared)} failed" if compared is not None else ""
    say(f"\n{counts}{tested}" + ("" if args.self_test else "; --self_test compares the device's numbers"))
    return 0 if passed else 1


def _self_test(device: str, say: Callable[[str], None]) -> list:
    """UserError where the device is not there."""
    import torch

    from diffdpo.doctor.self_test import run_self_test
    from diffdpo.evaluation.score_models import device_named
    from diffdpo.models.load import check_device

    check_device(named := device_named(device))
    return run_self_test(torch.device(named), say)
