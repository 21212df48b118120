"""What an evaluation tells: the JSON of ``--output`` and the table on the screen."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.files import whole_or_absent

PERCENT = ("accuracy", "exact_match", "auc", "calibration_error", "unfinished", "chance")
TITLES = {
    "accuracy": "right preferred",
    "accuracy_per_token": "right likelier per token",
    "accuracy_per_byte": "right likelier per byte",
    "margin": "margin",
    "auc": "AUC, right above wrong",
    "calibration_error": "expected calibration error",
    "perplexity": "perplexity, at most",
    "exact_match": "exact match",
    "unfinished": "answers without an end",
    "answer_tokens": "tokens an answer",
    "chance": "by chance",
}


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """The report, whole or not at all; what is not finite as null."""
    with whole_or_absent(path) as partial:
        partial.write_text(json.dumps(_plain(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_report(report: Mapping[str, Any]) -> None:
    """Figures of every model on every task, then how the models compare, then the breakdowns of a single model."""
    from rich.console import Console

    console = Console(width=None if Console().is_terminal else 120)
    console.print(_figures_table(report["results"]))
    for sampler in {json.dumps(each["sampler"]): each for each in report["results"] if "sampler" in each}.values():
        shown = ", ".join(f"{key} {value}" for key, value in sampler["sampler"].items() if value not in (None, False))
        console.print(f"sampler of {sampler['task_label']}: {shown}", highlight=False)
    if report["comparisons"]:
        console.print(_comparison_table(report["comparisons"]))
    if len(report["results"]) == 1:
        for key in ("by_length", "by_longer_side", "by_source"):
            groups = report["results"][0]["figures"].get(key) or {}
            if len(groups) > 1:
                told = ", ".join(
                    f"{name}: {cell('accuracy', each)} (n = {each['count']})" for name, each in groups.items()
                )
                console.print(f"{key.replace('_', ' ')}   {told}", highlight=False)


def _figures_table(results: Sequence[Mapping[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title="mean ± standard error [95 % interval]", title_justify="left")
    for header in ("model", "task", ""):
        table.add_column(header)
    table.add_column("", justify="right")
    table.add_column("n", justify="right")
    before: tuple[str, str] = ("", "")
    for result in results:
        for key, title in TITLES.items():
            if (figure := result["figures"].get(key)) is None:
                continue
            own = (result["label"], result["task_label"])
            shown = own if own != before else ("", "")
            table.add_row(*shown, title, cell(key, figure), str(figure["count"]))
            before = own
    return table


def _comparison_table(comparisons: Sequence[Mapping[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title="on the same items, against the first", title_justify="left")
    for header in ("model", "against", "task"):
        table.add_column(header)
    for header in ("win", "tie", "lose", "p (sign test)", "change"):
        table.add_column(header, justify="right")
    for each in comparisons:
        change = each["change"]
        stderr = "?" if math.isnan(change["stderr"]) else f"{change['stderr']:.3f}"
        table.add_row(
            *(each[key] for key in ("label", "against", "task_label")),
            *(str(each[key]) for key in ("win", "tie", "lose")),
            f"{each['p_value']:.3g}",
            f"{change['mean']:+.3f} ± {stderr}",
        )
    return table


def cell(key: str, figure: Mapping[str, Any]) -> str:
    """A figure as text: percent where it is a share."""
    percent = key in PERCENT or key.startswith("accuracy")
    scale, unit = (100.0, " %") if percent else (1.0, "")
    digits = 1 if percent else 3

    def number(value: float) -> str:
        return f"{scale * value:.{digits}f}"

    text = number(figure["mean"])
    if figure.get("stderr") is not None:
        text += f" ± {number(figure['stderr'])}"
    if figure.get("low") is not None:
        text += f" [{number(figure['low'])}, {number(figure['high'])}]"
    return text + unit
