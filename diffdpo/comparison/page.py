"""A comparison as one page: verdict, tables and curves. It fetches nothing: no server, no network."""

import html
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from data_pipeline.files import write_whole
from diffdpo import __version__
from diffdpo.comparison.recorded import Curve, RecordedRun
from diffdpo.comparison.tables import (
    Comparison,
    Table,
    differences_table,
    gaps,
    results_table,
    runs_table,
    title_of,
    verdict,
)

FOLDER = Path(__file__).parent
MOST_POINTS = 800  # of a curve; more are averaged, as a screen has no room for them
DIGITS = 5
SECTIONS = (
    ("Held out", ("eval/",)),
    ("Training", ("loss", "rewards/", "grad_norm", "learning_rate")),
    ("Scores and distance from the reference", ("scores/", "kl/")),
    ("Speed", ("pairs_per_second", "answers_per_second", "tokens_per_second", "step_seconds", "time/", "data_wait")),
    ("Memory", ("peak_memory", "memory/")),
    ("Noise of the estimates", ("noise/",)),
)
OPEN = ("Held out", "Training")


def write_page(found: Comparison, path: Path) -> None:
    """The page, whole or not at all."""
    write_whole(path, page(found).encode())


def page(found: Comparison) -> str:
    """The page's text."""
    template = (FOLDER / "page.html").read_text(encoding="utf-8")
    tables = [runs_table(found), results_table(found), differences_table(found)]
    parts = {
        "TITLE": html.escape(f"{len(found.runs)} runs compared"),
        "VERDICT": "".join(f"<p>{html.escape(line)}</p>" for line in verdict(found)),
        "TABLES": "".join(_table(table, found) for table in tables if table is not None),
        "GAPS": "".join(f"<li>{html.escape(gap)}</li>" for gap in gaps(found)),
        "MADE": f"diffdpo {__version__}, {datetime.now():%Y-%m-%d %H:%M}",
        "DATA": _as_script(curves(found)),
        "SCRIPT": (FOLDER / "page.js").read_text(encoding="utf-8"),
    }
    for name, text in parts.items():
        template = template.replace(f"<!--{name}-->", text)
    return template


def curves(found: Comparison) -> dict[str, Any]:
    """What the script draws: the runs, and the metrics by section; a run's colour is that of its group."""
    number = {id(run): index for index, group in enumerate(found.groups) for run in group.runs}
    return {
        "runs": [
            {"name": run.name, "color": number[id(run)], "state": run.status, "minutes": _points(run.minutes)}
            for run in found.runs
        ],
        "sections": [
            {"title": title, "open": title in OPEN, "panels": [_panel(name, found.runs) for name in names]}
            for title, names in _sections(found)
        ],
    }


def _sections(comparison: Comparison) -> list[tuple[str, list[str]]]:
    first = [f"eval/{name}" for name in comparison.metrics]
    known = dict.fromkeys(name for run in comparison.runs for name in run.curves)
    names = [*(name for name in first if name in known), *(name for name in known if name not in first)]
    found, taken = [], set()
    for title, heads in SECTIONS:
        own = [name for name in names if name not in taken and name.startswith(heads)]
        taken.update(own)
        found.append((title, own))
    found.append(("Other", [name for name in names if name not in taken]))
    return [(title, own) for title, own in found if own]


def _panel(name: str, runs: Sequence[RecordedRun]) -> dict[str, Any]:
    held_out = name.startswith("eval/")
    title = title_of(name.removeprefix("eval/")) if held_out else name
    return {
        "name": name,
        "title": title,
        "dots": held_out,
        "curves": [_points(run.curves[name]) if name in run.curves else None for run in runs],
    }


def _points(curve: Curve) -> list[list[float]]:
    """[steps, values], bins of neighbours averaged where there are too many."""
    points = curve.finite()
    size = -(-len(points) // MOST_POINTS) or 1
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    values = [float(f"{sum(value for _, value in part) / len(part):.{DIGITS}g}") for part in bins]
    return [[part[-1][0] for part in bins], values]


def _table(table: Table, found: Comparison) -> str:
    colors = {group.name: index for index, group in enumerate(found.groups)}
    colors |= {run.name: index for index, group in enumerate(found.groups) for run in group.runs}
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = []
    for row in table.rows:
        dot = f'<i class="dot" data-color="{colors[row[0]]}"></i>' if row[0] in colors else ""
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        rows.append(f"<tr><th>{dot}{html.escape(row[0])}</th>{cells}</tr>")
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    body = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    return f"<h2>{html.escape(table.title)}</h2>{body}{note}"


def _as_script(data: Any) -> str:
    """JSON that no name in it can end the script element with."""
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c")
