"""What a run leaves and says at its end: ``summary.json`` and the table."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.files import write_whole
from diffdpo.evaluation.result import cell, titles


def write_summary(output_dir: Path, summary: Mapping[str, Any]) -> Path:
    """``summary.json``, atomically."""
    path = output_dir / "summary.json"
    write_whole(path, json.dumps(_finite(summary), indent=1, default=_plain).encode())
    return path


def _finite(value: Any) -> Any:
    """NaN and infinity, which strict JSON does not know, as null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    return str(value)


def print_comparison(results: Mapping[str, Mapping[str, Any]]) -> None:
    """The before/after table, ± one standard error."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="held-out, mean ± standard error", title_justify="left")
    for header in ("", "before", "after", "change"):
        table.add_column(header, justify="left" if not header else "right")
    for key, title in titles(results).items():
        cells = [cell(key, results[key][column]) for column in ("before", "after", "change")]
        table.add_row(f"{title} (n = {results[key]['after']['count']})", *cells)
    Console(width=None if Console().is_terminal else 120).print(table)
