"""What a run leaves and says at its end: ``summary.json``, the table, the final model's folder."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffdpo.evaluation.estimate import Estimate, paired_difference

TITLES = {
    "rewards/accuracies": "preference accuracy (reward margin above 0)",
    "rewards/margins": "reward margin",
    "scores/accuracies": "chosen likelier per token",
    "rewards/separation": "desirable above undesirable (AUC of the reward)",
    "rewards/chosen": "reward of desirable answers",
    "rewards/rejected": "reward of undesirable answers",
    "exact_match": "exact match of sampled answers",
}
PERCENT = ("rewards/accuracies", "scores/accuracies", "rewards/separation", "exact_match")
DIGITS = 3


@dataclass(frozen=True)
class Evaluation:
    """Held-out results of one moment: a value per item for each metric, items in a fixed order."""

    values: Mapping[str, list[float]]

    def estimates(self) -> dict[str, Estimate]:
        return {key: Estimate.of(values) for key, values in self.values.items()}

    def means(self) -> dict[str, float]:
        return {key: estimate.mean for key, estimate in self.estimates().items()}


def comparison(before: Evaluation, after: Evaluation) -> dict[str, dict[str, Any]]:
    """Per metric: before, after and the paired change, each {mean, stderr, count}."""
    return {
        key: {
            "before": asdict(Estimate.of(before.values[key])),
            "after": asdict(Estimate.of(after.values[key])),
            "change": asdict(paired_difference(before.values[key], after.values[key])),
        }
        for key in after.values
        if after.values[key] and len(before.values.get(key, ())) == len(after.values[key])
    }


def write_summary(output_dir: Path, summary: Mapping[str, Any]) -> Path:
    """``summary.json``, atomically."""
    path = output_dir / "summary.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(_finite(summary), indent=1, default=_plain))
    partial.replace(path)
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
        cells = [_cell(key, results[key][column]) for column in ("before", "after", "change")]
        table.add_row(f"{title} (n = {results[key]['after']['count']})", *cells)
    Console(width=None if Console().is_terminal else 120).print(table)


def titles(results: Mapping[str, Any]) -> dict[str, str]:
    """What is shown of the results, with its title; the held-out loss where there is nothing else (supervised runs)."""
    shown = TITLES if any(key in results for key in TITLES) else {"loss": "held-out loss, nats a token"}
    return {key: title for key, title in shown.items() if key in results}


def _cell(key: str, estimate: Mapping[str, float]) -> str:
    mean, stderr = estimate["mean"], estimate["stderr"]
    unknown = "± ?" if math.isnan(stderr) else None  # of a single item
    if key in PERCENT:
        return f"{100 * mean:.1f} {unknown or f'± {100 * stderr:.1f}'} %"
    return f"{mean:+.{DIGITS}f} {unknown or f'± {stderr:.{DIGITS}f}'}"


def model_card(base: str, config_text: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """README.md of ``final/``."""
    lines = [
        "---",
        "library_name: diffdpo",
        "pipeline_tag: text-generation",
        "tags: [diffusion-language-model, diffusion-dpo, preference-alignment]",
        "---",
        "",
        "# Masked diffusion language model aligned with Diffusion-DPO",
        "",
        f"Trained by diffdpo from {base}.",
        "",
        "| held out, mean ± standard error | before | after |",
        "|---|---|---|",
        *(
            f"| {title} | {_cell(key, results[key]['before'])} | {_cell(key, results[key]['after'])} |"
            for key, title in titles(results).items()
        ),
        "",
        "Load with `diffdpo.models.load.load_model(FOLDER)`.",
        "",
        "```yaml",
        config_text.strip(),
        "```",
        "",
    ]
    return "\n".join(lines)
