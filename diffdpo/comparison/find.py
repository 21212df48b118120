"""Which runs are meant: folders, MLflow run ids or names, experiments, filters."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from diffdpo.comparison.from_folder import is_run, read_folder
from diffdpo.comparison.recorded import RecordedRun
from diffdpo.errors import UserError
from diffdpo.settings.credentials import STORE, taken
from diffdpo.tracking.mlflow_run import check_tracking_uri, sqlite_uri

DEPTH = 3  # folders below one that is named
NOT_RUNS = ("mlartifacts", "mlruns", "checkpoints", "final", "start", "plots")  # MLflow's copies, and parts of a run
DEFAULT_STORE = Path("outputs/mlflow.db")


def find_runs(
    names: Sequence[str], *, uri: str | None = None, experiment: str | None = None, where: str | None = None
) -> list[RecordedRun]:
    """The runs, each once, in the order they are named in. ``where``: a filter in MLflow's words. UserError for what
    is no run."""
    found: list[RecordedRun] = []
    for name in names:
        folders = folders_of(Path(name))
        found += [read_folder(folder) for folder in folders] if folders else _from_store(name, uri)
    if experiment or where:
        from diffdpo.comparison.from_mlflow import search

        found += search(store_of(uri), experiment=experiment, where=where)
    unique: list[RecordedRun] = []
    for run in found:
        if not any(_same(run, other) for other in unique):
            unique.append(run)
    return unique


def folders_of(path: Path) -> list[Path]:
    """The run in a folder, or all in the folders below it. UserError for a folder without any; [] for no folder."""
    if not path.is_dir():
        return []
    if is_run(path):
        return [path]
    below = [path]
    found: list[Path] = []
    for _ in range(DEPTH):
        try:
            below = sorted(
                child for folder in below for child in folder.iterdir() if child.is_dir() and child.name not in NOT_RUNS
            )
        except PermissionError as error:
            raise UserError(f"{error.filename} cannot be read ({error.strerror})") from None
        found += [folder for folder in below if is_run(folder)]
        below = [folder for folder in below if not is_run(folder)]
    if not found:
        raise UserError(f"{path} holds no run: there is no metrics.jsonl in it, nor in a folder below it")
    return found


def _from_store(name: str, uri: str | None) -> list[RecordedRun]:
    if Path(name).exists():
        raise UserError(f"{name} is a file; give the output folder of a run")
    if uri is None and not os.environ.get(STORE) and not DEFAULT_STORE.exists():
        hint = "" if re.search(r"[/.]", name) else "; for a run of MLflow give --tracking_uri as well"
        raise UserError(f"{name}: there is no such folder{hint}")
    from diffdpo.comparison.from_mlflow import by_name

    return by_name(store_of(uri), name)


def store_of(uri: str | None) -> str:
    """The MLflow store that names are looked up in: ``--tracking_uri``, else MLFLOW_TRACKING_URI, else that of
    outputs/ in the working folder. UserError where there is none."""
    if uri is None and not os.environ.get(STORE):
        if not DEFAULT_STORE.exists():
            raise UserError(f"no MLflow store: there is no {DEFAULT_STORE} here; give --tracking_uri, or set {STORE}")
        return sqlite_uri(DEFAULT_STORE.resolve())
    source = "--tracking_uri" if uri is not None else STORE
    store = taken(uri if uri is not None else os.environ[STORE], source)
    if store == "none":
        raise UserError(f"{source} none: names are looked up in a store; name one, or give folders of runs")
    check_tracking_uri(store, source)
    file = unquote(store.removeprefix("sqlite:///").partition("?")[0])
    if store.startswith("sqlite:///") and not Path(file).exists():  # MLflow would make it
        raise UserError(f"{source} {store}: there is no file {file}")
    return store


def _same(run: RecordedRun, other: RecordedRun) -> bool:
    if run.folder is not None and other.folder is not None:
        return run.folder == other.folder
    return run.run_id is not None and run.run_id == other.run_id
