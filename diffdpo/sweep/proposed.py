"""Cells that Optuna proposes, each from the results of those before it; what it knows lies in the sweep's folder."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffdpo.comparison.from_folder import read_folder
from diffdpo.errors import UserError
from diffdpo.sweep.grid import Cell, Grid, Search, cell_of
from diffdpo.sweep.states import FOLDER, State, read_state
from diffdpo.tracking.mlflow_run import sqlite_uri

METRIC = "metric"  # attribute of the study: what its values are


class Proposed:
    """The study of a sweep. ``less``: whether less of the metric is better."""

    def __init__(self, grid: Grid, search: Search, folder: Path, *, less: bool):
        try:
            import optuna
        except ImportError:
            raise UserError("a sweep with optuna needs it: pip install 'diffdpo[optuna]'") from None
        self.optuna, self.grid, self.search, self.folder = optuna, grid, search, folder
        self.numbers: dict[str, list[int]] = {}  # trials by the cell's name; two may propose one cell
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        (folder / FOLDER).mkdir(exist_ok=True)
        self.study = self._study(
            study_name=grid.name,
            storage=sqlite_uri((folder / FOLDER / "optuna.db").resolve()),
            direction="minimize" if less else "maximize",
            sampler=optuna.samplers.TPESampler(seed=search.seed),
        )

    def _study(self, **options: Any) -> Any:
        """The study that lies there, or a new one. Where that was of another metric, its trials are begun again: they
        are told their values by this one, since Optuna keeps a study's direction and would mix the two."""
        study = self.optuna.create_study(**options, load_if_exists=True)
        if study.user_attrs.get(METRIC) == self.search.metric:
            return study
        if trials := study.get_trials():
            self.optuna.delete_study(study_name=options["study_name"], storage=options["storage"])
            study = self.optuna.create_study(**options)
        begun = self.optuna.trial.TrialState.RUNNING
        for one in trials:
            study.add_trial(
                self.optuna.trial.create_trial(state=begun, params=one.params, distributions=one.distributions)
            )
        study.set_user_attr(METRIC, self.search.metric)
        return study

    def known(self) -> Grid:
        """The sweep with all cells that have been proposed so far."""
        cells = {self._cell(trial.params).name: self._cell(trial.params) for trial in self.study.get_trials()}
        return replace(self.grid, cells=tuple(cells.values()))

    def cells(self) -> Iterator[Cell]:
        """Cells that were begun, then new ones; each is asked for when there is a place for it."""
        for trial in self.study.get_trials(states=[self.optuna.trial.TrialState.RUNNING]):
            yield from self._unless_finished(trial.number, trial.params)
        while len(self.study.get_trials()) < self.search.trials:
            new = self.study.ask(self._distributions())
            yield from self._unless_finished(new.number, new.params)

    def _unless_finished(self, number: int, params: dict[str, Any]) -> Iterator[Cell]:
        cell = self._cell(params)
        known = self.numbers.setdefault(cell.name, [])
        known.append(number)
        state = read_state(self.folder, cell)
        if state.word == "to do" and len(known) == 1:
            yield cell
        elif state.word != "to do":  # by another trial, or when the sweep was killed before it was told
            self.ended(cell, state)

    def ended(self, cell: Cell, state: State) -> None:
        """Tell the study what came of a cell; of one that was stopped nothing, it goes on. UserError, and nothing told,
        for a metric that was not measured: once it is corrected, the finished cell counts."""
        if state.word == "to do":
            return
        value = self._value(cell) if state.word == "finished" else None
        for number in self.numbers.pop(cell.name, []):
            if value is None:
                self.study.tell(number, state=self.optuna.trial.TrialState.FAIL)
            else:
                self.study.tell(number, value)

    def _value(self, cell: Cell) -> float | None:
        """The metric at the end; None where it is no number. UserError where the run has not measured it, nor any."""
        measured, name = read_folder(self.folder / cell.name).after, self.search.metric
        if name not in measured and not self.study.get_trials(states=[self.optuna.trial.TrialState.COMPLETE]):
            raise UserError(
                f"the metric of the search is {name!r}, which {cell.name} has not measured; it has "
                f"{', '.join(measured) or 'no held-out figures'}: name one in optuna: metric, or in --metric, and give "
                "the same command"
            )
        value = measured[name].mean if name in measured else math.nan
        return value if math.isfinite(value) else None

    def _cell(self, params: dict[str, Any]) -> Cell:
        rounded = {name: float(f"{v:.4g}") if isinstance(v, float) else v for name, v in params.items()}
        return cell_of(self.grid, rounded)

    def _distributions(self) -> dict[str, Any]:
        kinds = self.optuna.distributions
        made = {}
        for name, of in self.search.space.items():
            if isinstance(of, list):
                made[name] = kinds.CategoricalDistribution(of)
            else:
                whole = isinstance(of["low"], int) and isinstance(of["high"], int)
                made[name] = (kinds.IntDistribution if whole else kinds.FloatDistribution)(**of)
        return made
