"""All that is measured on held-out data, before, during and after training."""

from collections.abc import Mapping, Sequence

from data_pipeline.batch import PairBatch
from diffdpo.engine.base import Engine
from diffdpo.evaluation.heldout_tasks import HeldOutTasks
from diffdpo.evaluation.items import record_names
from diffdpo.evaluation.preferences import answer_losses, score_held_out
from diffdpo.evaluation.result import Evaluation
from diffdpo.losses.options import LossOptions
from diffdpo.noise.options import NoiseOptions
from diffdpo.scores.reference import Reference, remembered
from diffdpo.scores.segments import Segments


class HeldOutPairs:
    """The held-out batches of this rank, pairs or single answers, with everything needed to judge a policy on them."""

    def __init__(
        self,
        engine: Engine,
        reference: Reference,
        noise: NoiseOptions,
        loss: LossOptions,
        batches: Sequence[PairBatch],
        tasks: HeldOutTasks,
        *,
        segments: Segments,
        max_length: int,
        moves: bool = False,
    ):
        """``moves``: the reference changes while the policy is trained."""
        self.engine, self.noise, self.loss = engine, noise, loss
        self.reference = reference if moves else remembered(reference, segments)
        self.batches, self.tasks = batches, tasks
        self.segments, self.max_length = segments, max_length

    def evaluate(self, when: str) -> Evaluation:
        """Pairs and tasks."""
        return Evaluation(self._values() | self.tasks.values(when))

    def quick(self) -> dict[str, float]:
        """Means over the pairs, which are cheap enough to measure during training; over the tasks too where a metric of
        theirs decides which model is the best."""
        tasks = self.tasks.values("so far") if self.tasks.decide else {}
        return Evaluation(self._values() | tasks).means()

    def names(self) -> Mapping[str, list[str]]:
        """The items of an evaluation, in the order of its values. Every rank calls."""
        counts = [batch.weight_B2.amax(1) for batch in self.batches]
        records = record_names(self.batches, counts, self.engine.world)
        return {"records": records, **self.tasks.items()}

    def _values(self) -> dict[str, list[float]]:
        if not self.batches:
            return {}
        table = score_held_out(
            self.engine,
            self.reference,
            self.batches,
            self.noise,
            self.loss,
            segments=self.segments,
            max_length=self.max_length,
        )
        return table.values(self.loss)


class HeldOutAnswers:
    """What supervised training measures: the loss of right answers, and sampled ones."""

    def __init__(
        self,
        engine: Engine,
        noise: NoiseOptions,
        batches: Sequence[PairBatch],
        tasks: HeldOutTasks,
        *,
        segments: Segments,
    ):
        self.engine, self.noise, self.batches = engine, noise, batches
        self.tasks, self.segments = tasks, segments

    def evaluate(self, when: str) -> Evaluation:
        """Losses and tasks."""
        return Evaluation(self._values() | self.tasks.values(when))

    def quick(self) -> dict[str, float]:
        """Mean loss, and the tasks: supervised runs are long, so this too can be afforded."""
        return Evaluation(self._values() | self.tasks.values("so far")).means()

    def names(self) -> Mapping[str, list[str]]:
        """The items of an evaluation, in the order of its values. Every rank calls."""
        counts = [batch.weight_B2[:, 0] for batch in self.batches]
        records = record_names(self.batches, counts, self.engine.world)
        return {"records": records, **self.tasks.items()}

    def _values(self) -> dict[str, list[float]]:
        if not self.batches:
            return {}
        losses = answer_losses(self.engine, self.batches, self.noise, segments=self.segments)
        return {"loss": losses}
