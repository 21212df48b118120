"""A comparison on a terminal, and as CSV."""

import csv
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from diffdpo.comparison.tables import Comparison, Table, differences_table, gaps, results_table, runs_table, verdict

NARROWEST = 160  # columns where the output is no terminal
MOST_SETTINGS = 6  # columns


def print_comparison(found: Comparison) -> None:
    """The verdict, the tables, and what the records lack."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=NARROWEST)
    for line in verdict(found):
        console.print(line, markup=False)
    for table in (runs_table(found, most=MOST_SETTINGS), results_table(found), differences_table(found)):
        if table is not None and len(table.columns) > 1:
            console.print()
            _print(console, table)
    for gap in gaps(found):
        console.print(f"note: {gap}", markup=False)


def _print(console: Console, table: Table) -> None:
    shown = RichTable(title=_plain(table.title), title_justify="left")
    for index, column in enumerate(table.columns):
        shown.add_column(_plain(column), justify="right" if index else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*map(_plain, row))
    console.print(shown)
    if table.note:
        console.print(table.note, markup=False)


def _plain(text: str) -> str:
    """``text`` without a meaning in rich's markup."""
    return text.replace("[", r"\[")


def write_csv(found: Comparison, path: Path) -> None:
    """A line a run: settings that differ, cost, and each metric's final value, error, best value and its step."""
    header = ["run", "place", "group", "state", "steps", "records_per_second", "peak_memory_gib", "seconds"]
    header += [f"setting/{name}" for name in (*found.settings, "seed")]
    header += [f"{name}{part}" for name in found.metrics for part in ("", "/stderr", "/best", "/best_step")]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for group in found.groups:
            for run in group.runs:
                row: list[object] = [run.name, run.place, group.name, run.status, run.steps]
                row += [run.rate, run.memory, run.seconds]
                row += [run.params.get(name) for name in (*found.settings, "seed")]
                for name in found.metrics:
                    final, best = run.after.get(name), run.best(name)
                    row += [final.mean, final.stderr] if final else [None, None]
                    row += list(best) if best else [None, None]
                writer.writerow(["" if value is None else value for value in row])
