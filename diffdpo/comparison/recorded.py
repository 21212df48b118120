"""A run as its record tells it, wherever that lies: what every table and curve of a comparison is made of."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffdpo.evaluation.estimate import Estimate

NOT_SETTINGS = frozenset(
    {
        "output_dir",
        "run_name",
        "experiment_name",
        "tracking_uri",
        "tracking_timeout",
        "report_to",
        "run_tags",
        "parent_run",
        "register_model",
        "resume_from_checkpoint",
        "save_steps",
        "save_minutes",
        "save_total_limit",
        "save_on_full_disk",
        "logging_steps",
        "stop_seconds",
        "hang_timeout",
        "data_cache_dir",
        "dataset_num_workers",
        "push_to_hub",
        "hub_model_id",
        "hub_private_repo",
        "hub_token",
    }
)
"""Settings that say where and how a run is recorded: what they are changes no result."""


@dataclass(frozen=True)
class Curve:
    """Values of a metric over steps; ``None`` where it was not finite."""

    steps: tuple[int, ...]
    values: tuple[float | None, ...]

    def finite(self) -> list[tuple[int, float]]:
        """The points that are numbers."""
        return [(s, v) for s, v in zip(self.steps, self.values, strict=True) if v is not None and math.isfinite(v)]


@dataclass(frozen=True)
class RecordedRun:
    """``params``: settings as text by name. ``asked``: names of those that a person changed. ``facts``: device, commit
    and such. ``after``: final held-out figures. ``items``: what can be used of ``held_out.json``. ``seconds`` is wall
    time, ``rate`` records a second. ``gaps``: what the record lacks, in words."""

    name: str
    place: str
    status: str
    params: Mapping[str, str]
    curves: Mapping[str, Curve]
    after: Mapping[str, Estimate]
    command: str = "train"
    folder: Path | None = None
    run_id: str | None = None
    asked: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    minutes: Curve = Curve((), ())
    items: Mapping[str, Any] | None = None
    steps: int = 0
    planned: int | None = None
    seconds: float | None = None
    rate: float | None = None
    memory: float | None = None
    gaps: tuple[str, ...] = ()

    def settings(self) -> dict[str, str]:
        """The settings that may change a result; the seed too."""
        return {key: value for key, value in self.params.items() if key not in NOT_SETTINGS}

    def count_of(self, metric: str) -> int:
        """Held-out items that a final figure is of; 0 where it is not known."""
        if metric in self.after and self.after[metric].count:
            return self.after[metric].count
        kept = {} if self.status == "running" else (self.items or {}).get("after", {})
        return len(kept.get(metric, ()))

    def best(self, metric: str) -> tuple[float, int] | None:
        """(best held-out value on the way or at the end, its step); None where it was never measured."""
        curve = self.curves.get(f"eval/{metric}")
        points = [] if curve is None else [(step, value) for step, value in curve.finite() if step > 0]
        if not points:
            return None
        step, value = (min if lower_is_better(metric) else max)(points, key=lambda point: point[1])
        return value, step


def lower_is_better(metric: str) -> bool:
    """Whether less of a held-out metric is better, judged by its name."""
    return any(word in metric for word in ("loss", "error", "perplexity", "bits"))


def labelled(runs: Sequence[RecordedRun]) -> list[RecordedRun]:
    """The runs under names that tell them apart: where two have one name, the end of their place is added."""
    named: list[RecordedRun] = []
    for run in runs:
        twins = [other for other in runs if other.name == run.name and other.place != run.place]
        tail = _distinct_tail(run.place, [twin.place for twin in twins]) if twins else ""
        named.append(replace(run, name=f"{run.name} ({tail})") if tail else run)
    return named


def _distinct_tail(place: str, others: Sequence[str]) -> str:
    parts = Path(place).parts
    for count in range(1, len(parts) + 1):
        tail = parts[-count:]
        if all(Path(other).parts[-count:] != tail for other in others):
            return "/".join(tail)
    return place


def curves_of(lines: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Curve], Curve]:
    """(curve of every metric, minutes since the start over steps) from lines {step, time, metric: value}; of a step
    that was written twice the later line counts."""
    points: dict[str, dict[int, float | None]] = {}
    times: dict[int, float] = {}
    for line in lines:
        step = line["step"]
        times[step] = line["time"]
        for key, value in line.items():
            if key not in ("step", "time") and (value is None or _is_number(value)):
                points.setdefault(key, {})[step] = None if value is None else float(value)
    start = min(times.values(), default=0.0)
    curves = {key: Curve(*_sorted(found)) for key, found in points.items()}
    return curves, Curve(*_sorted({step: (when - start) / 60 for step, when in times.items()}))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sorted(found: Mapping[int, Any]) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    steps = tuple(sorted(found))
    return steps, tuple(found[step] for step in steps)


def last_held_out(curves: Mapping[str, Curve]) -> dict[str, Estimate]:
    """The newest held-out means of a run that has not ended; their error bars are not known. NaN is one too."""
    found = {}
    for key, curve in curves.items():
        if key.startswith("eval/") and curve.steps[-1] > 0:  # that of step 0 is of before training
            mean = curve.values[-1]
            found[key.removeprefix("eval/")] = Estimate(math.nan if mean is None else mean, math.nan, 0)
    return found


def rate_of(curves: Mapping[str, Curve]) -> float | None:
    """Records a second over all steps but the first, which warms caches."""
    rates = next((curves[key].finite() for key in ("pairs_per_second", "answers_per_second") if key in curves), [])
    seconds = dict(curves["step_seconds"].finite()) if "step_seconds" in curves else {}
    usable = [(rate, seconds[step]) for step, rate in (rates[1:] or rates) if step in seconds]
    total = sum(spent for _, spent in usable)
    return sum(rate * spent for rate, spent in usable) / total if total else None


def peak_of(curves: Mapping[str, Curve]) -> float | None:
    """The largest ``peak_memory_gib`` so far."""
    return (
        max((value for _, value in curves["peak_memory_gib"].finite()), default=None)
        if "peak_memory_gib" in curves
        else None
    )
