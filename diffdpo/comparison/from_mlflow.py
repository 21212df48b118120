"""Runs from an MLflow store, for who has not their folders."""

import math
import socket
import tempfile
from pathlib import Path
from typing import Any

from diffdpo.comparison.files import number_in, read_items, read_mapping
from diffdpo.comparison.from_folder import FACTS, INSTEAD, SUMMARY, command_of, estimates, facts_of, texts
from diffdpo.comparison.recorded import Curve, RecordedRun, curves_of, last_held_out, peak_of, rate_of
from diffdpo.errors import UserError
from diffdpo.evaluation.item_file import FILE as ITEMS
from diffdpo.settings.credentials import in_a_line
from diffdpo.tracking.journal import FILE as JOURNAL
from diffdpo.tracking.mlflow_run import client_of

STATES = {"FINISHED": "finished", "RUNNING": "running", "KILLED": "stopped", "FAILED": "failed", "SCHEDULED": "waiting"}
FILES = (SUMMARY, "config.yaml", "asked.yaml", "environment.json")
MOST = 200  # runs of one look-up
SWEEP, COMMAND, VERSION, PARENT = "diffdpo.sweep", "diffdpo.command", "diffdpo.version", "mlflow.parentRunId"  # tags


def by_name(uri: str, name: str) -> list[RecordedRun]:
    """The run of this id, all runs of this name, or those of the experiment of this name; of a sweep its runs.
    UserError for none, and for an evaluation, which is no run of training."""
    try:
        client = client_of(uri)
        run = client.get_run(name)
    except Exception as error:
        if not _is_absent(error):
            raise _told(uri, error) from None
    else:
        return _by_id(client, uri, run)
    found = [] if name.count("'") and name.count('"') else _of_name(uri, name)  # MLflow has no word for both
    found = found or search(uri, experiment=name, where=None, needed=False)
    if not found:
        raise UserError(f"{name} is neither a folder nor a run's id or name, nor an experiment, in {uri}")
    return found


def _by_id(client: Any, uri: str, run: Any) -> list[RecordedRun]:
    if COMMAND in run.data.tags:
        raise _no_training(run.info.run_id, run.data.tags[COMMAND])
    if SWEEP in run.data.tags:
        found = _children(uri, run.info.run_id)
        if not found:
            raise UserError(f"{run.info.run_id} is a sweep of which no run is in {uri} yet; give the sweep's folder")
        return found
    try:
        return [_read(client, uri, run)]
    except Exception as error:
        raise _told(uri, error) from None


def _no_training(name: str, command: str) -> UserError:
    return UserError(
        f"{name} is a run of `diffdpo {command}`, and compare sets runs of training beside each other; give their ids, "
        "names or folders"
    )


def _of_name(uri: str, name: str) -> list[RecordedRun]:
    quote = '"' if "'" in name else "'"
    where = f"attributes.run_name = {quote}{name}{quote}"
    return search(uri, experiment=None, where=where, needed=False, sweeps=True, name=name)


def _children(uri: str, parent: str) -> list[RecordedRun]:
    return search(uri, experiment=None, where=f"tags.`{PARENT}` = '{parent}'", needed=False)


def search(
    uri: str,
    *,
    experiment: str | None,
    where: str | None,
    needed: bool = True,
    sweeps: bool = False,
    name: str | None = None,
) -> list[RecordedRun]:
    """The runs of an experiment (of all, where None) that a filter lets through, oldest first. Evaluations and sweeps
    are no runs of training and are left out; with ``sweeps`` the runs of a sweep stand for it. ``name``: what the user
    asked for; UserError where only evaluations have it."""
    try:
        client = client_of(uri)
        known = client.search_experiments()
        chosen = [one.experiment_id for one in known if experiment is None or one.name == experiment]
        runs = (
            client.search_runs(chosen, where or "", max_results=MOST, order_by=["attributes.start_time ASC"])
            if chosen
            else []
        )
        parents = [run for run in runs if SWEEP in run.data.tags] if sweeps else []
        found = [_read(client, uri, run) for run in runs if not {SWEEP, COMMAND} & run.data.tags.keys()]
    except Exception as error:
        raise _told(uri, error) from None
    if getattr(runs, "token", None):
        raise UserError(f"more than {MOST} runs of {uri} fit {where or experiment}; narrow it down with --filter")
    for parent in parents:
        found += _children(uri, parent.info.run_id)
    commands = [run.data.tags[COMMAND] for run in runs if COMMAND in run.data.tags]
    if not found and commands and (needed or name is not None):
        raise _no_training(name or f"what fits {where or experiment}", commands[0])
    if not chosen and needed:
        raise UserError(f"--experiment_name {experiment}: {uri} has {', '.join(one.name for one in known)}")
    if not found and needed:
        raise UserError(f"no run of {uri} fits {where or experiment}")
    return found


def _is_absent(error: Exception) -> bool:
    return getattr(error, "error_code", None) in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def _told(uri: str, error: Exception) -> UserError:
    if _is_unreachable(uri, error):
        return UserError(f"{uri} does not answer; start that server, or name another store with --tracking_uri")
    return UserError(
        f"{uri} does not give what was asked for ({in_a_line(error)}); check the address, and --filter if given"
    )


def _is_unreachable(uri: str, error: BaseException) -> bool:
    """Whether an error comes from a connection that nobody took, which lies below it in the words of a library."""
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, ConnectionError | TimeoutError | socket.gaierror) and not uri.startswith("sqlite"):
            return True
        below = below.__cause__ or below.__context__
    return False


def _read(client: Any, uri: str, run: Any) -> RecordedRun:
    """One run: its points, and the files that it left with its end."""
    lines = [
        {"step": point.step, "time": point.timestamp / 1000, key: point.value if math.isfinite(point.value) else None}
        for key in run.data.metrics
        if not key.startswith("system/")
        for point in client.get_metric_history(run.info.run_id, key)
    ]
    curves, minutes = curves_of(lines)
    gaps = [] if curves else ["no point in MLflow"]
    with tempfile.TemporaryDirectory() as folder:
        fetched = _fetch(client, run.info.run_id, Path(folder), gaps)
        items = read_items(Path(folder), gaps)
    summary, config = fetched[SUMMARY], fetched["config.yaml"]
    if not config and VERSION in run.data.tags:  # parameters of others' runs are no settings
        config = dict(run.data.params)
    status, ended = STATES.get(run.info.status, run.info.status), run.info.end_time
    seconds, memory = (number_in(summary, name, SUMMARY, gaps) for name in ("seconds", "peak_memory_gib"))
    held_out = summary.get("held_out") if status == "finished" else None
    return RecordedRun(
        name=run.info.run_name or run.info.run_id,
        place=f"{run.info.run_id} in {uri}",
        status=status,
        params=texts(config),
        curves=curves,
        after=(estimates(held_out, "after") if isinstance(held_out, dict) else {}) or last_held_out(curves),
        command=command_of(config),
        run_id=run.info.run_id,
        asked=tuple(fetched["asked.yaml"]),
        facts=facts_of(fetched["environment.json"] or {key: run.data.params.get(key) for key in FACTS}),
        minutes=minutes,
        items=items,
        steps=max((line["step"] for line in lines), default=0),
        seconds=seconds or _seconds(run.info.start_time, ended, minutes),
        rate=rate_of(curves),
        memory=memory or peak_of(curves),
        gaps=tuple(gaps),
    )


def _seconds(started: int, ended: int | None, minutes: Curve) -> float | None:
    if ended:
        return (ended - started) / 1000
    return 60 * (minutes.values[-1] or 0.0) if minutes.values else None


def _fetch(client: Any, run_id: str, folder: Path, gaps: list[str]) -> dict[str, dict[str, Any]]:
    """The small files of a run, put into ``folder`` and parsed; {} for those that it has not (yet)."""
    there = {file.path for file in client.list_artifacts(run_id)}
    for name in there.intersection((*FILES, ITEMS)):
        try:
            client.download_artifacts(run_id, name, str(folder))
        except Exception as error:  # every kind of store fails in its own way
            gaps.append(f"{name} cannot be fetched ({in_a_line(error)})")
    instead = {SUMMARY: INSTEAD.replace(JOURNAL, "MLflow")}
    return {name: read_mapping(folder / name, gaps, needed=False, instead=instead.get(name, "")) for name in FILES}
