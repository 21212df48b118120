"""A run from its folder: ended or in progress, with a torn journal, with or without MLflow."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffdpo.comparison.files import number_in, read_items, read_mapping
from diffdpo.comparison.recorded import RecordedRun, curves_of, last_held_out, peak_of, rate_of
from diffdpo.evaluation.estimate import Estimate
from diffdpo.tracking import lock
from diffdpo.tracking.journal import FILE as JOURNAL
from diffdpo.tracking.journal import parsed
from diffdpo.tracking.mlflow_run import STATE_FILE

SUMMARY = "summary.json"
INSTEAD = f"; held-out figures are the newest of {JOURNAL}"  # of a run without a summary
FACTS = ("device", "processes", "dtype", "parameters", "trained_parameters", "data_fingerprint", "held_out_fingerprint")


def is_run(folder: Path) -> bool:
    """Whether a folder holds the record of a run."""
    recorded = all((folder / name).is_file() for name in ("config.yaml", "environment.json"))
    return recorded or (folder / JOURNAL).is_file()


def read_folder(folder: Path) -> RecordedRun:
    """The run in a folder. What its record lacks is told in ``gaps``; nothing of it stops a comparison."""
    gaps: list[str] = []
    lines = _lines(folder / JOURNAL, gaps)
    config = read_mapping(folder / "config.yaml", gaps)
    asked = read_mapping(folder / "asked.yaml", gaps, needed=False)
    environment = read_mapping(folder / "environment.json", gaps)
    shipped, running = read_mapping(folder / STATE_FILE, gaps, needed=False), lock.is_held(folder)
    # while a run is in progress, the summary is that of an earlier one in this folder
    summary = {} if running else read_mapping(folder / SUMMARY, gaps, needed=False, instead=INSTEAD)
    curves, minutes = curves_of(lines)
    after = _after(summary) or last_held_out(curves)
    if not after:
        gaps.append("no held-out figures")
    planned = number_in(config, "max_steps", "config.yaml", gaps)
    seconds, memory = (number_in(summary, name, SUMMARY, gaps) for name in ("seconds", "peak_memory_gib"))
    return RecordedRun(
        name=str(config.get("run_name") or summary.get("run_name") or shipped.get("run_name") or folder.resolve().name),
        place=str(folder),
        status=_status(running, (folder / SUMMARY).exists(), shipped),
        params=texts(config),
        curves=curves,
        after=after,
        command=command_of(config),
        folder=folder.resolve(),
        run_id=shipped.get("run_id"),
        asked=tuple(asked),
        facts=facts_of(environment),
        minutes=minutes,
        items=read_items(folder, gaps),
        steps=max((line["step"] for line in lines), default=0),
        planned=int(planned) if planned and planned > 0 else None,
        seconds=seconds or (60 * minutes.values[-1] if minutes.values else None),  # type: ignore[operator]
        rate=rate_of(curves),
        memory=memory or peak_of(curves),
        gaps=tuple(gaps),
    )


def _lines(path: Path, gaps: list[str]) -> list[dict[str, Any]]:
    """The lines of the journal that are whole."""
    try:
        raw = path.read_bytes()
    except OSError:
        raw = b""
    read = [parsed(line) for line in raw.splitlines(keepends=True)]
    lines = [line for line in read if line is not None]
    if len(lines) < len(read):
        gaps.append(f"{len(read) - len(lines)} of {len(read)} lines of {JOURNAL} are torn or damaged and left out")
    if not lines:
        gaps.append(f"no line of {JOURNAL}")
    return lines


def texts(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as text: the same from YAML, JSON and MLflow."""
    return {str(key): str(value) for key, value in settings.items()}


def facts_of(environment: Mapping[str, Any]) -> dict[str, str]:
    """What of ``environment.json`` may explain a difference."""
    facts = {key: str(environment[key]) for key in FACTS if environment.get(key) is not None}
    git, packages = environment.get("git"), environment.get("packages")
    if isinstance(git, Mapping):
        facts["commit"] = f"{str(git.get('commit'))[:9]}{' with changes' if git.get('dirty') else ''}"
    if isinstance(packages, Mapping):
        facts |= {name: str(packages[name]) for name in ("torch", "deepspeed", "transformers") if name in packages}
    return facts


def command_of(config: Mapping[str, Any]) -> str:
    """``train`` or ``sft``, by the settings that only one of them has."""
    return "sft" if "answer_canvas" in config else "train"


def estimates(held_out: Mapping[str, Any], moment: str) -> dict[str, Estimate]:
    """The figures of a moment in the ``held_out`` of a ``summary.json``; null is NaN."""
    found = {}
    for key, moments in held_out.items():
        try:
            mean, stderr, count = (moments[moment][part] for part in ("mean", "stderr", "count"))
            mean, stderr = (math.nan if value is None else float(value) for value in (mean, stderr))
            found[key] = Estimate(mean, stderr, int(count))
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
    return found


def _after(summary: Mapping[str, Any]) -> dict[str, Estimate]:
    held_out = summary.get("held_out")
    return estimates(held_out, "after") if isinstance(held_out, Mapping) else {}


def _status(running: bool, summarised: bool, shipped: Mapping[str, Any]) -> str:
    """``summarised``: a run that ends writes its summary, whatever has become of the file since."""
    if running:
        return "running"
    if summarised:
        return "finished"
    known = {"FINISHED": "finished", "KILLED": "stopped", "FAILED": "failed"}
    return known.get(str(shipped.get("status")), "broken off")
