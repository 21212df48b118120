"""The tables of a comparison, as text for whatever shows them: a terminal, a page, a CSV file."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from diffdpo.comparison.groups import ABSENT, Group, differing_facts, differing_settings, group_runs
from diffdpo.comparison.paired import Difference, beyond_chance, differences, has_items
from diffdpo.comparison.recorded import RecordedRun, labelled, lower_is_better
from diffdpo.errors import UserError
from diffdpo.evaluation.estimate import Estimate
from diffdpo.evaluation.result import PERCENT, TASKS, TITLES

SHORT = {
    "rewards/accuracies": "preference accuracy",
    "rewards/margins": "reward margin",
    "scores/accuracies": "chosen likelier per token",
    "rewards/separation": "AUC of the reward",
    "exact_match": "exact match",
    "multiple_choice": "multiple choice",
    "loss": "held-out loss",
}
LONGEST = 28  # characters of a setting's value in a table
NO_VERDICT = ("rewards/chosen", "rewards/rejected")  # no direction is the better one


@dataclass(frozen=True)
class Table:
    """``rows`` are as long as ``columns``; the first column names the row. ``note`` is for the reader."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """Runs beside each other. ``metric`` is the one that the verdict goes by."""

    runs: tuple[RecordedRun, ...]
    groups: tuple[Group, ...]
    settings: tuple[str, ...]
    metrics: tuple[str, ...]
    metric: str | None
    baseline: Group
    differences: dict[str, list[Difference]]

    @property
    def others(self) -> list[Group]:
        """The groups that are set against the baseline, in the order of ``differences``."""
        return [group for group in self.groups if group is not self.baseline]


def compare(runs: Sequence[RecordedRun], *, baseline: str | None = None, metric: str | None = None) -> Comparison:
    """Set runs beside each other. ``baseline``: name of a run, by default the first; ``metric`` decides which is best,
    by default the first of the known ones that all have. UserError for a name that does not exist."""
    runs = labelled(runs)
    if not runs:
        raise UserError("there is no run to compare")
    groups = group_runs(runs)
    known = dict.fromkeys(name for group in groups for name in group.after)
    metrics = [name for name in TITLES if name in known]
    metrics += [name for name in known if name not in TITLES]
    if metric is not None and metric not in metrics:
        raise UserError(f"--metric {metric}: no run has it; there are {', '.join(metrics) or 'none'}")
    everywhere = [name for name in metrics if all(name in group.after for group in groups)]
    usable = [name for name in everywhere or metrics if name not in NO_VERDICT]
    base = _baseline(groups, baseline)
    others = [group for group in groups if group is not base]
    return Comparison(
        tuple(runs),
        tuple(groups),
        tuple(differing_settings(runs)),
        tuple(metrics),
        metric or (usable[0] if usable else None),
        base,
        differences(base, others, metrics),
    )


def _baseline(groups: Sequence[Group], name: str | None) -> Group:
    if name is None:
        return groups[0]
    for group in groups:
        if name == group.name or name in [run.name for run in group.runs]:
            return group
    raise UserError(f"--baseline {name}: no such run; there are {', '.join(group.name for group in groups)}")


def runs_table(found: Comparison, *, most: int | None = None) -> Table:
    """What differs, and what each run cost. ``most``: columns of settings; further ones are told in the note."""
    shown, rest = found.settings[:most], found.settings[len(found.settings[:most]) :]
    names = [*shown, *(["seed"] if len({run.params.get("seed") for run in found.runs}) > 1 else [])]
    columns = ("run", *names, "state", "steps", "records/s", "GiB", "time")
    rows = []
    for run in found.runs:
        values = [shortened(run.params.get(name, ABSENT)) for name in names]
        steps = f"{run.steps}/{run.planned}" if run.planned and run.planned != run.steps else str(run.steps)
        cost = (_number(run.rate, 1), _number(run.memory, 2), duration(run.seconds))
        rows.append((run.name, *values, run.status, steps, *cost))
    same = "" if found.settings else "No setting differs but the seed and where the runs lie. "
    return Table("What differs", columns, tuple(rows), (same + _also(found, rest)).strip())


def results_table(found: Comparison) -> Table:
    """Final held-out figures with error bars, and the best on the way."""
    shown = [name for name in found.metrics if name not in NO_VERDICT]
    columns = ("run", *(f"{title_of(name)}{' (less is better)' if lower_is_better(name) else ''}" for name in shown))
    counted = {name for name in shown if len({n for group in found.groups for n in group.counts_of(name)}) > 1}
    rows = []
    for group in found.groups:
        rows.append((group.name, *(_final_and_best(group, name) + _n(group, name, counted) for name in shown)))
    return Table(
        "Held out, at the end",
        columns,
        tuple(rows),
        "± is one standard error: over seeds where a row has several, else over held-out items (another seed may move "
        "a result by more). In brackets: the best on the way, and its step."
        + (" n: held-out items, where runs differ in their number." if counted else ""),
    )


def differences_table(found: Comparison) -> Table | None:
    """Paired differences from the baseline; None where there is nothing to set against it."""
    shown = [name for name in found.metrics if name not in NO_VERDICT]
    if not found.others or not shown:
        return None
    rows = []
    for index, group in enumerate(found.others):
        of = (found.baseline, group)
        rows.append((group.name, *(difference_cell(found.differences[name][index], of) for name in shown)))
    return Table(
        f"Difference from {found.baseline.name}, item by item",
        ("run", *(title_of(name) for name in shown)),
        tuple(rows),
        "On the held-out items that both have; p of a sign-flip test, corrected for the number of runs (Holm). "
        "* p < 0.05." + _no_baseline(found, shown),
    )


def _no_baseline(found: Comparison, shown: Sequence[str]) -> str:
    """Why no run is set against the baseline, where that is the baseline's own fault, and what to do."""
    base = found.baseline
    if any(has_items(base, name) for name in shown):
        return ""
    state = base.measured[0].status
    text = f" {base.name} ({state}) has no held-out results item by item, so nothing is set against it"
    usable = [group for group in found.others if any(has_items(group, name) for name in shown)]
    if len(usable) > 1:
        text += f"; --baseline {shlex.quote(usable[0].name)} sets the others against that run"
    return f"{text}."


def verdict(found: Comparison) -> list[str]:
    """What a stranger should take away, in sentences."""
    name = found.metric
    if name is None:
        return ["No run has a held-out figure, so none can be called better."]
    measured = [group for group in found.groups if name in group.after and math.isfinite(group.after[name].mean)]
    lines = []
    if len(measured) < len(found.groups):
        without = [group.name for group in found.groups if group not in measured]
        lines.append(f"No {title_of(name)} that is a number: {', '.join(without)}.")
    if not measured:
        return lines
    sign = -1 if lower_is_better(name) else 1
    best = max(measured, key=lambda group: sign * group.after[name].mean)
    alike = [group for group in measured if group.after[name].mean == best.after[name].mean]
    named = ", ".join(group.name for group in alike) + (" alike" if len(alike) > 1 else "")
    lines.insert(0, f"Best {title_of(name)}: {named}, {estimate_cell(name, best.after[name])}.")
    rivals = [group for group in measured if group not in alike]
    if rivals:
        second = max(rivals, key=lambda group: sign * group.after[name].mean)
        against = differences(second, [best], [name])[name][0]
        if against.change is None:
            reason = f" ({against.why_not})" if against.why_not else ""
            tail = f"whether the difference is more than chance cannot be said{reason}"
        else:
            sure = "more than chance" if beyond_chance(against) else "which may be chance"
            over = "item by item"
            if _of_some(against, (second, best)):
                over = f"over the {_items(against.change.count)} both have"
            tail = f"the difference {over} is {difference_cell(against)}, {sure}"
        lines.insert(1, f"Next is {second.name}, {estimate_cell(name, second.after[name])}: {tail}.")
    unfinished = [run.name for run in found.runs if run.status != "finished"]
    if unfinished:
        lines.append(
            f"Not finished: {', '.join(unfinished)}. Their figures, if any, are the newest on the way; where other "
            "seeds have finished, these alone are averaged."
        )
    return lines


def gaps(found: Comparison) -> list[str]:
    """What the runs' records lack."""
    return [f"{run.name}: {gap}" for run in found.runs for gap in run.gaps]


# ------------------------------------------------------------------------------------------------------ cells


def title_of(metric: str) -> str:
    """A metric for a heading; of several tasks of a kind, the kind and the task."""
    kind, _, task = metric.replace("@", "/", 1).partition("/")
    return SHORT.get(metric) or (f"{SHORT[kind]}, {task}" if kind in TASKS else metric)


def estimate_cell(metric: str, estimate: Estimate, *, signed: bool = False) -> str:
    """``95.3 ± 1.3 %``; without ± where the error is not known."""
    scale, unit, digits = (100.0, " %", 1) if metric.replace("@", "/").startswith(PERCENT) else (1.0, "", 3)
    if not math.isfinite(estimate.mean):
        return "not finite"
    mean = f"{scale * estimate.mean:{'+' if signed else ''}.{digits}f}"
    bar = f" ± {scale * estimate.stderr:.{digits}f}" if math.isfinite(estimate.stderr) else ""
    return mean + bar + unit


def difference_cell(difference: Difference, of: Sequence[Group] = ()) -> str:
    """``+2.3 ± 1.1 % (p 0.04) *``, or why there is none. ``of``: the two groups; where the difference is not of all
    their items, their number is told."""
    if difference.change is None or difference.p is None:
        return f"({difference.why_not})" if difference.why_not else ABSENT
    p = "p < 0.001" if difference.p < 0.001 else f"p {difference.p:.3f}"
    star = " *" if beyond_chance(difference) else ""
    n = f", n {difference.change.count}" if _of_some(difference, of) else ""
    return f"{estimate_cell(difference.metric, difference.change, signed=True)} ({p}{n}){star}"


def _of_some(difference: Difference, of: Sequence[Group]) -> bool:
    """Whether a difference is of other items than the groups' own figures are of."""
    counts = {count for group in of for count in group.counts_of(difference.metric)}
    return difference.change is not None and bool(counts - {difference.change.count})


def _items(count: int) -> str:
    return f"{count} item{'s' if count > 1 else ''}"


def _n(group: Group, metric: str, counted: set[str]) -> str:
    counts = group.counts_of(metric) if metric in counted else []
    return f" (n {', '.join(map(str, counts))})" if counts else ""


def _final_and_best(group: Group, metric: str) -> str:
    if metric not in group.after:
        return ABSENT
    cell = estimate_cell(metric, group.after[metric])
    best = group.measured[0].best(metric) if len(group.measured) == 1 else None
    if best is None or math.isclose(best[0], group.after[metric].mean, rel_tol=1e-6):
        return cell
    value, step = best
    return f"{cell} ({estimate_cell(metric, Estimate(value, math.nan, 0))} @ {step})"


def duration(seconds: float | None) -> str:
    """``1:02:03``."""
    if seconds is None:
        return ABSENT
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _number(value: float | None, digits: int) -> str:
    return ABSENT if value is None else f"{value:.{digits}f}"


def shortened(text: str) -> str:
    """The end of a long value: what differs in paths is mostly there."""
    return text if len(text) <= LONGEST else f"…{text[-LONGEST + 1 :]}"


def _also(found: Comparison, settings: Sequence[str]) -> str:
    differ = {name: [run.params.get(name, ABSENT) for run in found.runs] for name in settings}
    differ |= differing_facts(found.runs)
    if len({run.command for run in found.runs}) > 1:
        differ = {"command": [run.command for run in found.runs]} | differ
    if all(run.params.get("train_data") in (None, "None") for run in found.runs):
        differ.pop("data_fingerprint", None)  # generated: it follows from the settings and the seed
    words = [f"{name} ({', '.join(dict.fromkeys(map(shortened, values)))})" for name, values in differ.items()]
    return f"Also different: {'; '.join(words)}." if words else ""
