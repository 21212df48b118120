"""What the doctor found, as a screen for people and as JSON for a bug report."""

import platform
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from diffdpo import __version__
from diffdpo.doctor.finding import OK, Finding

WIDTH, NAMES, STATES = 120, 18, 8


def as_text(subject: str, findings: Sequence[Finding]) -> str:
    """The lines of one subject: state, name and what was found; under a line that is not ok, what to do."""
    lines = [f"{subject}:"]
    for finding in findings:
        mark = finding.state if finding.state == OK else finding.state.upper()
        head = f"  {mark:<{STATES}}{finding.name:<{NAMES}} "
        indent = " " * len(head)
        lines += _wrapped(finding.found, head, indent)
        lines += _wrapped(finding.advice, f"{indent}→ ", f"{indent}  ") if finding.advice else []
    return "\n".join(lines)


def _wrapped(text: str, first: str, then: str) -> list[str]:
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=then, **options)


def as_json(subjects: Mapping[str, Sequence[Finding]], compared: Sequence[Any] | None, passed: bool) -> dict[str, Any]:
    """All findings; ``self_test`` is null where none was asked for."""
    return {
        "diffdpo": __version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "platform": platform.platform(),
        "passed": passed,
        "findings": {subject: [asdict(finding) for finding in findings] for subject, findings in subjects.items()},
        "self_test": None if compared is None else [asdict(line) for line in compared],
    }
