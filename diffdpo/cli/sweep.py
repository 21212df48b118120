"""A grid of runs, one after the other or several at a time; the same command goes on after any end, kill -9 too.

diffdpo sweep grid.yaml --jobs 2
"""

import shlex
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffdpo.cli.flags import own_names, parse_config
from diffdpo.command import Parser
from diffdpo.config import SftConfig, TrainConfig
from diffdpo.errors import RESUMABLE, UserError
from diffdpo.settings.base import Settings
from diffdpo.sweep.grid import Cell, Grid, cell_of, read_grid, words_of

if TYPE_CHECKING:
    from diffdpo.comparison.recorded import RecordedRun
    from diffdpo.comparison.tables import Comparison
    from diffdpo.sweep.parent import Parent
    from diffdpo.sweep.proposed import Proposed
    from diffdpo.sweep.states import State
    from diffdpo.sweep.work import Work

CONFIGS = {"train": TrainConfig, "sft": SftConfig}


def build_parser() -> Parser:
    """The flags of the command."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "grid", type=Path, help="YAML: fixed flags, a grid or a list of those that are tried (docs/tracking.md)"
    )
    parser.add_argument(
        "--output_dir", type=Path, help="folder of the sweep, a folder a run in it; default: outputs/NAME"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; each gets its share of the GPUs")
    parser.add_argument(
        "--launcher", default="", help='words that start a run, such as "torchrun --standalone --nproc_per_node 2"'
    )
    parser.add_argument("--retry_failed", action="store_true", help="run again what has failed")
    parser.add_argument("--print_flags", action="store_true", help="print the flags of each run, a line a run, and end")
    parser.add_argument("--metric", help="held-out metric that says which is best, such as exact_match")
    parser.add_argument("--tracking_uri", help="MLflow store; default: that of the file, as in train")
    return parser


def main(argv: list[str]) -> int:
    """Run the cells, then compare them. 1 where one failed, 2 where none has the metric, 3 where a signal
    stopped the sweep."""
    args = build_parser().parse_args(argv)
    grid = read_grid(args.grid)
    _check(args.grid, grid)
    if args.jobs < 1:
        raise UserError(f"--jobs is {args.jobs}; it must be at least 1")
    if grid.search and (args.print_flags or args.retry_failed):
        flag = "--print_flags" if args.print_flags else "--retry_failed"
        raise UserError(f"{flag} is for a grid or a list; Optuna's cells follow from results (raise trials for more)")
    if args.print_flags:
        for cell in grid.cells:
            print(shlex.join(cell.words()))
        return 0
    launcher = shlex.split(args.launcher)
    if launcher and not shutil.which(launcher[0]):
        raise UserError(f"--launcher: there is no program {launcher[0]}")
    from diffdpo.tracking.lock import alone_in
    from diffdpo.tracking.run import tracking_uri

    folder = args.output_dir or Path("outputs") / grid.name
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file; give a folder")
    uri = tracking_uri(args.tracking_uri or grid.tracking_uri, folder)
    with alone_in(folder):
        return _sweep(args, grid, folder, launcher, uri)


def _sweep(args, grid: Grid, folder: Path, launcher: list[str], uri: str | None) -> int:
    from diffdpo.sweep.parent import TAG, Parent
    from diffdpo.sweep.states import read_state
    from diffdpo.sweep.work import Work

    proposed = _proposed(grid, folder, args.metric)
    grid = proposed.known() if proposed else grid
    states = {cell.name: read_state(folder, cell).word for cell in grid.cells}
    again = ("to do", "failed") if args.retry_failed else ("to do",)
    cells = [cell for cell in grid.cells if states[cell.name] in again]
    to_run = f"{grid.search.trials} trials by Optuna" if grid.search else f"{len(cells)} to run"
    print(f"sweep   {grid.name}: {_counted(states, grid)}; {to_run}, {args.jobs} at a time, in {folder}")
    shutil.copyfile(args.grid, folder / "sweep.yaml")
    parent = Parent(grid, folder, uri)
    extra = ["--tracking_uri", uri or "none"] + (["--run_tags", f"{TAG}={parent.run_id}"] if parent.run_id else [])
    work = Work(grid, folder, jobs=args.jobs, launcher=launcher, extra=extra, say=lambda line: print(line, flush=True))
    try:
        if proposed:
            work.run(proposed.cells(), proposed.ended)
        else:
            work.run(cells, _Teller(args.metric, folder, grid).ended)
    except UserError:  # of the search's metric: no further cell can be proposed by it
        parent.close((proposed.known() if proposed else grid).cells, "FAILED")
        raise
    return _end(args, proposed.known() if proposed else grid, folder, work, parent)


def _end(args, grid: Grid, folder: Path, work: "Work", parent: "Parent") -> int:
    """Compare the cells, say what came of them, and the exit code."""
    from diffdpo.sweep.states import read_state

    states = {cell.name: read_state(folder, cell).word for cell in grid.cells}
    metric = args.metric or (grid.search.metric if grid.search else None)
    wrong = _compare(metric, folder, [folder / cell.name for cell in grid.cells])
    print(f"\nsweep   {grid.name}: {_counted(states, grid)}")
    failed = [name for name, word in states.items() if word == "failed"]
    if failed:
        print(f"        failed: {', '.join(failed)}; once mended, --retry_failed runs them again")
    if work.stopping:
        print("        stopped; the same command goes on")
    if wrong:
        wrong = wrong if args.metric else wrong.replace("--metric", "optuna: metric", 1)
        print(f"        {wrong}; the comparison goes by its usual metric")
    parent.close(grid.cells, "KILLED" if work.stopping else "FAILED" if failed else "FINISHED")
    if parent.error:
        send = f"diffdpo compare --sync {shlex.quote(str(folder))}"
        print(f"        MLflow has not all of it ({parent.error}); send the rest with {send}")
    return RESUMABLE if work.stopping else 1 if failed else 2 if wrong else 0


class _Teller:
    """Says of a ``--metric`` that is not measured as soon as a cell has finished, the cells of earlier tries included.
    The sweep goes on: others may have it, and its absence takes nothing from the runs."""

    def __init__(self, metric: str | None, folder: Path, grid: Grid):
        from diffdpo.sweep.states import read_state

        self.metric, self.folder, self.finished = metric, folder, list[Path]()
        for cell in grid.cells:
            self._hear(cell, read_state(folder, cell))
        self._tell()

    def ended(self, cell: Cell, state: "State") -> None:
        """A cell has ended. Only the first that finished is judged."""
        if not self.finished:
            self._hear(cell, state)
            self._tell()

    def _hear(self, cell: Cell, state: "State") -> None:
        if state.word == "finished":
            self.finished.append(self.folder / cell.name)

    def _tell(self) -> None:
        runs = _runs(self.finished) if self.metric else []
        wrong = _compared(runs, self.metric)[1] if runs else ""
        if wrong:
            print(f"        so far {wrong}", flush=True)


def _proposed(grid: Grid, folder: Path, metric: str | None) -> "Proposed | None":
    """Where Optuna proposes the cells, its study."""
    if grid.search is None:
        return None
    from diffdpo.comparison.recorded import lower_is_better
    from diffdpo.sweep.proposed import Proposed

    search = replace(grid.search, metric=metric or grid.search.metric)
    return Proposed(grid, search, folder, less=lower_is_better(search.metric))


def _counted(states: dict[str, str], grid: Grid) -> str:
    counts = Counter(states.values())
    return f"{len(grid.cells)} runs, " + ", ".join(f"{count} {word}" for word, count in sorted(counts.items()))


def _runs(folders: list[Path]) -> "list[RecordedRun]":
    """The runs in these folders; a cell whose run has not begun has none."""
    from diffdpo.comparison.find import find_runs
    from diffdpo.comparison.from_folder import is_run

    return find_runs([str(folder) for folder in folders if is_run(folder)])


def _compared(runs: "list[RecordedRun]", metric: str | None) -> "tuple[Comparison, str]":
    """The comparison by a metric, or by the usual one, and then what is wrong with the metric."""
    from diffdpo.comparison.tables import compare

    try:
        return compare(runs, metric=metric), ""
    except UserError as error:
        return compare(runs), str(error)


def _compare(metric: str | None, folder: Path, cells: list[Path]) -> str:
    """The tables, and the page and the CSV file in the sweep's folder; nothing where no run has begun. What is wrong
    with the metric, if anything."""
    from diffdpo.comparison.page import write_page
    from diffdpo.comparison.tables import verdict
    from diffdpo.comparison.text import print_comparison, write_csv

    runs = _runs(cells)
    if not runs:
        print("        no comparison: no run has begun")
        return ""
    found, wrong = _compared(runs, metric)
    print()
    print_comparison(found)
    write_csv(found, folder / "comparison.csv")
    write_page(found, folder / "comparison.html")
    (folder / "verdict.md").write_text("\n\n".join(verdict(found)))
    print(f"page    {folder / 'comparison.html'}")
    return wrong


def _check(path: Path, grid: Grid) -> None:
    """Every cell as its command would check it, before the first one runs. UserError."""
    config_class = CONFIGS[grid.command]
    search = grid.search
    corners = [cell_of(grid, tried) for tried in (*search.corners(), *search.choices())] if search else []
    known: dict[tuple[Settings, frozenset[str]], Cell] = {}
    for cell in (*grid.cells, *corners):
        try:
            own_names(config_class, {name: value for name, value in cell.flags.items() if name != "config"})
            config = parse_config(config_class, cell.words(), "")
        except UserError as error:
            raise UserError(f"{path}, {cell.name}: {error}") from None
        other = known.setdefault((config, frozenset(cell.flags)), cell)
        if other.name != cell.name:
            raise UserError(f"{path}: {_alike(other, cell)}; take one out")


def _alike(one: Cell, other: Cell) -> str:
    """Why two cells would be one run twice."""
    spelled = {name: [" ".join(words_of(cell.flags[name])) for cell in (one, other)] for name in one.flags}
    differ = [f"{name}: {a} and {b} are the same value" for name, (a, b) in spelled.items() if a != b]
    return differ[0] if differ else f"{one.name} and {other.name} are the same run"
