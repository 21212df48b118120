"""What this machine can do for a run and what is missing; with --self_test, whether its device computes what it should.

    python launch/doctor.py                        # a screen: ok, warning or error, and what to do
    python launch/doctor.py --self_test --json     # to attach to a bug report

Exit code 1 where no run can be, or the self-test fails.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

from diffdpo.command import Parser
from diffdpo.doctor.finding import ERROR, WARNING, Finding, error, worst
from diffdpo.doctor.imports import Imports
from diffdpo.errors import UserError

NOT_FOR_A_TEST = ("outputs", "NVMe offload")  # findings that a self-test can do without


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(description=(__doc__ or "").strip(), prog=None)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--self_test", action="store_true", help="train some steps on the device; a minute or two")
    parser.add_argument("--device", help="of the self-test: auto (the default), cpu, cuda, cuda:1, ...")
    parser.add_argument("--output_dir", type=Path, help="where runs are to go (default: outputs, here)")
    parser.add_argument("--nvme_path", type=Path, help="where --ds_config is to offload to")
    parser.add_argument("--json", action="store_true", help="all of it as JSON, and nothing else")
    return parser


def main(argv: list[str]) -> int:
    """Look at the machine; 0 where runs can be."""
    args = build_parser().parse_args(argv)
    _check_name(args.device, tested=args.self_test)
    from diffdpo.doctor.examine import examine
    from diffdpo.doctor.report import as_json, as_text
    from diffdpo.doctor.software import begin_imports

    imports = begin_imports()
    _check_there(args.device, imports)
    say = (lambda text: None) if args.json else (lambda text: print(text, flush=True))
    subjects = {}
    for subject, findings in examine(imports, output_dir=args.output_dir, nvme_path=args.nvme_path):
        subjects[subject] = findings
        if findings:
            say(as_text(subject, findings))
    everything = [finding for findings in subjects.values() for finding in findings]
    compared = None
    if args.self_test:
        compared, obstacles = _self_test(args.device or "auto", everything, say)
        if obstacles:
            subjects["self-test"] = obstacles
            everything += obstacles
            say(as_text("self-test", obstacles))
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


def _check_name(device: str | None, *, tested: bool) -> None:
    """UserError for what names no device, or one that nothing would be done on."""
    if device is None:
        return
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UserError(f"--device {device!r} is unknown; use auto, cpu, cuda, cuda:0, ...")
    if not tested:
        raise UserError(f"--device {device} is where --self_test computes; add --self_test, or leave it out")


def _check_there(device: str | None, imports: Imports) -> None:
    """UserError for a GPU that is not there. Without a torch to ask, its own error says enough."""
    if device is None or not device.startswith("cuda") or imports.fault("torch"):
        return
    try:
        from diffdpo.doctor.gpus import visible

        count = visible()
    except ImportError:
        return
    if count == 0:
        raise UserError(f"--device {device}: no GPU is to be found here; use --device cpu, or leave out --self_test")
    if int(device.partition(":")[2] or 0) >= count:
        raise UserError(
            f"--device {device}: torch sees {count} GPU{'s' if count > 1 else ''}, the last is cuda:{count - 1}"
        )


def _self_test(device: str, known: list[Finding], say: Callable[[str], None]) -> tuple[list | None, list[Finding]]:
    """What was compared, or why nothing could be."""
    if missing := [one.name for one in known if one.state == ERROR and one.name not in NOT_FOR_A_TEST]:
        return None, [error("self-test", f"not without {', '.join(missing)}", "mend that first (above)")]
    try:
        import torch

        from diffdpo.doctor.gpus import visible
        from diffdpo.doctor.self_test import run_self_test
    except Exception as failure:  # packages raise what they like where they clash
        what = " ".join(f"{type(failure).__name__}: {failure}".split())[:200]
        return None, [error("self-test", f"cannot be imported ({what})", "attach this line to a bug report")]
    here = device if device != "auto" else "cuda" if visible() else "cpu"
    return run_self_test(torch.device(here), say), []
