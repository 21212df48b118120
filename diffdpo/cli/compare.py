"""Runs beside each other: what differs, which is better and whether that may be chance.

diffdpo compare outputs/a outputs/b                     # folders of runs, or of many runs
diffdpo compare --experiment_name diffdpo --html page.html
"""

import argparse
import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffdpo.command import Parser
from diffdpo.errors import UserError


def build_parser() -> Parser:
    """The flags of the command."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="a run's folder or one that holds many; an MLflow run id, name or experiment",
    )
    parser.add_argument(
        "--baseline", metavar="RUN", help="name of the run that others are set against; default: the first"
    )
    parser.add_argument("--metric", metavar="NAME", help="held-out metric that says which is best, such as exact_match")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a page with curves, readable without a server")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="write a line a run")
    parser.add_argument("--experiment_name", metavar="NAME", help="all runs of an MLflow experiment")
    parser.add_argument("--filter", metavar="TEXT", help="in MLflow's words, such as \"params.beta = '0.1'\"")
    parser.add_argument(
        "--tracking_uri", metavar="URI", help="MLflow store of names; default: $MLFLOW_TRACKING_URI, else outputs/"
    )
    parser.add_argument(
        "--sync", metavar="DIR", type=Path, action="append", help="first send to MLflow what the runs in DIR could not"
    )
    return parser


def main(argv: list[str]) -> int:
    """Print the comparison; 1 where --sync could not send everything."""
    args = build_parser().parse_args(argv)
    named = args.runs or args.experiment_name or args.filter
    if not named and not args.sync:
        raise UserError("no run is named; give folders of runs, such as: diffdpo compare outputs/a outputs/b")
    for flag, path in (("--html", args.html), ("--csv", args.csv)):
        _check_file(flag, path)
    failed = _sync(args.sync or [])
    if named:
        _compare(args)
    return 1 if failed else 0


def _compare(args: argparse.Namespace) -> None:
    from diffdpo.comparison.find import find_runs
    from diffdpo.comparison.tables import compare
    from diffdpo.comparison.text import print_comparison, write_csv

    runs = find_runs(args.runs, uri=args.tracking_uri, experiment=args.experiment_name, where=args.filter)
    found = compare(runs, baseline=args.baseline, metric=args.metric)
    print_comparison(found)
    if args.csv:
        with _told_as("--csv", args.csv):
            write_csv(found, args.csv)
        print(f"csv     {args.csv}")
    if args.html:
        from diffdpo.comparison.page import write_page

        with _told_as("--html", args.html):
            write_page(found, args.html)
        print(f"page    {args.html}")


def _check_file(flag: str, path: Path | None) -> None:
    """Before all work, whether a file can be written in its place. What may stand there is left as it is."""
    if path is None:
        return
    folder = path.absolute().parent
    with _told_as(flag, path):
        if not folder.is_dir():
            raise UserError(
                f"{flag} {path} cannot be written: its folder does not exist; make it, or give another file"
            )
        if path.is_dir():
            raise UserError(f"{flag} {path} cannot be written: it is a folder; give a file in it")
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if not path.exists() or flag == "--html":  # the page takes the place of an earlier one by a rename
            tempfile.TemporaryFile(dir=folder).close()


@contextmanager
def _told_as(flag: str, path: Path) -> Iterator[None]:
    """What the disk refuses is told with the flag that asked for it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written: {error.strerror or error}; give another file") from None


def _sync(folders: list[Path]) -> int:
    """Send the runs in the folders; how many could not be sent."""
    from diffdpo.comparison.find import folders_of
    from diffdpo.comparison.sync import sync

    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--sync {folder}: there is no such folder")
    return sum(not sync(run) for folder in folders for run in folders_of(folder))
