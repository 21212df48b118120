"""Held-out results item by item, in ``held_out.json`` of a run: what two runs are compared by, record by record.

The file holds ``data`` (fingerprint of the held-out data), the names of the items in the order of the values
(``records``, and by its metric those of each task), and ``before`` / ``after``: a list of values for each metric. No
torch in here.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.files import write_whole
from diffdpo.evaluation.result import Evaluation

FILE = "held_out.json"
MOMENTS = ("before", "after")
DIGITS = 7  # of a value: more than two evaluations of the same weights share


class ItemFile:
    """``held_out.json`` of a run; written on rank 0."""

    def __init__(self, output_dir: Path, data: str | None, names: Mapping[str, list[str]]):
        self.path = output_dir / FILE
        self.content: dict[str, Any] = {"data": data, **names}

    def write(self, when: str, evaluation: Evaluation) -> None:
        """Add the values of a moment, ``before`` or ``after``; the file is whole at any time."""
        self.content[when] = {
            key: [float(f"{value:.{DIGITS}g}") for value in values] for key, values in evaluation.values.items()
        }
        write_whole(self.path, json.dumps(self.content).encode())


def usable(content: Mapping[str, Any], gaps: list[str]) -> dict[str, Any]:
    """The content of a run's file without what is neither a list of names nor one of values, which ``gaps`` is told. A
    value that is no number is NaN."""
    found: dict[str, Any] = {}
    for key, part in content.items():
        if key == "data":
            found[key] = part
        elif key in MOMENTS:
            found[key] = _values(key, part, gaps)
        elif isinstance(part, list) and all(isinstance(name, str) for name in part):
            found[key] = part
        else:
            gaps.append(f"{key} of {FILE} is no list of names and left out")
            found[key] = []  # the items of a task stay those of a task: others' names are not theirs
    return found


def _values(moment: str, part: Any, gaps: list[str]) -> dict[str, list[float]]:
    if not isinstance(part, dict):
        gaps.append(f"{moment} of {FILE} holds no values and is left out")
        return {}
    found = {}
    for metric, values in part.items():
        if not isinstance(values, list):
            gaps.append(f"{metric} of {FILE} ({moment}) is no list of values and left out")
            continue
        found[metric] = [float(value) if _is_finite(value) else math.nan for value in values]
        if lost := sum(map(math.isnan, found[metric])):
            gaps.append(f"{lost} of {len(values)} values of {metric} in {FILE} ({moment}) are no numbers and left out")
    return found


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
