"""The steps between two lines of the journal, and what the line says of them: means, rates, and where the time went."""

from collections.abc import Mapping, Sequence

from diffdpo.engine.clock import PHASES
from diffdpo.losses.metrics import means
from diffdpo.step.report import StepReport


class Window:
    """The steps since the last line of the journal."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []
        self.seconds, self.waited = 0.0, 0.0
        self.phases = dict.fromkeys(PHASES, 0.0)
        self.busy: list[float] = []  # of each rank

    def add(self, report: StepReport, seconds: float, waited: float, phases: Mapping[str, float]) -> None:
        """A step of this rank: all its seconds, those in which it waited for data, and seconds by phase."""
        self.reports.append(report)
        self.seconds += seconds
        self.waited += waited
        for name, spent in phases.items():
            self.phases[name] += spent

    def add_busy(self, seconds: Sequence[float]) -> None:
        """Each rank's seconds of a step in which it did not wait for others."""
        self.busy = [a + b for a, b in zip(self.busy or [0.0] * len(seconds), seconds, strict=True)]

    def metrics(self, unit: str, *, peak: float | None = None) -> dict[str, float]:
        """Means over the window; rates are of all ranks together. ``peak``: FLOP/s of all devices, where known."""
        count, last = len(self.reports), self.reports[-1]
        sums = {name: sum(report.sums[name] for report in self.reports) for name in last.sums}
        records = sum(report.records for report in self.reports)
        losses = [report.loss for report in self.reports if report.records]  # a step without records has none
        return {
            **({"loss": sum(losses) / len(losses)} if losses else {}),
            **({"loss/sft": last.sft_loss} if last.sft_loss is not None and last.records else {}),
            **({"kl/reference_point": last.reference_point} if last.reference_point is not None else {}),
            **({"router/balance_loss": last.router_balance} if last.router_balance is not None else {}),
            **means(sums),
            "noise/num_samples": sum(report.num_samples for report in self.reports) / count,
            "grad_norm": last.grad_norm,
            f"{unit}_per_second": records / self.seconds,
            "tokens_per_second": sum(report.tokens for report in self.reports) / self.seconds,
            "step_seconds": self.seconds / count,
            "data/padding_share": sum(r.padding_tokens for r in self.reports)
            / max(1, sum(r.computed_tokens for r in self.reports)),
            "data/empty_steps": count - len(losses),
            "memory/step_retries": sum(len(report.notes) for report in self.reports),
            "data_wait_share": self.waited / self.seconds,
            **self._times(peak),
        }

    def _times(self, peak: float | None) -> dict[str, float]:
        """Seconds of a step: by phase on this rank, and what the fastest and the slowest rank worked."""
        count = len(self.reports)
        other = max(0.0, self.seconds - sum(self.phases.values()))
        times = {f"time/{name}": spent / count for name, spent in {**self.phases, "other": other}.items()}
        if len(self.busy) > 1:
            slowest = max(range(len(self.busy)), key=self.busy.__getitem__)
            times |= {
                "time/fastest_rank": min(self.busy) / count,
                "time/slowest_rank": self.busy[slowest] / count,
                "time/slowest_rank_number": slowest,
            }
        flops = sum(report.flops for report in self.reports)
        if peak and flops:
            times["model_flops_utilisation"] = flops / self.seconds / peak
        return times
