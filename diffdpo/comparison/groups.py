"""What differs between runs, and which of them differ by their seed alone."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from diffdpo.comparison.recorded import RecordedRun
from diffdpo.evaluation.estimate import Estimate

ABSENT = "-"


def differing_settings(runs: Sequence[RecordedRun]) -> list[str]:
    """Names of settings, the seed aside, whose values differ: first those that a person changed in any run. Settings
    that only some runs have, of another command or version, are no difference."""
    everyone = [run.settings() for run in runs if run.params]
    names = [name for name in (everyone or [{}])[0] if name != "seed" and all(name in each for each in everyone)]
    differ = [name for name in names if len({settings[name] for settings in everyone}) > 1]
    asked = {name for run in runs for name in run.asked}
    return sorted(differ, key=lambda name: name not in asked)


def differing_facts(runs: Sequence[RecordedRun]) -> dict[str, list[str]]:
    """Device, commit, versions and data that differ: what else may explain a difference. A value a run."""
    names = list(dict.fromkeys(name for run in runs for name in run.facts))
    values = {name: [run.facts.get(name, ABSENT) for run in runs] for name in names}
    return {name: found for name, found in values.items() if len(set(found) - {ABSENT}) > 1}


@dataclass(frozen=True)
class Group:
    """Runs with the same settings but for the seed. Its figures are means over the seeds."""

    name: str
    runs: tuple[RecordedRun, ...]

    @property
    def first(self) -> RecordedRun:
        """Stands for the group where its settings are asked for."""
        return self.runs[0]

    @property
    def measured(self) -> tuple[RecordedRun, ...]:
        """The runs whose figures are averaged: the finished ones, where there are any."""
        return tuple(run for run in self.runs if run.status == "finished") or self.runs

    def counts_of(self, metric: str) -> list[int]:
        """Numbers of held-out items that the runs' figures are of, each once; those not known are left out."""
        return sorted({run.count_of(metric) for run in self.measured} - {0})

    @cached_property
    def after(self) -> dict[str, Estimate]:
        """Final held-out figures. Of several seeds: their mean and its standard error over seeds; of one run its own,
        over held-out items."""
        if len(self.measured) == 1:
            return dict(self.measured[0].after)
        names = dict.fromkeys(name for run in self.measured for name in run.after)
        found = {}
        for name in names:
            means = [run.after[name].mean for run in self.measured if name in run.after]
            finite = [mean for mean in means if math.isfinite(mean)]
            found[name] = Estimate.of(finite if len(finite) == len(means) else [math.nan])
        return found


def group_runs(runs: Sequence[RecordedRun]) -> list[Group]:
    """The runs, those that differ by their seed alone together, in the order of first mention. A second run of the same
    seed says nothing of seeds and is of another group."""
    found: dict[object, list[RecordedRun]] = {}
    for run in runs:
        settings = run.settings()
        seed = settings.pop("seed", None)
        same = (run.command, tuple(sorted(settings.items()))) if settings else run.place  # of settings unknown: alone
        times = sum(1 for number in range(len(runs)) if seed in _seeds(found.get((same, number), ())))
        found.setdefault((same, times), []).append(run)
    return [Group(_name_of(members), tuple(members)) for members in found.values()]


def _seeds(members: Sequence[RecordedRun]) -> list[str | None]:
    return [run.params.get("seed") for run in members]


def _name_of(members: Sequence[RecordedRun]) -> str:
    """What the names have in common, or else the first, and the seeds."""
    if len(members) == 1:
        return members[0].name
    common = members[0].name
    while not all(run.name.startswith(common) for run in members):
        common = common[:-1]
    common = re.sub(r"[-_ .=(/]*(s|seed)?[-_ .=(/]*$", "", common) or common.strip("-_ .=(/") or members[0].name
    return f"{common} (seeds {', '.join(run.params.get('seed', '?') for run in members)})"
