"""What a person sees of a run in MLflow beside its points: what was changed, its data, its answers, what it came to."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from diffdpo.evaluation.result import cell, titles
from diffdpo.evaluation.samples import read_samples

NOTE, CHANGED, TABLES = "mlflow.note.content", "changed", "mlflow.loggedArtifacts"
ANSWERS, VERDICT = "answers.json", "verdict.md"
NAMES = ("output_dir", "run_name", "run_tags", "experiment_name", "tracking_uri", "resume_from_checkpoint")
"""Settings that MLflow shows elsewhere, or that say nothing of a result."""
LONGEST = 4000  # of a tag, in characters


def send_description(client: Any, run_id: str | None, output_dir: Path) -> None:
    """The run's description: what a person changed, then the held-out table; and the first as the tag ``changed``."""
    changed = changed_settings(output_dir)
    if changed:
        client.set_tag(run_id, CHANGED, ", ".join(f"{key}={value}" for key, value in changed.items())[:LONGEST])
    if text := description(output_dir, changed):
        client.set_tag(run_id, NOTE, text[:LONGEST])


def changed_settings(output_dir: Path) -> dict[str, Any]:
    """What was asked for, where the run lies left out."""
    try:
        asked = yaml.safe_load((output_dir / "asked.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {key: value for key, value in asked.items() if key not in NAMES} if isinstance(asked, dict) else {}


def description(output_dir: Path, changed: Mapping[str, Any]) -> str:
    """Markdown; '' where there is nothing to tell. Of a sweep what its comparison says (``verdict.md``)."""
    if (output_dir / VERDICT).exists():
        return (output_dir / VERDICT).read_text()
    parts = []
    try:
        summary = json.loads((output_dir / "summary.json").read_text())
        held_out = {
            key: {moment: _numbers(figures) for moment, figures in moments.items()}
            for key, moments in summary["held_out"].items()
        }
        rows = "\n".join(
            f"| {title} (n = {held_out[key]['after']['count']:.0f}) | "
            + " | ".join(cell(key, held_out[key][moment]) for moment in ("before", "after", "change"))
            + " |"
            for key, title in titles(held_out).items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        rows = ""
    if rows:
        head = "| held out, mean ± standard error | before | after | change |\n|---|---|---|---|"
        parts.append(f"{head}\n{rows}")
    if changed:
        rows = "\n".join(f"| {key} | {value} |" for key, value in changed.items())
        parts.append(f"**Changed by hand**\n\n| setting | value |\n|---|---|\n{rows}")
    return "\n\n".join(parts)


def _numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    return {key: float("nan") if value is None else float(value) for key, value in figures.items()}


def send_answers(client: Any, run_id: str | None, output_dir: Path) -> None:
    """The sampled answers as a table that MLflow shows; sent whole each time, so that none is in it twice."""
    samples = read_samples(output_dir)
    if not samples:
        return
    columns = list(dict.fromkeys(key for sample in samples for key in sample))
    rows = [[sample.get(key) for key in columns] for sample in samples]
    client.log_text(run_id, json.dumps({"columns": columns, "data": rows}, ensure_ascii=False), ANSWERS)
    client.set_tag(run_id, TABLES, json.dumps([{"path": ANSWERS, "type": "table"}]))


def send_datasets(client: Any, run_id: str | None, datasets: Sequence[Mapping[str, str]]) -> None:
    """The run's data as MLflow's dataset inputs: name, fingerprint, number of records, and what it was used for."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = [
        DatasetInput(
            Dataset(
                name=one["name"],
                digest=one["digest"],
                source_type="local" if "://" not in one["source"] else "url",
                source=json.dumps({"uri": one["source"]}),
                profile=json.dumps({"num_rows": int(one["records"])}),
            ),
            [InputTag("mlflow.data.context", one["context"])],
        )
        for one in datasets
    ]
    if inputs:
        client.log_inputs(run_id, inputs)
