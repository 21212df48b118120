"""Held-out results item by item, in ``held_out.json`` of a run: what two runs are compared by, record by record.

The file holds ``data`` (fingerprint of the held-out data), the names of the items in the order of the values
(``records``, and by its metric those of each task), and ``before`` / ``after``: a list of values for each metric. No
torch in here.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.files import write_whole
from diffdpo.evaluation.result import Evaluation

FILE = "held_out.json"
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


def read_items(output_dir: Path) -> dict[str, Any] | None:
    """The content of a run's file; None where there is none, or none that can be read."""
    try:
        content = json.loads((output_dir / FILE).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
